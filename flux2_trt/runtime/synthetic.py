"""Synthetic weights: what a bundle that keeps a seed in their place runs with, for speed and never for pictures.

They have the distribution, the formats and the layouts of a model's, so that kernels take as long. For dev there are 32
billion of them: four million are drawn from the seed and come again and again, in every tensor, which no kernel knows.
A bundle for the CPU holds other ones of the same seed, each drawn for itself.
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
from flux2_trt.manifest import SYNTHETIC, ComponentRecord
from flux2_trt.runtime.weights import Bytes, WeightSource
from flux2_trt.spec import TransformerSpec

POOL = 2**22
WIDEST = 5.0
"""Standard deviations that an FP8 weight's largest value lies away."""
_BLOCK = re.compile(r"(double|single)_blocks\.0\.")


def synthetic_weights(bundle: Bundle, record: ComponentRecord) -> WeightSource:
    """For a component of a prepared bundle, whose graphs say what they take, in one graph or in parts.

    Raises UsageError for a format that is not made up here.
    """
    whole = record.name.partition(".")[0]
    graphs = [
        Graph.from_bytes(bundle.plan_path(each.name).read_bytes())
        for each in bundle.manifest.components
        if each.name.partition(".")[0] == whole
    ]
    blocks = bundle.manifest.model.transformer if len(graphs) > 1 else None
    return SyntheticWeights(graphs, blocks, bundle.manifest.source[SYNTHETIC])


class SyntheticWeights:
    """A `WeightSource` for graphs; `blocks`: of a model whose graphs have only the first block of each kind.

    Raises UsageError for a format that is not made up here.
    """

    def __init__(self, graphs: list[Graph], blocks: TransformerSpec | None, seed: int) -> None:
        self._slots: dict[str, WeightSlot | ScaleSlot] = {}
        for graph in graphs:
            self._slots |= {**graph.weights, **graph.scales}
        self._normal = np.random.default_rng(seed).standard_normal(POOL, np.float32)
        self._pools: dict[tuple[str, float], Bytes] = {}
        self._made: dict[tuple[str, float, int], Bytes] = {}
        self._first: dict[str, str] = {}
        counts: Mapping[str, int] = {}
        if blocks:
            counts = {"double": blocks.num_double_blocks, "single": blocks.num_single_blocks}
        for name, slot in self._slots.items():
            if slot.dtype not in ("float", "bfloat16", FP8_DTYPE):
                raise UsageError(f"no weights in {slot.dtype} are made up here; give a bundle in fp8 or bf16")
            match = _BLOCK.match(name)
            numbers = range(counts[match[1]]) if match and counts else (None,)
            for number in numbers:
                full = name if number is None else name.replace(".0.", f".{number}.", 1)
                self._first[full] = name
        self.sizes = {name: self._bytes(self._slots[first]) for name, first in self._first.items()}

    def read(self, name: str) -> Bytes:
        """Weights of the same format, spread and size have the same bytes, which are kept."""
        slot = self._slots[self._first[name]]
        if isinstance(slot, ScaleSlot):
            return np.array([self._scale(slot)], np.float32).view(np.uint8)
        if len(slot.shape) == 1:
            value = 0.0 if name.endswith((".bias", ".running_mean")) else 1.0
            return np.resize(self._stored(slot.dtype, np.array([value], np.float32)), self.sizes[name])
        deviation = FP8_MAX / WIDEST if slot.dtype == FP8_DTYPE else self._deviation(slot)
        key = (slot.dtype, deviation, self.sizes[name])
        if key not in self._made:
            pool = key[:2]
            if pool not in self._pools:
                self._pools[pool] = self._stored(slot.dtype, self._normal * np.float32(deviation))
            self._made[key] = np.resize(self._pools[pool], self.sizes[name])
        return self._made[key]

    def check(self) -> None:
        """Nothing can change."""

    def _scale(self, slot: ScaleSlot) -> float:
        if slot.kind == "quantize":
            return 1 / SYNTHETIC_INPUT_SCALE
        weight = self._slots[slot.weights[0]]
        assert isinstance(weight, WeightSlot)
        return SYNTHETIC_INPUT_SCALE * self._deviation(weight) * WIDEST / FP8_MAX

    @staticmethod
    def _bytes(slot: WeightSlot | ScaleSlot) -> int:
        return math.prod(slot.shape) * STORED_DTYPES[slot.dtype][1] // 8

    @staticmethod
    def _deviation(slot: WeightSlot) -> float:
        """Activations keep their size."""
        inputs = slot.shape[0] if slot.transposed else math.prod(slot.shape[1:])
        return float(inputs**-0.5)

    @staticmethod
    def _stored(dtype: str, values: NDArray[np.float32]) -> Bytes:
        tensor = torch.from_numpy(values)
        tensor = tensor.clamp(-FP8_MAX, FP8_MAX) if dtype == FP8_DTYPE else tensor
        return tensor.to(STORED_DTYPES[dtype][2]).view(torch.uint8).numpy()
