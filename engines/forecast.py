"""Forecast: whether a model fits a device, what has to move for it, and the least time that pictures then take.

A pure function of values, to be asked before any memory is taken. Weights are exact; scratch is what the compiler said
of a bundle's plans, else an estimate; times are floors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from engines.hardware import GIGA
from engines.residency import (
    BIG,
    KINDS,
    SLOTS,
    Arrangement,
    Residency,
    arrangements,
    least_bytes,
    reside,
    residency_of,
)
from engines.roofline import Floor, compute_seconds, floor_of
from engines.setting import Setting
from engines.work import double_block, runs_of
from flux2_trt.drawing import Drawing
from flux2_trt.errors import DeviceMemoryError
from flux2_trt.spec import Component

MOST_BATCH = 1024  # beyond it the question is not asked
WORTH_MOVING = 1.02  # of the time that a batch takes


@dataclass(frozen=True)
class Forecast:
    """What fits where, and the floors. All bytes are of the device but `pinned_bytes`, which are the host's.

    `floors`: of one run of a component; that of the transformer has the bus in it.
    """

    setting: Setting
    drawing: Drawing
    residency: Residency
    floors: Mapping[Component, Floor]
    scratch_bytes: int
    buffer_bytes: int

    @property
    def items(self) -> dict[str, int]:
        """The budget, line by line."""
        return {
            "weights": self.residency.peak_bytes,
            "scratch": self.scratch_bytes,
            "buffers": self.buffer_bytes,
            "context": self.setting.context_bytes,
        }

    @property
    def device_bytes(self) -> int:
        return sum(self.items.values())

    @property
    def pinned_bytes(self) -> int:
        return self.residency.pinned_bytes

    @property
    def step(self) -> Floor:
        return self.floors["transformer"]

    @property
    def copies_hide(self) -> bool:
        """Whatever is streamed is there before it is needed."""
        return self.step.bus_seconds <= max(self.step.compute_seconds, self.step.memory_seconds)

    @property
    def moving_seconds(self) -> float:
        """For a batch: of weights that are swapped between stages, which nothing hides."""
        moved = sum(placement.moved_bytes for placement in self.residency.placements.values())
        return moved / self.setting.hardware.bus.bytes_per_second

    @property
    def batch_seconds(self) -> float:
        """From prompts to pictures."""
        runs = sum(runs_of(component, self.drawing) * floor.seconds for component, floor in self.floors.items())
        return runs + self.moving_seconds

    @property
    def picture_seconds(self) -> float:
        return self.batch_seconds / self.drawing.batch


def forecast(setting: Setting, drawing: Drawing) -> Forecast:
    """The fastest arrangement that fits, by its floors. Raises DeviceMemoryError where none does."""
    fitting = [forecast_of(setting, drawing, residency) for residency in _residencies(setting, drawing)]
    if not fitting:
        needed, free = least_memory(setting, drawing), setting.memory_bytes
        up, down = math.ceil(needed / GIGA * 100) / 100, math.floor(free / GIGA * 100) / 100
        size = f"{drawing.width}x{drawing.height}, batch {drawing.batch}"
        raise DeviceMemoryError(
            f"{setting.spec.name} in {setting.recipe.name} at {size}, needs at least {up:.2f} GB of device memory, and "
            f"{down:.2f} GB are free",
            needed,
            free,
        )
    return min(fitting, key=lambda each: each.batch_seconds)  # of equals the first, which moves least


def forecast_of(setting: Setting, drawing: Drawing, residency: Residency) -> Forecast:
    """With weights as `residency` has them, whether they fit or not."""
    components = setting.components(drawing)
    floors = {c: floor_of(c, setting.spec, drawing, setting.recipe, setting.hardware) for c in components}
    return Forecast(
        setting,
        drawing,
        residency,
        _with_bus(floors, residency, setting, drawing),
        setting.shared_scratch(drawing),
        setting.buffers(drawing, residency.streamed is not None),
    )


def kept(best: Forecast, before: Residency) -> Forecast | None:
    """The forecast with weights as they were for other pictures, where these fit so too and take no longer than in the
    best one, but for `WORTH_MOVING`; else None."""
    setting, drawing = best.setting, best.drawing
    residency = residency_of(setting.all_weights(drawing), setting.blocks, before.moved, before.streamed)
    made = forecast_of(setting, drawing, residency)
    fits = made.device_bytes <= setting.memory_bytes
    return made if fits and made.batch_seconds <= WORTH_MOVING * best.batch_seconds else None


def least_memory(setting: Setting, drawing: Drawing) -> int:
    """The least bytes of a device that do, with all moved that can be."""
    weights = setting.all_weights(drawing)
    return min(
        _beside(setting, drawing, option) + least_bytes(option, weights, setting.blocks)
        for option in arrangements(setting.can_stream)
    )


def _beside(setting: Setting, drawing: Drawing, arrangement: Arrangement) -> int:
    """All but weights."""
    buffers = setting.buffers(drawing, arrangement.streams)
    return setting.shared_scratch(drawing) + buffers + setting.context_bytes


def _residencies(setting: Setting, drawing: Drawing) -> list[Residency]:
    """Every arrangement that fits, those that move least first."""
    weights = setting.all_weights(drawing)
    found = (
        reside(option, weights, setting.blocks, setting.memory_bytes - _beside(setting, drawing, option))
        for option in arrangements(setting.can_stream)
    )
    return [residency for residency in found if residency]


def largest(setting: Setting, drawing: Drawing, residency: Residency) -> tuple[int, int]:
    """The largest batch at this size, and the largest side of a square picture in a batch of one, that fit with text
    encoder and transformer moved no more than in `residency`, but for how many blocks are streamed."""
    most_moved = {name: KINDS.index(residency.placements[name].kind) for name in BIG if name in residency.placements}

    def fits(other: Drawing) -> bool:
        return any(
            all(KINDS.index(found.placements[name].kind) <= moved for name, moved in most_moved.items())
            for found in _residencies(setting, other)
        )

    multiple, most = drawing.pixels_per_token, setting.spec.sampling.max_side
    batch = _last(1, MOST_BATCH, lambda count: fits(replace(drawing, batch=count)))
    alone = replace(drawing, batch=1)
    tokens = _last(
        -(-setting.spec.sampling.min_side // multiple),
        most // multiple,
        lambda side: fits(replace(alone, width=side * multiple, height=side * multiple)),
    )
    return batch, tokens * multiple


def _last(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest value that fits, which is at least `low`, where what fits is followed by what does not."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _with_bus(
    floors: Mapping[Component, Floor], residency: Residency, setting: Setting, drawing: Drawing
) -> dict[Component, Floor]:
    """The floors with the bus in that of the transformer.

    Where only single blocks are streamed, copying pauses during the double ones as soon as both slots are full.
    """
    placement = residency.placements["transformer"]
    if placement.streamed is None:
        return dict(floors)
    size, bus = setting.spec.transformer, setting.hardware.bus.bytes_per_second
    seconds = placement.streamed.bytes / bus
    if not placement.streamed.doubles:
        double = compute_seconds(double_block(size, drawing), "transformer", setting.recipe, setting.hardware.peak)
        filling = SLOTS * setting.blocks.single_bytes / bus
        seconds += max(size.num_double_blocks * double - filling, 0.0)
    return {**floors, "transformer": replace(floors["transformer"], bus_seconds=seconds)}
