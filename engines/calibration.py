"""Calibration of a model, from pictures with their prompts or `tiny`'s own scenes, and the scales of a build."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.sources import ModelSource, resolve_source
from export.calibrate import Calibration, CalibrationSample, Pixels, input_scales
from export.conversion import NO_SCALES, Scales
from export.quantize import FP8_MAX
from export.recipes import QUANTIZED_LINEARS, Recipe
from flux2_trt.errors import UsageError
from flux2_trt.images import as_reference, load_reference
from flux2_trt.inventory import expected_tensors
from flux2_trt.naming import FAMILY_OF
from flux2_trt.spec import ModelSpec
from flux2_trt.text import PromptTokenizer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SEED = 0
SYNTHETIC_INPUT_SCALE = 8 / FP8_MAX  # inputs of synthetic weights are about normal


def calibrate(
    model: str,
    checkpoint: str | None,
    pictures: Path | None,
    samples: int,
    trajectories: int,
    device: str,
    on_progress: Callable[[str], None],
) -> Calibration:
    """Measure the input scales of a model. Raises UsageError for a request that cannot be met.

    `trajectories`: of how many of the samples the prompt is denoised too; all of them where there are fewer.
    """
    if samples < 1:
        raise UsageError(f"--samples is {samples}; it is at least 1")
    if trajectories < 0:
        raise UsageError(f"--trajectories is {trajectories}; it is at least 0")
    source = resolve_source(model, checkpoint)
    if source.seed is not None:
        raise UsageError(f"{checkpoint} has no ranges to measure; synthetic weights come with synthetic scales")
    if source.tokenizer is None or source.spec.prompt is None:
        raise UsageError(f"{source.spec.name} has no text encoder, or none with weights; calibration needs its prompts")
    chosen = _samples(source, pictures, samples)
    tokenizer = PromptTokenizer.from_file(source.tokenizer, source.spec.prompt)
    denoised = min(trajectories, len(chosen))
    scales = input_scales(source.spec, source.open, tokenizer, chosen, denoised, device, on_progress)
    return Calibration(source.spec.name, source.identity(), len(chosen), scales, denoised)


def _samples(source: ModelSource, pictures: Path | None, count: int) -> list[CalibrationSample]:
    if pictures is not None:
        return folder_samples(pictures, source.spec, count)
    if source.spec.name != "tiny":
        raise UsageError(
            f"{source.spec.name} is calibrated on pictures; give --pictures FOLDER, where every picture has its prompt "
            "beside it: cat.png and cat.txt"
        )
    return scene_samples(source.spec, count)


def folder_samples(folder: Path, spec: ModelSpec, count: int) -> list[CalibrationSample]:
    """The first `count` pictures of a folder by name, each with the prompt in the text file of its name.

    Every second one has the picture before it as its reference, so that reference tokens are seen. Raises UsageError
    for a folder without such pairs, ImageError for a picture that cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one with pictures and their prompts: cat.png and cat.txt")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    pairs = [(path, path.with_suffix(".txt")) for path in paths if path.with_suffix(".txt").is_file()]
    if not pairs:
        raise UsageError(f"{folder} has no picture with a prompt beside it; add some: cat.png and cat.txt")
    chosen: list[CalibrationSample] = []
    for picture, prompt in pairs[:count]:
        pixels: Pixels = as_reference(load_reference(picture), spec, count=1)
        references = (chosen[-1].picture,) if len(chosen) % 2 else ()
        chosen.append(CalibrationSample(prompt.read_text(encoding="utf-8").strip(), pixels, references))
    return chosen


def scene_samples(spec: ModelSpec, count: int) -> list[CalibrationSample]:
    """Scenes of `tiny`'s training set: pictures from text, edits and combinations in turn."""
    from export.tiny.dataset import DRAW, sample
    from export.tiny.scenes import render

    rng, kinds, size = np.random.default_rng(SEED), list(DRAW), (spec.sampling.width, spec.sampling.height)
    drawn = [sample(rng, kind=kinds[index % len(kinds)]) for index in range(count)]
    return [
        CalibrationSample(
            each.prompt, render(each.target, *size), tuple(render(scene, *size) for scene in each.references)
        )
        for each in drawn
    ]


def scales_of(source: ModelSource, recipe: Recipe, given: Path | None) -> Scales:
    """The scales of these weights, without LoRAs: made up as they are, or those of the checkpoint and a calibration.

    `given`: a calibration in place of the one that comes with the model. None where nothing is quantized. Raises
    UsageError where a linear has no scale, or the calibration is of other weights.
    """
    if recipe.linears is None:
        if given:
            raise UsageError(f"precision {recipe.name} quantizes nothing; leave --calibration out")
        return NO_SCALES
    names = {
        component: [n for n in expected_tensors(source.spec, FAMILY_OF[component]) if re.fullmatch(pattern, n)]
        for component, pattern in QUANTIZED_LINEARS.items()
        if component in source.spec.components
    }
    quantized = [name for there in names.values() for name in there]
    if source.seed is not None:
        return Scales(dict.fromkeys(quantized, SYNTHETIC_INPUT_SCALE))
    inputs: dict[str, float] = {}
    weights: dict[str, float] = {}
    for component, there in names.items():
        checkpoint = source.open_checkpoint(FAMILY_OF[component])
        weights |= {name: scale for name in there if (scale := checkpoint.weight_scale(name))}
        inputs |= {name: scale for name in there if (scale := checkpoint.input_scale(name))}
    if file := given or source.calibration:
        calibration = Calibration.read(file)
        check_weights(calibration, source.base_identity(), file)
        inputs |= calibration.input_scales
    if missing := [name for name in quantized if name not in inputs]:
        raise UsageError(
            f"precision {recipe.name} needs a calibration: {len(missing)} of {len(quantized)} linears have no input "
            f"scale (first {missing[0]}); make one (flux2-trt calibrate MODEL --pictures FOLDER -o scales.json) and "
            "give it (--calibration scales.json), or build with --precision bf16"
        )
    return Scales({name: inputs[name] for name in quantized}, weights)


def check_weights(calibration: Calibration, identity: Mapping[str, Any], where: Path) -> None:
    """Raises UsageError where a calibration was measured with other weights."""
    if _digests(calibration.weights) != _digests(identity):
        raise UsageError(
            f"{where} was measured with other weights of {calibration.model}; make it again: flux2-trt calibrate"
        )


def _digests(identity: Mapping[str, Any]) -> dict[str, list[str]]:
    """The digests of an identity without the names of files, which a copy may change."""
    return {family: sorted(files.values()) for family, files in identity["weights_sha256"].items()}
