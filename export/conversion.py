"""Conversion: one weight, from a few rows of its source at a time to all that a file holds of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from export.graph import Graph, Slots, WeightSlot
from export.quantize import FP8_DTYPE, INT4_DTYPE, NVFP4_DTYPE, NVFP4_MAX, block_scale_name
from export.rounding import fp8_codes, fp8_scale, int4_codes, nvfp4_codes
from export.tensor_source import TensorSource
from flux2_trt.errors import CheckpointError
from flux2_trt.tensor_file import VALUES_AT_ONCE

STORED_DTYPES: Mapping[str, tuple[str, int, torch.dtype]] = {
    "float": ("F32", 32, torch.float32),
    "bfloat16": ("BF16", 16, torch.bfloat16),
    FP8_DTYPE: ("F8_E4M3", 8, torch.float8_e4m3fn),
    NVFP4_DTYPE: ("F4", 4, torch.uint8),
    INT4_DTYPE: ("U8", 4, torch.uint8),  # safetensors has no 4-bit integers: two in a byte
}
"""By the dtype of a slot: safetensors' name, the bits of an element, and the dtype of what torch writes."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By size: torch moves these about faster than floats of 8 and 16 bits."""
ROW_MULTIPLE = 64  # whole cache lines where rows become columns, and whole bytes of 4-bit codes


@dataclass(frozen=True)
class Scales:
    """FP8 scales by the names of weights.

    `inputs`: of what a weight is multiplied with, its largest magnitude over 448. `weights`: of weights whose codes a
    checkpoint has already, so that they stay the same; all others get amax / 448.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def without_weights(self, changed: Collection[str]) -> Scales:
        """For other values of these weights, whose scales come from them again; those of inputs stay."""
        return replace(self, weights={name: scale for name, scale in self.weights.items() if name not in changed})


NO_SCALES = Scales()


class Converter:
    """Converts the weights of a graph, each to `parts`: the tensors of the file that follow from it.

    Linears that share an input take the largest of their input scales. Raises CheckpointError where a linear has no
    input scale, or a tensor not the shape that the graph takes.
    """

    def __init__(self, graph: Graph | Slots, source: TensorSource, scales: Scales) -> None:
        self.graph, self.source, self.scales = graph, source, scales
        self.slots = {
            **graph.weights,
            **{n: WeightSlot(s.shape, s.dtype, transposed=False) for n, s in graph.scales.items()},
        }
        self.parts: dict[str, list[str]] = {name: [name] for name in graph.weights}
        self.input_scales: dict[str, float] = {}
        for name, scale in graph.scales.items():
            if scale.kind != "quantize":
                self.parts[scale.weights[0]].append(name)
                continue
            if missing := [weight for weight in scale.weights if weight not in scales.inputs]:
                raise CheckpointError(f"{missing[0]} has no input scale; calibrate the model, or build it in bf16")
            shared = max(scales.inputs[weight] for weight in scale.weights)
            self.input_scales |= {w: shared / (NVFP4_MAX if self._is(w, NVFP4_DTYPE) else 1) for w in scale.weights}
        for name, slot in graph.weights.items():
            shape = source.shape(name)
            shape = tuple(reversed(shape)) if slot.transposed else shape
            if shape != slot.shape:
                raise CheckpointError(f"{name} has shape {list(shape)}; the graph takes {list(slot.shape)}")

    def input_factors(self) -> dict[str, torch.Tensor]:
        """The scales that follow from no weight, fp32 [1]."""
        scales = {name: scale for name, scale in self.graph.scales.items() if scale.kind == "quantize"}
        return {name: torch.tensor([1 / self.input_scales[scale.weights[0]]]) for name, scale in scales.items()}

    def convert(self, name: str) -> dict[str, torch.Tensor]:
        """The parts of a weight in the layout of the file, with integers for elements of 8 and 16 bits.

        Raises CheckpointError where a value is not finite.
        """
        rows, axis = self.source.shape(name)[0], int(self.graph.weights[name].transposed)
        scale = self._scale(name)
        parts: dict[str, torch.Tensor] = {}
        for part in self.parts[name]:
            if part in self.graph.scales and self.graph.scales[part].kind == "dequantize":
                assert scale is not None
                parts[part] = torch.tensor([self.input_scales[name] * scale])
            else:
                parts[part] = self._empty(self.slots[part])
        step = max(VALUES_AT_ONCE // math.prod(self.source.shape(name)[1:]) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        for first in range(0, rows, step):
            values = torch.from_numpy(self.source.read(name, first, first + step))
            for part, stored in self._stored(name, values, scale).items():
                whole = parts[part]
                place = whole.narrow(axis, first * whole.shape[axis] // rows, stored.shape[axis])
                place.copy_(stored.view(whole.dtype))
        return parts

    def _is(self, name: str, dtype: str) -> bool:
        return self.graph.weights[name].dtype == dtype

    def _scale(self, name: str) -> float | None:
        """Of the whole weight; None where its format has none. Raises CheckpointError where a value is not finite."""
        largest = self.source.largest(name)
        if not math.isfinite(largest):
            raise CheckpointError(f"{name} holds NaN or infinity; download the checkpoint again")
        if self._is(name, NVFP4_DTYPE):
            return fp8_scale(largest) / NVFP4_MAX
        return self.scales.weights.get(name, fp8_scale(largest)) if self._is(name, FP8_DTYPE) else None

    def _stored(self, name: str, values: torch.Tensor, scale: float | None) -> dict[str, torch.Tensor]:
        """The parts of some rows, which are along dimension 1 where the weight is transposed."""
        slot, block = self.graph.weights[name], block_scale_name(name)
        dtype = STORED_DTYPES[slot.dtype][2]
        if slot.dtype == INT4_DTYPE:
            codes, block_scales = int4_codes(values, STORED_DTYPES[self.slots[block].dtype][2])
            return {name: codes, block: block_scales}
        if slot.dtype == NVFP4_DTYPE:
            assert scale is not None
            codes, block_scales = nvfp4_codes(values, scale)
            return {name: codes, block: block_scales}
        stored = values.to(dtype) if scale is None else fp8_codes(values, scale)
        return {name: stored.view(INTEGERS[dtype.itemsize]).T.contiguous() if slot.transposed else stored}

    @staticmethod
    def _empty(slot: WeightSlot) -> torch.Tensor:
        _, bits, dtype = STORED_DTYPES[slot.dtype]
        *sides, columns = slot.shape
        return torch.empty(*sides, columns * bits // 8 // dtype.itemsize, dtype=INTEGERS[dtype.itemsize])
