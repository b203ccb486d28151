"""Trajectory: what pictures that are denoised together need from the host, from noise, prompts and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flux2_trt.latents import pack, position_ids, rotary_tables
from flux2_trt.runtime.denoiser import Floats, Trajectory
from flux2_trt.spec import ModelSpec


@dataclass(frozen=True)
class Start:
    """What one picture begins with: noise [C, h, w], prompt embeds [T, context_dim], reference latents [h, w, C]
    each."""

    noise: Floats
    embeds: Floats
    references: tuple[Floats, ...] = ()

    @property
    def tokens(self) -> Floats:
        """[N, C]: the noise and then the references."""
        references = [latents.reshape(-1, latents.shape[-1]) for latents in self.references]
        return np.concatenate([pack(self.noise[None])[0], *references])

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(latents.shape[0], latents.shape[1]) for latents in self.references]


def trajectory_of(
    spec: ModelSpec,
    starts: Sequence[Start],
    levels: NDArray[np.float64],
    guidance: float,
    unconditional: Floats | None = None,
) -> Trajectory:
    """Of pictures of one size, with references of the same sizes.

    `levels` [S + 1]: noise levels, the last of them 0. With `unconditional` [T, context_dim], the embeds of the empty
    prompt, each picture is denoised twice, without and with its prompt, first all without.
    """
    embeds = [start.embeds for start in starts]
    if unconditional is not None:
        embeds = [unconditional] * len(starts) + embeds
    _, height, width = starts[0].noise.shape
    tokens = np.stack([start.tokens for start in starts])
    steps, size = np.diff(levels.astype(np.float32)), spec.transformer
    dt = np.zeros((len(steps), tokens.shape[1]), np.float32)
    dt[:, : height * width] = steps[:, None]
    ids = position_ids(len(embeds[0]), height, width, starts[0].grids)
    cos, sin = rotary_tables(ids, size.axes_dim, size.theta)
    mixes = spec.sampling.guidance_kind == "classifier_free"
    return Trajectory(
        timestep=levels[:-1].astype(np.float32),
        guidance=np.full(len(steps), guidance, np.float32) if size.guidance_embeds else None,
        prompt_embeds=np.stack(embeds),
        tokens=np.tile(tokens, (len(embeds) // len(starts), 1, 1)),
        dt=dt,
        cos=cos,
        sin=sin,
        guidance_mix=_guidance_mix(len(starts), guidance, unconditional is not None) if mixes else None,
    )


def _guidance_mix(pictures: int, guidance: float, guided: bool) -> Floats:
    """What each row's velocity is made of: itself, or (1 - g) * unconditional + g * conditional of its picture."""
    own = np.eye(pictures, dtype=np.float32)
    if not guided:
        return own
    return np.block([[(1.0 - guidance) * own, guidance * own]] * 2).astype(np.float32)
