"""Goals: by how much ours is to be faster than diffusers, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.result import Measurement, Result
from benchmarks.harness.statistics import Ratio, ratio_of_medians


@dataclass(frozen=True)
class Goal:
    """`stage`: None for the whole call."""

    baseline: str
    stage: str | None
    times: float


GOALS = (
    Goal("diffusers", None, 2.0),
    Goal("diffusers-compile", None, 1.2),
    Goal("diffusers", "denoise", 1.5),
    Goal("diffusers-compile", "denoise", 1.1),
)


@dataclass(frozen=True)
class Outcome:
    """`ratio`: how many times faster; None where one of the two was not measured."""

    goal: Goal
    ratio: Ratio | None

    @property
    def verdict(self) -> str:
        """Reached where the whole interval is above the goal, missed where it is below."""
        if self.ratio is None:
            return "not measured"
        if self.ratio.low >= self.goal.times:
            return "reached"
        return "missed" if self.ratio.high < self.goal.times else "undecided"


def outcomes(result: Result) -> list[Outcome]:
    """Of the primary system in single-stream."""
    found = {each.system: each for each in result.of("single-stream")}
    ours = found.get(result.primary)
    return [Outcome(goal, _ratio(goal, ours, found.get(goal.baseline))) for goal in GOALS]


def _ratio(goal: Goal, ours: Measurement | None, theirs: Measurement | None) -> Ratio | None:
    if ours is None or theirs is None:
        return None
    own, other = ((each.seconds if goal.stage is None else each.stage(goal.stage)) for each in (ours, theirs))
    return ratio_of_medians(other, own, paired=True) if own and other else None
