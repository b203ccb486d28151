"""Plan: a compiled component on a device, and its executions at fixed shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flux2_trt.errors import UsageError
from flux2_trt.manifest import ComponentRecord, TensorShape
from flux2_trt.runtime.device import Address, Stream

Sizes = Mapping[str, int]
"""The dynamic sides of a component by their names in the manifest."""
Shape = tuple[int, ...]

ITEM_BYTES = {"float": 4, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1}
"""By the dtype that a manifest names."""
NUMPY_DTYPES = {"float": np.float32, "bfloat16": np.uint16, "int32": np.int32, "int64": np.int64, "uint8": np.uint8}
"""What such a tensor is on the host; bf16 as its bits."""


class Execution(Protocol):
    """A plan at fixed shapes. Its addresses, once bound, stay; `enqueue` is all that a step needs."""

    @property
    def scratch_bytes(self) -> int: ...

    def use_scratch(self, address: Address, size: int) -> None:
        """Memory for activations, which no other execution may use at the same time."""
        ...

    def bind(self, addresses: Mapping[str, Address]) -> None: ...

    def enqueue(self, stream: Stream) -> None:
        """Raises DeviceError where the plan cannot be launched."""
        ...

    def close(self) -> None: ...


class Plan(Protocol):
    """A plan that a device has accepted."""

    @property
    def inputs(self) -> frozenset[str]:
        """Weights and scales among them."""
        ...

    def execution(self, shapes: Mapping[str, Shape], profile: int, stream: Stream) -> Execution:
        """`shapes`: of the inputs that are no weights; `profile`: the optimization profile that they fit."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tensors:
    """Inputs and outputs, as a manifest has them, at given sizes."""

    of: Mapping[str, TensorShape]
    sizes: Sizes

    def sides(self, name: str) -> Sequence[int | str]:
        return self.of[name]["shape"]

    def shape(self, name: str) -> Shape:
        return tuple(self.sizes[side] if isinstance(side, str) else side for side in self.sides(name))

    def dtype(self, name: str) -> str:
        return self.of[name]["dtype"]

    def bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * ITEM_BYTES[self.dtype(name)]

    def shapes(self, names: Iterable[str]) -> dict[str, Shape]:
        """Of those among `names` that are no weights."""
        return {name: self.shape(name) for name in names if name in self.of}


def profile_of(record: ComponentRecord, sizes: Sizes) -> int:
    """The first optimization profile that `sizes` fit, the narrowest one; 0 where the plan takes any.

    Raises UsageError with what the plan was built for.
    """
    for index, profile in enumerate(record.profiles):
        if all(least <= sizes[side] <= most for side, (least, _, most) in profile.items() if side in sizes):
            return index
    if not record.profiles:
        return 0
    widest = record.profiles[-1]
    wrong = [
        f"{side} {sizes[side]} ({least} to {most})"
        for side, (least, _, most) in widest.items()
        if side in sizes and not least <= sizes[side] <= most
    ]
    raise UsageError(
        f"the plan of {record.name} was not built for {', '.join(wrong)}; ask for another size, or build one with "
        "other --sizes, --max-batch or --max-references"
    )
