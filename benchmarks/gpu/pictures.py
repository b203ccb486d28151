"""Pictures of `tiny` on a GPU beside those of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness.quality import relative_error
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.gpu import GpuRuntime

PROMPT = "a large red circle on a blue background"
CALLS: tuple[dict[str, Any], ...] = (
    {"prompt": PROMPT, "seed": 3},
    {"prompt": "a green triangle to the left of a yellow square on a white background", "seed": 4},
    {"prompt": "a small blue star above a red square", "seed": 5, "width": 192, "height": 128},
    {"prompt": [PROMPT, "a yellow heart on a black background"], "seed": 6},
    {"prompt": "make the circle green", "seed": 7, "image": "first"},
)


@dataclass(frozen=True)
class Likeness:
    """`latent_error`: of the last latents, relative, the largest of all pictures; `psnr`: decibels, the smallest;
    `differing`: channels of pixels that differ by more than 8 of 255, the largest part."""

    latent_error: float
    psnr: float
    differing: float
    finite: bool


Drawn = list[tuple[Any, Any]]
"""Latents and pictures of each call."""


def draw(pipeline: Flux2Pipeline, first: Image.Image | None = None) -> Drawn:
    """`first`: the reference of the edit; the own first picture where None."""
    drawn: Drawn = []
    for call in CALLS:
        asked = dict(call)
        if "image" in asked:
            asked["image"] = first or drawn[0][1][0]
        latents = pipeline(**asked, output_type="latent").images
        drawn.append((latents, pipeline(**asked).images))
    return drawn


def compare(ours: Drawn, theirs: Drawn) -> Likeness:
    errors, ratios, parts, finite = [], [], [], True
    for (latents, pictures), (others, references) in zip(ours, theirs, strict=True):
        finite &= bool(np.isfinite(latents).all())
        errors.append(relative_error(latents, others))
        for one, other in zip(pictures, references, strict=True):
            difference = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
            parts.append(float((difference > 8).mean()))
            ratios.append(float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-9))))
    return Likeness(max(errors), min(ratios), max(parts), finite)


def likeness(runtime: GpuRuntime, reference: Drawn) -> Likeness:
    pipeline = Flux2Pipeline(runtime.bundle, runtime=runtime)
    return compare(draw(pipeline, reference[0][1][0]), reference)
