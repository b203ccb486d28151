"""Roofline: the least time that a component can take on a device, and what does not let it be faster.

A floor is no forecast: it takes the peak rates of the data sheet, and kernels, memory and bus all busy at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.footprint import value_bytes, weight_bytes
from engines.hardware import Hardware, Rates
from engines.work import Work, work_of
from export.recipes import QUANTIZED_ATTENTION, Dtype, Format, Recipe
from flux2_trt.drawing import Drawing
from flux2_trt.errors import UsageError
from flux2_trt.spec import Component, ModelSpec

Bound = Literal["compute", "memory", "bus"]


@dataclass(frozen=True)
class Floor:
    """The least seconds of one run, by what they go to; the largest counts."""

    compute_seconds: float
    memory_seconds: float
    bus_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.bus_seconds)

    @property
    def bound(self) -> Bound:
        """What the run waits for."""
        times: dict[Bound, float] = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "bus": self.bus_seconds,
        }
        return max(times, key=lambda name: times[name])


def floor_of(
    component: Component,
    spec: ModelSpec,
    drawing: Drawing,
    recipe: Recipe,
    hardware: Hardware,
    rates: Rates | None = None,
) -> Floor:
    """Of one run of `component` (see `engines.work.work_of`) with all of its weights on the device.

    `rates`: others than the highest that are known. Raises UsageError where the device lacks a format of the recipe.
    """
    work = work_of(component, spec, drawing)
    compute = compute_seconds(work, component, recipe, rates or hardware.peak)
    moved = moved_bytes(component, spec, drawing, recipe)
    return Floor(compute, moved / hardware.memory_bytes_per_second)


def compute_seconds(work: Work, component: Component, recipe: Recipe, rates: Rates) -> float:
    """Of the operations of `work`, each kind at the rate of its format. Raises UsageError where there is none."""
    linears, attention = _formats(component, recipe)
    kinds: tuple[tuple[int, Dtype | Format], ...] = (
        (work.linear_flops, linears),
        (work.attention_flops, attention),
        (work.other_flops, recipe.dtype),
    )
    seconds = 0.0
    for flops, number_format in kinds:
        rate = rates.of(number_format)
        if flops and rate is None:
            raise UsageError(f"there is no peak rate for {number_format} here; choose another --precision")
        seconds += flops / rate if rate else 0.0
    return seconds


def moved_bytes(component: Component, spec: ModelSpec, drawing: Drawing, recipe: Recipe) -> float:
    """Weights, read once, and activations with the best fusion: see `engines.work`."""
    work = work_of(component, spec, drawing)
    linears, attention = _formats(component, recipe)
    wide = value_bytes(recipe.dtype, recipe.dtype)
    narrow, in_attention = value_bytes(linears, recipe.dtype), value_bytes(attention, recipe.dtype)
    activations = work.wide_values * wide + work.narrow_values * narrow + work.attention_values * in_attention
    return activations + weight_bytes(component, spec, recipe)


def _formats(component: Component, recipe: Recipe) -> tuple[Dtype | Format, Dtype | Format]:
    """Of linears that may be quantized, and of attention."""
    attention = recipe.attention if component in QUANTIZED_ATTENTION else None
    return recipe.linears or recipe.dtype, attention or recipe.dtype
