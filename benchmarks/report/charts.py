"""Charts: what the report shows, each as an SVG from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.harness.statistics import summarize
from benchmarks.report.svg import (
    MARGIN_LEFT,
    MARGIN_RIGHT,
    WIDTH,
    Format,
    Scale,
    bottom_axis,
    drawing,
    element,
    left_axis,
    line,
    padded,
    plain,
    text,
)

ROW, BAR = 32, 11
LEFT, RIGHT = 4, WIDTH - MARGIN_RIGHT
APART = 14  # of the numbers in a scatter
PLOT_TOP, PLOT_BOTTOM, PLOT_HEIGHT = 26, 226, 262


@dataclass(frozen=True)
class Row:
    """A system in a chart. `color`: a CSS colour."""

    title: str
    color: str
    values: Sequence[float]


@dataclass(frozen=True)
class Segment:
    """A stretch of a timeline, in the unit of its axis."""

    begin: float
    end: float
    color: str


def distributions(rows: Sequence[Row], unit: str, label: str) -> str:
    """Every sample as a dot, p50 as a long tick, p90 as a short one."""
    scale = Scale(*padded([value for row in rows for value in row.values]), LEFT + 6, RIGHT - 6)
    bottom = ROW * len(rows) + 4
    parts = [bottom_axis(scale, 0, bottom, unit)]
    for index, row in enumerate(rows):
        y = ROW * index + 22
        found = summarize(row.values)
        parts.append(text(LEFT, y - 9, row.title))
        parts.append(text(RIGHT, y - 9, f"p50 {plain(found.p50)}", class_="tick", text_anchor="end"))
        for value in row.values:
            parts.append(element("circle", cx=scale(value), cy=y, r=3, fill=row.color, fill_opacity=0.45))
        for value, half in ((found.p50, 8), (found.p90, 4)):
            place = scale(value)
            parts.append(line(place, y - half + 2, place, y + half - 2, stroke=row.color, stroke_width=2))
    return drawing(bottom + 32, *parts, label=label)


def bars(rows: Sequence[Row], unit: str, label: str, show: Format = plain, most: float | None = None) -> str:
    """A bar for the first value of each row, from 0."""
    high = most or 1.05 * max(row.values[0] for row in rows)
    scale = Scale(0.0, high, LEFT, RIGHT)
    bottom = ROW * len(rows) + 4
    parts = [bottom_axis(scale, 0, bottom, unit)]
    for index, row in enumerate(rows):
        y, value = ROW * index, row.values[0]
        parts.append(text(LEFT, y + 13, row.title))
        parts.append(text(RIGHT, y + 13, show(value), class_="tick", text_anchor="end"))
        width = max(1.0, scale(value) - LEFT)
        parts.append(element("rect", x=LEFT, y=y + 17, width=width, height=BAR, rx=2, fill=row.color))
    return drawing(bottom + 32, *parts, label=label)


def timelines(rows: Sequence[tuple[str, Sequence[Segment]]], unit: str, label: str) -> str:
    """Stretches one after the other, for each system on a line of its own."""
    high = max(segment.end for _, segments in rows for segment in segments)
    scale = Scale(0.0, 1.02 * high, LEFT, RIGHT)
    bottom = ROW * len(rows) + 4
    parts = [bottom_axis(scale, 0, bottom, unit)]
    for index, (title, segments) in enumerate(rows):
        y = ROW * index
        parts.append(text(LEFT, y + 13, title))
        parts.append(text(RIGHT, y + 13, plain(segments[-1].end), class_="tick", text_anchor="end"))
        for segment in segments:
            begin, end = scale(segment.begin), scale(segment.end)
            width = max(0.4, end - begin)
            parts.append(element("rect", x=begin, y=y + 17, width=width, height=BAR, fill=segment.color))
    return drawing(bottom + 32, *parts, label=label)


@dataclass(frozen=True)
class Point:
    title: str
    color: str
    x: float
    y: float


def scatter(points: Sequence[Point], x_title: str, y_title: str, label: str) -> str:
    """Both axes logarithmic; points have the numbers of their places in `points`, which a legend explains."""
    x = Scale(*padded([point.x for point in points], True), MARGIN_LEFT, RIGHT, True)
    y = Scale(*padded([point.y for point in points], True), PLOT_BOTTOM, PLOT_TOP, True)
    parts = [bottom_axis(x, PLOT_TOP, PLOT_BOTTOM, x_title), left_axis(y, MARGIN_LEFT, RIGHT, y_title)]
    taken: list[tuple[float, float]] = []
    for number, point in enumerate(points, start=1):
        place_x, place_y = x(point.x), y(point.y)
        while any(abs(place_x - a) < APART and abs(place_y - b) < APART for a, b in taken):
            place_y -= APART  # a line leads from the number to its place
        taken.append((place_x, place_y))
        if place_y != y(point.y):
            parts.append(line(place_x, place_y, place_x, y(point.y), stroke=point.color))
        dot = element("title", escape(point.title))
        parts.append(element("circle", dot, cx=place_x, cy=place_y, r=7.5, fill=point.color))
        parts.append(text(place_x, place_y + 3.5, str(number), class_="number", text_anchor="middle"))
    return drawing(PLOT_HEIGHT, *parts, label=label)


@dataclass(frozen=True)
class Series:
    """`fit`: a line through these points instead of through the measured ones."""

    color: str
    points: Sequence[tuple[float, float]]
    fit: Sequence[tuple[float, float]] = ()


def curves(series: Sequence[Series], x_title: str, y_title: str, label: str, logarithmic: bool = False) -> str:
    """Points and lines; `logarithmic`: on the y axis, which else begins at 0."""
    everything = [point for each in series for point in (*each.points, *each.fit)]
    x = Scale(*padded([a for a, _ in everything]), MARGIN_LEFT, RIGHT)
    y = Scale(*padded([b for _, b in everything], logarithmic, zero=True), PLOT_BOTTOM, PLOT_TOP, logarithmic)
    parts = [bottom_axis(x, PLOT_TOP, PLOT_BOTTOM, x_title), left_axis(y, MARGIN_LEFT, RIGHT, y_title)]
    for each in series:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in (each.fit or each.points))
        dashes: dict[str, object] = {"stroke_dasharray": "4 3"} if each.fit else {}
        parts.append(element("polyline", points=path, fill="none", stroke=each.color, stroke_width=1.6, **dashes))
        for a, b in each.points:
            parts.append(element("circle", cx=x(a), cy=y(b), r=3.2, fill=each.color))
    return drawing(PLOT_HEIGHT, *parts, label=label)


def legend(entries: Mapping[str, str]) -> str:
    """Names and their colours, as a list."""
    items = "".join(f'<li><i style="background:{color}"></i>{name}</li>' for name, color in entries.items())
    return f'<ul class="legend">{items}</ul>'
