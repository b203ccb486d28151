"""Calibrate: the ranges of what quantized linears are given, from real prompts and pictures.

A picture is encoded and mixed with noise, (1 - sigma) * latents + sigma * noise, at several noise levels of the model's
own schedule, which is what the transformer sees along the flow of a perfect model. What it sees along its own, a few
trajectories show: prompts that are denoised from noise, every step and with guidance as in a picture. All pictures pass
one block after the other, so one block's weights are in memory at a time, beside the few that every step needs; each
step of the trajectories is one more pass over the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.passes import Noisy, Passes, Picture, TransformerPasses
from export.quantize import FP8_MAX
from export.rounding import SMALLEST_SCALE
from export.tensor_source import TensorSource
from flux2_trt.errors import Flux2Error
from flux2_trt.latents import position_ids, rotary_tables
from flux2_trt.naming import Family
from flux2_trt.pipeline import UNCONDITIONAL
from flux2_trt.schedule import sigmas
from flux2_trt.spec import ModelSpec
from flux2_trt.text import PromptTokenizer

SCHEMA_VERSION = 1
LEVELS_A_SAMPLE = 4

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class CalibrationSample:
    """A prompt, the picture [H, W, 3] that it asks for, and the reference pictures that it speaks of."""

    prompt: str
    picture: Pixels
    references: tuple[Pixels, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Input scales by the name of a linear's weight: the largest magnitude that was seen, over 448.

    `weights`: what they were measured with, as `engines.sources.ModelSource.identity` says it. `samples`: how many,
    and `trajectories`: of how many of them the prompt was denoised too.
    """

    model: str
    weights: Mapping[str, Any]
    samples: int
    input_scales: Mapping[str, float]
    trajectories: int = 0
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.part")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @staticmethod
    def read(path: Path) -> Calibration:
        """Raises Flux2Error for a file that is no calibration, or one with impossible scales."""
        advice = "make it again: flux2-trt calibrate"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            calibration = Calibration(**values)
            scales = calibration.input_scales.values()
            sound = all(type(scale) is float and 0 < scale < float("inf") for scale in scales) and bool(scales)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise Flux2Error(f"{path} is no calibration ({error}); {advice}") from error
        if calibration.schema_version != SCHEMA_VERSION or not sound:
            raise Flux2Error(f"{path} is no calibration that this version reads; {advice}")
        return calibration


def input_scales(
    spec: ModelSpec,
    open_family: Callable[[Family], TensorSource],
    tokenizer: PromptTokenizer,
    samples: Sequence[CalibrationSample],
    trajectories: int,
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Measure the input scales of all linears that a recipe may quantize, in fp32.

    `trajectories`: of how many samples, from the first on, the prompt is denoised too.
    """
    passes, generator = Passes(spec, open_family, device, on_progress), torch.Generator().manual_seed(0)
    prompts, sampling = [each.prompt for each in samples], spec.sampling
    guided = trajectories > 0 and sampling.guidance_kind == "classifier_free" and sampling.guidance_scale > 1
    with torch.no_grad():
        embeds = passes.prompt_embeds(tokenizer, [*prompts, UNCONDITIONAL] if guided else prompts)
        pictures = _pictures(passes, samples, embeds[: len(samples)])
        transformer = passes.transformer()
        transformer.velocities(_mixed(pictures, generator), on_progress)
        if trajectories:
            _denoise(transformer, pictures[:trajectories], embeds[-1:] if guided else None, generator)
    return {name: max(amax / FP8_MAX, SMALLEST_SCALE) for name, amax in passes.observer.largest.items()}


def _pictures(passes: Passes, samples: Sequence[CalibrationSample], embeds: Tensor) -> list[Picture]:
    encoder, spec, pictures = passes.vae_encoder(), passes.spec.transformer, []
    for each, row in zip(samples, embeds.split(1), strict=True):
        encoded = [
            encoder(torch.from_numpy(pixels[None]).to(passes.device)) for pixels in (each.picture, *each.references)
        ]
        grids = [(latents.shape[1], latents.shape[2]) for latents in encoded]
        picture, *references = (latents.flatten(1, 2) for latents in encoded)
        ids = position_ids(row.shape[1], *grids[0], grids[1:])
        tables = rotary_tables(ids, spec.axes_dim, spec.theta)
        cos, sin = (torch.from_numpy(table).to(passes.device) for table in tables)
        levels = sigmas(passes.spec.sampling.num_inference_steps, picture.shape[1]).astype(np.float32)
        pictures.append(Picture(picture, tuple(references), row, levels, cos, sin))
    return pictures


def _mixed(pictures: Sequence[Picture], generator: torch.Generator) -> list[Noisy]:
    """Every picture at `LEVELS_A_SAMPLE` noise levels, spread so that all samples together cover the schedule."""
    mixed = []
    for number, picture in enumerate(pictures):
        steps = len(picture.levels) - 1
        for part in range(min(LEVELS_A_SAMPLE, steps)):
            sigma = float(picture.levels[(number + part * steps // LEVELS_A_SAMPLE) % steps])
            mixed.append(Noisy(picture, torch.lerp(picture.latents, _noise(picture, generator), sigma), sigma))
    return mixed


def _denoise(
    transformer: TransformerPasses,
    pictures: Sequence[Picture],
    unconditional: Tensor | None,
    generator: torch.Generator,
) -> None:
    """The Euler loop of `flux2_trt.pipeline`, all pictures in step; `unconditional` embeds where they are guided."""
    passes = transformer.passes
    latents = [_noise(picture, generator) for picture in pictures]
    steps = passes.spec.sampling.num_inference_steps
    for step in range(steps):
        passes.on_progress(f"transformer, step {step + 1} of {steps} from noise")
        noisy = [Noisy(p, x, float(p.levels[step])) for p, x in zip(pictures, latents, strict=True)]
        if unconditional is not None:
            noisy += [replace(each, picture=replace(each.picture, embeds=unconditional)) for each in noisy]
        velocities = transformer.velocities(noisy)
        if unconditional is not None:
            scale, half = passes.spec.sampling.guidance_scale, len(pictures)
            velocities = [torch.lerp(*pair, scale) for pair in zip(velocities[half:], velocities[:half], strict=True)]
        latents = [
            x + float(picture.levels[step + 1] - picture.levels[step]) * velocity
            for x, picture, velocity in zip(latents, pictures, velocities, strict=True)
        ]


def _noise(picture: Picture, generator: torch.Generator) -> Tensor:
    return torch.randn(picture.latents.shape, generator=generator).to(picture.latents.device)
