"""Samples to train and judge on: a prompt, the reference scenes that it speaks of, and the scene that it asks for."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from export.tiny import prompts
from export.tiny.scenes import (
    COLORS,
    DEFAULT_BACKGROUND,
    DEFAULT_POSITION,
    DEFAULT_RELATION,
    DEFAULT_SIZE_ALONE,
    DEFAULT_SIZE_PAIR,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    others,
    pick,
    sample_place,
    sample_places,
    sample_size,
)

Kind = Literal["text", "edit", "combine"]
WEIGHTS: Mapping[Kind, float] = {"text": 0.55, "edit": 0.33, "combine": 0.12}
OPERATIONS = ("recolor", "reshape", "backdrop", "resize", "remove", "move", "color from", "background from")
HELD_OUT_ONE_IN = 10

PAIR_SHARE = 0.5
STATED_SHARE = {"background": 0.6, "position": 0.5, "relation": 0.6, "size alone": 0.5, "size of pair": 0.35}
NEW_COLOR_SHARE = 0.4

EXTRA_WORDS = tuple(
    """
    . ; ! ? - ' " ( ) / & s t d i me my we you your this that these those there here is are be was has have having its
    them they one two three single both each other another same different pair 0 3 4 5 first second third only just not
    no without also then so as if by for at in into onto of off from up down out inside outside within between behind
    front beside near far around along across toward towards show paint create generate make render give add insert
    want need would like can could should let do keep leave stay set get swap switch exchange recolor recolour color
    colour colored coloured fill filled erase take away clear shift slide enlarge shrink grow increase decrease scale
    reduce bring photo painting drawing illustration picture pictures image images scene canvas icon figure figures
    shapes object objects thing things item circles squares triangles stars diamonds crosses discs boxes round circular
    disk ball dot rectangle rectangular triangular pointed rhombus heart plus sign x logo symbol flat simple plain
    solid clean minimal geometric vector style art bright dark light deep pale vivid pure hue shade tone backdrop wall
    scarlet crimson golden gold lime navy cyan teal turquoise magenta brown beige silver rose lavender lilac indigo
    huge giant tall wide short medium sized size tinier littler biggest smallest larger smaller much very more less
    upper lower middle center centre centered centred edge side sides half corner corners underneath alongside
    horizontal vertical space empty full large but with using where which while all every some any
    """.split()
)


@dataclass(frozen=True)
class Sample:
    """One prompt with what it refers to, what it asks for and what may be judged.

    `stated` holds the facts that the prompt or the references determine beyond shapes, colours and background
    ("background", "position", "relation", "size 1", "size 2"), and for an edit or a combination its operation.
    """

    kind: Kind
    prompt: str
    references: tuple[Scene, ...]
    target: Scene
    stated: frozenset[str]

    @property
    def operation(self) -> str:
        """What an edit or a combination does."""
        return next(operation for operation in OPERATIONS if operation in self.stated)

    @property
    def source_index(self) -> int:
        """The reference that gives the geometry of the target: the only one of an edit, one of two to combine."""
        if self.kind == "edit":
            return 0
        return [_geometry(reference) for reference in self.references].index(_geometry(self.target))


def is_held_out(scene: Scene) -> bool:
    """Whether the combination of shapes and colours in `scene`, in any order, is kept for evaluation."""
    things = sorted(f"{thing.shape} {thing.color}" for thing in scene.things)
    digest = hashlib.blake2b(" | ".join([scene.background, *things]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def sample(
    rng: np.random.Generator,
    held_out: bool = False,
    kind: Kind | None = None,
    weights: Mapping[Kind, float] = WEIGHTS,
) -> Sample:
    """Draw a sample whose target is on the asked side of the split; without a `kind`, one is drawn by `weights`."""
    if kind is None:
        kinds = list(weights)
        shares = np.array([weights[name] for name in kinds])
        kind = kinds[int(np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(), side="right"))]
    while True:
        drawn = DRAW[kind](rng)
        if is_held_out(drawn.target) == held_out:
            return drawn


def _geometry(scene: Scene) -> list[tuple[str, float, float, float]]:
    return [(thing.shape, thing.size, thing.center_x, thing.center_y) for thing in scene.things]


def vocabulary() -> tuple[str, ...]:
    """Every token that `sample` can produce, then other words that people use for such pictures; no repeats."""
    return tuple(dict.fromkeys((*prompts.WORDS, *EXTRA_WORDS)))


def _scene(rng: np.random.Generator, pair: bool) -> tuple[Scene, frozenset[str]]:
    """A scene and its stated facts; what is not stated takes its default."""
    candidates = ("background", "relation", "size 1", "size 2") if pair else ("background", "position", "size 1")
    share = STATED_SHARE | dict.fromkeys(("size 1", "size 2"), STATED_SHARE["size of pair" if pair else "size alone"])
    stated = frozenset(fact for fact in candidates if rng.random() < share[fact])

    background = pick(rng, list(COLORS)) if "background" in stated else DEFAULT_BACKGROUND
    if pair:
        relation = pick(rng, list(RELATIONS)) if "relation" in stated else DEFAULT_RELATION
        places = list(sample_places(rng, relation))
    else:
        places = [sample_place(rng, pick(rng, list(POSITIONS)) if "position" in stated else DEFAULT_POSITION)]
    default_size = DEFAULT_SIZE_PAIR if pair else DEFAULT_SIZE_ALONE
    things: list[Thing] = []
    for index, (x, y) in enumerate(places, start=1):
        color = pick(rng, others(COLORS, background, *(thing.color for thing in things)))
        size = pick(rng, list(SIZES)) if f"size {index}" in stated else default_size
        things.append(Thing(pick(rng, SHAPES), color, sample_size(rng, size), x, y))
    return Scene(background, tuple(things)), stated


def _facts(scene: Scene, operation: str) -> frozenset[str]:
    """All facts of `scene`: references leave nothing open."""
    sizes = (f"size {index}" for index, _ in enumerate(scene.things, start=1))
    return frozenset(("background", "position" if scene.relation is None else "relation", *sizes, operation))


def _text(rng: np.random.Generator) -> Sample:
    scene, stated = _scene(rng, pair=rng.random() < PAIR_SHARE)
    return Sample("text", prompts.describe(rng, scene, stated), (), scene, stated)


def _edit(rng: np.random.Generator) -> Sample:
    pair = rng.random() < PAIR_SHARE
    source, _ = _scene(rng, pair)
    index = int(rng.integers(len(source.things)))
    thing = source.things[index]
    free_colors = others(COLORS, source.background, *(each.color for each in source.things))
    operation = pick(rng, ("recolor", "reshape", "backdrop", "resize", "remove" if pair else "move"))
    target = source
    if operation == "recolor":
        color = pick(rng, free_colors)
        target = _with(source, index, replace(thing, color=color))
        prompt = prompts.recolor(rng, source, index, color)
    elif operation == "reshape":
        shape = pick(rng, others(SHAPES, thing.shape))
        new_color = pick(rng, free_colors) if rng.random() < NEW_COLOR_SHARE else None
        target = _with(source, index, replace(thing, shape=shape, color=new_color or thing.color))
        prompt = prompts.reshape(rng, source, index, shape, new_color)
    elif operation == "backdrop":
        color = pick(rng, free_colors)
        target = replace(source, background=color)
        prompt = prompts.backdrop(rng, color)
    elif operation == "resize":
        size = pick(rng, others(SIZES, thing.size_name))
        target = _with(source, index, replace(thing, size=thing.size - SIZES[thing.size_name] + SIZES[size]))
        prompt = prompts.resize(rng, source, index, size)
    elif operation == "remove":
        target = replace(source, things=(source.things[1 - index],))
        prompt = prompts.remove(rng, source, index)
    else:
        position = pick(rng, _destinations(thing.position))
        x, y = sample_place(rng, position)
        target = _with(source, index, replace(thing, center_x=x, center_y=y))
        prompt = prompts.move(rng, source, index, position)
    return Sample("edit", prompt, (source,), target, _facts(target, operation))


def _destinations(position: str) -> list[str]:
    """Where a thing may be moved: "to the left" must mean the same place whether or not it keeps its height."""
    x, y = POSITIONS[position]
    middle_x, middle_y = POSITIONS["center"]
    blocked = ("left", "right") if y != middle_y else ()
    return others(POSITIONS, position, *blocked, *(("top", "bottom") if x != middle_x else ()))


def _with(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def _combine(rng: np.random.Generator) -> Sample:
    main = int(rng.integers(2))
    donor = 1 - main
    operation = pick(rng, ("color from", "color from", "background from"))
    while True:
        scenes = [_scene(rng, pair=False)[0] for _ in range(2)]
        (thing,), (other,) = scenes[main].things, scenes[donor].things
        if operation == "color from" and other.color not in (thing.color, scenes[main].background):
            target = replace(scenes[main], things=(replace(thing, color=other.color),))
            prompt = prompts.combine_color(rng, main, donor)
            break
        if operation == "background from" and scenes[donor].background not in (thing.color, scenes[main].background):
            target = replace(scenes[main], background=scenes[donor].background)
            prompt = prompts.combine_background(rng, main, donor)
            break
    return Sample("combine", prompt, (scenes[0], scenes[1]), target, _facts(target, operation))


DRAW: Mapping[Kind, Callable[[np.random.Generator], Sample]] = {"text": _text, "edit": _edit, "combine": _combine}
