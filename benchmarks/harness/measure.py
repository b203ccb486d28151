"""Measure: from what was asked on the command line to a result on disk."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Axes, Case, Scenario
from benchmarks.harness.gemm import measure_gemm, shapes_of
from benchmarks.harness.harness import Harness, Protocol, control_of
from benchmarks.harness.identity import identity
from benchmarks.harness.inputs import Inputs, prompt_of
from benchmarks.harness.monitor import Monitor
from benchmarks.harness.quality import tasks_of
from benchmarks.harness.result import Missing, Result
from benchmarks.harness.system import CONTROL, KINDS, PLANS, Setup, kind_of, why_missing
from benchmarks.harness.worker import ProcessWorker
from engines.targets import resolve_target
from flux2_trt.cores import usable_cores
from flux2_trt.errors import BundleError, Flux2Error, UsageError
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.spec import ModelSpec
from flux2_trt.store import Store

Build = Callable[[str, str, str, str | None], Path]
"""Model, target, precision and checkpoint to the folder of a bundle; raises Flux2Error."""

REFERENCES = ("diffusers-fp32", "diffusers", "torch", "plans:fp32")
"""What quality is measured against: the first of these that is there. Someone else's code comes first, in fp32."""


@dataclass(frozen=True)
class Asked:
    """What the user wants; None takes the default. `systems`: by name; `pythons`: the interpreters of some of them."""

    model: str = "tiny"
    checkpoint: str | None = None
    target: str = "auto"
    systems: tuple[str, ...] | None = None
    scenarios: tuple[Scenario, ...] = ("single-stream", "offline", "sweep")
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    offline_batch: int = 4
    sizes: tuple[tuple[int, int], ...] | None = None
    sweep_steps: tuple[int, ...] | None = None
    references: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    full_sweep: bool = False
    repeats: int = 30
    sweep_repeats: int = 5
    warmup: int = 2
    min_seconds: float = 0.0
    quality_count: int = 10
    threads: int | None = None
    seed: int = 1
    pythons: Mapping[str, str] | None = None

    def protocol(self, spec: ModelSpec) -> Protocol:
        """Raises UsageError for a picture that the model does not draw."""
        sampling, axes = spec.sampling, Axes.of(spec)
        default = Case(
            sampling.width if self.width is None else self.width,
            sampling.height if self.height is None else self.height,
            sampling.num_inference_steps if self.steps is None else self.steps,
        )
        axes = Axes(
            axes.sizes if self.sizes is None else self.sizes,
            axes.steps if self.sweep_steps is None else self.sweep_steps,
            axes.references if self.references is None else self.references,
            axes.batches if self.batches is None else self.batches,
            self.full_sweep,
        )
        for case in (default, *(axes.cases(default) if "sweep" in self.scenarios else ())):
            case.drawing(spec)
        return Protocol(
            prompt=prompt_of(spec),
            scenarios=self.scenarios,
            case=default,
            offline_batch=self.offline_batch,
            axes=axes,
            repeats=self.repeats,
            sweep_repeats=self.sweep_repeats,
            warmup=self.warmup,
            min_seconds=self.min_seconds,
            quality_count=self.quality_count,
            seed=self.seed,
        )


def default_systems(target: str) -> tuple[str, ...]:
    """Our plans in every precision of the target, and every baseline, one of them twice."""
    found = resolve_target(target)
    plans = [f"{PLANS}:{precision}" for precision in found.precisions]
    others = [name for name in KINDS if name != "diffusers-fp32" or found.compute_capability]  # on a CPU, all are
    return (*plans, *others, control_of("diffusers"))


def check(asked: Asked) -> tuple[str, ...]:
    """The systems, each known and once. Raises UsageError, before anything is built or loaded."""
    systems = default_systems(asked.target) if asked.systems is None else tuple(dict.fromkeys(asked.systems))
    precisions = resolve_target(asked.target).precisions
    for name in systems:
        kind_of(name)
        precision = name.removesuffix(f"+{CONTROL}").removeprefix(f"{PLANS}:")
        if name.startswith(f"{PLANS}:") and precision not in precisions:
            raise UsageError(f"{name} is not for this target; its precisions are {', '.join(precisions)}")
    if not any(name.startswith(f"{PLANS}:") for name in systems):
        raise UsageError(f"none of {', '.join(systems)} is ours; give --systems plans:{precisions[0]},... too")
    if unknown := [name for name in asked.pythons or {} if name not in systems]:
        raise UsageError(f"--python names {', '.join(unknown)}, which is not among the systems: {', '.join(systems)}")
    for name, value, least in (
        ("repeats", asked.repeats, 1),
        ("sweep-repeats", asked.sweep_repeats, 1),
        ("warmup", asked.warmup, 1),
        ("quality-count", asked.quality_count, 0),
        ("offline-batch", asked.offline_batch, 1),
        ("threads", 1 if asked.threads is None else asked.threads, 1),
        ("min-seconds", asked.min_seconds, 0),
        ("seed", asked.seed, 0),
    ):
        if not least <= value < 2**64:
            raise UsageError(f"--{name} is {value}; it is at least {least}")
    if asked.threads and asked.threads > usable_cores():
        raise UsageError(f"--threads is {asked.threads}, and this machine lets us use {usable_cores()} cores")
    return systems


