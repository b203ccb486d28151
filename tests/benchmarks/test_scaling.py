"""Fits: they find what was put in, and say what they do not explain."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_stand_ins import measurement, result

from benchmarks.harness.case import Case
from benchmarks.harness.floor import work_of_case
from benchmarks.harness.result import Measurement
from benchmarks.harness.scaling import cases_along, explained, fit_line, fit_steps
from flux2_trt.models import published_spec

SIDES = (128, 192, 256, 384, 512)


def swept(overhead: float, rate: float, attention_rate: float, odd: float = 1.0) -> list[Measurement]:
    """Steps of `tiny` that take exactly what they should, but for the largest."""
    found = []
    for side in SIDES:
        case = Case(side, side, 8)
        work = work_of_case(published_spec("tiny"), case, "cpu", "fp32")
        step = overhead + (work.step - work.attention) / rate + work.attention / attention_rate
        step *= odd if side == SIDES[-1] else 1.0
        each = measurement("plans:fp32", [8 * step / 0.9] * 3, scenario="sweep", case=case, work=work)
        found.append(each)
    return found


def test_the_terms_are_found() -> None:
    fit = fit_steps(swept(0.002, 1e11, 4e10))
    assert fit is not None and fit.worst_share < 1e-6
    assert fit.overhead == pytest.approx(0.002) and fit.other_rate == pytest.approx(1e11)
    assert fit.attention_rate == pytest.approx(4e10)
    [text] = [line for line in explained(fit, swept(0.002, 1e11, 4e10)) if line.startswith("Attention")]
    assert "runs at 40 % of the speed of linears" in text


def test_no_term_is_negative() -> None:
    fit = fit_steps(swept(0.0, 1e11, 1e13))
    assert fit is not None and fit.overhead >= 0 and (fit.attention_rate is None or fit.attention_rate > 0)


def test_what_no_term_explains_is_said() -> None:
    slow = swept(0.002, 1e11, 1e11, odd=3.0)
    # the fit leans on its terms to come near: an outlier in a middle case cannot be followed
    slow[2] = replace(
        slow[2], samples=tuple(replace(s, stages={"denoise": 2 * s.stages["denoise"]}) for s in slow[2].samples)
    )
    fit = fit_steps(slow)
    assert fit is not None and fit.worst_share > 0.15
    assert any(line.startswith(f"Not explained: {fit.worst.title}") for line in explained(fit, slow))


def test_few_sizes_are_no_fit() -> None:
    assert fit_steps(swept(0.002, 1e11, 1e11)[:3]) is None


def test_an_axis_is_what_alone_differs() -> None:
    cases = [Case(128, 128, 8), Case(256, 256, 8), Case(256, 256, 4), Case(256, 256, 8, 1), Case(256, 256, 8, 0, 2)]
    found = result(measurements=tuple(measurement("plans:fp32", [1.0], scenario="sweep", case=case) for case in cases))
    along = {axis: [each.case for each in cases_along(found, "plans:fp32", axis)] for axis in ("pixels", "steps")}
    assert along == {"pixels": [cases[0], cases[1]], "steps": [cases[2], cases[1]]}
    assert [each.case for each in cases_along(found, "plans:fp32", "batch")] == [cases[1], cases[4]]
    assert cases_along(found, "diffusers", "batch") == []


def test_a_line() -> None:
    line = fit_line([1, 2, 4], [1.5, 2.5, 4.5])
    assert (line.slope, line.intercept, line.worst_share) == pytest.approx((1.0, 0.5, 0.0))
