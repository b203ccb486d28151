"""Statistics: what samples say, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of samples in their own unit. `spread`: standard deviation over mean."""

    count: int
    p50: float
    p90: float
    p99: float
    mean: float
    deviation: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return self.deviation / self.mean if self.mean else 0.0


def summarize(values: Sequence[float]) -> Summary:
    """Percentiles by linear interpolation; with few samples p99 is little but the largest."""
    array = np.asarray(values, np.float64)
    p50, p90, p99 = (float(each) for each in np.percentile(array, (50, 90, 99)))
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return Summary(len(array), p50, p90, p99, float(array.mean()), deviation, float(array.min()), float(array.max()))


@dataclass(frozen=True)
class Ratio:
    """Of two medians, with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], paired: bool = False) -> Ratio:
    """By percentile bootstrap (Efron and Tibshirani 1993, chapter 13) from a fixed seed.

    `paired`: sample i of both was taken in the same round, so that what slowed the machine then slowed both.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    rng = np.random.default_rng(0)
    first = rng.integers(len(a), size=(RESAMPLES, len(a)))
    second = first if paired and len(a) == len(b) else rng.integers(len(b), size=(RESAMPLES, len(b)))
    ratios = np.median(a[first], axis=1) / np.median(b[second], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(each) for each in np.percentile(ratios, (tail, 100 - tail)))
    return Ratio(float(np.median(a) / np.median(b)), low, high)


def share_margin(share: float, count: int) -> float:
    """Half the width of the 95 % interval of a share of `count` (Agresti and Coull 1998): not 0 at 0 and 1."""
    z = 1.96
    adjusted = (share * count + z * z / 2) / (count + z * z)
    return z * math.sqrt(adjusted * (1 - adjusted) / (count + z * z))
