"""Checkpoints to weight files: the tensors that a graph takes, in the layout that it wants, one at a time in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from export.trace import Graph, WeightSlot
from flux2_trt.errors import CheckpointError
from flux2_trt.naming import Family
from flux2_trt.spec import Component

FAMILY_OF: Mapping[Component, Family] = {
    "text_encoder": "text_encoder",
    "conditioning": "transformer",
    "transformer": "transformer",
    "vae_encoder": "autoencoder",
    "vae_decoder": "autoencoder",
}
SAFETENSORS_DTYPES = {"float": ("F32", 4)}
HEADER_ALIGNMENT = 64


class TensorSource(Protocol):
    """Anything that gives canonical tensors by name as fp32: a checkpoint, or random values."""

    def read(self, name: str) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class RandomSource:
    """Synthetic weights of a seed, scaled so that activations keep their size; each depends on its name alone."""

    seed: int
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> NDArray[np.float32]:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith((".bias", ".running_mean")) else 1.0, np.float32)
        words = np.frombuffer(name.encode().ljust(-(-len(name.encode()) // 4) * 4, b"\0"), np.uint32)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *words.tolist()])))
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(math.prod(shape[1:]) ** -0.5)


def write_weights(graph: Graph, source: TensorSource, path: Path) -> dict[str, tuple[int, int]]:
    """Write the weights of `graph` to a safetensors file; returns byte offset and length of each in the file.

    Raises CheckpointError where a tensor has not the shape that the graph takes, or is not finite.
    """
    spans, header = _layout(graph.weights)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, slot in graph.weights.items():
            file.write(_arranged(name, slot, source.read(name)).data)
    return spans


def place_external(graph: Graph, spans: Mapping[str, tuple[int, int]], file_name: str) -> onnx.ModelProto:
    """The graph with its weight inputs as constants whose data are in the weight file `file_name`."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for index in reversed(range(len(model.graph.input))):
        value = model.graph.input[index]
        if value.name not in graph.weights:
            continue
        offset, length = spans[value.name]
        tensor = model.graph.initializer.add()
        tensor.name = value.name
        tensor.data_type = value.type.tensor_type.elem_type
        tensor.dims.extend(graph.weights[value.name].shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", file_name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)
        del model.graph.input[index]
    return model


def _layout(weights: Mapping[str, WeightSlot]) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Where each tensor lies in the file, and the file's JSON header."""
    entries, places, position = {}, {}, 0
    for name, slot in weights.items():
        dtype, item_bytes = SAFETENSORS_DTYPES[slot.dtype]
        length = math.prod(slot.shape) * item_bytes
        entries[name] = {"dtype": dtype, "shape": list(slot.shape), "data_offsets": [position, position + length]}
        places[name] = (position, length)
        position += length
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-(len(header) + 8) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8)
    start = len(header) + 8
    return {name: (start + first, length) for name, (first, length) in places.items()}, header


def _arranged(name: str, slot: WeightSlot, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    arranged = np.ascontiguousarray(tensor.T if slot.transposed else tensor)
    if arranged.shape != slot.shape:
        raise CheckpointError(f"{name} has shape {list(arranged.shape)}; the graph takes {list(slot.shape)}")
    if not np.isfinite(arranged).all():
        raise CheckpointError(f"{name} holds NaN or infinity; download the checkpoint again")
    return arranged
