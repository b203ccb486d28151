"""Shapes: the sizes that a plan is compiled for, as optimization profiles of every component."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux2_trt.drawing import MAX_STEPS, MEGAPIXEL
from flux2_trt.errors import UsageError
from flux2_trt.spec import Component, ModelSpec


@dataclass(frozen=True)
class Range:
    """Least, best and largest value of a dynamic side."""

    least: int
    best: int
    most: int


Profile = Mapping[str, Range]
"""The dynamic sides of a component by the names that `export.examples` gives them."""


@dataclass(frozen=True)
class SizeClass:
    """Pictures of up to `most` pixels, with kernels that are chosen for those of `best`."""

    best: int
    most: int


SIZE_CLASSES: Mapping[str, SizeClass] = {
    "any": SizeClass(MEGAPIXEL, 4 * MEGAPIXEL),
    "512": SizeClass(512 * 512, 512 * 512),
    "1mp": SizeClass(MEGAPIXEL, MEGAPIXEL),
    "4mp": SizeClass(4 * MEGAPIXEL, 4 * MEGAPIXEL),
}
DEFAULT_SIZES = ("any",)
MIN_TEXT_TOKENS = 16
"""With the 16 tokens of the smallest picture this makes 32, below which TensorRT-RTX 1.7 fuses no FP8 attention."""


@dataclass(frozen=True)
class ShapeRequest:
    """What a bundle is to draw: size classes, each with up to `max_references` reference pictures of up to 1 MP, in
    batches of up to `max_batch`."""

    sizes: tuple[str, ...] = DEFAULT_SIZES
    max_batch: int = 1
    max_references: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.sizes if name not in SIZE_CLASSES]
        if unknown or not self.sizes:
            wrong = f"unknown size class {unknown[0]!r}" if unknown else "no size class"
            raise UsageError(f"{wrong}; known are {', '.join(SIZE_CLASSES)}, with commas between them")
        for name, least in (("max_batch", 1), ("max_references", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it is at least {least}")


def profiles(component: Component, spec: ModelSpec, request: ShapeRequest) -> Sequence[Profile]:
    """One profile a size class for what depends on the size of pictures, else one.

    Guided pictures of a classifier-free model are batches of two.
    """
    batch = request.max_batch * (2 if spec.sampling.guidance_kind == "classifier_free" else 1)
    best_batch = 2 if batch > request.max_batch else 1
    batches = Range(1, best_batch, batch)
    text_length = spec.prompt.max_length if spec.prompt else 512
    text = Range(min(MIN_TEXT_TOKENS, text_length), text_length, text_length)
    match component:
        case "text_encoder":
            return [{"batch": batches, "text_tokens": text}]
        case "conditioning":
            return [{"steps": _steps(spec), "batch": batches, "text_tokens": text}]
    limit = spec.sampling.max_side**2
    asked = [SIZE_CLASSES[name] for name in request.sizes]
    classes = {SizeClass(min(each.best, limit), min(each.most, limit)) for each in asked}
    ordered = sorted(classes, key=lambda each: (each.most, each.best))
    if component == "transformer":
        return [_transformer_profile(spec, size, request, batches, text) for size in ordered]
    return [_picture_profile(spec, size, Range(1, 1, request.max_batch)) for size in ordered]


def _transformer_profile(
    spec: ModelSpec, size: SizeClass, request: ShapeRequest, batches: Range, text: Range
) -> Profile:
    pixels = spec.autoencoder.pixels_per_token**2
    best, most = size.best // pixels, size.most // pixels
    references = request.max_references * min(MEGAPIXEL, spec.sampling.max_reference_area or MEGAPIXEL) // pixels
    least = spec.sampling.min_side**2 // pixels
    tokens = Range(least, best, most + references)
    every = Range(least + text.least, best + text.best, most + references + text.most)
    return {"batch": batches, "tokens": tokens, "text_tokens": text, "all_tokens": every, "steps": _steps(spec)}


def _steps(spec: ModelSpec) -> Range:
    """Of the tables, which have a row for each."""
    return Range(1, spec.sampling.num_inference_steps, MAX_STEPS)


def _picture_profile(spec: ModelSpec, size: SizeClass, batches: Range) -> Profile:
    """The best shape is square; sides are free, so that others with up to twice the side of the largest square fit."""
    pixels, sampling = spec.autoencoder.pixels_per_token, spec.sampling
    best, most = math.isqrt(size.best) // pixels, math.isqrt(size.most) // pixels
    side = Range(sampling.min_side // pixels, best, min(sampling.max_side // pixels, most * 2))
    in_pixels = Range(side.least * pixels, side.best * pixels, side.most * pixels)
    return {
        "batch": batches,
        "latent_height": side,
        "latent_width": side,
        "height": in_pixels,
        "width": in_pixels,
    }


def shape_of(sides: Sequence[Any], profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, best and largest shape of an input whose sides are numbers or names of dynamic sides."""
    ranges = [profile[side] if isinstance(side, str) else Range(side, side, side) for side in sides]
    return tuple(r.least for r in ranges), tuple(r.best for r in ranges), tuple(r.most for r in ranges)
