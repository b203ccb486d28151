"""What the README says about builds for GPUs: `python -m benchmarks.builds`.

Every case is one `flux2-trt build` with synthetic weights, as a process of its own with a fresh store, on a machine
without a GPU: the plans are compiled, not run. Writes `results/builds.json`, with what the compiler says of kernels.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cpu import processor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("flux2-trt", "torch", "onnx", "onnxscript", "tensorrt-rtx-cu13")


@dataclass(frozen=True)
class Case:
    """One build."""

    model: str
    target: str
    precision: str
    components: str | None = None

    @staticmethod
    def of(text: str) -> Case:
        """From `model:target:precision[:component,component]`."""
        parts = text.split(":")
        if len(parts) not in (3, 4):
            raise typer.BadParameter(f"{text!r} is no model:target:precision[:components]")
        return Case(*parts)


CASES = (
    "dev:rtx4090:fp8",
    "dev:rtx5090:fp8",
    "dev:rtx4090:fp8-attention:transformer",
    "dev:rtx3090:bf16:transformer",
    "klein-4b:rtx4090:fp8",
    "klein-9b:rtx4090:fp8",
)


def measure(case: Case) -> dict[str, Any]:
    """The report of the build; its seconds and peak memory are its own."""
    with tempfile.TemporaryDirectory() as home:
        words = ["build", case.model, "--checkpoint", "random:0", "--target", case.target]
        words += ["--precision", case.precision, "--json", "--quiet"]
        words += ["--components", case.components] if case.components else []
        environment = {**os.environ, "FLUX2_TRT_HOME": home, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-m", "flux2_trt.cli", *words], env=environment, stdout=subprocess.PIPE)
        report = json.loads(done.stdout)
        if done.returncode:
            raise RuntimeError(f"flux2-trt {' '.join(words)}: {report['error']}")
        del report["bundle"]
        return {"command": f"flux2-trt {' '.join(words)}", **report}


def summary(report: dict[str, Any]) -> str:
    """One line of a table: what, seconds, memory, megabytes of plans, kernels of the transformer."""
    plans = sum(component["plan_bytes"] for component in report["components"]) / 1e6
    kernels = [
        f"{profile['gemms']} {profile['fused_attentions']}"
        for component in report["components"]
        if component["name"] == "transformer"
        for profile in component["layers"]["profiles"]
    ]
    return (
        f"{report['model']} {report['target']} {report['precision']}: {report['seconds']:.0f} s, "
        f"{report['peak_rss_bytes'] / 1e9:.2f} GB, plans {plans:.1f} MB, transformer {'; '.join(kernels)}"
    )


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="model:target:precision[:components].")] = None,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "builds.json",
) -> None:
    """Build every case and write what it took."""
    reports = []
    for case in cases or CASES:
        reports.append(measure(Case.of(case)))
        print(summary(reports[-1]), flush=True)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "platform": platform.platform()},
        "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "builds": reports,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