def measure(asked: Asked, output: Path, build: Build, note: Callable[[str], None]) -> Result:
    """Everything; `output` is written again and again on the way. Raises Flux2Error where nothing can be measured."""
    from engines.sources import resolve_source

    systems, threads = check(asked), usable_cores() if asked.threads is None else asked.threads
    spec = resolve_source(asked.model, asked.checkpoint).spec
    protocol = asked.protocol(spec)
    monitor = Monitor.find()
    found = identity(monitor)  # the load average is that of before
    bundles, missing = _bundles(asked, systems, build, note)
    shapes = shapes_of(spec, protocol.case.drawing(spec))
    gemm = measure_gemm(shapes, threads)
    note(f"matrix products: {gemm}")
    inputs = Inputs(Flux2Pipeline.from_bundle(next(iter(bundles.values()))))
    inputs.prepare([protocol.prompt, *(task.prompt for task in tasks_of(spec, protocol.quality_count, protocol.case))])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flux2-bench-")))
        workers = []
        for name in systems:
            reason = None if name in (asked.pythons or {}) else why_missing(name)
            if name.startswith(f"{PLANS}:") and name not in bundles:
                continue
            if reason is None:
                note(f"loading {name}")
                bundle = bundles.get(name) or next(iter(bundles.values()))
                setup = Setup(name, asked.model, asked.checkpoint, str(bundle))
                python = (asked.pythons or {}).get(name, sys.executable)
                try:
                    worker = ProcessWorker(setup, folder, threads, python)
                except Flux2Error as error:
                    reason = str(error)
                else:
                    stack.callback(worker.close)
                    workers.append(worker)
            if reason is not None:
                note(f"{name} is missing: {reason}")
                missing.append(Missing(name, reason))
        names = [worker.name for worker in workers]
        primary = next((name for name in names if name.startswith(f"{PLANS}:")), None)
        if primary is None:
            raise Flux2Error("; ".join(each.reason for each in missing) or "none of our systems could be loaded")
        reference = next((name for name in REFERENCES if name in names), primary)
        options = {**asdict(asked), "systems": list(systems), "threads": threads, "reference": reference}
        options["target"] = resolve_target(asked.target).name
        harness = Harness(
            workers,
            inputs,
            protocol,
            primary,
            reference,
            {**found, "model": {"name": spec.name, **_weights(workers, primary)}},
            _plain(options),
            missing,
            gemm,
            monitor,
            save=lambda result: result.write(output),
            note=note,
        )
        return harness.run()


def _bundles(
    asked: Asked, systems: Iterable[str], build: Build, note: Callable[[str], None]
) -> tuple[dict[str, Path], list[Missing]]:
    """For each of our plans its bundle, built where it has to be; where it cannot be, the newest in the store."""
    target = resolve_target(asked.target).name
    bundles: dict[str, Path] = {}
    missing = []
    for name in systems:
        base = name.removesuffix(f"+{CONTROL}")
        if not base.startswith(f"{PLANS}:"):
            continue
        precision = base.removeprefix(f"{PLANS}:")
        try:
            bundles[name] = build(asked.model, target, precision, asked.checkpoint)
        except UsageError:
            raise
        except Flux2Error as problem:
            try:
                bundles[name] = Store().find(asked.model, target, precision, makes_pictures=True)
                note(f"{name} as it was built before: {problem}")
            except BundleError:
                missing.append(Missing(name, str(problem)))
    if not bundles:
        raise Flux2Error(f"no bundle to measure: {missing[0].reason}")
    return bundles, missing


def _weights(workers: Iterable[ProcessWorker], primary: str) -> dict[str, Any]:
    facts = next(worker.facts for worker in workers if worker.name == primary)
    return {"bundle": facts["bundle"], "weights": facts["weights"]}


def _plain(values: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(values, Mapping):
        return {str(name): _plain(value) for name, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values
