"""TensorSource: where weights come from, whole or some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flux2_trt.errors import BundleError
from flux2_trt.tensor_file import TensorFile

RANDOM_ROWS = 64
TRANSPOSED = "transposed"
"""The metadata of a weight file that names, with spaces between them, the weights [N, K] which it holds as [K, N]."""
SCALES = "scales"
"""The metadata of a weight file that says in JSON which tensors are scales: name -> [kind, *names of weights]."""


class TensorSource(Protocol):
    """Anything that gives canonical tensors by name as fp32: a checkpoint, or random values."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """The tensor, or its rows `first` to `last` as in a slice, as a new array."""
        ...

    def largest(self, name: str) -> float:
        """The largest magnitude in the tensor; NaN or infinity where it holds one."""
        ...


@dataclass(frozen=True)
class RandomSource:
    """Synthetic weights of a seed, scaled so that activations keep their size; each depends on its name alone."""

    seed: int
    shapes: Mapping[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        shape = self.shapes[name]
        rows = range(shape[0])[first:last]
        if len(shape) == 1:
            return np.full(len(rows), 0.0 if name.endswith((".bias", ".running_mean")) else 1.0, np.float32)
        words = np.frombuffer(name.encode().ljust(-(-len(name.encode()) // 4) * 4, b"\0"), np.uint32).tolist()
        parts = []
        for begin in range(rows.start // RANDOM_ROWS * RANDOM_ROWS, rows.stop, RANDOM_ROWS):
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *words, begin])))
            drawn = rng.standard_normal((min(RANDOM_ROWS, shape[0] - begin), *shape[1:]), dtype=np.float32)
            parts.append(drawn[max(rows.start - begin, 0) : rows.stop - begin])
        values = np.concatenate(parts)
        values *= np.float32(math.prod(shape[1:]) ** -0.5)
        return values

    def largest(self, name: str) -> float:
        rows = self.shapes[name][0]
        return max(float(np.abs(self.read(name, i, i + RANDOM_ROWS)).max()) for i in range(0, rows, RANDOM_ROWS))


class WeightFile:
    """The weights of a bundle's component as the checkpoint has them, from a file that nothing is quantized in.

    Raises BundleError for a file that does not say how its weights lie in it.
    """

    def __init__(self, path: Path) -> None:
        self.file = TensorFile(path)
        if TRANSPOSED not in self.file.metadata:
            raise BundleError(f"{path} was written by an earlier version, for plans only; build the bundle again")
        self.transposed = frozenset(self.file.metadata[TRANSPOSED].split())

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.tensors[name].shape
        return tuple(reversed(shape)) if name in self.transposed else shape

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        values = self.file.tensors[name].float32()
        return np.ascontiguousarray(values.T[first:last] if name in self.transposed else values[first:last])

    def largest(self, name: str) -> float:
        return self.file.tensors[name].largest()
