"""English for scenes, edits and combinations: what is said is given, how it is said is drawn.

Every phrase stands in a table here, so that `WORDS` is exactly what the generator can say.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from export.tiny.scenes import COLORS, SHAPES, Scene, Thing, pick

MAX_WORDS = 28
FIRST_SYNONYM_SHARE = 0.7

SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
}
COLOR_WORDS = {color: (color,) for color in COLORS} | {"gray": ("gray", "grey"), "purple": ("purple", "violet")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
RESIZE_WORDS = {"small": ("smaller", "small"), "large": ("larger", "bigger", "large", "big")}
HUE = ("color", "colour")

LEADS = ("draw", "please draw", "a picture of", "an image of")
LEAD_SHARE = 0.3
BARE_SHARE = 0.15

BACKGROUNDS = (
    "on {a} {color} background",
    "against {a} {color} background",
    "with {a} {color} background",
    "on {color}",
    ", {color} background",
    ", background: {color}",
)
BACKGROUNDS_FIRST = ("on {a} {color} background,", "{color} background,", "background: {color},")
BACKGROUND_FIRST_SHARE = 0.25
POSITION_FIRST_SHARE = 0.15

AT = {
    "center": ("in the center", "in the middle", "centered"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
} | {
    corner: (f"in the {corner} corner", f"at the {corner}", f"in the {corner}")
    for corner in ("top left", "top right", "bottom left", "bottom right")
}
TO = {
    "center": ("to the center", "to the middle"),
    "top": ("to the top",),
    "bottom": ("to the bottom",),
    "left": ("to the left", "to the left side"),
    "right": ("to the right", "to the right side"),
} | {
    corner: (f"to the {corner}", f"to the {corner} corner")
    for corner in ("top left", "top right", "bottom left", "bottom right")
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
SIDE_BY_SIDE = ("and", "next to")

RECOLOR = (
    "make {thing} {color}",
    "turn {thing} {color}",
    "paint {thing} {color}",
    "change the {hue} of {thing} to {color}",
)
RESHAPE = ("replace {thing} with {new}", "turn {thing} into {new}", "change {thing} to {new}")
BACKDROP = (
    "on {a} {color} background",
    "make the background {color}",
    "turn the background {color}",
    "change the background to {color}",
)
RESIZE = ("make {thing} {size}",)
REMOVE = ("remove {thing}", "delete {thing}")
MOVE_TO = ("move {thing}",)
MOVE_AT = ("put {thing}", "place {thing}")
LONE = ("it", "the shape")
LONE_SHARE = 0.2

IMAGES = (("image 1", "the first image"), ("image 2", "the second image"))
COLOR_FROM = (
    "the shape of {a} in the {hue} of {b}",
    "the shape of {a} with the {hue} of {b}",
    "{a} but in the {hue} of {b}",
    "draw the shape from {a} using the {hue} of {b}",
    "the {hue} of {b} on the shape of {a}",
)
BACKGROUND_FROM = (
    "{a} on the background of {b}",
    "the object of {a} on the background of {b}",
    "put the object from {a} on the background of {b}",
)


def tokens(text: str) -> list[str]:
    """Lower-case words, single digits and single punctuation marks of `text`."""
    return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


def _phrases() -> Iterator[str]:
    tables: tuple[Iterable[Sequence[str]], ...] = (
        *(table.values() for table in (SHAPE_WORDS, COLOR_WORDS, SIZE_WORDS, RESIZE_WORDS, AT, TO, RELATION_WORDS)),
        (HUE, LEADS, BACKGROUNDS, BACKGROUNDS_FIRST, SIDE_BY_SIDE, RECOLOR, RESHAPE, BACKDROP, RESIZE, REMOVE),
        (MOVE_TO, MOVE_AT, LONE, COLOR_FROM, BACKGROUND_FROM, ("a", "an", "the")),
        IMAGES,
    )
    for table in tables:
        for phrases in table:
            yield from phrases


WORDS = tuple(dict.fromkeys(word for phrase in _phrases() for word in tokens(re.sub(r"{\w+}", " ", phrase))))


def describe(rng: np.random.Generator, scene: Scene, stated: frozenset[str]) -> str:
    """A prompt for `scene` that says its shapes and colours and, of the rest, the `stated` facts only.

    Facts are "background", "position", "relation", "size 1" and "size 2" (of the first and second thing).
    """
    named = [_noun(rng, thing, f"size {index}" in stated) for index, thing in enumerate(scene.things, start=1)]
    words = named[0]
    if scene.relation is not None:
        link = _synonym(rng, RELATION_WORDS[scene.relation] if "relation" in stated else SIDE_BY_SIDE)
        words = f"{named[0]} {link} {named[1]}"
    after: list[str] = []
    before: list[str] = []
    if "position" in stated:
        where = pick(rng, AT[scene.things[0].position])
        if rng.random() < POSITION_FIRST_SHARE:
            before.append(f"{where},")
        else:
            after.append(where)
    if "background" in stated:
        if not before and rng.random() < BACKGROUND_FIRST_SHARE:
            before.append(_on(rng, BACKGROUNDS_FIRST, scene.background))
        else:
            after.append(_on(rng, BACKGROUNDS, scene.background))
    if len(after) == 2 and not after[1].startswith(",") and rng.random() < 0.5:
        after.reverse()
    lead = [pick(rng, LEADS)] if not before and rng.random() < LEAD_SHARE else []
    return " ".join([*before, *lead, words, *after]).replace(" ,", ",")


def recolor(rng: np.random.Generator, scene: Scene, index: int, color: str) -> str:
    """Ask for another colour of thing `index`."""
    return pick(rng, RECOLOR).format(thing=_the(rng, scene, index), color=_color(rng, color), hue=pick(rng, HUE))


def reshape(rng: np.random.Generator, scene: Scene, index: int, shape: str, color: str | None) -> str:
    """Ask for another shape, and another colour if one is given, in the place of thing `index`."""
    new = _synonym(rng, SHAPE_WORDS[shape])
    if color is not None:
        new = f"{_color(rng, color)} {new}"
    return pick(rng, RESHAPE).format(thing=_the(rng, scene, index), new=f"{_article(new)} {new}")


def backdrop(rng: np.random.Generator, color: str) -> str:
    """Ask for another background."""
    return _on(rng, BACKDROP, color)


def resize(rng: np.random.Generator, scene: Scene, index: int, size: str) -> str:
    """Ask for the other size of thing `index`."""
    return pick(rng, RESIZE).format(thing=_the(rng, scene, index), size=pick(rng, RESIZE_WORDS[size]))


def remove(rng: np.random.Generator, scene: Scene, index: int) -> str:
    """Ask for thing `index` to go."""
    return pick(rng, REMOVE).format(thing=_the(rng, scene, index))


def move(rng: np.random.Generator, scene: Scene, index: int, position: str) -> str:
    """Ask for thing `index` to stand at `position`."""
    verbs, places = (MOVE_TO, TO) if rng.random() < 0.5 else (MOVE_AT, AT)
    if position == "center" and verbs is MOVE_AT:
        return f"{pick(rng, MOVE_AT).format(thing=_the(rng, scene, index))} {pick(rng, AT[position][:2])}"
    return f"{pick(rng, verbs).format(thing=_the(rng, scene, index))} {pick(rng, places[position])}"


def combine_color(rng: np.random.Generator, shape_from: int, color_from: int) -> str:
    """Ask for the thing of reference `shape_from` (0 or 1) in the colour of reference `color_from`."""
    return _combine(rng, COLOR_FROM, shape_from, color_from)


def combine_background(rng: np.random.Generator, thing_from: int, background_from: int) -> str:
    """Ask for the thing of reference `thing_from` (0 or 1) on the background of reference `background_from`."""
    return _combine(rng, BACKGROUND_FROM, thing_from, background_from)


def _combine(rng: np.random.Generator, templates: Sequence[str], a: int, b: int) -> str:
    style = int(rng.integers(2))
    return pick(rng, templates).format(a=IMAGES[a][style], b=IMAGES[b][style], hue=pick(rng, HUE))


def _synonym(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Mostly the first word."""
    return words[0] if len(words) == 1 or rng.random() < FIRST_SYNONYM_SHARE else pick(rng, words[1:])


