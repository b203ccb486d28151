"""Cases: what a sweep measures, and values that are no cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.harness.case import Axes, Case, parse_counts, parse_scenarios, parse_sizes
from flux2_trt.errors import UsageError
from flux2_trt.models import FAMILY, published_spec

DEFAULT = Case(256, 256, 8)
AXES = Axes(((128, 128), (256, 256)), (4, 8), (0, 2), (1, 3))


def test_a_sweep_leaves_the_default_along_one_axis_at_a_time() -> None:
    assert set(AXES.cases(DEFAULT)) == {
        DEFAULT,
        Case(128, 128, 8),
        Case(256, 256, 4),
        Case(256, 256, 8, references=2),
        Case(256, 256, 8, batch=3),
    }


def test_a_full_sweep_has_every_combination_once() -> None:
    cases = replace(AXES, full=True).cases(DEFAULT)
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 2
    assert Case(128, 128, 4, 2, 3) in cases


@pytest.mark.parametrize("name", FAMILY)
def test_every_model_draws_its_own_sweep(name: str) -> None:
    spec = published_spec(name)
    default = Case(spec.sampling.width, spec.sampling.height, spec.sampling.num_inference_steps)
    cases = Axes.of(spec).cases(default)
    assert len({case.width for case in cases}) >= 4
    for case in cases:
        assert case.drawing(spec).batch == case.batch


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_sizes, "256", "'256' is no size; give --sizes like 256x256,512x384"),
        (parse_sizes, "256x256,x", "'x' is no size"),
        (parse_scenarios, "single-stream,server", "unknown scenario server; known are single-stream, offline, sweep"),
        (lambda text: parse_counts("batches", text, 1), "0,1", "'0,1' is no list of whole numbers from 1"),
        (lambda text: parse_counts("references", text, 0), "1,-2", "give --references like 1,2,4"),
    ],
)
def test_what_is_no_value_is_refused_with_an_example(parse, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert message in str(error.value)
