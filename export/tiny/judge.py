"""Whether a picture shows what a sample asked for, decided without a network.

The background is the palette colour that most of the border has. What clearly differs from it falls into connected
components; each is read as a `Thing` and the things are compared with those of the target.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from export.tiny.dataset import Kind, Sample
from export.tiny.scenes import (
    COLORS,
    SHAPES,
    Mask,
    Pixels,
    Scene,
    Thing,
    area,
    extent,
    relation_name,
    render,
    stencil,
)

UNKNOWN = "unknown"
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
COLOR_TOLERANCE = 60.0
"""RGB distance up to which a pixel or median is a palette colour: under half of the least distance of two of them."""
RIM_TOLERANCE = 80.0
"""RGB distance of a rim pixel from the mixtures of thing and background; JPEG halves the resolution of colour."""
RIM_WIDTH = 5
"""Pixels; a part of a component that is nowhere as wide as this and not of its colour is its rim, no second thing."""
FOREGROUND_DISTANCE = 50.0
BORDER_SHARE = 0.6
SPECK_SHARE = 0.0015
MOST_THINGS = 6
"""Components read at most, and again of second colours: a picture of noise has thousands."""
SHAPE_IOU = 0.75
ASPECT_TOLERANCE = 1.25
TEMPLATE_SIDE = 64
PLACE_TOLERANCE = 0.04
SIZE_TOLERANCE = 0.15
EDIT_MARGIN = 0.04
UNCHANGED_MAE = 12.0
"""Mean absolute error in steps of 255: Gaussian noise of sigma 8 alone gives 6.4."""


@dataclass(frozen=True)
class Found:
    """A component of a picture read as a thing (shape or colour may be "unknown"), and its pixels, bool [H, W]."""

    thing: Thing
    pixels: Mask


@dataclass(frozen=True)
class ThingVerdict:
    """How the best match of one expected thing fares; `size_right` is None where no size was stated."""

    color_right: bool
    shape_right: bool
    size_right: bool | None


@dataclass(frozen=True)
class Verdict:
    """What is right about one picture; None where the sample leaves the matter open.

    Edits and combinations are judged against their source, the reference that gives the geometry: `edit_right` when
    all that was asked for is there, `unchanged` when all else equals the source.
    """

    kind: Kind
    background_right: bool
    expected: int
    found: int
    things: tuple[ThingVerdict, ...]
    relation_right: bool | None
    position_right: bool | None
    edit_right: bool | None
    unchanged: bool | None

    @property
    def passed(self) -> bool:
        """Nothing that was asked for is wrong or missing, and nothing else is there."""
        details = [self.relation_right, self.position_right, self.edit_right, self.unchanged]
        for thing in self.things:
            details += [thing.color_right, thing.shape_right, thing.size_right]
        return self.background_right and self.found == self.expected and False not in details


def judge(sample: Sample, picture: Pixels, references_pixels: Sequence[Pixels] | None = None) -> Verdict:
    """Compare `picture` (uint8 [H, W, 3]) with what `sample` states.

    `references_pixels` are the references as the model saw them, each of the picture's size; without them the
    references are rendered. Raises ValueError for another dtype, shape or number of pictures.
    """
    _check(sample, picture, references_pixels)
    target, stated = sample.target, sample.stated
    background, components = read(picture)
    matches = _match(target.things, components)

    things = tuple(_judge_thing(thing, match, f"size {n}" in stated) for n, (thing, match) in enumerate(matches, 1))
    relation = position = None
    if "relation" in stated:
        centers = [(match.thing.center_x, match.thing.center_y) for _, match in matches if match is not None]
        relation = len(centers) == 2 and relation_name(centers[0], centers[1]) == target.relation
    if "position" in stated:
        (thing, match), *_ = matches
        position = match is not None and match.thing.position == thing.position

    edit_right = unchanged = None
    if sample.references:
        index = sample.source_index
        source = sample.references[index]
        pixels = None if references_pixels is None else references_pixels[index]
        edit_right = len(components) == len(target.things) and _edit_right(source, target, background, matches)
        unchanged = _unchanged(source, target, background, matches, picture, pixels)
    return Verdict(
        kind=sample.kind,
        background_right=background == target.background,
        expected=len(target.things),
        found=len(components),
        things=things,
        relation_right=relation,
        position_right=position,
        edit_right=edit_right,
        unchanged=unchanged,
    )


def score(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Shares in 0..1 of what is right among what was asked for; a name is absent where nothing was.

    An edit counts when what was asked for is there and the rest is unchanged; a combination when it passes.
    """
    verdicts = tuple(verdicts)
    things = [thing for verdict in verdicts for thing in verdict.things]
    edits = [verdict for verdict in verdicts if verdict.kind == "edit"]
    columns: dict[str, list[bool | None]] = {
        "objects_colour": [thing.color_right for thing in things],
        "objects_shape": [thing.shape_right for thing in things],
        "objects_count": [verdict.found == verdict.expected for verdict in verdicts],
        "relations": [verdict.relation_right for verdict in verdicts],
        "positions": [verdict.position_right for verdict in verdicts],
        "sizes": [thing.size_right for thing in things],
        "backgrounds": [verdict.background_right for verdict in verdicts],
        "edits": [bool(verdict.edit_right and verdict.unchanged) for verdict in edits],
        "combines": [verdict.passed for verdict in verdicts if verdict.kind == "combine"],
        "passed": [verdict.passed for verdict in verdicts],
    }
    known = {name: [value for value in column if value is not None] for name, column in columns.items()}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def read(picture: Pixels) -> tuple[str, list[Found]]:
    """The background colour and the components of `picture` (uint8 [H, W, 3]), the largest first."""
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background, share = _dominant(border)
    name = _color_name(background) if share >= BORDER_SHARE else UNKNOWN
    return name, _read_components(pixels, background, _length(pixels - background) > FOREGROUND_DISTANCE)


