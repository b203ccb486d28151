"""Systems and results to measure with: small, exact, and as fast or slow as a test wants."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.harness.case import Axes, Case
from benchmarks.harness.gemm import GemmRate
from benchmarks.harness.harness import Protocol
from benchmarks.harness.memory import peak_host_bytes
from benchmarks.harness.result import (
    SCHEMA,
    VERSION,
    CaseWork,
    Measurement,
    Quality,
    Result,
    Sample,
    SystemRecord,
    Watched,
)
from benchmarks.harness.system import Job, System
from benchmarks.harness.worker import Timed, timed
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.denoiser import Denoiser, HostLoop
from flux2_trt.runtime.engine import Arrays, Engine
from flux2_trt.runtime.host import HostRuntime

CASE = Case(128, 128, 2)


class LocalWorker:
    """A system in this process."""

    def __init__(self, name: str, system: System) -> None:
        self.name, self._system, self.pid = name, system, os.getpid()
        self.load_seconds, self.loaded_host_bytes = 0.0, peak_host_bytes()
        self.facts = system.facts()

    def draw(self, job: Job, watched: bool = False) -> Timed:
        return timed(self._system, job, watched)

    def close(self) -> None:
        pass


class AlteredRuntime(HostRuntime):
    """The runtime of a bundle, with a transformer that waits before each run, or whose latents are off."""

    wait_seconds = 0.0
    factor = 1.0

    def engine(self, component: Any) -> Engine:
        engine = super().engine(component)
        return _Altered(engine, self) if component == "transformer" else engine

    def denoiser(self) -> Denoiser:
        return HostLoop(self.engine("conditioning"), self.engine("transformer"))


class _Altered:
    def __init__(self, engine: Engine, runtime: AlteredRuntime) -> None:
        self._engine, self._runtime = engine, runtime

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        time.sleep(self._runtime.wait_seconds)
        outputs = self._engine.run(inputs)
        return outputs | {"updated_latents": outputs["updated_latents"] * np.float32(self._runtime.factor)}


def altered(pipeline: Flux2Pipeline, wait_seconds: float = 0.0, factor: float = 1.0) -> AlteredRuntime:
    runtime = AlteredRuntime(pipeline.bundle)
    runtime.wait_seconds, runtime.factor = wait_seconds, factor
    return runtime


def protocol(**values: Any) -> Protocol:
    """Small and quick; of single-stream alone where nothing else is said."""
    axes = Axes(((128, 128), (192, 192)), (1, 2), (0, 1), (1, 2))
    quick = Protocol(
        prompt="a large red circle on a blue background",
        scenarios=("single-stream",),
        case=CASE,
        offline_batch=2,
        axes=axes,
        repeats=4,
        sweep_repeats=1,
        warmup=1,
        settle_seconds=0.0,
        watched=1,
        quality_count=0,
    )
    return replace(quick, **values)


def measurement(system: str, seconds: list[float], **values: Any) -> Measurement:
    """Nine tenths of each call in the loop."""
    samples = tuple(Sample(each, {"denoise": 0.9 * each, "decode": 0.05 * each}, each, None) for each in seconds)
    watched = (Watched({"denoise": 0.9 * seconds[0], "png": 0.01}, (seconds[0] * 0.45,) * 2, (1e-4, 1e-4)),)
    work = CaseWork(step=2 * 10**9, attention=4 * 10**8, call=5 * 10**9, floor_seconds=None)
    found = Measurement(
        system, "single-stream", CASE, work, samples, watched, 2 * 10**8, None, 0.01, None, ()
    )  # fmt: skip
    return replace(found, **values)


def quality(system: str, error: float, **values: Any) -> Quality:
    scores = {"objects_colour": 1.0, "passed": 0.9}
    psnr = None if error == 0 else 50.0
    return replace(Quality(system, "diffusers", 30, 0, (error / 2, error), psnr, 0.999, None, None, scores), **values)


def record(name: str, track: Any = "exact") -> SystemRecord:
    facts = {"bundle": "0" * 64, "weights_bytes": 10**7, "compilers": ["onnxruntime 1"]}
    return SystemRecord(name, f"<{name}>", track, True, facts, 0.5, 0.3, 10**8)


def result(**values: Any) -> Result:
    """Ours twice as fast as diffusers, and something slower in fp8."""
    rng = np.random.default_rng(0)

    def around(seconds: float) -> list[float]:
        return [float(each) for each in seconds * (1 + 0.01 * rng.standard_normal(20))]

    machine = {"processor": "<a processor>", "cores": 2, "platform": "p", "load_average_before": 0.1, "gpu": None}
    software = {"python": "3", "packages": {"flux2-trt": "1"}, "compiler": None, "git": None}
    found = Result(
        schema=SCHEMA,
        version=VERSION,
        created="2026-01-01T00:00:00+00:00",
        stopped=None,
        identity={"machine": machine, "software": software, "model": {"name": "tiny"}, "inputs": {"noise": "n"}},
        options={"threads": 2, "repeats": 20},
        primary="plans:fp32",
        gemm=GemmRate(1e11, "numpy 2", "fp32", (64, 64, 64)),
        systems=(record("plans:fp32"), record("plans:fp8", "approximate"), record("diffusers")),
        missing=(),
        measurements=(
            measurement("plans:fp32", around(0.2)),
            measurement("plans:fp8", around(0.3)),
            measurement("diffusers", around(0.44)),
            measurement("plans:fp32", [0.8, 0.81, 0.8], scenario="offline", case=replace(CASE, batch=4)),
        ),
        quality=(quality("diffusers", 0.0), quality("plans:fp32", 0.0002), quality("plans:fp8", 0.03)),
    )
    return replace(found, **values)
