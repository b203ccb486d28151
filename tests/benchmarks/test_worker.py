"""Workers: a process draws what it would have drawn here, and says what went wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_stand_ins import CASE

from benchmarks.harness.inputs import Inputs
from benchmarks.harness.ours import PipelineSystem
from benchmarks.harness.system import Setup
from benchmarks.harness.worker import ProcessWorker, timed
from flux2_trt.errors import Flux2Error
from flux2_trt.pipeline import Flux2Pipeline

PROMPT = "a large red circle on a blue background"
FP32 = 5e-4  # other kernels, and a text encoder, through 8 steps at most


@pytest.fixture(scope="module")
def inputs(tiny: Flux2Pipeline) -> Inputs:
    return Inputs(tiny)


@pytest.fixture(scope="module")
def worker(tiny: Flux2Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    setup = Setup("plans:fp32", "tiny", None, str(tiny.bundle.path))
    made = ProcessWorker(setup, tmp_path_factory.mktemp("worker"), threads=1)
    yield made
    made.close()


def test_a_process_draws_the_same_and_its_memory_is_its_own(
    worker: ProcessWorker, tiny: Flux2Pipeline, inputs: Inputs
) -> None:
    job = inputs.job(replace(CASE, references=1), PROMPT, 1)
    here, there = PipelineSystem(tiny.bundle).draw(job, True), worker.draw(job, watched=True)
    assert np.array_equal(there.drawn.pictures, here.pictures)
    assert len(there.drawn.latents) == CASE.steps
    assert all(np.array_equal(a, b) for a, b in zip(there.drawn.latents, here.latents, strict=True))
    assert "encode" in there.drawn.stages
    assert there.seconds > 0 and there.cpu_seconds > 0
    if there.peak_host_bytes is not None:
        # torch, which this process has loaded, is not in that one
        peak = timed(PipelineSystem(tiny.bundle), job, False).peak_host_bytes
        assert peak is not None and 5e7 < there.peak_host_bytes < peak


def test_it_has_so_many_cores_and_says_what_it_is(worker: ProcessWorker, tiny: Flux2Pipeline) -> None:
    if hasattr(os, "sched_getaffinity"):
        assert len(os.sched_getaffinity(worker.pid)) == 1
    assert worker.facts["bundle"] == tiny.bundle.manifest.key and worker.facts["weights_bytes"] > 10**7
    assert worker.load_seconds > 0


def test_pictures_are_those_of_diffusers_with_the_same_weights_embeds_and_noise(
    tiny: Flux2Pipeline, inputs: Inputs
) -> None:
    from benchmarks.harness.theirs import DiffusersSystem

    theirs = DiffusersSystem.load(Setup("diffusers", "tiny", None, None))
    for references in (0, 1):
        job = inputs.job(replace(CASE, references=references), PROMPT, 1)
        ours, other = PipelineSystem(tiny.bundle).draw(job, True), theirs.draw(job, True)
        assert np.abs(ours.pictures.astype(int) - other.pictures.astype(int)).max() <= 1
        for a, b in zip(ours.latents, other.latents, strict=True):
            assert np.linalg.norm(a - b) < FP32 * np.linalg.norm(b)
        assert set(other.stages) == {"denoise", "decode"} | ({"encode"} if references else set())
        assert len(other.steps) == len(other.gaps) == CASE.steps


def test_a_batch_is_of_that_many_pictures_for_both(tiny: Flux2Pipeline, inputs: Inputs) -> None:
    from benchmarks.harness.theirs import DiffusersSystem

    job = inputs.job(replace(CASE, batch=2), PROMPT, 1)
    ours = PipelineSystem(tiny.bundle).draw(job, False).pictures
    other = DiffusersSystem.load(Setup("diffusers", "tiny", None, None)).draw(job, False).pictures
    assert ours.shape == other.shape == (2, 128, 128, 3)
    assert np.abs(ours.astype(int) - other.astype(int)).max() <= 1 and (ours[0] != ours[1]).any()


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(Flux2Error, match="no-bundle"):
        ProcessWorker(Setup("plans:fp32", "tiny", None, str(tmp_path / "no-bundle")), tmp_path, 1)
    with pytest.raises(Flux2Error, match=r"sglang: the package sglang is not installed: pip install 'sglang\[diffu"):
        ProcessWorker(Setup("sglang", "tiny", None, None), tmp_path, 1)


def test_a_process_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(Flux2Error, match="plans:fp32 ended without an answer: no such module"):
        ProcessWorker(Setup("plans:fp32", "tiny", None, None), tmp_path, 1, str(program))


def test_a_failure_in_a_call_leaves_the_worker_to_go_on(worker: ProcessWorker, inputs: Inputs) -> None:
    job = inputs.job(CASE, PROMPT, 1)
    with pytest.raises(Flux2Error, match=r"latents .* do not fit"):
        worker.draw(replace(job, noise=job.noise[:, :3]))
    assert worker.draw(job).drawn.pictures.shape == (1, 128, 128, 3)
