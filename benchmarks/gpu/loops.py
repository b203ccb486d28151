"""The denoising loop at real size: milliseconds a step, what the host costs, memory, and how far from the floor."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.device import TimedDevice
from engines.hardware import HARDWARE
from engines.roofline import floor_of
from export.recipes import RECIPES
from flux2_trt.drawing import DEFAULT_TEXT_TOKENS, MEGAPIXEL, Drawing
from flux2_trt.latents import position_ids
from flux2_trt.runtime.denoiser import Trajectory, untimed
from flux2_trt.runtime.gpu import GpuRuntime
from flux2_trt.schedule import sigmas
from flux2_trt.spec import ModelSpec
from flux2_trt.trajectory import Start, trajectory_of

STEPS = 8
FEW_STEPS = 2


@dataclass(frozen=True)
class Case:
    """`batch` pictures of `width` x `height`, each with `references` of 1 MP, or as the model takes them."""

    width: int
    height: int
    references: int = 0
    batch: int = 1

    def positions(self, spec: ModelSpec) -> NDArray[np.int64]:
        """Of its tokens and those of the longest prompt."""
        unit = spec.autoencoder.pixels_per_token
        return position_ids(_text_tokens(spec), self.height // unit, self.width // unit, self.grids(spec))

    def grids(self, spec: ModelSpec) -> list[tuple[int, int]]:
        area = min(MEGAPIXEL, spec.sampling.max_reference_area or MEGAPIXEL)
        side = math.isqrt(area) // spec.autoencoder.pixels_per_token
        return [(side, side)] * self.references


@dataclass(frozen=True)
class LoopTimes:
    """One loop. `step_ms`: the median on the device; `wait_ms`: the longest that the device waited between two steps;
    both None without graphs. `wall_step_ms`: on the host's clock, from loops of two lengths. `prepare_seconds`: of the
    first loop of this size: uploads, compiling, capturing. `used_bytes`: of device memory, all in all."""

    case: Case
    step_ms: float | None
    step_ms_all: list[float]
    wait_ms: float | None
    wall_step_ms: float
    prepare_seconds: float
    used_bytes: int
    floor_ms: float | None
    bound: str | None
    finite: bool

    @property
    def fraction_of_floor(self) -> float | None:
        return self.floor_ms / (self.step_ms or self.wall_step_ms) if self.floor_ms else None


def trajectory(spec: ModelSpec, case: Case, steps: int, seed: int = 0) -> Trajectory:
    """With random prompts, noise and references."""
    rng, unit = np.random.default_rng(seed), spec.autoencoder.pixels_per_token
    size, height, width = spec.transformer, case.height // unit, case.width // unit

    def start() -> Start:
        return Start(
            noise=rng.standard_normal((size.in_channels, height, width), np.float32),
            embeds=rng.standard_normal((_text_tokens(spec), size.context_dim), np.float32),
            references=tuple(rng.standard_normal((*grid, size.in_channels), np.float32) for grid in case.grids(spec)),
        )

    return trajectory_of(spec, [start() for _ in range(case.batch)], sigmas(steps, height * width), guidance=4.0)


def _text_tokens(spec: ModelSpec) -> int:
    return spec.prompt.max_length if spec.prompt else DEFAULT_TEXT_TOKENS


def measure(runtime: GpuRuntime, device: TimedDevice, case: Case, target: str, graphs: bool, free: int) -> LoopTimes:
    """`free`: bytes of the device before the runtime took any; `target`: whose floor it is held against."""
    spec, recipe = runtime.bundle.manifest.model, RECIPES[runtime.bundle.manifest.recipe]
    loop = runtime.denoiser()

    def seconds(steps: int) -> float:
        made = trajectory(spec, case, steps)
        started = time.perf_counter()
        found.append(loop.run(made, lambda *_: None, untimed))
        return time.perf_counter() - started

    found: list[np.ndarray] = []
    prepare = seconds(FEW_STEPS)
    device.forget_launches()
    few, many = seconds(FEW_STEPS), seconds(STEPS)
    ran, waits = device.milliseconds(STEPS) if graphs else ([], [])
    device.forget_launches()
    floor = None
    if target in HARDWARE:
        drawing = Drawing.of(spec, case.width, case.height, case.batch, case.references)
        floor = floor_of("transformer", spec, drawing, recipe, HARDWARE[target])
    return LoopTimes(
        case=case,
        step_ms=statistics.median(ran) if ran else None,
        step_ms_all=[round(each, 3) for each in ran],
        wait_ms=max(waits) if waits else None,
        wall_step_ms=(many - few) / (STEPS - FEW_STEPS) * 1e3,
        prepare_seconds=prepare,
        used_bytes=free - device.free_bytes(),
        floor_ms=floor.seconds * 1e3 if floor else None,
        bound=floor.bound if floor else None,
        finite=bool(np.isfinite(found[-1]).all()),
    )
