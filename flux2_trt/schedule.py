"""The schedule: which noise level each step starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flux2_trt.errors import UsageError

MAX_STEPS = 1000  # the model was trained on 1000 noise levels (diffusers `num_train_timesteps`)


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """The shift exponent for an output of `num_tokens` image tokens in `num_steps` steps; references do not count.

    A line in tokens fitted at 10 steps and one at 200, interpolated in steps; above 4300 tokens the latter for any
    number of steps (flux2 `sampling.py`, diffusers `compute_empirical_mu`).
    """
    mu_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return mu_200
    mu_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (mu_200 - mu_10) / 190.0
    return slope * num_steps + (mu_200 - 200.0 * slope)


def sigmas(num_steps: int, num_tokens: int, custom: Sequence[float] | None = None) -> NDArray[np.float64]:
    """Noise levels f64 [S + 1], from the first step's start down to 0: bit for bit those of diffusers' `Flux2Pipeline`.

    linspace(1, 1/S, S) or the `custom` levels, shifted by mu: s -> e^mu / (e^mu + 1/s - 1), then a 0. Custom levels
    are shifted too, because diffusers does so: give the levels from before the shift, one per step.
    Raises UsageError for steps outside 1..1000, and for custom levels that are not one per step, strictly decreasing,
    above 0 and at most 1.
    """
    if not isinstance(num_steps, (int, np.integer)) or not 1 <= num_steps <= MAX_STEPS:
        raise UsageError(f"{num_steps!r} steps are not allowed; give a whole number from 1 to {MAX_STEPS}")
    levels = np.linspace(1.0, 1.0 / num_steps, num_steps) if custom is None else _checked(custom, num_steps)
    levels = levels.astype(np.float32)  # in float32 as diffusers does: 1/s - 1 cancels, by up to 1.5e-6 at 1000 steps
    scale = np.float32(math.exp(empirical_mu(num_tokens, num_steps)))
    return np.append(scale / (scale + (1 / levels - 1)), 0.0).astype(np.float64)


def _checked(custom: Sequence[float], num_steps: int) -> NDArray[np.float32]:
    try:
        levels = np.asarray(custom, dtype=np.float64).reshape(len(custom)).astype(np.float32)
    except (TypeError, ValueError):
        kind = type(custom).__name__
        raise UsageError(f"the sigmas ({kind}) are not a flat list of numbers; give for example [1.0, 0.5]") from None
    if levels.size == 0:
        raise UsageError("sigmas are empty; give one number per step, for example 1.0 0.75 0.5 0.25, or leave them out")
    if levels.size != num_steps:
        raise UsageError(f"{levels.size} sigmas do not fit {num_steps} steps; give one per step, or leave steps out")
    outside = levels[~((levels > 0.0) & (levels <= 1.0))]
    if outside.size:
        raise UsageError(
            f"sigma {outside[0]} is not allowed; every sigma is above 0 and at most 1 (the final 0 is added)"
        )
    rising = np.flatnonzero(np.diff(levels) >= 0.0)
    if rising.size:
        before, after = levels[rising[0]], levels[rising[0] + 1]
        raise UsageError(f"sigmas must strictly decrease, but {after} follows {before}; sort them from high to low")
    return levels
