"""What is asked for is checked before anything is built, and what is missing is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.measure import Asked, check, default_systems, measure
from benchmarks.harness.result import read_result
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.models import published_spec
from flux2_trt.pipeline import Flux2Pipeline

QUICK = Asked(
    systems=("plans:fp32", "plans:fp8", "sglang"),
    scenarios=("single-stream",),
    width=128,
    height=128,
    steps=1,
    repeats=2,
    warmup=1,
    quality_count=0,
    threads=1,
)


def test_by_default_everything_is_measured_that_there_is() -> None:
    systems = default_systems("cpu")
    assert systems[0] == "plans:fp32" and {"plans:nvfp4", "torch-compile", "diffusers", "sglang"} <= set(systems)
    assert "diffusers+control" in systems
    assert check(Asked()) == systems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": ("plans:fp32", "torchserve")}, "unknown system 'torchserve'; known are plans:PRECISION, torch,"),
        ({"systems": ("plans:bf16",)}, "plans:bf16 is not for this target; its precisions are fp32, fp8"),
        ({"systems": ("diffusers",)}, "none of diffusers is ours; give --systems plans:fp32,"),
        ({"target": "h900"}, "unknown target 'h900'"),
        ({"repeats": 0}, "--repeats is 0; it is at least 1"),
        ({"quality_count": -1}, "--quality-count is -1; it is at least 0"),
        ({"threads": 0}, "--threads is 0; it is at least 1"),
        ({"seed": -1}, "--seed is -1; it is at least 0"),
        ({"min_seconds": float("nan")}, "--min-seconds is nan; it is at least 0"),
        ({"threads": 4000}, "--threads is 4000, and this machine lets us use"),
        ({"pythons": {"sglang": "/python"}, "systems": ("plans:fp32",)}, "--python names sglang, which is not among"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        check(replace(Asked(), **change))
    assert message in str(error.value)


def test_a_picture_that_the_model_does_not_draw_is_refused() -> None:
    with pytest.raises(UsageError, match="1024"):
        replace(Asked(), width=1024).protocol(published_spec("tiny"))
    with pytest.raises(UsageError, match="--steps is 0"):
        replace(Asked(), steps=0).protocol(published_spec("tiny"))
    with pytest.raises(UsageError, match="1024"):
        replace(Asked(), sizes=((1024, 1024),)).protocol(published_spec("tiny"))


def test_a_run_names_what_is_missing_and_writes_the_rest(
    tiny: Flux2Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path / "home"))

    def build(model: str, target: str, precision: str, checkpoint: str | None) -> Path:
        if precision != "fp32":
            raise Flux2Error("no disk left")
        return tiny.bundle.path

    path = tmp_path / "result.json"
    found = measure(QUICK, path, build, lambda text: None)
    assert read_result(path) == found and found.stopped is None and found.primary == "plans:fp32"
    missing = {each.name: each.reason for each in found.missing}
    assert missing["plans:fp8"] == "no disk left"
    assert missing["sglang"].startswith("the package sglang is not installed: pip install")
    [ours] = found.of("single-stream")
    assert len(ours.samples) == 2 and ours.work.step > 10**8 and found.gemm is not None
    identity = found.identity
    assert identity["machine"]["processor"] and identity["software"]["packages"]["onnxruntime"]
    assert identity["model"]["bundle"] == tiny.bundle.manifest.key and identity["model"]["weights"]
    assert len(identity["inputs"]["noise"]) == 64 and found.options["seed"] == 1 and found.options["threads"] == 1


def test_without_any_bundle_there_is_nothing_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path))

    def build(*_: Any) -> Path:
        raise Flux2Error("building needs the package 'torch'")

    with pytest.raises(Flux2Error, match="no bundle to measure: building needs the package 'torch'"):
        measure(QUICK, tmp_path / "result.json", build, lambda text: None)
    assert not (tmp_path / "result.json").exists()
