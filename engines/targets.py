"""Targets: what plans are compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flux2_trt.errors import UsageError
from flux2_trt.manifest import WeightPlacement


@dataclass(frozen=True)
class Target:
    """A device type, the compiler for it and the precisions that it runs; the first is the default."""

    name: str
    compiler: str
    precisions: tuple[str, ...]
    weight_placement: WeightPlacement


TARGETS: Mapping[str, Target] = {
    "cpu": Target("cpu", compiler="onnxruntime", precisions=("fp32",), weight_placement="external"),
}
AUTO = "auto"


def resolve_target(name: str) -> Target:
    """The target of that name; `auto` is the CPU. Raises UsageError for a name that is not there."""
    if name == AUTO:
        return TARGETS["cpu"]
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; this version builds for {', '.join(TARGETS)} (or auto)")
    return TARGETS[name]


def resolve_precision(target: Target, precision: str | None) -> str:
    """The asked precision, or the target's first. Raises UsageError for one that the target does not run."""
    if precision is None:
        return target.precisions[0]
    if precision not in target.precisions:
        allowed = ", ".join(target.precisions)
        raise UsageError(f"target {target.name} does not run precision {precision!r}; it runs {allowed}")
    return precision
