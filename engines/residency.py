"""Residency: which weights are in the memory of a device, and when.

A component is *resident*; or *swapped* in whole for its stage and dropped after it; or *streamed*, the transformer
only: the blocks that find no room come through the bus in every step, into two slots, one that fills while the other
is computed with. Components run one after the other and share one scratch memory (TensorRT:
`ExecutionContextAllocationStrategy.USER_MANAGED`). Whatever is moved comes from pinned memory of the host.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from flux2_trt.spec import Component

Kind = Literal["resident", "swapped", "streamed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""By how much they move."""
BIG: tuple[Component, ...] = ("text_encoder", "transformer")
SMALL: tuple[Component, ...] = ("vae_encoder", "vae_decoder")
LOOP: tuple[Component, ...] = ("conditioning", "transformer")
"""On the device together: every picture is conditioned before it is denoised."""
SLOTS = 2


@dataclass(frozen=True)
class Blocks:
    """The blocks of a transformer, double ones first: how many of each kind and the bytes of one."""

    num_double: int
    double_bytes: int
    num_single: int
    single_bytes: int

    @property
    def bytes(self) -> int:
        return self.num_double * self.double_bytes + self.num_single * self.single_bytes

    @property
    def least_bytes(self) -> int:
        """With as many blocks streamed as it takes."""
        rest = self.num_double * self.double_bytes
        least = min(self.bytes, rest + SLOTS * self.single_bytes)
        return min(least, SLOTS * self.double_bytes) if self.num_double else least

    def streamed(self, room: int) -> Streamed:
        """As few blocks as leave the others and the slots within `room` bytes, single ones first: they are smaller.

        `room` is at least `least_bytes`.
        """
        if self.bytes <= room:
            return Streamed(0, 0, 0, self.bytes)
        rest = self.num_double * self.double_bytes
        if room >= rest + SLOTS * self.single_bytes:
            singles = math.ceil((self.bytes + SLOTS * self.single_bytes - room) / self.single_bytes)
            left = singles * self.single_bytes
            return Streamed(0, singles, left, self.bytes - left + SLOTS * self.single_bytes)
        over = self.bytes + SLOTS * self.double_bytes - room
        doubles = math.ceil((over - self.num_single * self.single_bytes) / self.double_bytes)
        singles = max(math.ceil((over - doubles * self.double_bytes) / self.single_bytes), 0)
        left = doubles * self.double_bytes + singles * self.single_bytes
        return Streamed(doubles, singles, left, self.bytes - left + SLOTS * self.double_bytes)


@dataclass(frozen=True)
class Streamed:
    """`bytes`: that come through the bus in a step; `device_bytes`: of the blocks that stay, and of the slots."""

    doubles: int
    singles: int
    bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where the weights of a component are.

    `device_bytes`: on the device while it runs; `moved_bytes`: through the bus for a batch of pictures, once;
    `streamed`: through the bus in every step.
    """

    component: Component
    kind: Kind
    weight_bytes: int
    device_bytes: int
    moved_bytes: int = 0
    streamed: Streamed | None = None

    @property
    def pinned_bytes(self) -> int:
        """Of the host's memory, for what moves."""
        return self.moved_bytes + (self.streamed.bytes if self.streamed else 0)


@dataclass(frozen=True)
class Residency:
    """`peak_bytes`: of weights on the device at once, slots included."""

    placements: Mapping[Component, Placement]
    peak_bytes: int

    @property
    def pinned_bytes(self) -> int:
        return sum(placement.pinned_bytes for placement in self.placements.values())

    @property
    def moved(self) -> frozenset[Component]:
        """What makes room for one another between stages; of a streamed transformer, what of it stays in a step."""
        return frozenset(name for name, placement in self.placements.items() if placement.moved_bytes)

    @property
    def streamed(self) -> Streamed | None:
        return self.placements["transformer"].streamed


@dataclass(frozen=True)
class Arrangement:
    """What is moved at all. `alternates`: text encoder and transformer make room for one another and for the others;
    `swaps_small`: so do those, and with both what conditions goes and comes with the transformer."""

    alternates: bool
    swaps_small: bool
    streams: bool

    @property
    def moved(self) -> frozenset[Component]:
        moved = (BIG if self.alternates else ()) + (SMALL if self.swaps_small else ())
        return frozenset(moved) | frozenset(LOOP if self.alternates and self.swaps_small else ())


def arrangements(can_stream: bool) -> Iterator[Arrangement]:
    """All there are, those that move least first."""
    both = (False, True)
    for streams, alternates, swaps_small in product(both if can_stream else (False,), both, both):
        yield Arrangement(alternates, swaps_small, streams)


def least_bytes(arrangement: Arrangement, weights: Mapping[Component, int], blocks: Blocks) -> int:
    """The least room for weights in which the arrangement works."""
    of_blocks = blocks.least_bytes if arrangement.streams else blocks.bytes
    return _peak(weights, arrangement.moved, weights["transformer"] - blocks.bytes + of_blocks)


def reside(arrangement: Arrangement, weights: Mapping[Component, int], blocks: Blocks, room: int) -> Residency | None:
    """The arrangement within `room` bytes for weights; None where it does not fit."""
    if least_bytes(arrangement, weights, blocks) > room:
        return None
    streamed = None
    if arrangement.streams:
        ends = weights["transformer"] - blocks.bytes
        streamed = blocks.streamed(room - _beside_transformer(weights, arrangement.moved) - ends)
        if not streamed.bytes:
            return None  # nothing has to be streamed: that is another arrangement
    return residency_of(weights, blocks, arrangement.moved, streamed)


def residency_of(
    weights: Mapping[Component, int], blocks: Blocks, moved: Container[Component], streamed: Streamed | None
) -> Residency:
    """With the components that make room for one another, and the blocks that are streamed."""
    placements: dict[Component, Placement] = {}
    for component, size in weights.items():
        moves = component in moved
        if component == "transformer" and streamed:
            device = size - blocks.bytes + streamed.device_bytes
            kept = size - streamed.bytes if moves else 0
            placements[component] = Placement(component, "streamed", size, device, kept, streamed)
        else:
            kind: Kind = "swapped" if moves else "resident"
            placements[component] = Placement(component, kind, size, size, size if moves else 0)
    return Residency(placements, _peak(weights, moved, placements["transformer"].device_bytes))


def _peak(weights: Mapping[Component, int], moved: Container[Component], transformer: int) -> int:
    """Bytes of weights at once, with those of the transformer that are on the device."""
    running = _beside_transformer(weights, moved) + transformer
    stays, goes = _others(weights, moved)
    return max(running, stays + goes) if "transformer" in moved else running


def _beside_transformer(weights: Mapping[Component, int], moved: Container[Component]) -> int:
    """Bytes of the other weights that have to have room while it runs, or at another time where it stays."""
    stays, goes = _others(weights, moved)
    if "transformer" not in moved:
        return stays + goes
    return stays + sum(size for name, size in weights.items() if name in LOOP[:-1] and name in moved)


def _others(weights: Mapping[Component, int], moved: Container[Component]) -> tuple[int, int]:
    """Bytes of all but the transformer: of what always stays, and of the largest that comes and goes."""
    stays = sum(size for name, size in weights.items() if name != "transformer" and name not in moved)
    goes = max((size for name, size in weights.items() if name not in LOOP and name in moved), default=0)
    return stays, goes
