"""Floor: the operations of a case, and the least time that a step of it can take by a data sheet."""

from __future__ import annotations

from benchmarks.harness.case import Case
from benchmarks.harness.result import CaseWork
from engines.hardware import HARDWARE
from engines.roofline import floor_of
from engines.work import runs_of, work_of
from export.recipes import RECIPES
from flux2_trt.errors import UsageError
from flux2_trt.spec import ModelSpec


def work_of_case(spec: ModelSpec, case: Case, target: str, precision: str) -> CaseWork:
    """Of a timed call, which begins with prompt embeds: the text encoder is not in it."""
    drawing = case.drawing(spec)
    step = work_of("transformer", spec, drawing)
    used = [name for name in spec.components if name != "text_encoder" and runs_of(name, drawing)]
    call = sum(runs_of(name, drawing) * work_of(name, spec, drawing).flops for name in used)
    floor = None
    if target in HARDWARE and precision in RECIPES:
        try:
            floor = floor_of("transformer", spec, drawing, RECIPES[precision], HARDWARE[target]).seconds
        except UsageError:  # a format without a rate there
            floor = None
    return CaseWork(step.flops, step.attention_flops, call, floor)
