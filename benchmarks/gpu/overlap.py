"""What it gains that prompts are encoded, and pictures decoded and compressed, while others are denoised."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux2_trt.finishing import PictureSettings
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.gpu import GpuRuntime
from flux2_trt.text import TokenizedPrompts

PROMPTS, PER_PROMPT = 4, 2


@dataclass(frozen=True)
class Pace:
    """Seconds a picture of one call with several prompts, PNGs and all; the second call of two."""

    overlaps: bool
    side: int
    pictures: int
    seconds_per_picture: float
    timings: dict[str, float]


class WithoutTokenizer(Flux2Pipeline):
    """Made-up weights come without a tokenizer: prompts are random token ids."""

    def _tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        assert self.spec.prompt and self.spec.text_encoder
        shape = (len(prompts), self.spec.prompt.max_length)
        ids = np.random.default_rng(0).integers(0, self.spec.text_encoder.vocab_size, shape)
        return TokenizedPrompts(ids, np.ones(shape, np.int64), (False,) * len(prompts))


def measure(make: Callable[[bool], GpuRuntime], sides: Sequence[int]) -> list[Pace]:
    """`make`: a runtime with everything resident, that overlaps or not."""
    found = []
    for overlaps in (False, True):
        runtime = make(overlaps)
        try:
            found += [_pace(WithoutTokenizer(runtime.bundle, runtime=runtime), side) for side in sides]
        finally:
            runtime.close()
    return found


def _pace(pipeline: Flux2Pipeline, side: int) -> Pace:
    def compress(_: PictureSettings, picture: Any, refused: str | None) -> None:
        picture.save(io.BytesIO(), "PNG")

    prompts = [f"prompt {index}" for index in range(PROMPTS)]
    for _ in range(2):
        begun = time.perf_counter()
        made = pipeline(
            prompts, seed=0, width=side, height=side, num_images_per_prompt=PER_PROMPT, callback_on_picture=compress
        )
        seconds = time.perf_counter() - begun
    pictures = PROMPTS * PER_PROMPT
    return Pace(pipeline.runtime.overlaps, side, pictures, seconds / pictures, made.timings)