def _read_components(pixels: NDArray[np.float32], background: NDArray[np.float32], foreground: Mask) -> list[Found]:
    """Read the largest components that are no specks, then the largest parts of them that have a second colour."""
    found: list[Found] = []
    opening = np.ones((RIM_WIDTH, RIM_WIDTH), dtype=bool)
    for region in (foreground, second := np.zeros_like(foreground)):
        labels, _ = ndimage.label(region)
        areas, boxes = np.bincount(labels.ravel()), ndimage.find_objects(labels)
        numbers = [int(n) for n in np.argsort(-areas) if n and areas[n] >= SPECK_SHARE * region.size]
        for number in numbers[:MOST_THINGS]:
            box, component = boxes[number - 1], labels == number
            thing, own = _read_component(pixels, background, component, box)
            found.append(Found(thing, component))
            if region is foreground:
                second[box] |= ndimage.binary_opening((component & ~own)[box], opening)
    return found


def _read_component(
    pixels: NDArray[np.float32], background: NDArray[np.float32], component: Mask, box: tuple[slice, slice]
) -> tuple[Thing, Mask]:
    """Read a component by the pixels that have its own colour, which end where the rim is half background."""
    inside, cut = component[box], pixels[box]
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    color, _ = _dominant(cut[depth >= depth.max() / 2])
    direction, offset = color - background, cut - background
    along = (offset @ (direction / np.dot(direction, direction))).clip(0, 1)
    aside = _length(offset - along[..., None] * direction)
    own = np.zeros_like(component)
    own[box] = mask = inside & (along > 0.5) & (aside < RIM_TOLERANCE)
    if not mask.any():
        return Thing(UNKNOWN, UNKNOWN, 0.0, 0.5, 0.5), own

    height, width = component.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shape = _shape_name(mask[top:bottom, left:right])
    if shape == UNKNOWN:
        radius = max(bottom - top, right - left) / 2
    else:
        radius = math.sqrt(float(mask.sum()) / area(shape))
    thing = Thing(
        shape=shape,
        color=_color_name(color),
        size=float(radius / min(width, height)),
        center_x=float((box[1].start + (left + right) / 2) / width),
        center_y=float((box[0].start + (top + bottom) / 2) / height),
    )
    return thing, own


