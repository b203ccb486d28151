"""Targets: what plans are compiled for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from export.recipes import Dtype, Recipe, WeightLayout
from flux2_trt.errors import UsageError
from flux2_trt.manifest import WeightPlacement

PlanLayout = Literal["whole", "blocks"]
"""One plan for the transformer, or one for each of its parts: a device that is too small streams the weights of blocks
while others are computed."""


class Device(Protocol):
    """A GPU of this machine, as the driver names it."""

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> str: ...


@dataclass(frozen=True)
class Target:
    """A device type, the compiler for it and the precisions that it runs; the first is the default.

    `compute_capability`: as the driver says it, "8.9"; None for a CPU. `dtype`: what it computes in whatever the recipe
    says; quantized values are then rounded, and multiplied in that. `fp8_layout`: how FP8 weights lie in memory.
    """

    name: str
    compiler: str
    precisions: tuple[str, ...]
    compute_capability: str | None = None
    dtype: Dtype | None = None
    fp8_layout: WeightLayout = "kn"

    @property
    def ahead_of_time(self) -> bool:
        """Plans are compiled without the device."""
        return self.compiler == "tensorrt_rtx"

    @property
    def needs_device(self) -> bool:
        """Plans are compiled on the device itself, by timing kernels there."""
        return self.compiler == "tensorrt"

    def device(self, devices: Sequence[Device]) -> Device | None:
        """The first of `devices` that is this target's: of its capability, and of no other target's name."""
        others = {target.name for target in TARGETS.values() if target.needs_device} - {self.name}
        for each in devices:
            words = set(re.findall(r"[a-z0-9]+", each.name.lower()))
            if each.compute_capability == self.compute_capability and not words & others:
                return each
        return None


def _rtx(name: str, compute_capability: str, *precisions: str) -> Target:
    return Target(name, "tensorrt_rtx", precisions, compute_capability)


def _data_center(name: str, compute_capability: str, *precisions: str) -> Target:
    """The tensor cores of Hopper read FP8 along K alone: [N, K] in memory (PTX ISA, wgmma, transposed operands)."""
    return Target(name, "tensorrt", precisions, compute_capability, fp8_layout="nk")


_FP8 = ("fp8", "fp8-attention", "bf16")
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "onnxruntime", ("fp32", "fp8", "fp8-attention", "nvfp4", "int4"), dtype="fp32"),
        _data_center("gb300", "10.3", *_FP8, "nvfp4"),
        _data_center("gb200", "10.0", *_FP8, "nvfp4"),
        _data_center("b300", "10.3", *_FP8, "nvfp4"),
        _data_center("b200", "10.0", *_FP8, "nvfp4"),
        _data_center("h200", "9.0", *_FP8),
        _data_center("h100", "9.0", *_FP8),
        _rtx("rtx4090", "8.9", *_FP8, "int4"),
        _rtx("l40s", "8.9", *_FP8, "int4"),
        _rtx("rtx5090", "12.0", *_FP8, "nvfp4", "int4"),
        _rtx("rtx-pro-6000", "12.0", *_FP8, "nvfp4", "int4"),
        _rtx("a100", "8.0", "bf16", "int4"),
        _rtx("rtx3090", "8.6", "bf16", "int4"),
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
    allowed: tuple[WeightPlacement, ...] = recipe.placements if target.compute_capability else ("external",)
    for placement in allowed:
        if asked in (None, placement):
            return placement
    raise UsageError(
        f"target {target.name} takes {' or '.join(allowed)} weights in {recipe.name}, not {asked}; leave --weights out"
    )


def resolve_layout(target: Target, placement: WeightPlacement, asked: str) -> PlanLayout:
    """The asked layout. Raises UsageError for one that is unknown, or that weights in the plan do not allow."""
    if asked == "whole":
        return "whole"
    if asked != "blocks":
        raise UsageError(f"unknown --plans {asked}; known are {', '.join(get_args(PlanLayout))}")
    if placement != "bound":
        raise UsageError(
            f"--plans blocks needs bound weights, since blocks share a plan; they are {placement} for {target.name}"
        )
    return "blocks"


def resolve_precision(target: Target, precision: str | None) -> str:
    """The asked precision, or the target's first. Raises UsageError for one that the target does not run."""
    if precision is None:
        return target.precisions[0]
    if precision not in target.precisions:
        allowed = ", ".join(target.precisions)
        raise UsageError(f"target {target.name} does not run precision {precision!r}; it runs {allowed}")
    return precision
