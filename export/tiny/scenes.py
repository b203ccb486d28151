"""Scenes of one or two flat coloured shapes, and how they look.

Lengths are relative to the shorter side of the canvas, centres relative to each axis (x right, y down), so that one
scene fits every canvas. Places and sizes are drawn so that two things of any size stand apart and inside the canvas.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

T = TypeVar("T")
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Point = tuple[float, float]

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 10, 40),
    "orange": (255, 130, 0),
    "yellow": (255, 245, 60),
    "green": (20, 160, 50),
    "blue": (20, 70, 230),
    "purple": (140, 20, 190),
    "pink": (255, 140, 200),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
}
SIZES = {"small": 0.12, "large": 0.20}
SIZE_JITTER = 0.002
SIZE_BORDER = (SIZES["small"] + SIZES["large"]) / 2

NEAR, MIDDLE, FAR = 0.26, 0.50, 0.74
POSITIONS: dict[str, Point] = {
    "center": (MIDDLE, MIDDLE),
    "top": (MIDDLE, NEAR),
    "bottom": (MIDDLE, FAR),
    "left": (NEAR, MIDDLE),
    "right": (FAR, MIDDLE),
    "top left": (NEAR, NEAR),
    "top right": (FAR, NEAR),
    "bottom left": (NEAR, FAR),
    "bottom right": (FAR, FAR),
}
RELATIONS: dict[str, tuple[str, str]] = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
DEFAULT_BACKGROUND = "white"
DEFAULT_POSITION = "center"
DEFAULT_RELATION = "left of"
DEFAULT_SIZE_ALONE = "large"
DEFAULT_SIZE_PAIR = "small"
PLACE_JITTER = 0.005
ALIGN_JITTER = 0.005

OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One upright flat shape; `size` is half the side of the box that it is drawn in."""

    shape: str
    color: str
    size: float
    center_x: float
    center_y: float

    @property
    def size_name(self) -> str:
        return size_name(self.size)

    @property
    def position(self) -> str:
        return position_name(self.center_x, self.center_y)


@dataclass(frozen=True)
class Scene:
    """A background colour and one or two things on it, in the order in which a prompt names them."""

    background: str
    things: tuple[Thing, ...]

    @property
    def relation(self) -> str | None:
        """Where the first thing stands relative to the second; None for a lone thing."""
        if len(self.things) != 2:
            return None
        first, second = self.things
        return relation_name((first.center_x, first.center_y), (second.center_x, second.center_y))


def size_name(size: float) -> str:
    """The class of a radius relative to the shorter side."""
    return "large" if size > SIZE_BORDER else "small"


def position_name(center_x: float, center_y: float) -> str:
    """The cell of the 3x3 grid whose anchor is nearest."""
    return min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (center_x, center_y)))


def relation_name(first: Point, second: Point) -> str:
    """The relation of two centres along the axis on which they are further apart."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def others(options: Collection[str], *excluded: str) -> list[str]:
    """`options` without `excluded`, in order."""
    return [option for option in options if option not in excluded]


def sample_size(rng: np.random.Generator, name: str) -> float:
    """A radius of the named size, relative to the shorter side."""
    return SIZES[name] + float(rng.uniform(-SIZE_JITTER, SIZE_JITTER))


def sample_place(rng: np.random.Generator, position: str) -> Point:
    """The centre of a lone thing near the anchor of `position`."""
    x, y = POSITIONS[position]
    dx, dy = rng.uniform(-PLACE_JITTER, PLACE_JITTER, 2)
    return x + float(dx), y + float(dy)


def sample_places(rng: np.random.Generator, relation: str) -> tuple[Point, Point]:
    """The centres of two things in `relation`, roughly aligned on the other axis."""
    along = rng.uniform(-PLACE_JITTER, PLACE_JITTER, 2)
    across = rng.uniform(-ALIGN_JITTER, ALIGN_JITTER, 2)
    jitter = (along, across) if relation in ("left of", "right of") else (across, along)
    (x0, y0), (x1, y1) = (POSITIONS[position] for position in RELATIONS[relation])
    return (
        (x0 + float(jitter[0][0]), y0 + float(jitter[1][0])),
        (x1 + float(jitter[0][1]), y1 + float(jitter[1][1])),
    )


def _star() -> list[Point]:
    """A five-pointed star around the middle of its own bounding box."""
    inner = 0.42
    lift = (1 - math.cos(math.pi / 5)) / 2
    angles = [index * math.pi / 5 for index in range(10)]
    radii = [1.0 if index % 2 == 0 else inner for index in range(10)]
    return [(r * math.sin(a), lift - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


_SIDE, _ARM = 0.88, 0.34
OUTLINES: dict[str, list[Point]] = {
    "square": [(-_SIDE, -_SIDE), (_SIDE, -_SIDE), (_SIDE, _SIDE), (-_SIDE, _SIDE)],
    "triangle": [(0, -0.9), (1, 0.9), (-1, 0.9)],
    "star": _star(),
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
}
"""Corners of every shape but the circle, in units of the radius, around the middle of its bounding box."""


def extent(shape: str) -> Point:
    """Half the width and half the height of `shape`'s bounding box, in units of the radius."""
    if shape == "circle":
        return 1.0, 1.0
    return max(x for x, _ in OUTLINES[shape]), max(y for _, y in OUTLINES[shape])


@cache
def area(shape: str) -> float:
    """The area of `shape` at radius 1 (shoelace formula)."""
    if shape == "circle":
        return math.pi
    corners = OUTLINES[shape]
    following = [*corners[1:], corners[0]]
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, following, strict=True))) / 2


@cache
def stencil(shape: str, side: int) -> Mask:
    """`shape` stretched until its bounding box fills a square: bool [side, side]."""
    half_width, half_height = extent(shape)
    units = (side / 2 / half_width, side / 2 / half_height)
    return np.array(_mask(shape, (side / 2, side / 2), units, side)) > 127


def render(scene: Scene, width: int, height: int) -> Pixels:
    """Draw `scene` antialiased: uint8 [H, W, 3]."""
    image = Image.new("RGB", (width, height), COLORS[scene.background])
    for thing in scene.things:
        radius = thing.size * min(width, height)
        x, y = thing.center_x * width, thing.center_y * height
        left, top = math.floor(x - radius), math.floor(y - radius)
        side = math.ceil(2 * radius) + 2
        mask = _mask(thing.shape, (x - left, y - top), (radius, radius), side)
        image.paste(COLORS[thing.color], (left, top), mask)
    return np.array(image)


def _mask(shape: str, center: Point, units: Point, side: int) -> Image.Image:
    """The coverage of one shape on a square of `side` pixels, drawn larger and averaged.

    `units` are the pixels of one radius along x and y.
    """
    large = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING), 0)
    x, y, unit_x, unit_y = (OVERSAMPLING * value for value in (*center, *units))
    draw = ImageDraw.Draw(large)
    if shape == "circle":
        draw.ellipse((x - unit_x, y - unit_y, x + unit_x, y + unit_y), fill=255)
    else:
        draw.polygon([(x + unit_x * dx, y + unit_y * dy) for dx, dy in OUTLINES[shape]], fill=255)
    return large.reduce(OVERSAMPLING)