def _dominant(colors: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """The median of those of `colors` [N, 3] that are nearest to the most frequent palette colour, and their share."""
    nearest = np.argmin(_length(colors[:, None] - PALETTE), axis=1)
    modal = nearest == np.bincount(nearest).argmax()
    return np.median(colors[modal], axis=0), float(modal.mean())


def _length(colors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean length along the last axis; einsum takes half the time of `np.linalg.norm` here."""
    squares: NDArray[np.float32] = np.einsum("...c,...c->...", colors, colors)
    return np.sqrt(squares)


def _color_name(color: NDArray[np.float32]) -> str:
    distances = np.linalg.norm(PALETTE - color, axis=-1)
    index = int(distances.argmin())
    return list(COLORS)[index] if distances[index] <= COLOR_TOLERANCE else UNKNOWN


def _shape_name(box: Mask) -> str:
    """The shape whose template fits `box`, a mask cut to its bounding box, best and well enough."""
    side = (TEMPLATE_SIDE, TEMPLATE_SIDE)
    stretched = np.array(Image.fromarray(box.astype(np.uint8) * 255).resize(side, Image.Resampling.BOX)) > 127
    overlaps = {shape: _iou(stretched, stencil(shape, TEMPLATE_SIDE)) for shape in SHAPES}
    best = max(SHAPES, key=lambda shape: overlaps[shape])
    half_width, half_height = extent(best)
    aspect = box.shape[1] / box.shape[0] / (half_width / half_height)
    fits = overlaps[best] >= SHAPE_IOU and 1 / ASPECT_TOLERANCE <= aspect <= ASPECT_TOLERANCE
    return best if fits else UNKNOWN


def _iou(first: Mask, second: Mask) -> float:
    return float((first & second).sum() / (first | second).sum())


Matches = list[tuple[Thing, Found | None]]


def _match(expected: Sequence[Thing], components: Sequence[Found]) -> Matches:
    """Pair every expected thing with the component that suits it, in the best assignment of all."""
    candidates: list[Found | None] = [*components, *[None] * len(expected)]

    def likeness(thing: Thing, found: Found | None) -> float:
        if found is None:
            return -1.0
        distance = math.dist((thing.center_x, thing.center_y), (found.thing.center_x, found.thing.center_y))
        return (found.thing.color == thing.color) + (found.thing.shape == thing.shape) - distance / 2

    best = max(
        permutations(candidates, len(expected)),
        key=lambda chosen: sum(map(likeness, expected, chosen)),
    )
    return list(zip(expected, best, strict=True))


def _judge_thing(thing: Thing, match: Found | None, with_size: bool) -> ThingVerdict:
    if match is None:
        return ThingVerdict(False, False, False if with_size else None)
    seen = match.thing
    size_right = seen.size_name == thing.size_name if with_size else None
    return ThingVerdict(seen.color == thing.color, seen.shape == thing.shape, size_right)


def _origins(source: Scene, target: Scene) -> list[Thing]:
    """What every thing of `target` was in `source`; a removal keeps the others as they were."""
    return list(source.things if len(source.things) == len(target.things) else target.things)


def _edit_right(source: Scene, target: Scene, background: str, matches: Matches) -> bool:
    """Whether everything in which `target` differs from `source` is there."""
    right = background == target.background or target.background == source.background
    for origin, (thing, match) in zip(_origins(source, target), matches, strict=True):
        if match is None:
            return False
        for name in ("color", "shape", "size_name", "position"):
            asked = getattr(thing, name)
            right &= asked == getattr(origin, name) or asked == getattr(match.thing, name)
    return right


def _unchanged(
    source: Scene, target: Scene, background: str, matches: Matches, picture: Pixels, source_pixels: Pixels | None
) -> bool:
    """Whether everything in which `target` equals `source` is kept, down to the pixels away from the edit."""
    height, width, _ = picture.shape
    before, after = render(source, width, height), render(target, width, height)
    edited: Mask = (before != after).any(axis=-1)
    kept = background == target.background or target.background != source.background
    for origin, (thing, match) in zip(_origins(source, target), matches, strict=True):
        if match is None:
            return False
        seen = match.thing
        if origin != thing:
            edited |= match.pixels
        kept &= origin.color != thing.color or seen.color == thing.color
        kept &= origin.shape != thing.shape or seen.shape == thing.shape
        kept &= origin.size != thing.size or abs(seen.size / thing.size - 1) <= SIZE_TOLERANCE
        place, seen_place = (thing.center_x, thing.center_y), (seen.center_x, seen.center_y)
        moved = (origin.center_x, origin.center_y) != place
        kept &= moved or math.dist(place, seen_place) <= PLACE_TOLERANCE
    margin = math.ceil(EDIT_MARGIN * min(width, height))
    rest = ~ndimage.maximum_filter(edited, size=2 * margin + 1)
    if not rest.any():
        return kept
    expected = after if source_pixels is None else source_pixels
    error = np.abs(picture[rest].astype(np.float32) - expected[rest]).mean()
    return kept and float(error) <= UNCHANGED_MAE


def _check(sample: Sample, picture: Pixels, references_pixels: Sequence[Pixels] | None) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} {list(picture.shape)}; pass uint8 [H, W, 3].")
    if references_pixels is None:
        return
    if len(references_pixels) != len(sample.references):
        raise ValueError(f"{len(references_pixels)} reference pictures for {len(sample.references)} references.")
    for reference in references_pixels:
        if reference.shape != picture.shape or reference.dtype != np.uint8:
            raise ValueError(
                f"a reference is {reference.dtype} {list(reference.shape)}, the picture uint8 {list(picture.shape)}; "
                "pass references of the picture's size, or none to render them."
            )
