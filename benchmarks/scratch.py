"""Scratch memory of plans at single sizes, which `engines.footprint` estimates from: `python -m benchmarks.scratch`.

The plans are compiled by TensorRT-RTX on a machine without a GPU, not run; the compiler says what they will need. What
it says of a plan for a range of sizes is in `results/builds.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import machine
from engines.shapes import Profile, Range
from engines.targets import TARGETS
from engines.tensorrt import compile_plan
from export.quantize import quantize
from export.recipes import RECIPES
from export.trace import trace
from flux2_trt.models import published_spec
from flux2_trt.spec import Component

RESULT = Path(__file__).parent / "results" / "scratch.json"
TARGET = "rtx4090"
CASES: Sequence[tuple[str, Component, str, tuple[int, ...]]] = (
    ("dev", "vae_decoder", "bf16", (512, 768, 1024, 1280, 1440, 1536, 1792, 2048)),
    ("dev", "vae_encoder", "bf16", (512, 1024, 1536, 2048)),
    ("klein-4b", "transformer", "fp8", (512, 1024, 2048)),
)


def profile_of(component: Component, model: str, side: int) -> Profile:
    """Square pictures of `side` pixels, one at a time."""
    spec = published_spec(model)
    latent = side // spec.autoencoder.pixels_per_token
    text = spec.prompt.max_length if spec.prompt else 0
    sides = {"batch": 1}
    if component == "transformer":
        sides |= {"tokens": latent**2, "text_tokens": text, "all_tokens": latent**2 + text}
    else:
        sides |= {"latent_height": latent, "latent_width": latent, "height": side, "width": side}
    return {name: Range(size, size, size) for name, size in sides.items()}


def main(output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULT) -> None:
    """Compile every case at every size and write what the compiler says."""
    found = []
    for model, component, precision, sizes in CASES:
        recipe = RECIPES[precision]
        graph = quantize(trace(component, published_spec(model), recipe.dtype), recipe)
        for side in sizes:
            compiled = compile_plan(graph, [profile_of(component, model, side)], TARGETS[TARGET])
            size = compiled.report.scratch_bytes
            case = {"model": model, "component": component, "precision": precision, "side": side}
            found.append({**case, "scratch_bytes": size})
            print(f"{model} {component} {precision} {side}x{side}: {size / 1e9:.3f} GB", flush=True)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "packages": {name: version(name) for name in ("flux2-trt", "tensorrt-rtx-cu13")},
        "target": TARGET,
        "scratch": found,
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
