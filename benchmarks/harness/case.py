"""Case: what is drawn in one timed call; and which cases the scenarios measure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

from flux2_trt.drawing import Drawing
from flux2_trt.errors import UsageError
from flux2_trt.spec import ModelSpec

Scenario = Literal["single-stream", "offline", "sweep"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
"""One picture after the other; as many at once as a batch holds; one axis, or all, away from the default."""


@dataclass(frozen=True, order=True)
class Case:
    """`batch` pictures of `width` x `height` in `steps`, from `references` pictures of the model's largest size."""

    width: int
    height: int
    steps: int
    references: int = 0
    batch: int = 1

    @property
    def title(self) -> str:
        plural = "" if self.references == 1 else "s"
        parts = [f"{self.width}x{self.height}", f"{self.steps} steps"]
        parts += [f"{self.references} reference{plural}"] if self.references else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        return ", ".join(parts)

    def drawing(self, spec: ModelSpec, text_tokens: int | None = None) -> Drawing:
        """Raises UsageError for what the model does not draw."""
        return Drawing.of(spec, self.width, self.height, self.batch, self.references, self.steps, text_tokens)


@dataclass(frozen=True)
class Axes:
    """The values of a sweep. `full`: every combination; else one axis at a time away from the default case."""

    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    references: tuple[int, ...]
    batches: tuple[int, ...]
    full: bool = False

    @staticmethod
    def of(spec: ModelSpec) -> Axes:
        """What shows growth: square sizes the model draws, a few steps, references and batches."""
        sampling, multiple = spec.sampling, spec.autoencoder.pixels_per_token
        sides = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
        allowed = [side for side in sides if sampling.min_side <= side <= sampling.max_side and side % multiple == 0]
        default = sampling.num_inference_steps
        steps = tuple(sorted({max(1, default // 4), max(1, default // 2), default, 2 * default}))
        return Axes(tuple((side, side) for side in allowed[-5:]), steps, (0, 1, 2, 3), (1, 2, 4))

    def cases(self, default: Case) -> tuple[Case, ...]:
        """Without repetition, in an order that does not depend on the order of values."""
        if self.full:
            product = itertools.product(self.sizes, self.steps, self.references, self.batches)
            found = {Case(*size, steps, references, batch) for size, steps, references, batch in product}
        else:
            found = {default}
            found |= {replace(default, width=width, height=height) for width, height in self.sizes}
            found |= {replace(default, steps=steps) for steps in self.steps}
            found |= {replace(default, references=references) for references in self.references}
            found |= {replace(default, batch=batch) for batch in self.batches}
        return tuple(sorted(found))


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`256x256,512x384`. Raises UsageError."""
    found = []
    for word in text.split(","):
        width, _, height = word.strip().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise UsageError(f"{word.strip()!r} is no size; give --sizes like 256x256,512x384")
        found.append((int(width), int(height)))
    return tuple(found)


def parse_counts(name: str, text: str, least: int) -> tuple[int, ...]:
    """`1,2,4`. Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise UsageError(f"{text!r} is no list of whole numbers from {least}; give --{name} like 1,2,4")
    return tuple(int(word) for word in words)


def parse_scenarios(text: str) -> tuple[Scenario, ...]:
    """Raises UsageError for one that is not known."""
    asked = [word.strip() for word in text.split(",")]
    if unknown := [word for word in asked if word not in SCENARIOS]:
        raise UsageError(f"unknown scenario {', '.join(unknown)}; known are {', '.join(SCENARIOS)}")
    return tuple(scenario for scenario in SCENARIOS if scenario in asked)
