"""Scaling: how time grows with size, steps, references and batch, fitted against operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from benchmarks.harness.case import Case
from benchmarks.harness.result import Measurement, Result

CLOSE = 0.15
"""Relative distance from the fit up to which a case counts as explained by it."""


@dataclass(frozen=True)
class StepFit:
    """Seconds of a step = `overhead` + other operations / `other_rate` + attention's / `attention_rate`.

    `exponent`: of seconds as a power of all operations, 1 where they grow alike; `worst`: the case farthest from the
    fit, and how far, relatively.
    """

    overhead: float
    other_rate: float | None
    attention_rate: float | None
    exponent: float
    worst: Case
    worst_share: float

    def seconds(self, step: float, attention: float) -> float:
        other = (step - attention) / self.other_rate if self.other_rate else 0.0
        return self.overhead + other + (attention / self.attention_rate if self.attention_rate else 0.0)


def cases_along(result: Result, system: str, axis: str) -> list[Measurement]:
    """Those of a sweep that differ in one axis alone: "pixels", "steps", "references" or "batch", in its order."""
    swept = [each for each in result.of("sweep") if each.system == system]
    keys: dict[str, Callable[[Case], int]] = {
        "pixels": lambda case: case.width * case.height,
        "steps": lambda case: case.steps,
        "references": lambda case: case.references,
        "batch": lambda case: case.batch,
    }

    def rest(case: Case) -> tuple[int, ...]:
        return tuple(value(case) for name, value in keys.items() if name != axis)

    groups: dict[tuple[int, ...], list[Measurement]] = {}
    for each in swept:
        groups.setdefault(rest(each.case), []).append(each)
    longest = max(groups.values(), key=len, default=[])
    return sorted(longest, key=lambda each: keys[axis](each.case)) if len(longest) > 1 else []


def fit_steps(measurements: Sequence[Measurement]) -> StepFit | None:
    """By least squares of relative errors, with no term below zero; None for fewer than four kinds of step."""
    points = [each for each in measurements if each.step_seconds and each.case.batch == 1]
    if len({each.work.step for each in points}) < 4:
        return None
    work = np.array([(1.0, p.work.step - p.work.attention, p.work.attention) for p in points], np.float64)
    cases = [each.case for each in points]
    seconds = np.array([median(each.step_seconds) for each in points])
    terms = _nonnegative(work / seconds[:, None], np.ones(len(seconds)))
    relative = np.abs(work @ terms / seconds - 1)
    worst = int(relative.argmax())
    exponent = float(np.polyfit(np.log(work[:, 1] + work[:, 2]), np.log(seconds), 1)[0])
    overhead, other, attention = (float(term) for term in terms)
    return StepFit(
        overhead,
        1 / other if other else None,
        1 / attention if attention else None,
        exponent,
        cases[worst],
        float(relative[worst]),
    )


def _nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no negative coefficient: with this few, the best of all subsets of columns."""
    scale = matrix.max(axis=0)
    best, least = np.zeros(matrix.shape[1]), np.inf
    for count in range(1, matrix.shape[1] + 1):
        for columns in itertools.combinations(range(matrix.shape[1]), count):
            chosen = matrix[:, columns] / scale[list(columns)]
            found = np.linalg.lstsq(chosen, target, rcond=None)[0]
            error = float(((chosen @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least:
                least, best = error, np.zeros(matrix.shape[1])
                best[list(columns)] = found / scale[list(columns)]
    return best


def explained(fit: StepFit, measurements: Sequence[Measurement]) -> list[str]:
    """What the fit says, in sentences; each number is of this fit."""
    shares = sorted(each.work.attention / each.work.step for each in measurements)
    giga = 1e9
    lines = [f"A step's time grows as its operations to the power {fit.exponent:.2f}."]
    if fit.other_rate:
        text = f"The fit gives {1000 * fit.overhead:.1f} ms that do not depend on size, "
        text += f"{fit.other_rate / giga:.0f} GFLOP/s for linears"
        text += f" and {fit.attention_rate / giga:.0f} GFLOP/s for attention" if fit.attention_rate else ""
        lines.append(text + ".")
    if fit.other_rate and fit.attention_rate and fit.attention_rate < fit.other_rate:
        slower = 100 * fit.attention_rate / fit.other_rate
        lines.append(
            f"Attention, {100 * shares[0]:.0f} % of the operations of the smallest step and {100 * shares[-1]:.0f} % "
            f"of the largest, runs at {slower:.0f} % of the speed of linears. Its operations, and the softmax between "
            "them, grow with the square of the tokens."
        )
    elif fit.exponent > 1 + CLOSE:
        lines.append("Time grows faster than operations, and attention does not explain it.")
    if fit.worst_share > CLOSE:
        lines.append(
            f"Not explained: {fit.worst.title} is {100 * fit.worst_share:.0f} % from the fit. Look for a cache that "
            "its activations no longer fit, or for work of others on the machine."
        )
    else:
        lines.append(f"No case is farther from it than {100 * fit.worst_share:.0f} % ({fit.worst.title}).")
    return lines


@dataclass(frozen=True)
class Line:
    """`slope` and `intercept` in seconds; `worst_share`: the largest relative distance of a point."""

    slope: float
    intercept: float
    worst_share: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    slope, intercept = (float(value) for value in np.polyfit(x, y, 1))
    worst = max(abs((intercept + slope * a) / b - 1) for a, b in zip(x, y, strict=True))
    return Line(slope, intercept, float(worst))
