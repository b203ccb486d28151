"""Inputs: prompt embeds, noise and references, made once and given to every system alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.harness.case import Case
from benchmarks.harness.system import Floats, Job, Pictures
from flux2_trt.drawing import MEGAPIXEL
from flux2_trt.noise import noise_batch
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.spec import ModelSpec

TINY_PROMPT = "a large red circle on a blue background"
PROMPT = "a lighthouse on a cliff at dawn, seen from the sea, with gulls around it and a small boat in front"


def prompt_of(spec: ModelSpec) -> str:
    """What is drawn in timed calls."""
    return TINY_PROMPT if spec.name == "tiny" else PROMPT


class Inputs:
    """Made by our pipeline in its own precision. Without a text encoder, embeds are noise of the prompt's length."""

    def __init__(self, pipeline: Flux2Pipeline) -> None:
        self.spec = pipeline.spec
        self._pipeline = pipeline
        self._embeds: dict[str, Floats] = {}

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode what will be asked for, and let go of what that took: systems need the memory."""
        for prompt in prompts:
            self.embeds(prompt)
        self._pipeline.close()

    def embeds(self, prompt: str) -> Floats:
        """[1, T, D] fp32."""
        if prompt not in self._embeds:
            if self.spec.text_encoder is None:
                width = self.spec.transformer.context_dim
                self._embeds[prompt] = np.random.default_rng(0).standard_normal((1, 512, width), np.float32)
            else:
                self._embeds[prompt] = self._pipeline.encode_prompt([prompt])[0]
        return self._embeds[prompt]

    def reference(self, index: int) -> Pictures:
        """A square picture of 1 MP, or of the model's limit where that is less: waves, so that nothing is flat."""
        side = math.isqrt(min(MEGAPIXEL, self.spec.sampling.max_reference_area or MEGAPIXEL))
        x = np.linspace(0, 2 * np.pi, side)
        waves = [np.sin((index + 1 + c) * x)[:, None] + np.cos((index + 2 - c) * x)[None] for c in range(3)]
        return (127.5 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)

    def job(
        self, case: Case, prompt: str, seed: int, references: Sequence[Pictures] | None = None, reads: bool = False
    ) -> Job:
        """`references`: in place of those of the case."""
        side = self.spec.autoencoder.pixels_per_token
        shape = (self.spec.transformer.in_channels, case.height // side, case.width // side)
        given = [self.reference(i) for i in range(case.references)] if references is None else references
        return Job(
            case=case,
            embeds=self.embeds(prompt).repeat(case.batch, axis=0),
            noise=noise_batch([seed + i for i in range(case.batch)], *shape),
            references=tuple(given),
            unconditional=self.embeds("") if case.drawing(self.spec).guided else None,
            prompt=prompt,
            seed=seed,
            reads_prompt=reads,
        )


def digest(values: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
