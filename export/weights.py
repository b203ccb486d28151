"""Checkpoints to weight files: the tensors that a graph takes, in the layout that it wants, one at a time in memory.

FP8 weights are rounded to nearest even at the scale amax / 448, one a tensor (OCP 8-bit floating point, E4M3). NVFP4
weights have an fp32 scale amax / (448 * 6) and for 16 values along K an E4M3 scale, their largest / 6 in units of the
former; even columns are in the low bits of a byte, as ONNX and PyTorch pack them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.graph import Graph, WeightSlot
from export.quantize import (
    FP8_DTYPE,
    FP8_MAX,
    INT4_BLOCK,
    INT4_DTYPE,
    INT4_MAX,
    NVFP4_DTYPE,
    NVFP4_MAX,
    block_scale_name,
)
from flux2_trt.errors import CheckpointError
from flux2_trt.naming import Family
from flux2_trt.quantized import E2M1, NVFP4_BLOCK
from flux2_trt.spec import Component

FAMILY_OF: Mapping[Component, Family] = {
    "text_encoder": "text_encoder",
    "conditioning": "transformer",
    "transformer": "transformer",
    "vae_encoder": "autoencoder",
    "vae_decoder": "autoencoder",
}
STORED_DTYPES: Mapping[str, tuple[str, int, torch.dtype]] = {
    "float": ("F32", 32, torch.float32),
    "bfloat16": ("BF16", 16, torch.bfloat16),
    FP8_DTYPE: ("F8_E4M3", 8, torch.float8_e4m3fn),
    NVFP4_DTYPE: ("F4", 4, torch.uint8),
    INT4_DTYPE: ("U8", 4, torch.uint8),  # safetensors has no 4-bit integers: two in a byte
}
"""By the dtype of a slot: safetensors' name, the bits of an element, and the dtype of what torch writes."""
# Half way between neighbours; a tie goes to the even code, so the boundaries above odd ones lie just below it.
E2M1_BOUNDARIES = torch.from_numpy((E2M1[1:] + E2M1[:-1]) / 2)
E2M1_BOUNDARIES[1::2] = torch.nextafter(E2M1_BOUNDARIES[1::2], torch.zeros(3))
ROWS_AT_ONCE = 1024
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # its reciprocal is finite
HEADER_ALIGNMENT = 64


