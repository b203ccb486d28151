"""Harness: systems take turns, and everything that was measured is kept as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from benchmarks.harness.case import Axes, Case, Scenario
from benchmarks.harness.floor import work_of_case
from benchmarks.harness.gemm import GemmRate
from benchmarks.harness.inputs import Inputs, digest
from benchmarks.harness.monitor import Monitor, Reading
from benchmarks.harness.quality import Gallery, compare, tasks_of, unscored
from benchmarks.harness.result import (
    SCHEMA,
    VERSION,
    CaseWork,
    Measurement,
    Missing,
    Quality,
    Result,
    Sample,
    SystemRecord,
    Watched,
)
from benchmarks.harness.system import CONTROL, kind_of, title_of
from benchmarks.harness.worker import Timed, Worker
from flux2_trt.cores import usable_cores
from flux2_trt.errors import Flux2Error

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Protocol:
    """How it is measured.

    `repeats`: timed calls of a system in a case, more where `min_seconds` have not gone by; `settle_seconds` before
    each, since threads of the system before it wait for work by spinning, for up to 0.1 s, on cores that it needs;
    `watched`: calls that are watched step by step after them; `quality_count`: samples of every kind, 0 for none.
    """

    prompt: str
    scenarios: tuple[Scenario, ...]
    case: Case
    offline_batch: int
    axes: Axes
    repeats: int = 30
    sweep_repeats: int = 5
    warmup: int = 2
    settle_seconds: float = 0.2
    watched: int = 3
    min_seconds: float = 0.0
    quality_count: int = 10
    seed: int = 1


@dataclass
class _Measuring:
    """A measurement as it grows."""

    system: str
    scenario: Scenario
    case: Case
    work: CaseWork
    samples: list[Sample] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    host_peaks: list[int] = field(default_factory=list)
    device_peaks: list[int] = field(default_factory=list)

    def add(self, timed: Timed, reading: Reading) -> None:
        self.samples.append(Sample(timed.seconds, dict(timed.drawn.stages), timed.cpu_seconds, reading.energy_joules))
        self.readings.append(reading)
        self.host_peaks += [timed.peak_host_bytes] if timed.peak_host_bytes is not None else []
        peaks = (timed.peak_device_bytes, reading.peak_device_bytes)
        self.device_peaks += [peak for peak in peaks if peak is not None]

    def finished(self) -> Measurement:
        clocks = [reading.clocks_mhz for reading in self.readings if reading.clocks_mhz]
        return Measurement(
            system=self.system,
            scenario=self.scenario,
            case=self.case,
            work=self.work,
            samples=tuple(self.samples),
            watched=tuple(self.watched),
            peak_host_bytes=max(self.host_peaks, default=None),
            peak_device_bytes=max(self.device_peaks, default=None),
            others_share=self._others_share(),
            clocks_mhz=(min(low for low, _ in clocks), max(high for _, high in clocks)) if clocks else None,
            throttling=tuple(sorted(set().union(*(reading.throttling for reading in self.readings)))),
        )

    def _others_share(self) -> float | None:
        others = [reading.others_seconds for reading in self.readings]
        if not others or None in others:
            return None
        wall = sum(reading.wall_seconds for reading in self.readings)
        return max(0.0, sum(filter(None, others)) / (wall * usable_cores()))


class Harness:
    """Measures `workers`, of which `primary` is what the goals are about, and `reference` what quality is against.

    `save` gets the result so far, again and again. Ctrl-C, or SIGTERM, ends the run with what was measured until then.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        inputs: Inputs,
        protocol: Protocol,
        primary: str,
        reference: str,
        identity: Mapping[str, Any],
        options: Mapping[str, Any],
        missing: Iterable[Missing] = (),
        gemm: GemmRate | None = None,
        monitor: Monitor | None = None,
        save: Callable[[Result], None] = lambda result: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._workers = list(workers)
        self._inputs, self._protocol = inputs, protocol
        self._primary, self._reference = primary, reference
        self._identity, self._options, self._gemm = identity, options, gemm
        self._missing = list(missing)
        self._monitor = monitor or Monitor()
        self._save, self._note = save, note
        self._created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._first: dict[str, float] = {}
        self._measuring: list[_Measuring] = []
        self._quality: list[Quality] = []
        if not self._monitor.has_gpu:
            self._missing.append(Missing("energy, clocks and throttling", "NVML knows no GPU here"))

    def run(self) -> Result:
        stopped: str | None = None
        try:
            for title, measure in self._parts():
                self._note(title)
                measure()
                self._save(self.result("not finished"))
        except KeyboardInterrupt:
            stopped = INTERRUPTED
        except SystemExit:
            self._save(self.result(INTERRUPTED))
            raise
        result = self.result(stopped)
        self._save(result)
        return result

    def _parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is measured, in the order of importance."""
        protocol = self._protocol
        if "single-stream" in protocol.scenarios:
            yield f"single-stream: {protocol.case.title}", lambda: self._measure("single-stream", protocol.case)
        if protocol.quality_count:
            yield "quality", self._measure_quality
        if "offline" in protocol.scenarios:
            case = Case(protocol.case.width, protocol.case.height, protocol.case.steps, 0, protocol.offline_batch)
            yield f"offline: {case.title}", lambda: self._measure("offline", case)
        if "sweep" in protocol.scenarios:
            for each in protocol.axes.cases(protocol.case):
                yield f"sweep: {each.title}", lambda case=each: self._measure("sweep", case)  # type: ignore[misc]

    def result(self, stopped: str | None) -> Result:
        return Result(
            schema=SCHEMA,
            version=VERSION,
            created=self._created,
            stopped=stopped,
            identity={**self._identity, "inputs": self._input_hashes()},
            options=self._options,
            primary=self._primary,
            gemm=self._gemm,
            systems=tuple(map(self._record, self._workers)),
            missing=tuple(self._missing),
            measurements=tuple(each.finished() for each in self._measuring if each.samples or each.watched),
            quality=tuple(self._quality),
        )

    def _input_hashes(self) -> dict[str, str]:
        job = self._job(self._protocol.case)
        return {"prompt": job.prompt, "embeds": digest(job.embeds), "noise": digest(job.noise)}

    def _record(self, worker: Worker) -> SystemRecord:
        kind = kind_of(worker.name)
        return SystemRecord(
            name=worker.name,
            title=title_of(worker.name),
            track=kind.track,
            same_latents=kind.same_latents,
            facts=worker.facts,
            load_seconds=worker.load_seconds,
            first_seconds=self._first.get(worker.name),
            loaded_host_bytes=worker.loaded_host_bytes,
        )

    def _job(self, case: Case) -> Any:
        return self._inputs.job(case, self._protocol.prompt, self._protocol.seed)

    def _measure(self, scenario: Scenario, case: Case) -> None:
        """One case: warm-up, then rounds in which every system has its turn, forwards and backwards, then watched."""
        protocol, job = self._protocol, self._job(case)
        running: dict[str, tuple[Worker, _Measuring]] = {}
        for worker in self._taking_part(scenario):
            with self._failing(worker, f"{scenario}, {case.title}"):
                seconds = worker.draw(job).seconds
                if worker.name not in self._first:
                    self._first[worker.name] = seconds
                    self._note(f"{worker.name}: the first call took {seconds:.1f} s")
                target = str(worker.facts.get("target", self._options.get("target")))
                work = work_of_case(self._inputs.spec, case, target, str(worker.facts.get("precision")))
                running[worker.name] = (worker, _Measuring(worker.name, scenario, case, work))
        for index in range(1, protocol.warmup):  # in turns too: what compiled first has waited for the others
            for name in _turn(list(running), index):
                with self._failing(running[name][0], f"{scenario}, {case.title}", running):
                    running[name][0].draw(job)
        self._measuring += [measuring for _, measuring in running.values()]
        rounds = self._rounds(scenario, case)
        least = protocol.min_seconds if scenario == "single-stream" else 0.0
        begun, index = time.monotonic(), 0
        while running and (index < rounds or time.monotonic() - begun < least):
            for worker, measuring in self._settled(running, index):
                with self._failing(worker, f"{scenario}, {case.title}", running):
                    with self._monitor.watch(worker.pid) as reading:
                        timed = worker.draw(job)
                    measuring.add(timed, reading)
            index += 1
        for index in range(protocol.watched if scenario != "offline" else 0):
            for worker, measuring in self._settled(running, index):
                with self._failing(worker, f"watched, {case.title}", running):
                    drawn = worker.draw(job, watched=True).drawn
                    measuring.watched.append(Watched(dict(drawn.stages), drawn.steps, drawn.gaps))

    def _settled(
        self, running: Mapping[str, tuple[Worker, _Measuring]], index: int
    ) -> Iterator[tuple[Worker, _Measuring]]:
        """Each in its turn, once the threads of the one before have had the time to sleep."""
        for name in _turn(list(running), index):
            time.sleep(self._protocol.settle_seconds)
            yield running[name]

    def _taking_part(self, scenario: Scenario) -> list[Worker]:
        """In a sweep, the primary and the reference: neither compiles anew, and precision changes no growth."""
        if scenario != "sweep":
            return self._workers
        return [worker for worker in self._workers if worker.name in (self._primary, self._reference)]

    def _rounds(self, scenario: Scenario, case: Case) -> int:
        if scenario == "offline":
            return max(3, -(-self._protocol.repeats // (2 * case.batch)))
        return self._protocol.repeats if scenario == "single-stream" else self._protocol.sweep_repeats

    @contextmanager
    def _failing(self, worker: Worker, what: str, running: dict[str, Any] | None = None) -> Iterator[None]:
        """A system that fails is named as missing, and the others go on."""
        try:
            yield
        except Flux2Error as error:
            self._missing.append(Missing(f"{worker.name}: {what}", str(error)))
            self._note(f"{worker.name} failed in {what}: {error}")
            if running is not None:
                running.pop(worker.name, None)

    def _measure_quality(self) -> None:
        """The reference draws first; then each system is compared as soon as it has drawn."""
        case = self._protocol.case
        self._missing += unscored(self._inputs.spec)
        tasks = tasks_of(self._inputs.spec, self._protocol.quality_count, case)
        galleries: dict[str, Gallery] = {}
        order = sorted(self._workers, key=lambda worker: worker.name != self._reference)
        for worker in order:
            if not kind_of(worker.name).same_latents:
                continue
            gallery = Gallery()
            reads = kind_of(worker.name).needs != "diffusers" and self._inputs.spec.text_encoder is not None
            with self._failing(worker, "quality"):
                for task in tasks:
                    gallery.add(worker.draw(task.job(self._inputs, case, reads), watched=True).drawn)
                galleries[worker.name] = gallery
                reference = galleries.get(self._reference)
                if reference is not None:
                    self._quality.append(compare(worker.name, self._reference, tasks, gallery, reference))


def _turn(names: list[str], index: int) -> list[str]:
    """A, B, C, then C, B, A: what drifts while they take turns drifts for all alike."""
    return names if index % 2 == 0 else names[::-1]


def control_of(name: str) -> str:
    """The name of a system that is measured twice, to see what noise does."""
    return f"{name}+{CONTROL}"
