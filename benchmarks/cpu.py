"""What the README says about speed on a CPU: `python -m benchmarks.cpu`.

Whole commands as a user types them (wall time, peak memory), and noise by itself. Writes one JSON file. Pictures beside
baselines are measured by `flux2-trt bench`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from flux2_trt.noise import noise_batch

PROMPT = "a large red circle on a blue background"
PACKAGES = ("flux2-trt", "torch", "diffusers", "onnxruntime", "numpy")
RESULTS = Path(__file__).parent / "results"


METER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - started
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""  # a small process of its own: a child counts the memory of the process that it was forked from


def measure_command(arguments: list[str], environment: dict[str, str], repeats: int) -> dict[str, Any]:
    """Wall seconds (all, median) of a command, and peak resident bytes of the largest of its processes."""
    seconds, peaks = [], []
    for _ in range(repeats):
        meter = [sys.executable, "-c", METER, *arguments]
        result = subprocess.run(meter, env=environment, capture_output=True, text=True)
        code, wall, peak = json.loads(result.stdout)
        if code:
            raise RuntimeError(f"{' '.join(arguments)} failed: {result.stderr}")
        seconds.append(wall)
        peaks.append(peak)
    return {
        "command": " ".join(arguments[1:]),
        "seconds": [round(value, 3) for value in seconds],
        "median_seconds": round(statistics.median(seconds), 3),
        "peak_rss_bytes": max(peaks),
    }


def measure_commands(home: Path, repeats: int) -> list[dict[str, Any]]:
    """The README's commands in a fresh store."""
    environment = {**os.environ, "FLUX2_TRT_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-m", "flux2_trt.cli"]
    rows = [measure_command([*program, "--help"], environment, repeats)]
    subprocess.run([*program, "build", "tiny", "--target", "cpu"], env=environment, check=True, capture_output=True)
    picture = str(home / "picture.png")
    run = [*program, "run", PROMPT, "--seed", "1", "-o", picture, "--overwrite"]
    rows.append(measure_command(run, environment, repeats))
    with tempfile.TemporaryDirectory() as fresh:
        cold = {**environment, "FLUX2_TRT_HOME": fresh}
        rows.append(measure_command([*program, "build", "tiny", "--target", "cpu"], cold, 1))
    return rows


def measure_noise(repeats: int) -> dict[str, float]:
    """Median seconds for the noise of one picture with 128 channels, by size in pixels."""
    medians = {}
    for side in (1024, 2048):
        seconds = []
        for seed in range(repeats):
            started = time.perf_counter()
            noise_batch([seed], 128, side // 16, side // 16)
            seconds.append(time.perf_counter() - started)
        medians[f"{side}x{side}"] = round(statistics.median(seconds), 4)
    return medians


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of every measurement.")] = 5,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "cpu.json",
) -> None:
    """Measure on this machine and write the result."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLUX2_TRT_HOME"] = home
        commands = measure_commands(Path(home), repeats)
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "commands": commands,
            "noise_median_seconds": measure_noise(repeats),
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
