"""Timing: the sections of the page about speed, each from a result alone; empty where nothing of it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.harness.goals import outcomes
from benchmarks.harness.result import Measurement, Result, Watched
from benchmarks.harness.statistics import ratio_of_medians, summarize
from benchmarks.harness.system import Track
from benchmarks.report.charts import (
    Row,
    Segment,
    bars,
    distributions,
    legend,
    timelines,
)
from benchmarks.report.markup import color_of, figure, ms, ordered, paragraph, percent, table, title_of

TRACKS: Mapping[Track, str] = {
    "exact": "The model's own arithmetic; what differs is rounding.",
    "approximate": "Quantized: smaller for some error, and faster where a device multiplies in that format. Not to be "
    "ranked with the exact ones.",
}
STAGES = {
    "text": "text",
    "encode": "references",
    "conditioning": "conditioning",
    "denoise": "denoising",
    "gap": "host gap",
    "decode": "decoding",
    "watermark": "watermark",
    "png": "PNG",
}
"""In the order in which they come; "gap" is the part of denoising in which the host keeps the device waiting."""
COLORS = {name: f"var(--s{index})" for index, name in enumerate(("text", "encode", "denoise", "step", "gap"))} | {
    "conditioning": "var(--s6)",
    "decode": "var(--s5)",
    "watermark": "var(--s7)",
    "png": "var(--s1)",
    "other": "var(--control)",
}
GOOD = {"reached": "good", "missed": "bad"}


def _track(result: Result, track: Track, measurements: Sequence[Measurement]) -> list[Measurement]:
    names = {system.name for system in result.systems if system.track == track}
    return [each for each in ordered(result, measurements) if each.system in names]


def goals(result: Result) -> str:
    if not result.of("single-stream"):
        return ""
    rows = []
    for outcome in outcomes(result):
        ratio = outcome.ratio
        found = f"{ratio.value:.2f}x" if ratio else ""
        between = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else ""
        verdict = f'<b class="{GOOD.get(outcome.verdict, "unsure")}">{outcome.verdict}</b>'
        what = "the loop alone" if outcome.goal.stage else "end to end"
        baseline = title_of(result, outcome.goal.baseline)
        rows.append([verdict, baseline, what, f"{outcome.goal.times:g}x", found, between])
    text = (
        f"How many times faster {title_of(result, result.primary)} is: the ratio of medians, with its 95 % interval "
        "from pairs of calls in the same round. End to end is from prompt embeds and noise to pixels; the loop alone "
        "is denoising."
    )
    text += " Undecided: the goal lies within that interval."
    heads = ["", "than", "what", "goal", "found", "95 %"]
    return "<h2>Goals</h2>" + table(heads, rows, texts=(1, 2)) + paragraph(text, "soft")


def latency(result: Result) -> str:
    found = result.of("single-stream")
    if not found:
        return ""
    parts = [f"<h2>Latency</h2>{paragraph(f'One picture at a time: {found[0].case.title}. Milliseconds.', 'soft')}"]
    for track, what in TRACKS.items():
        chosen = _track(result, track, found)
        if not chosen:
            continue
        parts.append(f"<h3>{track.capitalize()} track</h3>{paragraph(what, 'soft')}")
        rows = [
            Row(title_of(result, each.system), color_of(result, each.system), [1000 * s for s in each.seconds])
            for each in chosen
        ]
        title = f"Latency, {track}"
        caption = "Every timed call; the long tick is p50, the short one p90."
        parts.append(f'<div class="charts">{figure(title, distributions(rows, "ms", title), caption)}</div>')
        parts.append(_latency_table(result, chosen, track))
    return "".join(parts)


def _latency_table(result: Result, chosen: list[Measurement], track: Track) -> str:
    found = {each.system: each for each in result.of("single-stream")}
    against = found.get("diffusers")
    rows = []
    for each in chosen:
        s = summarize(each.seconds)
        cells = [title_of(result, each.system), *(ms(value) for value in (s.p50, s.p90, s.p99, s.mean, s.deviation))]
        cells += [percent(s.spread), str(s.count)]
        if track == "exact":
            times = ratio_of_medians(against.seconds, each.seconds, paired=True) if against else None
            cells.append(f"{times.value:.2f}x" if times else "")
        record = result.system(each.system)
        cells.append(f"{record.first_seconds:.2f} s" if record and record.first_seconds is not None else "")
        rows.append(cells)
    heads = ["system", "p50", "p90", "p99", "mean", "deviation", "spread", "n"]
    heads += ["of diffusers eager"] if track == "exact" else []
    few = paragraph("With fewer than 100 calls, p99 is little but the slowest.", "soft") if len(rows) else ""
    return table([*heads, "first call"], rows) + few


def stages(result: Result) -> str:
    found = [each for each in result.of("single-stream") if each.watched]
    if not found:
        return ""
    rows, splits, cells = [], [], []
    for each in ordered(result, found):
        title = title_of(result, each.system)
        seconds = {name: median(each.stage(name)) for name in STAGES if each.stage(name)}
        total = median(each.seconds)
        known = [name for name in ("encode", "conditioning", "denoise", "decode") if name in seconds]
        other = max(0.0, total - sum(seconds[name] for name in known))
        splits.append((title, _stacked([*((name, seconds[name]) for name in known), ("other", other)])))
        rows.append((title, _timeline(each, min(each.watched, key=lambda w: sum(w.steps)))))
        gaps = [gap for watched in each.watched for gap in watched.gaps]
        shown = {**seconds, "gap": sum(gaps) / len(each.watched)} if gaps else seconds
        step = f"{ms(median(s for w in each.watched for s in w.steps))}" if each.watched[0].steps else ""
        gap = f"{1000 * median(gaps):.3f}" if gaps else "not told"
        cells.append([title, *(ms(shown[name]) if name in shown else "" for name in STAGES), ms(other), step, gap])
    names = {"encode": "references", "conditioning": "conditioning", "denoise": "denoising", "decode": "decoding"}
    told = {name for each in found for sample in each.samples for name in sample.stages}
    first = {text: COLORS[name] for name, text in names.items() if name in told} | {"other": COLORS["other"]}
    second = {
        "steps": f"linear-gradient(90deg, {COLORS['denoise']} 50%, {COLORS['step']} 50%)",
        "host gap": COLORS["gap"],
        "decoding": COLORS["decode"],
        "watermark": COLORS["watermark"],
        "PNG": COLORS["png"],
        "text": COLORS["text"],
    }
    by_stage = figure(
        "Time by stage", timelines(splits, "ms", "Time by stage") + legend(first), "Medians of the timed calls."
    )
    timeline = figure(
        "Timeline of steps",
        timelines(rows, "ms", "Timeline of steps") + legend(second),
        "One watched call each. Text, watermark and PNG are our pipeline's, and in no comparison.",
    )
    heads = ["system", *STAGES.values(), "other", "a step", "gap of a step"]
    text = "Milliseconds, medians; the host gap is of all steps of a picture, and is part of denoising."
    return (
        f'<h2>Stages</h2><div class="charts">{by_stage}{timeline}</div>' + table(heads, cells) + paragraph(text, "soft")
    )


def _stacked(parts: Sequence[tuple[str, float]]) -> list[Segment]:
    segments, place = [], 0.0
    for name, seconds in parts:
        segments.append(Segment(place, place + 1000 * seconds, COLORS[name]))
        place += 1000 * seconds
    return segments


def _timeline(measurement: Measurement, watched: Watched) -> list[Segment]:
    parts = [(name, watched.stages[name]) for name in ("text", "encode", "conditioning") if name in watched.stages]
    for index, seconds in enumerate(watched.steps):
        gap = watched.gaps[index] if index < len(watched.gaps) else 0.0
        parts += [("denoise" if index % 2 == 0 else "step", seconds - gap), ("gap", gap)]
    parts += [(name, watched.stages[name]) for name in ("decode", "watermark", "png") if name in watched.stages]
    return _stacked(parts)


def throughput(result: Result) -> str:
    found = result.of("offline")
    if not found:
        return ""
    parts = [f"<h2>Throughput</h2>{paragraph(f'Offline: {found[0].case.title}.', 'soft')}"]
    for track in TRACKS:
        chosen = _track(result, track, found)
        if not chosen:
            continue
        rates = {each.system: each.case.batch / median(each.seconds) for each in chosen}
        rows = [Row(title_of(result, name), color_of(result, name), [rate]) for name, rate in rates.items()]
        label = f"Throughput, {track}"
        chart = figure(label, bars(rows, "pictures a second", label, lambda v: f"{v:.2f}"))
        cells = [
            [
                title_of(result, each.system),
                f"{rates[each.system]:.2f}",
                f"{1 / rates[each.system]:.3f}",
                f"{3600 * rates[each.system]:.0f}",
                percent(summarize(each.seconds).spread),
                str(len(each.samples)),
            ]
            for each in chosen
        ]
        heads = ["system", "pictures a second", "seconds a picture", "pictures an hour", "spread", "n"]
        parts.append(f'<h3>{track.capitalize()} track</h3><div class="charts">{chart}</div>' + table(heads, cells))
    return "".join(parts)
