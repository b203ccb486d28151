"""The noise levels are those of diffusers' scheduler, custom ones included; impossible ones are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from flux2_trt.errors import UsageError
from flux2_trt.schedule import empirical_mu, sigmas

TURBO = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
TOKENS = {256: 256, 512: 1024, 1024: 4096, 2048: 16384}  # side in pixels -> image tokens of a square


def diffusers_sigmas(num_steps: int, num_tokens: int, custom: tuple[float, ...] | None = None) -> np.ndarray:
    """As diffusers' Flux2Pipeline calls its scheduler, step 6 of `__call__`."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    levels = np.linspace(1.0, 1 / num_steps, num_steps) if custom is None else custom
    scheduler.set_timesteps(num_steps, sigmas=levels, mu=compute_empirical_mu(num_tokens, num_steps))
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize("num_tokens", [*TOKENS.values(), 4300, 4301, 4080])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 28, 50, 1000])
def test_default_sigmas_are_diffusers_sigmas(num_steps: int, num_tokens: int) -> None:
    assert empirical_mu(num_tokens, num_steps) == pytest.approx(compute_empirical_mu(num_tokens, num_steps), rel=1e-14)
    ours = sigmas(num_steps, num_tokens)
    assert ours.dtype == np.float64 and ours.shape == (num_steps + 1,)
    assert np.array_equal(ours, diffusers_sigmas(num_steps, num_tokens))
    assert ours[0] == 1.0 and ours[-1] == 0.0 and (np.diff(ours) < 0).all()


@pytest.mark.parametrize(
    ("side", "num_steps", "mu"),
    [(1024, 4, 2.29118), (1024, 8, 2.26789), (1024, 28, 2.151443), (1024, 50, 2.023351), (512, 4, 2.03069)],
)
def test_mu_has_the_published_values(side: int, num_steps: int, mu: float) -> None:
    # Written with five to six decimals.
    assert empirical_mu(TOKENS[side], num_steps) == pytest.approx(mu, abs=1e-5)


def test_four_steps_at_1024_have_the_published_sigmas() -> None:
    # Written with five decimals.
    np.testing.assert_allclose(sigmas(4, 4096), [1, 0.96738, 0.90814, 0.76720, 0], rtol=0, atol=5.1e-6)


def test_custom_sigmas_are_shifted_like_diffusers_shifts_them() -> None:
    ours = sigmas(8, 4096, TURBO)
    assert np.array_equal(ours, diffusers_sigmas(8, 4096, TURBO))
    published = [1, 0.94739, 0.88248, 0.80027, 0.69282, 0.54619, 0.33467, 0.00299, 0]
    # Written with five decimals.
    np.testing.assert_allclose(ours, published, rtol=0, atol=5.1e-6)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 4.0, "4"])
def test_steps_outside_the_range_are_refused(num_steps: object) -> None:
    with pytest.raises(UsageError, match="whole number from 1 to 1000"):
        sigmas(num_steps, 4096)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ([], "empty"),
        ([1.0, 0.5], "2 sigmas do not fit 3 steps"),
        ([1.0, float("nan"), 0.5], "sigma nan"),
        ([1.5, 0.7, 0.5], "sigma 1.5"),
        ([1.0, 0.5, 0.0], "sigma 0.0"),
        ([1.0, 0.5, -0.5], "sigma -0.5"),
        ([1.0, 0.5, 5e-324], "sigma 0.0"),  # a step starts from a float32 level, in which this one is 0
        ([1.0, 0.5, 0.5 - 1e-12], "0.5 follows 0.5"),  # and these two are the same
        ([1.0, 0.5, 0.5], "0.5 follows 0.5"),
        ([0.2, 0.5, 1.0], "0.5 follows 0.2"),
        (["a", "b", "c"], "not a flat list of numbers"),
        ([[1.0, 0.5, 0.2]], "not a flat list of numbers"),
        (0.5, "not a flat list of numbers"),
    ],
)
def test_impossible_custom_sigmas_are_refused_on_one_line(custom: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sigmas(3, 4096, custom)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
