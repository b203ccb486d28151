"""The judge: passes every true picture, also a degraded one, and fails every picture that is wrong in one thing."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from export.tiny.dataset import Kind, Sample, sample
from export.tiny.judge import Verdict, judge, read, score
from export.tiny.scenes import COLORS, SHAPES, SIZES, Pixels, Scene, Thing, others, render


def draw(count: int, kind: Kind | None = None, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [sample(rng, kind=kind) for _ in range(count)]


def verdict(each: Sample, scene: Scene, side: int = 128) -> Verdict:
    return judge(each, render(scene, side, side))


def free_color(each: Sample) -> str:
    scenes = (*each.references, each.target)
    taken = [color for scene in scenes for color in (scene.background, *(thing.color for thing in scene.things))]
    return others(COLORS, *taken)[0]


def with_first(scene: Scene, thing: Thing) -> Scene:
    return replace(scene, things=(thing, *scene.things[1:]))


def blurred(picture: Pixels) -> Pixels:
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)))


def compressed(picture: Pixels) -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=60)
    return np.array(Image.open(stream))


def noisy(picture: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 8, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("width", "height", "count"), [(128, 128, 150), (256, 256, 50), (384, 256, 50)])
def test_rendered_targets_pass(width: int, height: int, count: int) -> None:
    verdicts = [judge(each, render(each.target, width, height)) for each in draw(count)]
    assert set(score(verdicts).values()) == {1.0}


@pytest.mark.parametrize("degraded", [blurred, compressed, noisy])
def test_degraded_targets_pass(degraded: Callable[[Pixels], Pixels]) -> None:
    for each in draw(30, seed=1):
        references = [degraded(render(scene, 256, 256)) for scene in each.references]
        picture = degraded(render(each.target, 256, 256))
        assert judge(each, picture).passed
        assert judge(each, picture, references).passed


def test_wrong_colour_shape_size_or_place_fails() -> None:
    for each in draw(50, "text"):
        thing = each.target.things[0]
        seen = verdict(each, with_first(each.target, replace(thing, color=free_color(each))))
        assert not seen.passed and not seen.things[0].color_right and seen.things[0].shape_right
        for shape in others(SHAPES, thing.shape):
            seen = verdict(each, with_first(each.target, replace(thing, shape=shape)))
            assert not seen.passed and not seen.things[0].shape_right and seen.things[0].color_right
        if "size 1" in each.stated:
            (other_size,) = others(SIZES, thing.size_name)
            seen = verdict(each, with_first(each.target, replace(thing, size=SIZES[other_size])))
            assert not seen.passed and seen.things[0].size_right is False
        if "position" in each.stated:
            place = (1 - thing.center_x, thing.center_y) if abs(thing.center_x - 0.5) > 0.1 else (0.26, 0.26)
            seen = verdict(each, with_first(each.target, replace(thing, center_x=place[0], center_y=place[1])))
            assert not seen.passed and seen.position_right is False


def test_wrong_relation_fails() -> None:
    pairs = [each for each in draw(150, "text") if "relation" in each.stated]
    assert len(pairs) > 20
    for each in pairs:
        a, b = each.target.things
        swapped = (
            replace(a, center_x=b.center_x, center_y=b.center_y),
            replace(b, center_x=a.center_x, center_y=a.center_y),
        )
        seen = verdict(each, replace(each.target, things=swapped))
        assert not seen.passed and seen.relation_right is False


def test_wrong_background_fails() -> None:
    for each in draw(60):
        seen = verdict(each, replace(each.target, background=free_color(each)))
        assert not seen.passed and not seen.background_right


def test_missing_or_extra_thing_fails() -> None:
    for each in draw(100):
        things = each.target.things
        seen = verdict(each, replace(each.target, things=things[1:]))
        assert not seen.passed and (seen.found, seen.expected) == (len(things) - 1, len(things))
        extra = Thing("circle", free_color(each), 0.03, 0.5, 0.05)
        seen = verdict(each, replace(each.target, things=(*things, extra)))
        assert not seen.passed and seen.found == len(things) + 1


def test_swapped_colours_fail() -> None:
    pairs = [e for e in draw(80, "text") if len(e.target.things) == 2 and len({t.shape for t in e.target.things}) == 2]
    for each in pairs:
        a, b = each.target.things
        swapped = (replace(a, color=b.color), replace(b, color=a.color))
        assert not verdict(each, replace(each.target, things=swapped)).passed


@pytest.mark.parametrize("side", [128, 256])
def test_noise_and_blank_pictures_fail(side: int) -> None:
    rng = np.random.default_rng(0)
    static = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    coarse = np.array(Image.fromarray(static[:16, :16]).resize((side, side)))
    for each in draw(25):
        for picture in (
            static,
            coarse,
            np.full_like(static, 128),
            render(Scene(each.target.background, ()), side, side),
        ):
            assert not judge(each, picture).passed


@pytest.mark.parametrize(("background", "color", "second"), [("white", "red", "blue"), ("white", "gray", "black")])
def test_two_coloured_thing_is_two_things(background: str, color: str, second: str) -> None:
    picture = render(Scene(background, (Thing("circle", color, 0.2, 0.5, 0.5),)), 256, 256)
    picture[:, 128:][(picture[:, 128:] == COLORS[color]).all(axis=-1)] = COLORS[second]
    things = [found.thing for found in read(picture)[1]]
    assert sorted(thing.color for thing in things) == sorted([color, second])
    assert {thing.shape for thing in things} == {"unknown"}


def test_shape_that_is_none_of_ours_is_unknown() -> None:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).ellipse((40, 100, 216, 156), fill=COLORS["red"])
    (found,) = read(np.array(image))[1]
    assert (found.thing.shape, found.thing.color) == ("unknown", "red")


def test_an_edit_that_was_not_made_fails() -> None:
    for each in draw(100, "edit"):
        seen = verdict(each, each.references[0])
        assert not seen.passed and seen.edit_right is False


def test_a_combination_that_is_a_reference_fails() -> None:
    for each in draw(60, "combine"):
        assert not any(verdict(each, reference).passed for reference in each.references)


def test_an_edit_that_touches_the_rest_fails() -> None:
    """The second thing is not named, so that another colour, size or place of it is a change."""
    judged = 0
    for each in draw(150, "edit"):
        target, source = each.target, each.references[0]
        if len(target.things) != 2 or target.things[1] != source.things[1] or target.background != source.background:
            continue
        first, second = target.things
        spoilt = (
            replace(second, color=free_color(each)),
            replace(second, size=second.size * 0.75),
            replace(second, center_x=second.center_x - 0.06),
        )
        for thing in spoilt:
            seen = verdict(each, replace(target, things=(first, thing)))
            assert not seen.passed and seen.edit_right and not seen.unchanged
        judged += 1
    assert judged > 10


def test_score_leaves_out_what_was_not_asked() -> None:
    lone = Sample("text", "a red circle", (), Scene("white", (Thing("circle", "red", 0.2, 0.5, 0.5),)), frozenset())
    good, bad = verdict(lone, lone.target), verdict(lone, Scene("white", ()))
    assert good.passed and good.relation_right is None and good.edit_right is None
    shares = score([good, bad])
    assert shares["objects_colour"] == shares["passed"] == 0.5 and shares["backgrounds"] == 1.0
    assert not {"relations", "positions", "sizes", "edits", "combines"} & set(shares)


def test_pictures_of_another_kind_are_refused() -> None:
    (edit,) = draw(1, "edit")
    picture = render(edit.target, 128, 128)
    with pytest.raises(ValueError, match="float64"):
        judge(edit, picture / 255)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 reference pictures for 1"):
        judge(edit, picture, [])
    with pytest.raises(ValueError, match=r"\[256, 256, 3\]"):
        judge(edit, picture, [render(edit.references[0], 256, 256)])