def _color(rng: np.random.Generator, color: str) -> str:
    return _synonym(rng, COLOR_WORDS[color])


def _article(words: str) -> str:
    return "an" if words[0] in "aeio" else "a"


def _on(rng: np.random.Generator, templates: Sequence[str], color: str) -> str:
    word = _color(rng, color)
    return pick(rng, templates).format(a=_article(word), color=word)


def _noun(rng: np.random.Generator, thing: Thing, with_size: bool) -> str:
    words = f"{_color(rng, thing.color)} {_synonym(rng, SHAPE_WORDS[thing.shape])}"
    if with_size:
        words = f"{_synonym(rng, SIZE_WORDS[thing.size_name])} {words}"
    return words if rng.random() < BARE_SHARE else f"{_article(words)} {words}"


def _the(rng: np.random.Generator, scene: Scene, index: int) -> str:
    """A name that only thing `index` of `scene` answers to."""
    thing = scene.things[index]
    if len(scene.things) == 1 and rng.random() < LONE_SHARE:
        return pick(rng, LONE)
    name = _synonym(rng, SHAPE_WORDS[thing.shape])
    shared = sum(other.shape == thing.shape for other in scene.things) > 1
    if shared or rng.random() < 0.5:
        name = f"{_color(rng, thing.color)} {name}"
    return f"the {name}"
