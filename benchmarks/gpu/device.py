"""A CUDA device that keeps account of when its graphs ran."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.device import Graph, Stream


@dataclass(frozen=True)
class Launch:
    """CUDA events before and after a graph."""

    begun: Any
    ended: Any


class TimedDevice(CudaDevice):
    """Puts an event before and after every launch of a graph; two records take less than 10 µs."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._launches: list[Launch] = []

    def launch(self, graph: Graph, stream: Stream) -> None:
        pair = Launch(self._call("cudaEventCreate"), self._call("cudaEventCreate"))
        self.record(pair.begun, stream)
        super().launch(graph, stream)
        self.record(pair.ended, stream)
        self._launches.append(pair)

    def forget_launches(self) -> None:
        for pair in self._launches:
            self.destroy_event(pair.begun)
            self.destroy_event(pair.ended)
        self._launches.clear()

    def milliseconds(self, last: int) -> tuple[list[float], list[float]]:
        """Of the last launches, which are done: how long each ran, and how long the device waited before the next."""
        pairs = self._launches[-last:]
        ran = [float(self._call("cudaEventElapsedTime", pair.begun, pair.ended)) for pair in pairs]
        waits = [float(self._call("cudaEventElapsedTime", one.ended, next_.begun)) for one, next_ in pairwise(pairs)]
        return ran, waits
