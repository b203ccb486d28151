"""Result: everything that a run of the benchmark measured, with what identifies it, as one JSON file.

The dataclasses are the schema: every field is there, none is unknown. A change of them is a new `VERSION`. Samples are
raw; what is derived from them (percentiles, ratios, fits) is derived when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Case, Scenario
from benchmarks.harness.gemm import GemmRate
from benchmarks.harness.record import RecordError, from_json
from benchmarks.harness.system import Track
from flux2_trt.errors import UsageError
from flux2_trt.outputs import write_file

SCHEMA = "flux2-trt/benchmark"
VERSION = 1


@dataclass(frozen=True)
class SystemRecord:
    """`facts`: what the system says of itself. `first_seconds`: the first call, which compiles where that is lazy."""

    name: str
    title: str
    track: Track
    same_latents: bool
    facts: Mapping[str, Any]
    load_seconds: float
    first_seconds: float | None
    loaded_host_bytes: int | None


@dataclass(frozen=True)
class Missing:
    """What was asked for, or would be measured, and is not: a system, a score, a device's figure; and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One timed call, from prompt embeds and noise to pixels; its stages as far as the system tells.

    Energy includes what the device takes when idle.
    """

    seconds: float
    stages: Mapping[str, float]
    cpu_seconds: float
    energy_joules: float | None


@dataclass(frozen=True)
class Watched:
    """One watched call: seconds of stages, of each step, and of the host gap in each step."""

    stages: Mapping[str, float]
    steps: tuple[float, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class CaseWork:
    """Operations of a step for all pictures of the case, of which `attention`, and of everything in a timed call.

    `floor_seconds`: of a step by the data sheet of the target (engines.roofline); None for one without, as a CPU.
    """

    step: int
    attention: int
    call: int
    floor_seconds: float | None


@dataclass(frozen=True)
class Measurement:
    """A system in a case. `others_share`: of the machine's cores, taken by other processes during the timed calls.

    `clocks_mhz`, `throttling`, device figures: of the GPU, where NVML tells.
    """

    system: str
    scenario: Scenario
    case: Case
    work: CaseWork
    samples: tuple[Sample, ...]
    watched: tuple[Watched, ...]
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    others_share: float | None
    clocks_mhz: tuple[int, int] | None
    throttling: tuple[str, ...]

    @property
    def seconds(self) -> list[float]:
        return [sample.seconds for sample in self.samples]

    def stage(self, name: str) -> list[float]:
        """Seconds of a stage in each call that tells: the timed ones, else the watched."""
        timed = [sample.stages[name] for sample in self.samples if name in sample.stages]
        return timed or [each.stages[name] for each in self.watched if name in each.stages]

    @property
    def step_seconds(self) -> list[float]:
        """Of the loop, divided by its steps, in each call; empty where the system does not tell of its loop. Pictures
        that are denoised one after the other count together, as those of a batch do."""
        return [seconds / self.case.steps for seconds in self.stage("denoise")]


@dataclass(frozen=True)
class Quality:
    """How far the pictures of a system are from the reference's, from the same latents.

    `latent_error_by_step`: norm of the difference over the norm, mean over pictures. `psnr_db`: the median of pictures
    that differ, None where all are identical. `scores`: shares in 0..1 by the judge of `tiny`; `lpips`, `clip`: None
    where the weights of these networks are not at hand.
    """

    system: str
    reference: str
    pictures: int
    identical: int
    latent_error_by_step: tuple[float, ...]
    psnr_db: float | None
    ssim: float | None
    lpips: float | None
    clip: float | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """`stopped`: why it is not complete; None where it is. `primary`: the system whose speed the goals are about."""

    schema: str
    version: int
    created: str
    stopped: str | None
    identity: Mapping[str, Any]
    options: Mapping[str, Any]
    primary: str
    gemm: GemmRate | None
    systems: tuple[SystemRecord, ...]
    missing: tuple[Missing, ...]
    measurements: tuple[Measurement, ...]
    quality: tuple[Quality, ...]

    def system(self, name: str) -> SystemRecord | None:
        return next((system for system in self.systems if system.name == name), None)

    def of(self, scenario: Scenario) -> list[Measurement]:
        return [each for each in self.measurements if each.scenario == scenario and each.samples]

    def write(self, path: Path) -> None:
        """Whole or not at all, in place of what is there. Raises Flux2Error where it cannot be written."""
        write_file(path, (json.dumps(asdict(self), indent=1) + "\n").encode(), overwrite=True)


def read_result(path: Path) -> Result:
    """Raises UsageError for a file that is missing, damaged, of another program, or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; give a file that flux2-trt bench wrote") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no result of flux2-trt bench: its schema is not {SCHEMA!r}")
    if values.get("version") != VERSION:
        raise UsageError(
            f"{path} has version {values.get('version')!r} of the schema, and this flux2-trt reads {VERSION}; "
            "measure again, or read it with the flux2-trt that wrote it"
        )
    try:
        return from_json(Result, values)
    except RecordError as error:
        raise UsageError(f"{path} is damaged: {error}; measure again") from None
