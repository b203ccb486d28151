"""What quantization costs: `python -m benchmarks.quantization`.

`tiny` with its trained weights in every precision, by ONNX Runtime: real FP8, NVFP4 and INT4 codes, multiplied in fp32.
NVFP4, for which it has no kernels, through the exact simulation of `export.simulation`.
The same seeds in each: the error of the latents after every step, PSNR and SSIM of the pictures against fp32, and the
judge's scores. Writes `results/quantization.json`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.tiny import draw
from engines.build import BuildRequest, build
from export.tiny.config import EvaluationConfig
from export.tiny.dataset import Sample
from export.tiny.evaluate import Pictures, held_out_scores
from flux2_trt.pipeline import Flux2Pipeline

RESULTS = Path(__file__).parent / "results"
REFERENCE = "fp32"
PRECISIONS = (REFERENCE, "fp8", "fp8-attention", "nvfp4", "int4")

Trajectory = list[NDArray[np.float32]]


def run(pipeline: Flux2Pipeline, config: EvaluationConfig) -> tuple[dict[str, float], list[Pictures], list[Trajectory]]:
    """Scores of the held-out samples, their pictures, and their latents after every step."""
    pictures: list[Pictures] = []
    trajectories: list[Trajectory] = []

    def generate(samples: Sequence[Sample], seeds: Sequence[int]) -> Pictures:
        for each, seed in zip(samples, seeds, strict=True):
            latents: Trajectory = []

            def keep(
                _pipeline: object, _step: int, _timestep: float, tensors: Mapping, kept: Trajectory = latents
            ) -> None:
                kept.append(tensors["latents"].copy())

            pictures.append(draw(pipeline, each, seed, config, keep))
            trajectories.append(latents)
        return np.stack(pictures[-len(samples) :])

    return held_out_scores(generate, config), pictures, trajectories


def compare(
    pictures: Sequence[Pictures], latents: Sequence[Trajectory], others: Sequence[Pictures], exact: Sequence[Trajectory]
) -> dict[str, Any]:
    """Against fp32: relative error of the latents by step, and of the pictures PSNR and SSIM (medians)."""
    steps = range(len(exact[0]))
    errors = [
        float(np.mean([relative_error(a[step], b[step]) for a, b in zip(latents, exact, strict=True)]))
        for step in steps
    ]
    pairs = list(zip(pictures, others, strict=True))
    same = sum(bool((a == b).all()) for a, b in pairs)
    psnr = [peak_signal_noise_ratio(b, a) for a, b in pairs if (a != b).any()]
    ssim = [structural_similarity(a, b, channel_axis=-1) for a, b in pairs]
    return {
        "latent_error_by_step": [round(error, 5) for error in errors],
        "identical_pictures": same,
        "psnr_db": round(float(np.median(psnr)), 2) if psnr else None,
        "ssim": round(float(np.median(ssim)), 4),
    }


def relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main(
    count: Annotated[int, typer.Option(help="Held-out samples of every kind.")] = 100,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "quantization.json",
) -> None:
    """Draw the same samples in every precision and compare."""
    config = EvaluationConfig(count=count)
    rows: dict[str, dict[str, Any]] = {}
    exact: tuple[list[Pictures], list[Trajectory]] = ([], [])
    with tempfile.TemporaryDirectory() as store:
        for precision in PRECISIONS:
            report = build(BuildRequest("tiny", "cpu", precision, output=Path(store)), lambda _: None)
            scores, pictures, latents = run(Flux2Pipeline.from_bundle(report.bundle), config)
            exact = exact if rows else (pictures, latents)
            rows[precision] = {
                "weights_bytes": report.weights_bytes,
                **compare(pictures, latents, *exact),
                "scores": scores,
            }
            print(precision, json.dumps(rows[precision]), flush=True)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "samples_of_every_kind": count,
        "num_inference_steps": config.num_inference_steps,
        "size": config.size,
        "precisions": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
