"""Folding: a model's weights with LoRAs added to them as they are read, some rows at a time, in fp32."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flux2_trt.lora.file import Delta, Lora
from flux2_trt.tensor_file import VALUES_AT_ONCE

if TYPE_CHECKING:
    from export.tensor_source import TensorSource

Floats = npt.NDArray[np.float32]


class FoldedSource:
    """The weights of `base`, a `TensorSource`, plus those of LoRAs; a `TensorSource` itself.

    What is read takes the memory of its rows and, until another weight is read in the same thread, of the `down`
    matrices of its LoRAs. `touched`: the names of weights that differ from the base's; all others are the base's, bit
    for bit, and so is every weight where all strengths are 0.
    """

    def __init__(self, base: TensorSource, loras: Iterable[Lora]) -> None:
        self.base = base
        self._deltas: dict[str, list[tuple[Delta, float]]] = {}
        for lora in loras:
            if lora.request.strength:
                for name, deltas in lora.deltas.items():
                    added = [(delta, lora.request.strength * delta.factor) for delta in deltas]
                    self._deltas.setdefault(name, []).extend(added)
        self._last = threading.local()

    @property
    def touched(self) -> frozenset[str]:
        return frozenset(self._deltas)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """The tensor with the LoRAs, or its rows `first` to `last` as in a slice, as a new array."""
        values = self.base.read(name, first, last)
        if name not in self._deltas:
            return values
        first, last, _ = slice(first, last).indices(self.shape(name)[0])
        for (delta, factor), down in zip(self._deltas[name], self._downs(name), strict=True):
            begin, end = max(first, delta.first), min(last, delta.last)
            if begin < end:
                added = delta.up.rows(begin - delta.first, end - delta.first).float32()
                added *= np.float32(factor)
                values[begin - first : end - first] += added if down is None else added @ down
        return values

    def largest(self, name: str) -> float:
        """The largest magnitude in the tensor; NaN or infinity where it holds one."""
        if name not in self._deltas:
            return self.base.largest(name)
        rows, *columns = self.shape(name)
        step = max(VALUES_AT_ONCE // max(int(np.prod(columns)), 1), 1)
        pieces = (self.read(name, first, first + step) for first in range(0, rows, step))
        return float(np.max([np.abs(piece).max() for piece in pieces]))

    def _downs(self, name: str) -> list[Floats | None]:
        """Of the weight that this thread reads, which it does from its first row to its last."""
        if getattr(self._last, "name", None) != name:
            self._last.downs = [None if delta.down is None else delta.down.float32() for delta, _ in self._deltas[name]]
            self._last.name = name
        downs: list[Floats | None] = self._last.downs
        return downs
