"""Standing: the sections of the page about quality, the floor, and what it takes; each from a result alone."""

from __future__ import annotations

from html import escape
from statistics import median

from benchmarks.harness.result import Result
from benchmarks.report.charts import Point, Row, Series, bars, curves, legend, scatter
from benchmarks.report.markup import color_of, figure, megabytes, ms, ordered, paragraph, percent, table, title_of


def quality(result: Result) -> str:
    if not result.quality:
        return ""
    latencies = {each.system: median(each.seconds) for each in result.of("single-stream")}
    reference = result.quality[0].reference
    points, series, rows = [], [], []
    drawn: dict[str, str] = {}
    for each in result.quality:
        title, color = title_of(result, each.system), color_of(result, each.system)
        error = each.latent_error_by_step[-1] if each.latent_error_by_step else None
        if error and each.system in latencies:
            points.append(Point(title, color, 1000 * latencies[each.system], 100 * error))
        if error:
            steps = [(index + 1.0, 100 * value) for index, value in enumerate(each.latent_error_by_step) if value > 0]
            series.append(Series(color, steps))
            drawn[title] = color
        first = each.latent_error_by_step[0] if each.latent_error_by_step else None
        scores = [f"{100 * each.scores[name]:.0f} %" if name in each.scores else "" for name in SCORES]
        record = result.system(each.system)
        rows.append(
            [
                title,
                record.track if record else "",
                *("" if value is None else f"{100 * value:.4f} %" for value in (first, error)),
                "the reference"
                if each.system == reference
                else f"{each.psnr_db:.1f} dB"
                if each.psnr_db
                else "identical",
                "" if each.ssim is None else f"{each.ssim:.4f}",
                "" if each.lpips is None else f"{each.lpips:.4f}",
                "" if each.clip is None else f"{each.clip:.2f}",
                f"{each.identical} of {each.pictures}",
                *scores,
            ]
        )
    charts = []
    if points:
        label = "Speed against quality"
        numbered = {f"{number} {point.title}": point.color for number, point in enumerate(points, start=1)}
        chart = scatter(points, "ms for a picture, p50", "error of the final latents, %", label) + legend(numbered)
        charts.append(figure(label, chart, "To the left is faster, below is closer to the reference."))
    if series:
        label = "Error of the latents by step"
        chart = curves(series, "step", "relative error, %", label, logarithmic=True)
        charts.append(figure(label, chart + legend(drawn), "Mean over pictures."))
    heads = [
        "system",
        "track",
        "first step",
        "last step",
        "PSNR",
        "SSIM",
        "LPIPS",
        "CLIP",
        "identical",
        *SCORES.values(),
    ]
    count = result.quality[0].pictures
    text = (
        f"The same latents, prompts and references by all: {count} pictures, against {title_of(result, reference)}. "
        "The error of the latents is relative; PSNR is the median of pictures that differ. A control is the reference "
        "again, in another process: what it differs by is noise."
    )
    judged = (
        " Scores are those of the judge of tiny, on held-out samples." if any(q.scores for q in result.quality) else ""
    )
    grid = f'<div class="charts">{"".join(charts)}</div>'
    return f"<h2>Quality beside speed</h2>{grid}{table(heads, rows)}{paragraph(text + judged, 'soft')}"


SCORES = {
    "objects_colour": "colours",
    "objects_shape": "shapes",
    "relations": "relations",
    "edits": "edits",
    "combines": "combinations",
    "passed": "all right",
}


def floor(result: Result) -> str:
    found = [each for each in result.of("single-stream") if each.step_seconds]
    if not found or result.gemm is None:
        return ""
    rate = result.gemm.flops_per_second
    rows, cells = [], []
    for each in ordered(result, found):
        step, call = median(each.step_seconds), median(each.seconds)
        share = each.work.step / rate / step
        sheet = each.work.floor_seconds
        record = result.system(each.system)
        same = result.gemm.number_format == "fp32" or (record is not None and record.track == "exact")
        if same:
            rows.append(Row(title_of(result, each.system), color_of(result, each.system), [100 * share]))
        cells.append(
            [
                title_of(result, each.system),
                ms(step),
                f"{each.work.step / step / 1e9:.0f}",
                *(
                    [ms(each.work.step / rate), percent(share), percent(each.work.call / rate / call)]
                    if same
                    else [""] * 3
                ),
                "" if sheet is None else ms(sheet),
                "" if sheet is None else percent(sheet / step),
            ]
        )
    label = "Part of the measured rate of matrix products"
    most = max(105.0, *(1.05 * row.values[0] for row in rows))
    chart = figure(label, bars(rows, "% of the rate, in the loop", label, lambda v: f"{v:.0f} %", most))
    heads = [
        "system", "ms a step", "GFLOP/s", "ms by measured rate", "reached", "reached by the whole call",
        "ms by data sheet", "of data sheet",
    ]  # fmt: skip
    work = found[0].work
    text = (
        f"Matrix products here, measured before: {result.gemm}. A step has {work.step / 1e9:.2f} GFLOP, of which "
        f"{percent(work.attention / work.step)} attention. Quantized weights are dequantized to fp32 on a CPU, so that "
        "the same rate holds for them. "
    )
    text += (
        "" if any(each.work.floor_seconds for each in found) else "A CPU has no data sheet that would tell its rate."
    )
    return (
        f'<h2>Distance from the floor</h2><div class="charts">{chart}</div>'
        + table(heads, cells)
        + paragraph(text, "soft")
    )


def resources(result: Result) -> str:
    found = result.of("single-stream") or result.of("offline")
    if not found:
        return ""
    rows = []
    for each in found:
        record = result.system(each.system)
        facts = record.facts if record else {}
        energy = [sample.energy_joules for sample in each.samples if sample.energy_joules is not None]
        rows.append(
            [
                title_of(result, each.system),
                megabytes(facts.get("weights_bytes")),
                megabytes(record.loaded_host_bytes if record else None),
                megabytes(each.peak_host_bytes),
                "" if each.peak_device_bytes is None else megabytes(each.peak_device_bytes),
                f"{median(energy) / each.case.batch:.1f} J" if energy else "",
                f"{median(sample.cpu_seconds for sample in each.samples):.2f} s",
                "" if each.others_share is None else percent(each.others_share),
                escape(", ".join(each.throttling)) or ("none" if energy else ""),
                f"{record.load_seconds:.1f} s" if record else "",
            ]
        )
    heads = [
        "system", "weights", "loaded", "peak, host", "peak, device", "energy a picture", "CPU time", "others on cores",
        "throttling", "load",
    ]  # fmt: skip
    text = (
        "Each system has a process of its own, and its peak is that of this process, Python and libraries with it. "
        "Energy, device memory and throttling are NVML's; energy has what the device takes when idle in it."
    )
    return "<h2>Memory, energy, machine</h2>" + table(heads, rows) + paragraph(text, "soft")
