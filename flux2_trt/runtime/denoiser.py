"""Denoiser: the Euler loop of one batch, whatever runs the transformer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flux2_trt.runtime.engine import Engine

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Trajectory:
    """What a loop needs from the host, all of it before the first step. S steps, B rows, T text and N other tokens.

    `timestep` [S]; `guidance` [S], or None where the model embeds none; `prompt_embeds` [B, T, context_dim]; `tokens`
    [B, N, C], noise and then references; `dt` [S, N], zero for references; `cos`, `sin` [T + N, D/2]; `guidance_mix`
    [B, B], or None where nothing is mixed. All fp32.
    """

    timestep: Floats
    guidance: Floats | None
    prompt_embeds: Floats
    tokens: Floats
    dt: Floats
    cos: Floats
    sin: Floats
    guidance_mix: Floats | None

    @property
    def steps(self) -> int:
        return len(self.timestep)

    def conditioning(self) -> dict[str, Floats]:
        """The inputs of the component `conditioning`."""
        inputs = {"timestep": self.timestep, "prompt_embeds": self.prompt_embeds}
        return inputs if self.guidance is None else {**inputs, "guidance": self.guidance}

    def static(self) -> dict[str, Floats]:
        """The inputs of the component `transformer` that stay as they are."""
        inputs = {"dt": self.dt, "cos": self.cos, "sin": self.sin}
        return inputs if self.guidance_mix is None else {**inputs, "guidance_mix": self.guidance_mix}


OnStep = Callable[[int, Callable[[], Floats]], "Floats | None"]
"""Called after a step with its number and what reads the tokens [B, N, C]; tokens that it gives take their place.

Reading makes the host wait for the device. What it raises ends the loop.
"""


Stage = Callable[[str], AbstractContextManager[None]]
"""What times the host's part of "conditioning" and "denoise"."""


def untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


class Denoiser(Protocol):
    def run(self, trajectory: Trajectory, on_step: OnStep, stage: Stage) -> Floats:
        """The tokens after the last step, [B, N, C] fp32, which are the caller's."""
        ...


class HostLoop:
    """The loop on the host, a call of an engine each step."""

    def __init__(self, conditioning: Engine, transformer: Engine) -> None:
        self._conditioning, self._transformer = conditioning, transformer

    def run(self, trajectory: Trajectory, on_step: OnStep, stage: Stage = untimed) -> Floats:
        with stage("conditioning"):
            conditioned = self._conditioning.run(trajectory.conditioning())
        with stage("denoise"):
            static: dict[str, NDArray[Any]] = {**trajectory.static(), **conditioned}
            tokens, step = trajectory.tokens, np.zeros(1, np.int32)
            for index in range(trajectory.steps):
                updated = self._transformer.run({"latents": tokens, "step": step, **static})
                tokens, step = updated["updated_latents"], updated["next_step"]
                changed = on_step(index, lambda tokens=tokens: tokens)  # type: ignore[misc]
                tokens = tokens if changed is None else changed
        return tokens
