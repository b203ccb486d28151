"""Markup: tables, figures and numbers of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from statistics import median

from benchmarks.harness.result import Measurement, Result, SystemRecord


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], texts: Iterable[int] = ()) -> str:
    """Cells are markup; the columns `texts` hold sentences. Columns in which nothing stands are left out."""
    rows = list(rows)
    kept = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    wide = {place for place, index in enumerate(kept) if index in set(texts)}

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if index in wide else ''}>{value}</{tag}>" for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', [row[index] for index in kept])}</tr>" for row in rows)
    heads = cells("th", [headings[index] for index in kept])
    return f'<div class="table"><table><tr>{heads}</tr>{body}</table></div>'


def figure(title: str, chart: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><b>{escape(title)}</b>{chart}{below}</figure>"


def paragraph(content: str, kind: str = "") -> str:
    return f'<p class="{kind}">{content}</p>' if kind else f"<p>{content}</p>"


def ms(seconds: float) -> str:
    """Milliseconds, to three places."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def megabytes(count: float | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f} MB"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def ordered(result: Result, measurements: Sequence[Measurement]) -> list[Measurement]:
    """The exact systems and then the approximate ones, each from fast to slow."""
    exact = {system.name for system in result.systems if system.track == "exact"}
    return sorted(measurements, key=lambda each: (each.system not in exact, median(each.seconds)))


APPROXIMATE_COLORS = 4


def color_of(result: Result, name: str) -> str:
    """Of a system: ours in the exact track, each of the others of ours, torch with our modules, others, a control."""
    if name.endswith("+control"):
        return "var(--control)"
    approximate = [system.name for system in result.systems if system.track == "approximate"]
    if name in approximate:
        return f"var(--a{approximate.index(name) % APPROXIMATE_COLORS})"
    if name.startswith("plans:"):
        return "var(--ours)"
    kind = "torch" if name.startswith("torch") else "theirs"
    return f"var(--{kind}-compile)" if name.endswith("-compile") else f"var(--{kind})"


def title_of(result: Result, name: str) -> str:
    system: SystemRecord | None = result.system(name)
    return escape(system.title) if system else escape(name)
