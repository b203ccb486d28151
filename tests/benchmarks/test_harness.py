"""The harness with `tiny` itself: turns, what is kept, and pipelines that were made slow or wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_stand_ins import CASE, LocalWorker, altered, protocol

from benchmarks.harness.case import Case
from benchmarks.harness.comparison import compare
from benchmarks.harness.harness import Harness
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.monitor import Monitor
from benchmarks.harness.ours import PipelineSystem
from benchmarks.harness.result import Result, read_result
from benchmarks.harness.system import Drawn, Job
from flux2_trt.errors import Flux2Error
from flux2_trt.pipeline import Flux2Pipeline

IDENTITY: dict[str, Any] = {"machine": {}, "software": {}, "model": {"name": "tiny"}}


class Diary:
    """A system that draws nothing, and says when it was asked. `fails`: in the call of that number."""

    def __init__(self, name: str, entries: list[str], fails: int | None = None, error: Any = None) -> None:
        self.name, self.entries, self.fails, self.error = name, entries, fails, error
        self.calls = 0

    def draw(self, job: Job, watched: bool) -> Drawn:
        self.calls += 1
        self.entries.append(f"{self.name}{'*' if watched else ''}")
        if self.calls == self.fails:
            raise self.error
        return Drawn(np.zeros((job.case.batch, 8, 8, 3), np.uint8), {"denoise": 0.001})

    def facts(self) -> dict[str, Any]:
        return {"precision": "fp32"}


def harness(systems: dict[str, Any], pipeline: Flux2Pipeline, reference: str | None = None, **values: Any) -> Harness:
    workers = [LocalWorker(name, system) for name, system in systems.items()]
    save = values.pop("save", lambda result: None)
    first = next(iter(systems))
    how = protocol(**values)
    return Harness(
        workers, Inputs(pipeline), how, first, reference or first, IDENTITY, {}, monitor=Monitor(), save=save
    )


def test_systems_take_turns_forwards_and_backwards(tiny: Flux2Pipeline) -> None:
    entries: list[str] = []
    names = ("plans:fp32", "torch", "diffusers")
    systems = {name: Diary(name[0], entries) for name in names}
    harness(systems, tiny, warmup=2, repeats=4, watched=1).run()
    assert "".join(entries) == "ptd" + "dtp" + "ptddtp" * 2 + "p*t*d*"


def test_every_scenario_is_measured_with_its_work(tiny: Flux2Pipeline) -> None:
    systems = {name: Diary("x", []) for name in ("plans:fp32", "plans:fp8", "diffusers")}
    scenarios = ("single-stream", "offline", "sweep")
    result = harness(systems, tiny, "diffusers", scenarios=scenarios, repeats=8).run()
    assert result.stopped is None
    assert {each.system for each in result.of("single-stream")} == set(systems)
    assert [each.case.batch for each in result.of("offline")] == [2, 2, 2]
    swept = {(each.case, each.system) for each in result.of("sweep")}
    assert {system for _, system in swept} == {"plans:fp32", "diffusers"}
    assert {case for case, _ in swept} == {
        CASE,
        Case(192, 192, 2),
        Case(128, 128, 1),
        Case(128, 128, 2, 1),
        Case(128, 128, 2, 0, 2),
    }
    works = {each.case: each.work.step for each in result.of("sweep")}
    assert works[Case(128, 128, 2, 0, 2)] == 2 * works[CASE] > works[Case(192, 192, 2)] * 0.5
    assert all(each.peak_host_bytes for each in result.measurements)


def test_an_interrupted_run_keeps_what_was_measured(tiny: Flux2Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    systems = {"plans:fp32": Diary("p", []), "torch": Diary("t", [], fails=4, error=KeyboardInterrupt())}
    result = harness(systems, tiny, repeats=6, save=lambda result: result.write(path)).run()
    assert read_result(path) == result and result.stopped == "interrupted"
    assert [len(each.samples) for each in result.measurements] == [3, 2]


def test_a_run_that_is_terminated_is_on_disk_before_it_ends(tiny: Flux2Pipeline) -> None:
    saved: list[Result] = []
    systems = {"plans:fp32": Diary("p", [], fails=3, error=SystemExit(143))}
    with pytest.raises(SystemExit):
        harness(systems, tiny, repeats=6, save=saved.append).run()
    assert saved[-1].stopped == "interrupted" and len(saved[-1].measurements[0].samples) == 1


def test_a_system_that_fails_is_named_and_the_others_go_on(tiny: Flux2Pipeline) -> None:
    error = Flux2Error("out of memory")
    systems = {"plans:fp32": Diary("p", []), "torch": Diary("t", [], fails=3, error=error)}
    result = harness(systems, tiny, repeats=4).run()
    assert {each.system: len(each.samples) for each in result.measurements} == {"plans:fp32": 4, "torch": 1}
    assert ("torch: single-stream, 128x128, 2 steps", "out of memory") in {(m.name, m.reason) for m in result.missing}


@pytest.fixture(scope="module")
def honest(tiny: Flux2Pipeline) -> Result:
    return measured(tiny)


def measured(pipeline: Flux2Pipeline, **alterations: float) -> Result:
    """Our plans, altered, and an unaltered pipeline as what they are held against."""
    systems = {
        "plans:fp32": PipelineSystem(pipeline.bundle, runtime=altered(pipeline, **alterations)),
        "torch": PipelineSystem(pipeline.bundle),
    }
    return harness(systems, pipeline, "torch", quality_count=1, repeats=6).run()


def test_a_slowed_pipeline_is_caught(tiny: Flux2Pipeline, honest: Result) -> None:
    """The wait is many times what a step of `tiny` takes, and only ever adds to it."""
    slow = measured(tiny, wait_seconds=0.25)
    found = compare(honest, slow)
    # The other pipeline may be found slower too, where the machine was busier meanwhile.
    assert any(each.text.startswith("plans:fp32 in single-stream") for each in found.worse)
    quality = [each for each in found.findings if "PSNR" in each.text or "latents" in each.text]
    assert quality and not any(each.worse for each in quality)


def test_a_wrong_pipeline_is_caught(tiny: Flux2Pipeline, honest: Result) -> None:
    found = compare(honest, measured(tiny, factor=1.02), threshold=10.0)  # its speed is not the question
    assert any("error of the final latents" in each.text for each in found.worse)
    assert any("PSNR" in each.text for each in found.worse)
    assert not any("times as long" in each.text for each in found.worse)


def test_our_pipeline_tells_of_its_stages_and_steps(honest: Result) -> None:
    ours = next(each for each in honest.measurements if each.system == "torch")
    assert {"conditioning", "denoise", "decode"} <= set(ours.samples[0].stages)
    assert "encode" not in ours.samples[0].stages and "text" not in ours.samples[0].stages
    [watched] = ours.watched
    assert {"text", "png"} <= set(watched.stages) and "watermark" not in watched.stages  # 128x128 carries none
    assert len(watched.steps) == len(watched.gaps) == CASE.steps
    assert all(0 <= gap < step for gap, step in zip(watched.gaps, watched.steps, strict=True))
    assert sum(watched.steps) <= watched.stages["denoise"] * 1.001
