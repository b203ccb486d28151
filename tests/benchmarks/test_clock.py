"""Timelines: steps, gaps and stages out of marks."""

from __future__ import annotations

import pytest

from benchmarks.harness.clock import Timeline


class SetClock:
    """Marks at the times that a test says."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.settled = False

    def mark(self) -> float:
        return self.times.pop(0)

    def settle(self) -> None:
        self.settled = True

    def seconds(self, first: float, last: float) -> float:
        return last - first


def test_a_gap_is_what_no_run_fills_and_watching_belongs_to_no_step() -> None:
    # run 10..14, end of step at 15, watched until 20; run 21..25, end at 27, until 30
    timeline = Timeline(SetClock(10, 14, 15, 20, 21, 25, 27, 30))
    for _ in range(2):
        with timeline.run():
            pass
        with timeline.end_of_step():
            pass
    steps, gaps = timeline.steps()
    assert steps == [15 - 10, 27 - 20]
    assert gaps == [(15 - 10) - (14 - 10), (27 - 20) - (25 - 21)]


def test_a_step_can_have_two_runs() -> None:
    """As with classifier-free guidance in diffusers."""
    timeline = Timeline(SetClock(0, 2, 3, 5, 6, 6))
    for _ in range(2):
        with timeline.run():
            pass
    with timeline.end_of_step():
        pass
    assert timeline.steps() == ([6], [6 - 2 - 2])


def test_pictures_one_after_the_other_do_not_count_what_is_between_their_loops() -> None:
    times = (0, 1, 1, 1, 1, 2, 2, 2)  # two steps of a second
    timeline = Timeline(SetClock(*times, *(100 + time for time in times)))
    for _ in range(4):
        with timeline.run():
            pass
        with timeline.end_of_step():
            pass
    assert timeline.steps(pictures=2) == ([1, 1, 1, 1], [0, 0, 0, 0])


def test_a_loop_that_tells_no_runs_has_no_gaps_and_no_first_step() -> None:
    timeline = Timeline(SetClock(5, 6, 8, 9))
    for _ in range(2):
        with timeline.end_of_step():
            pass
    assert timeline.steps() == ([2], [])


def test_stages_add_up() -> None:
    timeline = Timeline(SetClock(0, 1, 5, 8))
    for _ in range(2):
        with timeline.stage("decode"):
            pass
    assert timeline.stage_seconds() == {"decode": pytest.approx(4)}
