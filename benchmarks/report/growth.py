"""Growth: how time grows along the axes of the sweep, with fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import median

from benchmarks.harness.result import Measurement, Result
from benchmarks.harness.scaling import cases_along, explained, fit_line, fit_steps
from benchmarks.report.charts import Series, curves, legend
from benchmarks.report.markup import color_of, figure, ms, paragraph, table, title_of

Value = Callable[[Measurement], float]


def growth(result: Result) -> str:
    systems = list(dict.fromkeys(each.system for each in result.of("sweep")))
    if not systems:
        return ""
    axes: tuple[tuple[str, str, str, Value, bool], ...] = (
        ("pixels", "With size", "kilopixels", lambda each: each.case.width * each.case.height / 1000, True),
        ("references", "With references", "reference pictures", lambda each: each.case.references, True),
        ("steps", "With steps", "steps", lambda each: each.case.steps, False),
        ("batch", "With batch", "pictures a call", lambda each: each.case.batch, False),
    )
    charts = [_chart(result, systems, *axis) for axis in axes]
    parts = [f'<h2>Growth</h2><div class="charts">{"".join(charts)}</div>', legend(_names(result, systems))]
    for system in systems:
        swept = [each for each in result.of("sweep") if each.system == system]
        sentences = []
        if (fit := fit_steps(swept)) is not None:
            sentences += explained(fit, [each for each in swept if each.case.batch == 1])
        for axis, value in (("steps", lambda each: each.case.steps), ("batch", lambda each: each.case.batch)):
            along = cases_along(result, system, axis)
            if len(along) > 2:
                line = fit_line([value(each) for each in along], [median(each.seconds) for each in along])
                what = {"steps": "A step more", "batch": "A picture more in a batch"}[axis]
                sentences.append(
                    f"{what} takes {ms(line.slope)} ms, on top of {ms(max(0.0, line.intercept))} ms; no point is "
                    f"farther than {100 * line.worst_share:.0f} % from this line."
                )
        if sentences:
            parts.append(f"<h3>{title_of(result, system)}</h3>{paragraph(escape(' '.join(sentences)))}")
    parts.append(_table(result, systems))
    return "".join(parts)


def _chart(result: Result, systems: Sequence[str], axis: str, title: str, x_title: str, x: Value, of_step: bool) -> str:
    series = []
    for system in systems:
        along = cases_along(result, system, axis)
        if of_step:
            along = [each for each in along if each.step_seconds]
        if not along:
            continue
        points = [(x(each), 1000 * median(each.step_seconds if of_step else each.seconds)) for each in along]
        series.append(Series(color_of(result, system), points, _fitted(result, system, along, x) if of_step else ()))
    if not series:
        return ""
    y_title = "ms a step" if of_step else "ms a call"
    return figure(title, curves(series, x_title, y_title, title), "Dashed: the fit." if of_step else "")


def _fitted(result: Result, system: str, along: Sequence[Measurement], x: Value) -> list[tuple[float, float]]:
    """The fit at the measured places, joined by straight lines."""
    fit = fit_steps([each for each in result.of("sweep") if each.system == system])
    if fit is None:
        return []
    return [(x(each), 1000 * fit.seconds(each.work.step, each.work.attention)) for each in along]


def _names(result: Result, systems: Sequence[str]) -> dict[str, str]:
    return {title_of(result, system): color_of(result, system) for system in systems}


def _table(result: Result, systems: Sequence[str]) -> str:
    by_case: dict[str, dict[str, Measurement]] = {}
    for each in result.of("sweep"):
        by_case.setdefault(each.case.title, {})[each.system] = each
    rows = []
    for title, found in by_case.items():
        work = next(iter(found.values())).work
        cells = [title, f"{work.step / 1e9:.2f}", f"{100 * work.attention / work.step:.0f} %"]
        for system in systems:
            for seconds in ([], []) if system not in found else (found[system].seconds, found[system].step_seconds):
                cells.append(ms(median(seconds)) if seconds else "")
        rows.append(cells)
    heads = ["case", "GFLOP a step", "attention"]
    heads += [f"{title_of(result, system)}, {what}" for system in systems for what in ("call", "step")]
    return f"<details><summary>All cases, milliseconds</summary>{table(heads, rows)}</details>"