class TensorSource(Protocol):
    """Anything that gives canonical tensors by name as fp32: a checkpoint, or random values."""

    def read(self, name: str) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Scales:
    """FP8 scales by the names of weights.

    `inputs`: of what a weight is multiplied with, its largest magnitude over 448. `weights`: of weights whose codes a
    checkpoint has already, so that they stay the same; all others get amax / 448.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


NO_SCALES = Scales()


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


def write_weights(
    graph: Graph, source: TensorSource, path: Path, scales: Scales = NO_SCALES
) -> dict[str, tuple[int, int]]:
    """Write the weights and scales of `graph` to a safetensors file; returns byte offset and length of each in it.

    Linears that share an input take the largest of their input scales. Raises CheckpointError where a tensor has not
    the shape that the graph takes, is not finite, or has no input scale.
    """
    slots = {**graph.weights, **{n: WeightSlot(s.shape, s.dtype, transposed=False) for n, s in graph.scales.items()}}
    inputs = _shared_input_scales(graph, scales.inputs)
    spans, header = _layout(slots)
    weight_scales: dict[str, float] = {}

    def put(name: str, stored: torch.Tensor) -> None:
        file.seek(spans[name][0])
        file.write(stored.view(torch.uint8).numpy().data)

    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, slot in graph.weights.items():
            values = _checked(name, slot, source.read(name))
            if slot.dtype == NVFP4_DTYPE:
                weight_scales[name] = fp8_scale(values) / NVFP4_MAX
                codes, block_scales = nvfp4_codes(values, weight_scales[name])
                put(name, codes)
                put(block_scale_name(name), block_scales)
                continue
            if slot.dtype == INT4_DTYPE:
                codes, block_scales = int4_codes(values, STORED_DTYPES[slots[block_scale_name(name)].dtype][2])
                put(name, codes)
                put(block_scale_name(name), block_scales)
                continue
            if slot.dtype == FP8_DTYPE:
                weight_scales[name] = scales.weights.get(name) or fp8_scale(values)
            put(name, _stored(values, slot, weight_scales.get(name)))
        for name, scale in graph.scales.items():
            if scale.kind == "block":
                continue
            weight = scale.weights[0]
            input_scale = inputs[weight] / (NVFP4_MAX if graph.weights[weight].dtype == NVFP4_DTYPE else 1)
            factor = 1 / input_scale if scale.kind == "quantize" else input_scale * weight_scales[weight]
            put(name, torch.tensor([factor]))
    return spans


def nvfp4_codes(values: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K/2], two in a byte, and block scales float8_e4m3fn [N, K/16] of `values` fp32 [N, K]."""
    rows, columns = values.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    block_scales = torch.empty(rows, columns // NVFP4_BLOCK, dtype=torch.float8_e4m3fn)
    parts = (tensor.split(ROWS_AT_ONCE) for tensor in (values, codes, block_scales))
    for part, part_codes, part_scales in zip(*parts, strict=True):
        blocks = part.unflatten(1, (-1, NVFP4_BLOCK))
        part_scales.copy_((blocks.abs().amax(dim=-1) / NVFP4_MAX / scale).clamp_(max=FP8_MAX))
        steps = part_scales.float().mul_(scale)[..., None]
        quotients = torch.where(steps > 0, blocks / steps, 0.0).flatten(1)
        found = torch.bucketize(quotients.abs(), E2M1_BOUNDARIES, out_int32=True).to(torch.uint8)
        found |= (quotients < 0).to(torch.uint8) << 3
        part_codes.copy_(found[:, 0::2] | (found[:, 1::2] << 4))
    return codes, block_scales


def int4_codes(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `values` fp32 [N, K] codes uint8 [K, N/2], two in a byte, and block scales [K/64, N] in `dtype`."""
    rows, columns = values.shape
    codes = torch.empty(columns, rows // 2, dtype=torch.uint8)
    block_scales = torch.empty(columns // INT4_BLOCK, rows, dtype=dtype)
    for first in range(0, rows, ROWS_AT_ONCE):
        blocks = values[first : first + ROWS_AT_ONCE].unflatten(1, (-1, INT4_BLOCK))
        scales = (blocks.abs().amax(dim=-1) / INT4_MAX).to(dtype)
        steps = scales.float()[..., None]
        found = torch.where(steps > 0, blocks / steps, 0.0).round_().clamp_(-INT4_MAX - 1, INT4_MAX).flatten(1)
        found = (found.to(torch.int8) & 15).to(torch.uint8).T
        codes[:, first // 2 : (first + ROWS_AT_ONCE) // 2] = found[:, 0::2] | (found[:, 1::2] << 4)
        block_scales[:, first : first + ROWS_AT_ONCE] = scales.T
    return codes, block_scales


def fp8_scale(values: torch.Tensor) -> float:
    """amax / 448 in fp32; the smallest normal number where that is less, as for a tensor of zeros."""
    return max(*(abs(float(value)) / FP8_MAX for value in values.aminmax()), SMALLEST_SCALE)


def _shared_input_scales(graph: Graph, input_scales: Mapping[str, float]) -> dict[str, float]:
    shared: dict[str, float] = {}
    for scale in graph.scales.values():
        if scale.kind == "quantize":
            missing = [name for name in scale.weights if name not in input_scales]
            if missing:
                raise CheckpointError(f"{missing[0]} has no input scale; calibrate the model, or build it in bf16")
            shared |= dict.fromkeys(scale.weights, max(input_scales[name] for name in scale.weights))
    return shared


def read_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Byte offset and length of every tensor in a weight file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    start = 8 + length
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    return {name: (start + first, last - first) for name, (first, last) in offsets.items()}


def place_external(graph: Graph, spans: Mapping[str, tuple[int, int]], file_name: str) -> onnx.ModelProto:
    """The graph with its weights and scales as constants whose data are in the weight file `file_name`."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for index in reversed(range(len(model.graph.input))):
        value = model.graph.input[index]
        if value.name not in spans:
            continue
        offset, length = spans[value.name]
        tensor = model.graph.initializer.add()
        tensor.name = value.name
        tensor.data_type = value.type.tensor_type.elem_type
        tensor.dims.extend(side.dim_value for side in value.type.tensor_type.shape.dim)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", file_name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)
        del model.graph.input[index]
    return model


def _layout(weights: Mapping[str, WeightSlot]) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Where each tensor lies in the file, those of wide elements first, and the file's JSON header."""
    entries, places, position = {}, {}, 0
    for name, slot in sorted(weights.items(), key=lambda item: -STORED_DTYPES[item[1].dtype][1]):
        dtype, bits, _ = STORED_DTYPES[slot.dtype]
        length = math.prod(slot.shape) * bits // 8
        *rows, columns = slot.shape
        shape = [*rows, columns // 2 if slot.dtype == INT4_DTYPE else columns]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        places[name] = (position, length)
        position += length
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-(len(header) + 8) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8)
    start = len(header) + 8
    return {name: (start + first, length) for name, (first, length) in places.items()}, header


def _checked(name: str, slot: WeightSlot, tensor: NDArray[np.float32]) -> torch.Tensor:
    shape = tuple(reversed(tensor.shape)) if slot.transposed else tensor.shape
    if shape != slot.shape:
        raise CheckpointError(f"{name} has shape {list(shape)}; the graph takes {list(slot.shape)}")
    values = torch.from_numpy(tensor)
    if not all(math.isfinite(value) for value in values.aminmax()):
        raise CheckpointError(f"{name} holds NaN or infinity; download the checkpoint again")
    return values


def _stored(values: torch.Tensor, slot: WeightSlot, scale: float | None) -> torch.Tensor:
    """`values` in the dtype and layout of the slot; the only other copy in memory is in that dtype."""
    stored = torch.empty(values.shape, dtype=STORED_DTYPES[slot.dtype][2])
    for target, part in zip(stored.split(ROWS_AT_ONCE), values.split(ROWS_AT_ONCE), strict=True):
        # A quotient may round up past 448, which FP8 turns into NaN.
        target.copy_(part if scale is None else (part / scale).clamp_(-FP8_MAX, FP8_MAX))
    if not slot.transposed:
        return stored
    elements = stored.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[stored.itemsize])
    return elements.T.contiguous()
