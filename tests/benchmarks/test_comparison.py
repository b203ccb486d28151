"""Comparisons of results: what counts as slower or worse, what does not, and what else differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from bench_stand_ins import measurement, quality, record, result

from benchmarks.harness.comparison import compare
from benchmarks.harness.result import Measurement, Missing, Quality, Result, Sample
from flux2_trt.errors import UsageError


def times(factor: float, system: str, found: Result) -> Result:
    """With the calls of one system taking so many times as long."""

    def changed(each: Measurement) -> Measurement:
        if each.system != system:
            return each
        return replace(each, samples=tuple(Sample(factor * s.seconds, s.stages, 1, None) for s in each.samples))

    return replace(found, measurements=tuple(map(changed, found.measurements)))


def with_quality(change: Callable[[Quality], Quality], found: Result) -> Result:
    ours = [change(each) if each.system == "plans:fp32" else each for each in found.quality]
    return replace(found, quality=tuple(ours))


def worse(a: Result, b: Result, **thresholds: Any) -> list[str]:
    return [finding.text for finding in compare(a, b, **thresholds).worse]


def test_the_same_is_neither_slower_nor_worse_and_differs_in_nothing() -> None:
    found = compare(result(), result())
    assert not found.worse and not found.differences and not found.notes and len(found.findings) > 6


def test_slower_is_found_and_faster_is_not() -> None:
    [first, second] = worse(result(), times(1.2, "plans:fp32", result()))
    assert first.startswith("plans:fp32 in single-stream, 128x128, 2 steps: B takes 1.200 times as long as A (1.1")
    assert "offline" in second
    assert not worse(result(), times(0.8, "plans:fp32", result()))


def test_the_threshold_is_the_users() -> None:
    slower = times(1.2, "plans:fp32", result())
    assert not worse(result(), slower, threshold=0.25)
    assert not worse(result(), times(1.03, "plans:fp32", result()))
    assert worse(result(), times(1.03, "plans:fp32", result()), threshold=0.0)


def test_noise_is_no_slowness() -> None:
    """Twenty per cent more in the median of few and wild samples proves nothing."""
    a = result(measurements=(measurement("plans:fp32", [1.0, 1.6, 0.9, 1.5]),))
    b = result(measurements=(measurement("plans:fp32", [1.2, 1.8, 1.0, 1.7]),))
    assert not worse(a, b)


def test_a_control_that_differs_from_itself_raises_what_counts() -> None:
    base = result()
    [eager] = [each for each in base.measurements if each.system == "diffusers"]
    control = replace(eager, system="diffusers+control")
    doubled = replace(control, samples=tuple(replace(s, seconds=1.3 * s.seconds) for s in control.samples))
    noisy = replace(
        base, measurements=(*base.measurements, doubled), systems=(*base.systems, record("diffusers+control"))
    )
    found = compare(noisy, times(1.2, "plans:fp32", noisy))
    assert "a control differs from itself by 30 %: less than that is not told apart" in found.notes
    assert not found.worse and compare(noisy, times(1.5, "plans:fp32", noisy)).worse


def test_the_loop_alone_is_compared_too() -> None:
    slow = result()
    [ours, *rest] = slow.measurements
    samples = tuple(replace(s, stages={"denoise": 1.3 * s.stages["denoise"]}) for s in ours.samples)
    [text] = worse(result(), replace(slow, measurements=(replace(ours, samples=samples), *rest)))
    assert "the loop alone: B takes 1.300" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q: replace(q, latent_error_by_step=(0.0001, 0.01)), "error of the final latents 0.0200 % in A, 1.0000"),
        (lambda q: replace(q, psnr_db=30.0), "PSNR 50.0 dB in A, 30.0 dB in B"),
        (lambda q: replace(q, ssim=0.9), "SSIM 0.9990 in A, 0.9000 in B"),
        (lambda q: replace(q, scores={"passed": 0.5}), "passed 90.0 % in A, 50.0 % in B"),
    ],
)
def test_each_measure_of_quality_counts(change: Callable[[Quality], Quality], text: str) -> None:
    [found] = worse(result(), with_quality(change, result()))
    assert found.startswith("plans:fp32: ") and text in found


def test_quality_may_vary_within_noise() -> None:
    def change(q: Quality) -> Quality:
        return replace(q, latent_error_by_step=(0.0, 0.0004), psnr_db=49.5, ssim=0.998, scores={"passed": 0.87})

    assert not worse(result(), with_quality(change, result()))


def test_identical_pictures_may_come_to_differ_a_little_but_not_much() -> None:
    exact = with_quality(lambda q: replace(q, psnr_db=None), result())
    assert not worse(exact, with_quality(lambda q: replace(q, psnr_db=80.0), result()))
    assert worse(exact, with_quality(lambda q: replace(q, psnr_db=50.0), result()))


def test_a_system_that_failed_in_b_is_worse_and_one_that_was_not_asked_for_is_not() -> None:
    def without(reasons: tuple[Missing, ...]) -> Result:
        found = result(missing=reasons)
        return replace(found, measurements=tuple(m for m in found.measurements if m.system != "plans:fp8"))

    assert not worse(result(), without(()))
    [text] = worse(result(), without((Missing("plans:fp8", "it does not load"),)))
    assert text.endswith("was measured in A only: it does not load")


def test_what_else_differs_is_said() -> None:
    other = result()
    machine = other.identity["machine"] | {"processor": "<another>", "load_average_before": 9.0}
    other = replace(other, identity=dict(other.identity) | {"machine": machine}, options={"threads": 1, "repeats": 20})
    found = compare(result(), other)
    assert found.differences == (
        "machine.processor: <a processor> in A, <another> in B",
        "options.threads: 2 in A, 1 in B",
    )


def test_other_inputs_or_another_reference_leave_quality_alone() -> None:
    wrong = with_quality(lambda q: replace(q, psnr_db=20.0), result())
    other_noise = replace(wrong, identity=dict(wrong.identity) | {"inputs": {"noise": "another"}})
    found = compare(result(), other_noise)
    assert not found.worse and "prompt, embeds or noise differ: quality is not compared" in found.notes
    moved = with_quality(lambda q: replace(q, reference="torch", psnr_db=20.0), result())
    found = compare(result(), moved)
    assert not found.worse and any("another reference" in note for note in found.notes)


def test_nothing_in_common_is_an_error_and_half_a_result_is_a_note() -> None:
    other = result(measurements=(measurement("torch", [1.0]),), quality=(quality("torch", 0.1),))
    with pytest.raises(UsageError, match="no system and case in common; measure the same systems in both"):
        compare(result(), other)
    assert "B is not complete: interrupted" in compare(result(), result(stopped="interrupted")).notes
