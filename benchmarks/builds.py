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
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from flux2_trt.models import published_spec

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("flux2-trt", "torch", "onnx", "onnxscript", "tensorrt-rtx-cu13")


@dataclass(frozen=True)
class Case:
    """One build. `model`: a published name, or "dev@1+2" for one with so many double and single blocks."""

    model: str
    target: str
    precision: str
    options: Mapping[str, str]

    @staticmethod
    def of(text: str) -> Case:
        """From `model:target:precision[:option=value]...`, options as those of `flux2-trt build`."""
        parts = text.split(":")
        options = dict(part.split("=", 1) for part in parts[3:] if "=" in part)
        if len(parts) != 3 + len(options):
            raise typer.BadParameter(f"{text!r} is no model:target:precision[:option=value]")
        model, target, precision, *_ = parts
        return Case(model, target, precision, options)

    def words(self, folder: Path) -> list[str]:
        """The command, with a diffusers folder below `folder` where the model has another depth."""
        name, _, depth = self.model.partition("@")
        model = shallow(name, depth, folder) if depth else name
        words = ["build", model, "--checkpoint", "random:0", "--target", self.target, "--precision", self.precision]
        return words + [word for option, value in self.options.items() for word in (f"--{option}", value)]


CASES = (
    "dev:rtx4090:fp8",
    "dev:rtx5090:fp8",
    "klein-4b:rtx4090:fp8",
    "klein-9b:rtx4090:fp8",
    "dev:rtx4090:fp8-attention:components=transformer",
    "dev:rtx3090:bf16:components=transformer",
    "dev:rtx5090:nvfp4:components=transformer",
    "dev:rtx4090:fp8:components=transformer:plans=blocks",
    "dev@1+1:rtx5090:nvfp4:components=transformer:weights=bound",
    "dev@1+1:rtx5090:nvfp4:components=transformer:weights=embedded",
    "dev@1+1:rtx4090:int4:components=transformer",
)


def shallow(name: str, depth: str, folder: Path) -> str:
    """A diffusers folder of the model at another depth, "1+2", without weights."""
    size = published_spec(name).transformer
    double_blocks, single_blocks = map(int, depth.split("+"))
    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {},
        "vae/config.json": {},
        "transformer/config.json": {
            "num_attention_heads": size.num_heads,
            "joint_attention_dim": size.context_dim,
            "guidance_embeds": size.guidance_embeds,
            "num_layers": double_blocks,
            "num_single_layers": single_blocks,
        },
    }
    model = folder / f"{name}-{double_blocks}-{single_blocks}"
    for file, values in configs.items():
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_text(json.dumps(values), encoding="utf-8")
    return str(model)


def measure(case: Case) -> dict[str, Any]:
    """The report of the build; its seconds and peak memory are its own."""
    with tempfile.TemporaryDirectory() as home:
        words = [*case.words(Path(home)), "--json", "--quiet"]
        environment = {**os.environ, "FLUX2_TRT_HOME": home, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-m", "flux2_trt.cli", *words], env=environment, stdout=subprocess.PIPE)
        report = json.loads(done.stdout)
        if done.returncode:
            raise RuntimeError(f"flux2-trt {' '.join(words)}: {report['error']}")
        del report["bundle"]
        words[1] = case.model
        return {"command": f"flux2-trt {' '.join(words)}", **report}


def summary(report: dict[str, Any]) -> str:
    """One line: what, seconds, memory, megabytes of plans, and the kernels of the transformer's plans."""
    plans = sum(component["plan_bytes"] for component in report["components"]) / 1e6
    kernels = [
        f"{profile['kernels']} kernels, {profile['gemms']} {profile['fused_attentions']} int4 {profile['fused_int4']}"
        for component in report["components"]
        if component["name"].startswith("transformer")
        for profile in component["layers"]["profiles"]
    ]
    return (
        f"{report['command'].removesuffix(' --json --quiet')}: {report['seconds']:.0f} s, "
        f"{report['peak_rss_bytes'] / 1e9:.2f} GB, plans {plans:.1f} MB, transformer {'; '.join(kernels)}"
    )


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="model:target:precision[:option=value]...")] = None,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "builds.json",
) -> None:
    """Build every case and write what it took."""
    reports = []
    for case in cases or CASES:
        reports.append(measure(Case.of(case)))
        print(summary(reports[-1]), flush=True)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "builds": reports,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
