"""Weights of real size for measuring: random numbers that are made once and repeated.

They have the distribution, the formats and the layouts of a model's; a value comes again every four million, and in
every block, which no kernel knows of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from engines.calibration import SYNTHETIC_INPUT_SCALE
from export.conversion import STORED_DTYPES
from export.graph import Graph, ScaleSlot, WeightSlot
from export.quantize import FP8_DTYPE, FP8_MAX
from flux2_trt.bundle import Bundle
from flux2_trt.errors import UsageError
from flux2_trt.manifest import ComponentRecord
from flux2_trt.runtime.weights import WeightSource
from flux2_trt.spec import TransformerSpec

POOL = 2**22
WIDEST = 5.0
"""Standard deviations that an FP8 weight's largest value lies away."""
_BLOCK = re.compile(r"(double|single)_blocks\.0\.")


def random_weights(bundle: Bundle, record: ComponentRecord) -> WeightSource:
    """For a component of a bundle whose plans are graphs, one plan or all of its parts."""
    whole = record.name.partition(".")[0]
    graphs = [
        Graph.from_bytes(bundle.plan_path(each.name).read_bytes())
        for each in bundle.manifest.components
        if each.name.partition(".")[0] == whole
    ]
    return RandomWeights(graphs, bundle.manifest.model.transformer if len(graphs) > 1 else None)


class RandomWeights:
    """A `WeightSource` for graphs; `blocks`: of a model whose graphs have only the first block of each kind.

    Raises UsageError for a format that is not made up here.
    """

    def __init__(self, graphs: list[Graph], blocks: TransformerSpec | None, seed: int = 0) -> None:
        self._slots: dict[str, WeightSlot | ScaleSlot] = {}
        for graph in graphs:
            self._slots |= {**graph.weights, **graph.scales}
        self._weights = {name: slot for name, slot in self._slots.items() if isinstance(slot, WeightSlot)}
        self._normal = np.random.default_rng(seed).standard_normal(POOL, np.float32)
        self._made: dict[tuple[str, float], NDArray[np.uint8]] = {}
        self._full: dict[str, NDArray[np.uint8]] = {}
        self._first: dict[str, str] = {}
        for name in self._slots:
            counts: Mapping[str, int] = {}
            if blocks:
                counts = {"double": blocks.num_double_blocks, "single": blocks.num_single_blocks}
            match = _BLOCK.match(name)
            numbers = range(counts[match[1]]) if match and counts else (None,)
            for number in numbers:
                full = name if number is None else name.replace(".0.", f".{number}.", 1)
                self._first[full] = name
        self.sizes = {name: self._bytes(first) for name, first in self._first.items()}

    def read(self, name: str) -> NDArray[np.uint8]:
        first = self._first[name]
        if first not in self._full:
            self._full[first] = self._values(first)
        return self._full[first]

    def _values(self, name: str) -> NDArray[np.uint8]:
        slot = self._slots[name]
        if isinstance(slot, ScaleSlot):
            return np.array([self._scale(slot)], np.float32).view(np.uint8)
        if len(slot.shape) == 1:
            value = 0.0 if name.endswith((".bias", ".running_mean")) else 1.0
            return np.resize(self._stored(slot.dtype, np.array([value], np.float32)), self.sizes[name])
        key = (slot.dtype, 1.0 if slot.dtype == FP8_DTYPE else self._deviation(slot))
        if key not in self._made:
            deviation = FP8_MAX / WIDEST if slot.dtype == FP8_DTYPE else key[1]
            self._made[key] = self._stored(slot.dtype, self._normal * np.float32(deviation))
        return np.resize(self._made[key], self.sizes[name])

    def check(self) -> None:
        pass

    def _bytes(self, name: str) -> int:
        slot = self._slots[name]
        return math.prod(slot.shape) * STORED_DTYPES[slot.dtype][1] // 8

    def _scale(self, slot: ScaleSlot) -> float:
        if slot.kind == "quantize":
            return 1 / SYNTHETIC_INPUT_SCALE
        weight = self._weights[slot.weights[0]]
        return SYNTHETIC_INPUT_SCALE * self._deviation(weight) * WIDEST / FP8_MAX

    @staticmethod
    def _deviation(slot: WeightSlot) -> float:
        """Activations keep their size."""
        inputs = slot.shape[0] if slot.transposed else math.prod(slot.shape[1:])
        return float(inputs**-0.5)

    @staticmethod
    def _stored(dtype: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        if dtype not in ("float", "bfloat16", FP8_DTYPE):
            raise UsageError(f"no weights in {dtype} are made up here; give a bundle in fp8 or bf16")
        tensor = torch.from_numpy(values)
        tensor = tensor.clamp(-FP8_MAX, FP8_MAX) if dtype == FP8_DTYPE else tensor
        return tensor.to(STORED_DTYPES[dtype][2]).view(torch.uint8).numpy()
