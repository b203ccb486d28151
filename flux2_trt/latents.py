"""Latents: their token layout, and the rotary tables of their positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REFERENCE_TIME_STEP = 10  # reference k sits at t = 10 * k (flux2 `sampling.py`, diffusers `_prepare_image_ids`)


def pack(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Latents [B, C, h, w] as tokens [B, h*w, C], row by row, in memory of their own."""
    batch, channels, height, width = latents.shape
    return latents.reshape(batch, channels, height * width).transpose(0, 2, 1).copy()


def unpack(tokens: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Tokens [B, h*w, C] as latents [B, C, h, w], in memory of their own; undoes `pack`."""
    batch, _, channels = tokens.shape
    return tokens.transpose(0, 2, 1).copy().reshape(batch, channels, height, width)


def position_ids(
    text_length: int, height: int, width: int, references: Sequence[tuple[int, int]] = ()
) -> NDArray[np.int64]:
    """Positions (t, h, w, l), i64 [T + N, 4], of the tokens in the order [text, image, reference 1, reference 2, ...].

    Sides are in latent tokens, `references` are (height, width). Text token i is at (0, 0, 0, i), the image at
    (0, h, w, 0), reference k = 1.. at (10 k, h, w, 0) on a grid of its own (flux2 `sampling.py`).
    """
    text = _grid(0, 1, 1, text_length)
    grids = [_grid(REFERENCE_TIME_STEP * k, h, w, 1) for k, (h, w) in enumerate([(height, width), *references])]
    return np.concatenate([text, *grids])


def _grid(time: int, height: int, width: int, length: int) -> NDArray[np.int64]:
    rows, columns, places = np.indices((height, width, length), dtype=np.int64).reshape(3, -1)
    return np.stack([np.full_like(rows, time), rows, columns, places], axis=1)


def rotary_tables(
    ids: NDArray[np.int64], axes_dim: Sequence[int], theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of the rotary angles, f32 [L, head_dim / 2] each, of positions `ids` [L, len(axes_dim)].

    One value per pair of channels, the axes side by side (diffusers' `Flux2PosEmbed` repeats each value twice).
    Frequency j of an axis of size d is theta ** (-2 j / d); angles are float64, since positions reach thousands.
    """
    angles = np.concatenate(
        [
            np.outer(positions.astype(np.float64), theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))
            for positions, dim in zip(ids.T, axes_dim, strict=True)
        ],
        axis=1,
    )
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
