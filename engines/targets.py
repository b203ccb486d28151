"""Targets: what plans are compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from export.recipes import Dtype, Recipe
from flux2_trt.errors import UsageError
from flux2_trt.manifest import WeightPlacement


@dataclass(frozen=True)
class Target:
    """A device type, the compiler for it and the precisions that it runs; the first is the default.

    `compute_capability`: the compiler's name for it where plans are compiled ahead of time, without the device.
    `dtype`: what it computes in whatever the recipe says; quantized values are then rounded, and multiplied in that.
    """

    name: str
    compiler: str
    precisions: tuple[str, ...]
    compute_capability: str | None = None
    dtype: Dtype | None = None

    @property
    def ahead_of_time(self) -> bool:
        return self.compute_capability is not None


def _rtx(name: str, compute_capability: str, *precisions: str) -> Target:
    return Target(name, "tensorrt_rtx", precisions, compute_capability)


_FP8 = ("fp8", "fp8-attention", "bf16")
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "onnxruntime", ("fp32", "fp8", "fp8-attention", "nvfp4", "int4"), dtype="fp32"),
        _rtx("rtx4090", "SM89", *_FP8, "int4"),
        _rtx("l40s", "SM89", *_FP8, "int4"),
        _rtx("rtx5090", "SM120", *_FP8, "nvfp4", "int4"),
        _rtx("rtx-pro-6000", "SM120", *_FP8, "nvfp4", "int4"),
        _rtx("a100", "SM80", "bf16", "int4"),
        _rtx("rtx3090", "SM86", "bf16", "int4"),
    )
}
AUTO = "auto"


def resolve_target(name: str) -> Target:
    """The target of that name; `auto` is the CPU. Raises UsageError for a name that is not there."""
    if name == AUTO:
        return TARGETS["cpu"]
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; this version builds for {', '.join(TARGETS)} (or auto)")
    return TARGETS[name]


def resolve_placement(target: Target, recipe: Recipe, asked: str | None) -> WeightPlacement:
    """How the plan gets its weights: "external" on a CPU, else as the recipe allows. Raises UsageError for another."""
    allowed: tuple[WeightPlacement, ...] = recipe.placements if target.ahead_of_time else ("external",)
    for placement in allowed:
        if asked in (None, placement):
            return placement
    raise UsageError(
        f"target {target.name} takes {' or '.join(allowed)} weights in {recipe.name}, not {asked}; leave --weights out"
    )


def resolve_precision(target: Target, precision: str | None) -> str:
    """The asked precision, or the target's first. Raises UsageError for one that the target does not run."""
    if precision is None:
        return target.precisions[0]
    if precision not in target.precisions:
        allowed = ", ".join(target.precisions)
        raise UsageError(f"target {target.name} does not run precision {precision!r}; it runs {allowed}")
    return precision
