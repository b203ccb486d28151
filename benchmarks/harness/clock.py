"""Clock: marks in time, on the host or in a device's stream, and what went by between them.

A host's clock cannot tell when a GPU did what was enqueued: there, marks are events in the stream. Whatever is timed
takes marks from the clock that it was given, and asks for seconds after `settle`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Clock(Protocol):
    def mark(self) -> Any:
        """Now, in the order of the work that was given out before. Does not wait."""
        ...

    def settle(self) -> None:
        """Wait until everything before the last mark is done."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks, after `settle`."""
        ...


class HostClock:
    """The host's monotonic clock, for work that is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def settle(self) -> None:
        pass

    def seconds(self, first: float, last: float) -> float:
        return last - first


class CudaClock:
    """Events in torch's current CUDA stream. Written for the first GPU, and not tried on one."""

    def __init__(self) -> None:
        import torch

        self._cuda: Any = torch.cuda

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        self._cuda.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1000.0


@dataclass
class Timeline:
    """What happened in one call, as marks: stages by name, runs of the transformer, and ends of steps.

    A step lasts from the end of the one before (of the first run's start, for the first) to its own end, without what
    the watcher of its end took. Its host gap is what no run of the transformer fills.
    """

    clock: Clock
    stages: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    runs: list[tuple[Any, Any]] = field(default_factory=list)
    ends: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        first = self.clock.mark()
        yield
        self.stages.setdefault(name, []).append((first, self.clock.mark()))

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run of the transformer."""
        first = self.clock.mark()
        yield
        self.runs.append((first, self.clock.mark()))

    @contextmanager
    def end_of_step(self) -> Iterator[None]:
        """What is done inside belongs to no step."""
        first = self.clock.mark()
        yield
        self.ends.append((first, self.clock.mark()))

    def stage_seconds(self) -> dict[str, float]:
        return {name: sum(self.clock.seconds(*pair) for pair in pairs) for name, pairs in self.stages.items()}

    def steps(self, pictures: int = 1) -> tuple[list[float], list[float]]:
        """Seconds of each step, and of the host gap in each; of `pictures` loops one after the other.

        Without runs, gaps are unknown and none are given, nor the first step of each loop.
        """
        seconds, gaps, begun, runs = [], [], None, list(self.runs)
        per_loop = max(1, len(self.ends) // pictures)
        for index, (end, resumed) in enumerate(self.ends):
            inside = [run for run in runs if self.clock.seconds(run[1], end) >= 0]
            runs = runs[len(inside) :]
            if index % per_loop == 0:
                begun = inside[0][0] if inside else None
            if begun is not None:
                seconds.append(self.clock.seconds(begun, end))
                if inside:
                    gaps.append(seconds[-1] - sum(self.clock.seconds(*run) for run in inside))
            begun = resumed
        return seconds, gaps
