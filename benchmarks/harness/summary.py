"""Summary: a result in a few lines for a terminal, and in a few values for a program."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.goals import outcomes
from benchmarks.harness.result import Result
from benchmarks.harness.statistics import summarize


def lines_of(result: Result) -> list[str]:
    """Latency, throughput, quality, goals, and what is missing."""
    lines = []
    for each in sorted(result.of("single-stream"), key=lambda each: summarize(each.seconds).p50):
        found = summarize(each.seconds)
        lines.append(
            f"{each.system:24} p50 {_ms(found.p50)}  p90 {_ms(found.p90)}  p99 {_ms(found.p99)}  "
            f"mean {_ms(found.mean)} ± {_ms(found.deviation)}  n {found.count}"
        )
    for each in result.of("offline"):
        lines.append(f"{each.system:24} offline {each.case.batch / summarize(each.seconds).p50:.2f} pictures/s")
    for quality in result.quality:
        error = 100 * quality.latent_error_by_step[-1] if quality.latent_error_by_step else float("nan")
        psnr = "identical" if quality.psnr_db is None else f"{quality.psnr_db:.1f} dB"
        lines.append(f"{quality.system:24} latents {error:.4f} % from {quality.reference}, PSNR {psnr}")
    for outcome in outcomes(result):
        goal, what = outcome.goal, outcome.goal.stage or "end to end"
        found_ratio = f": {outcome.ratio}" if outcome.ratio else ""
        lines.append(f"goal {goal.times:g}x {goal.baseline}, {what}: {outcome.verdict}{found_ratio}")
    shares = [each.others_share for each in result.measurements if each.others_share is not None]
    if shares:
        lines.append(f"others took up to {100 * max(shares):.0f} % of the machine meanwhile")
    lines += [f"missing: {each.name}: {each.reason}" for each in result.missing]
    return lines + ([f"not complete: {result.stopped}"] if result.stopped else [])


def values_of(result: Result) -> dict[str, Any]:
    """JSON values: seconds by system, ratios by goal."""
    latency = {}
    for each in result.of("single-stream"):
        found = summarize(each.seconds)
        latency[each.system] = {"p50": found.p50, "p90": found.p90, "p99": found.p99, "mean": found.mean}
    return {
        "stopped": result.stopped,
        "seconds": latency,
        "pictures_per_second": {
            each.system: each.case.batch / summarize(each.seconds).p50 for each in result.of("offline")
        },
        "goals": [
            {
                "baseline": each.goal.baseline,
                "stage": each.goal.stage or "end to end",
                "times": each.goal.times,
                "found": each.ratio.value if each.ratio else None,
                "verdict": each.verdict,
            }
            for each in outcomes(result)
        ],
        "missing": {each.name: each.reason for each in result.missing},
    }


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
