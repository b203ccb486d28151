"""Operations and floors of cases, by a published table; rates of products."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness.case import Case
from benchmarks.harness.floor import work_of_case
from benchmarks.harness.gemm import GemmRate, best_rate, shapes_of
from flux2_trt.models import published_spec


def test_a_step_of_dev_at_1024_has_its_282_teraflop_and_its_floor_on_an_h100() -> None:
    found = work_of_case(published_spec("dev"), Case(1024, 1024, 50), "h100", "bf16")
    assert found.step / 1e12 == pytest.approx(282.6, abs=0.2)
    assert found.attention / 1e12 == pytest.approx(29.22, abs=0.05)
    assert found.floor_seconds == pytest.approx(0.2856, abs=0.001)
    assert found.call / found.step == pytest.approx(50, rel=0.003)  # a decoder of 10.5 and little else


def test_a_batch_is_a_multiple_and_a_cpu_has_no_sheet() -> None:
    spec = published_spec("tiny")
    one, four = (work_of_case(spec, Case(256, 256, 8, batch=batch), "cpu", "fp32") for batch in (1, 4))
    assert four.step == 4 * one.step and four.attention == 4 * one.attention
    assert one.floor_seconds is None


def test_a_format_that_the_device_lacks_has_no_floor() -> None:
    assert work_of_case(published_spec("dev"), Case(1024, 1024, 50), "h100", "nvfp4").floor_seconds is None


def test_products_are_those_of_the_shape_and_the_best_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.gemm.SECONDS", 0.0)
    found = best_rate([(8, 8, 8), (256, 256, 256)])
    assert found.shape == (256, 256, 256) and found.number_format == "fp32"
    assert 1e8 < found.flops_per_second < 1e14
    assert found.rates.bf16 is None and "TFLOP/s in fp32" in str(found)
    assert GemmRate(5e14, "torch", "bf16", (1, 1, 1)).rates.bf16 == 5e14


def test_the_shape_of_a_linear_is_the_models() -> None:
    spec = published_spec("tiny")
    (rows, inner, columns), square = shapes_of(spec, Case(256, 256, 8).drawing(spec))
    assert (rows, inner) == (256 + 32, spec.transformer.hidden_size)
    assert columns == 3 * spec.transformer.hidden_size + 2 * spec.transformer.mlp_hidden_size
    assert len(set(square)) == 1 and np.prod(square) > rows * inner * columns
