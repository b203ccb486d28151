"""`flux2-trt bench`: exit codes, one line of an error, files that are kept, and a small run from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from bench_stand_ins import result
from setuptools import find_packages
from setuptools.config.pyprojecttoml import read_configuration
from typer.testing import CliRunner, Result

from benchmarks.harness.result import read_result
from engines.build import BuildRequest, build
from flux2_trt.cli import app

ROOT = Path(__file__).parents[1]
SMALL = [
    "--systems", "plans:fp32,diffusers,sglang", "--width", "128", "--height", "128", "--steps", "2",
    "--sizes", "128x128", "--sweep-steps", "1,2", "--references", "0,1", "--batches", "1", "--repeats", "2",
    "--sweep-repeats", "1", "--warmup", "1", "--quality-count", "1", "--threads", "1",
]  # fmt: skip


def bench(*arguments: str | Path) -> Result:
    found = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert "Traceback" not in found.output
    return found


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A result, and one of which ours is slower."""
    monkeypatch.chdir(tmp_path)
    good, slow = tmp_path / "good.json", tmp_path / "slow.json"
    result().write(good)
    measurements = []
    for each in result().measurements:
        factor = 2.0 if each.system == "plans:fp32" else 1.0
        samples = tuple(replace(sample, seconds=factor * sample.seconds) for sample in each.samples)
        measurements.append(replace(each, samples=samples))
    result(measurements=tuple(measurements), options={"threads": 1, "repeats": 20}).write(slow)
    return good, slow


def test_compare_says_what_is_slower_and_exits_with_1(files: tuple[Path, Path]) -> None:
    found = bench("compare", *files)
    assert found.exit_code == 1
    [error] = found.stderr.splitlines()
    assert error.startswith("error: B is worse than A: plans:fp32 in single-stream, 128x128, 2 steps: B takes 2.000")
    assert "differs: options.threads: 2 in A, 1 in B" in found.stdout.splitlines()
    assert bench("compare", files[0], files[0]).exit_code == 0
    assert bench("compare", files[1], files[0]).exit_code == 0
    assert bench("compare", *files, "--threshold", "150").exit_code == 0


def test_compare_as_json_is_one_object(files: tuple[Path, Path]) -> None:
    found = bench("compare", *files, "--json")
    values = json.loads(found.stdout)
    assert found.exit_code == values["exit_code"] == 1 and found.stderr == ""
    assert values["error"].startswith("B is worse than A") and values["worse"]
    assert json.loads(bench("compare", files[0], files[0], "--json").stdout)["worse"] == []


def test_what_is_no_result_is_refused_by_each_command(files: tuple[Path, Path], tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_bytes(files[0].read_bytes()[:-300])
    other.write_text(json.dumps(json.loads(files[0].read_text()) | {"version": 99}), encoding="utf-8")
    for arguments in (("compare", files[0], broken), ("report", broken, "-o", "r.html")):
        found = bench(*arguments)
        assert found.exit_code == 2 and "broken.json cannot be read" in found.stderr
    found = bench("compare", files[0], other)
    assert found.exit_code == 2 and "has version 99 of the schema" in found.stderr
    assert not (tmp_path / "r.html").exists()
    found = bench("compare", *files, "--threshold", "-1")
    assert found.exit_code == 2 and "--threshold is -1; give percent from 0" in found.stderr


def test_report_writes_a_page_and_keeps_one_that_is_there(files: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = bench("report", *files, "-o", page)
    assert found.exit_code == 0 and found.stdout == f"{page}\n"
    assert "<h2>Beside other results</h2>" in page.read_text(encoding="utf-8")
    found = bench("report", files[0], "-o", page)
    assert found.exit_code == 2 and "report.html exists and is kept" in found.stderr
    assert bench("report", files[0], "-o", page, "--overwrite").exit_code == 0
    found = bench("report", files[0], "-o", tmp_path / "no" / "r.html")
    assert found.exit_code == 2 and "is no folder" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "plans:fp32,vllm"], "unknown system 'vllm'; known are plans:PRECISION, torch"),
        (["--scenarios", "server"], "unknown scenario server; known are"),
        (["--sizes", "big"], "'big' is no size"),
        (["--batches", "0"], "'0' is no list of whole numbers from 1"),
        (["--model", "sdxl"], "sdxl"),
        (["--python", "sglang"], "--python 'sglang' is no SYSTEM=INTERPRETER"),
        (["--width", "1000"], "1000"),
        (["-o", "no/such/folder.json"], "is no folder"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_built(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path / "home"))
    found = bench(*arguments)
    assert found.exit_code == 2 and message in found.stderr and len(found.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.harness.comparison")
    monkeypatch.setitem(sys.modules, "benchmarks.harness.comparison", None)
    found = bench("compare", *files)
    assert found.exit_code == 1 and "pip install 'flux2-trt[benchmark]'" in found.stderr


def test_one_command_measures_and_reports(tmp_path: Path) -> None:
    """As a process, which is interrupted when it has measured something, and then run to its end."""
    build(BuildRequest("tiny", "cpu", output=tmp_path / "home"), lambda message: None)
    environment = {
        **os.environ,
        "FLUX2_TRT_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "flux2_trt.cli", "bench", *SMALL, "--json"]
    many = [*command, "-o", "cut.json", "--repeats", "100000"]
    running = subprocess.Popen(
        many,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored under a shell's &
    )
    try:
        assert running.stderr is not None
        for text in running.stderr:
            if text.startswith("single-stream"):
                break
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(timeout=15)
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == json.loads(said)["exit_code"] == 130
    assert json.loads(said)["error"] == "interrupted; cut.json has what was measured until then"
    cut = read_result(tmp_path / "cut.json")
    assert cut.stopped == "interrupted" and (tmp_path / "cut.html").exists()
    assert all(len(each.samples) > 1 for each in cut.of("single-stream"))

    done = subprocess.run([*command, "-o", "whole.json"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert set(values["seconds"]) == {"plans:fp32", "diffusers"} and values["stopped"] is None
    assert "sglang" in values["missing"] and values["goals"][0]["found"] > 0
    whole = read_result(tmp_path / "whole.json")
    assert {each.system: each.identical for each in whole.quality if each.system == "diffusers"} == {"diffusers": 3}
    assert {each.scenario for each in whole.measurements} == {"single-stream", "offline", "sweep"}
    assert "<h2>Growth</h2>" in (tmp_path / "whole.html").read_text(encoding="utf-8")


def test_the_package_that_is_installed_has_the_command() -> None:
    config = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    packages = find_packages(str(ROOT), include=config["packages"]["find"]["include"])
    assert {"benchmarks", "benchmarks.harness", "benchmarks.report"} <= set(packages)
    assert all((ROOT / "benchmarks" / file).is_file() for file in config["package-data"]["benchmarks"])
