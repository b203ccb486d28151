"""Comparison: whether result B is slower or worse than result A, and what else differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.result import Measurement, Quality, Result
from benchmarks.harness.statistics import Ratio, ratio_of_medians, share_margin
from benchmarks.harness.system import CONTROL
from flux2_trt.errors import UsageError

LATENT_NOISE = 5e-4
"""Relative error of final latents that other kernels of the same arithmetic cause: 2e-4 for plans of `tiny` beside
diffusers after 8 steps, up to 1e-4 for small random models (tests/test_parity.py)."""
IDENTICAL_DB = 60.0
"""PSNR of pictures of which one value in fifteen differs by 1 of 255; an identical picture counts as this."""
PSNR_DROP_DB, SSIM_DROP = 1.0, 0.005
FLEETING = ("machine.load_average_before", "machine.clock_mhz")


@dataclass(frozen=True)
class Finding:
    """`worse`: B is, beyond the noise."""

    text: str
    worse: bool


@dataclass(frozen=True)
class Comparison:
    """`differences`: what identifies the results and is not the same; `findings`: of every number that both have."""

    differences: tuple[str, ...]
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def worse(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.worse)


def compare(a: Result, b: Result, threshold: float = 0.05, quality_threshold: float = 0.1) -> Comparison:
    """`threshold`: how much slower counts, as a share, beyond the confidence interval; where a control, measured twice
    in one run, differs from itself by more, that counts. `quality_threshold`: the same of the latents' error.

    Raises UsageError where the two have nothing in common.
    """
    notes: list[str] = []
    findings: list[Finding] = []
    for name, result in (("A", a), ("B", b)):
        if result.stopped:
            notes.append(f"{name} is not complete: {result.stopped}")
    noise = max(threshold, _control_noise(a), _control_noise(b))
    if noise > threshold:
        notes.append(f"a control differs from itself by {100 * noise:.0f} %: less than that is not told apart")
    theirs = {_key(each): each for each in b.measurements if each.samples}
    ours = {_key(each): each for each in a.measurements if each.samples}
    common = [key for key in ours if key in theirs]
    if not common and not ({each.system for each in a.quality} & {each.system for each in b.quality}):
        raise UsageError("the two results have no system and case in common; measure the same systems in both")
    for key in common:
        findings += _slower(ours[key], theirs[key], noise)
    failed = {each.name: each.reason for each in b.missing}
    for key in ours:
        if key not in theirs:
            reason = next((text for name, text in failed.items() if f"{name}:".startswith(f"{key[0]}:")), None)
            text = f"{key[0]} in {key[1]} was measured in A only"
            findings.append(Finding(f"{text}: {reason}" if reason else text, worse=reason is not None))
    findings += _all_quality(a, b, quality_threshold, notes)
    return Comparison(tuple(_differences(a, b)), tuple(notes), tuple(findings))


def _key(measurement: Measurement) -> tuple[str, str]:
    return measurement.system, f"{measurement.scenario}, {measurement.case.title}"


def _slower(a: Measurement, b: Measurement, noise: float) -> Iterator[Finding]:
    ratio = ratio_of_medians(b.seconds, a.seconds)
    system, where = _key(a)
    yield Finding(f"{system} in {where}: {_times(ratio)}", worse=ratio.low > 1 + noise)
    loop = [each.stage("denoise") for each in (a, b)]
    if all(loop):
        ratio = ratio_of_medians(loop[1], loop[0])
        yield Finding(f"{system} in {where}, the loop alone: {_times(ratio)}", worse=ratio.low > 1 + noise)


def _times(ratio: Ratio) -> str:
    return f"B takes {ratio.value:.3f} times as long as A ({ratio.low:.3f} to {ratio.high:.3f})"


def _control_noise(result: Result) -> float:
    """How much the medians of a system and its control differ, relatively."""
    medians = {(each.system, each.scenario, each.case): each.seconds for each in result.measurements if each.samples}
    found = 0.0
    for (system, scenario, case), seconds in medians.items():
        base = medians.get((system.removesuffix(f"+{CONTROL}"), scenario, case))
        if system.endswith(f"+{CONTROL}") and base and scenario == "single-stream":
            found = max(found, abs(ratio_of_medians(seconds, base, paired=True).value - 1))
    return found


def _all_quality(a: Result, b: Result, threshold: float, notes: list[str]) -> Iterator[Finding]:
    theirs = {each.system: each for each in b.quality}
    pairs = [(each, theirs[each.system]) for each in a.quality if each.system in theirs]
    if pairs and a.identity["inputs"] != b.identity["inputs"]:
        notes.append("prompt, embeds or noise differ: quality is not compared")
        return
    for one, other in pairs:
        if one.reference != other.reference or one.pictures != other.pictures:
            notes.append(f"{one.system}: another reference, or another number of pictures; quality is not compared")
        elif one.system != one.reference:
            yield from _worse(one, other, threshold)


def _worse(a: Quality, b: Quality, threshold: float) -> Iterator[Finding]:
    if a.latent_error_by_step and b.latent_error_by_step:
        before, after = a.latent_error_by_step[-1], b.latent_error_by_step[-1]
        text = f"{a.system}: error of the final latents {100 * before:.4f} % in A, {100 * after:.4f} % in B"
        yield Finding(text, worse=after > before * (1 + threshold) + LATENT_NOISE)
    before, after = (IDENTICAL_DB if q.psnr_db is None else min(q.psnr_db, IDENTICAL_DB) for q in (a, b))
    yield Finding(f"{a.system}: PSNR {before:.1f} dB in A, {after:.1f} dB in B", worse=after < before - PSNR_DROP_DB)
    if a.ssim is not None and b.ssim is not None:
        yield Finding(f"{a.system}: SSIM {a.ssim:.4f} in A, {b.ssim:.4f} in B", worse=b.ssim < a.ssim - SSIM_DROP)
    for name, share in a.scores.items():
        if name in b.scores:
            after = b.scores[name]
            text = f"{a.system}: {name} {100 * share:.1f} % in A, {100 * after:.1f} % in B"
            yield Finding(text, worse=after < share - share_margin(share, a.pictures))


def _differences(a: Result, b: Result) -> Iterator[str]:
    first, second = (_flat(_identifying(result)) for result in (a, b))
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name) and not name.endswith(FLEETING):
            yield f"{name}: {_shown(first.get(name))} in A, {_shown(second.get(name))} in B"


def _identifying(result: Result) -> dict[str, Any]:
    systems = {system.name: dict(system.facts) for system in result.systems}
    return {**result.identity, "options": result.options, "systems": systems, "primary": result.primary}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {
        name: value
        for key, inner in values.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def values_of(comparison: Comparison) -> dict[str, Any]:
    """JSON values."""
    return asdict(comparison) | {"worse": [finding.text for finding in comparison.worse]}
