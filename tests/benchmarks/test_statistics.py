"""Statistics against scipy's and by known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.statistics import ratio_of_medians, share_margin, summarize


def test_percentiles_and_spread() -> None:
    found = summarize([float(value) for value in range(1, 102)])
    assert (found.count, found.p50, found.p90, found.p99) == (101, 51, 91, 100)
    assert found.mean == 51 and found.deviation == pytest.approx(np.std(range(101), ddof=1))
    assert (found.low, found.high) == (1, 101)
    assert summarize([2.0]).deviation == 0


def test_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    slow, fast = 2 + 0.2 * rng.standard_normal(40), 1 + 0.1 * rng.standard_normal(40)
    found = ratio_of_medians(list(slow), list(fast))
    expected = stats.bootstrap(
        (slow, fast),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        method="percentile",
        n_resamples=4000,
        rng=1,
    ).confidence_interval
    assert found.value == pytest.approx(np.median(slow) / np.median(fast))
    # 2000 resamples leave about 3 % of an interval's half width to chance, on either side
    assert found.low == pytest.approx(expected.low, abs=0.02) and found.high == pytest.approx(expected.high, abs=0.02)


def test_pairs_take_out_what_slows_both() -> None:
    """Rounds of very different speed, in each of which one takes 1.1 times as long."""
    base = [1.0, 3.0, 1.1, 2.9, 1.2, 2.8, 1.3, 2.7, 1.4]
    slower = [1.1 * value for value in base]
    paired, apart = ratio_of_medians(slower, base, paired=True), ratio_of_medians(slower, base)
    assert paired.low == pytest.approx(1.1) and paired.high == pytest.approx(1.1)
    assert apart.low < 0.8 and apart.high > 1.4


def test_a_share_is_never_certain() -> None:
    assert share_margin(1.0, 30) > 0.05
    assert share_margin(0.5, 100) == pytest.approx(1.96 * np.sqrt(0.25 / 104), rel=0.01)
    assert share_margin(0.9, 300) < share_margin(0.9, 30)
