"""Svg: elements, scales and axes of small charts, 360 units wide: at that width text is as large as on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
MARGIN_LEFT, MARGIN_RIGHT = 46, 12


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """`class_` is the attribute class, `stroke_width` stroke-width."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    return f"<{name}{given}>{content}</{name}>" if content else f"<{name}{given}/>"


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value), quote=True)


def text(x: float, y: float, content: str, **attributes: object) -> str:
    return element("text", escape(content), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def drawing(height: float, *parts: str, label: str) -> str:
    """The chart; `label` is what it is called for those who do not see it."""
    return element(
        "svg", "".join(parts), viewBox=f"0 0 {WIDTH} {_text(float(height))}", role="img", aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """From values to places. `logarithmic`: then all values are above 0."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._inner(each) for each in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.begin + share * (self.end - self.begin)

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self, count: int = 5) -> list[float]:
        """Round values in the range: powers of ten, with 2 and 5 where there are few, or steps of 1, 2 or 5."""
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            powers = [10.0**exponent for exponent in exponents]
            found = [tick for tick in powers if self.low <= tick <= self.high]
            if len(found) > 2:
                return found[:: -(-len(found) // count)]
            finer = [factor * power for power in powers for factor in (1, 2, 5)]
            return [tick for tick in finer if self.low <= tick <= self.high]
        rough = (self.high - self.low) / count or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A number as short as it can be."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


Format = Callable[[float], str]


def bottom_axis(scale: Scale, top: float, y: float, title: str, show: Format = plain) -> str:
    """Grid lines from `top` to `y`, numbers and a title below."""
    parts = []
    for tick in scale.ticks():
        parts.append(line(scale(tick), top, scale(tick), y, class_="grid"))
        parts.append(text(scale(tick), y + 13, show(tick), class_="tick", text_anchor="middle"))
    parts.append(text((scale.begin + scale.end) / 2, y + 27, title, class_="tick", text_anchor="middle"))
    return "".join(parts)


def left_axis(scale: Scale, x: float, right: float, title: str, show: Format = plain) -> str:
    """Grid lines from `x` to `right`, numbers to the left, and the title above."""
    parts = []
    for tick in scale.ticks():
        parts.append(line(x, scale(tick), right, scale(tick), class_="grid"))
        parts.append(text(x - 5, scale(tick) + 3.5, show(tick), class_="tick", text_anchor="end"))
    parts.append(text(4, min(scale.begin, scale.end) - 8, title, class_="tick"))
    return "".join(parts)


def padded(values: Sequence[float], logarithmic: bool = False, zero: bool = False) -> tuple[float, float]:
    """A range around values, with room at its ends; from 0 with `zero`."""
    low, high = min(values), max(values)
    if logarithmic:
        return low / 1.4, high * 1.4
    room = 0.06 * (high - low or abs(high) or 1.0)
    return (0.0 if zero else low - room), high + room
