"""Scenes: what stands where, and that it is drawn there."""

from itertools import combinations

import numpy as np
import pytest

from export.tiny.dataset import Sample, sample
from export.tiny.scenes import (
    COLORS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    area,
    extent,
    render,
    sample_place,
    sample_places,
    sample_size,
)

CANVASES = [(128, 128), (256, 256), (384, 256), (256, 384)]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [sample(rng) for _ in range(1000)]


def test_colors_are_clearly_apart() -> None:
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in combinations(COLORS.values(), 2)) > 120


def test_named_places_relations_and_sizes_read_back() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        for position in POSITIONS:
            assert Thing("circle", "red", 0.1, *sample_place(rng, position)).position == position
        for size in SIZES:
            assert Thing("circle", "red", sample_size(rng, size), 0.5, 0.5).size_name == size
        for relation in RELATIONS:
            first, second = (Thing("circle", "red", 0.1, x, y) for x, y in sample_places(rng, relation))
            assert Scene("white", (first, second)).relation == relation


@pytest.mark.parametrize(("width", "height"), CANVASES)
def test_things_stay_inside_the_canvas_and_apart(samples: list[Sample], width: int, height: int) -> None:
    shorter = min(width, height)
    for scene in (scene for each in samples for scene in (*each.references, each.target)):
        boxes = []
        for thing in scene.things:
            x, y, r = thing.center_x * width, thing.center_y * height, thing.size * shorter
            boxes.append((x - r, y - r, x + r, y + r))
        margin = 0.02 * shorter
        for left, top, right, bottom in boxes:
            assert left > margin and top > margin and right < width - margin and bottom < height - margin
        for (left0, top0, right0, bottom0), (left1, top1, right1, bottom1) in combinations(boxes, 2):
            assert max(left0 - right1, left1 - right0, top0 - bottom1, top1 - bottom0) > margin


def test_colors_within_a_scene_differ(samples: list[Sample]) -> None:
    for scene in (scene for each in samples for scene in (*each.references, each.target)):
        colors = [scene.background, *(thing.color for thing in scene.things)]
        assert len(set(colors)) == len(colors)


@pytest.mark.parametrize(("width", "height"), CANVASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_render_puts_each_shape_where_the_scene_says(shape: str, width: int, height: int) -> None:
    thing = Thing(shape, "black", 0.2, 0.3, 0.7)
    picture = render(Scene("white", (thing,)), width, height)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    coverage = 1 - picture[..., 0] / 255
    rows, columns = np.flatnonzero((coverage > 0.5).any(axis=1)), np.flatnonzero((coverage > 0.5).any(axis=0))
    half_width, half_height = (0.2 * min(width, height) * half for half in extent(shape))
    # Thin tips fill less than half of their last pixels, hence up to 4 pixels.
    assert columns[[0, -1]] == pytest.approx([0.3 * width - half_width, 0.3 * width + half_width], abs=4)
    assert rows[[0, -1]] == pytest.approx([0.7 * height - half_height, 0.7 * height + half_height], abs=4)
    # Pillow draws outlines inclusively: up to half an oversampled pixel all around, 3 % of the smallest shape here.
    assert coverage.sum() == pytest.approx(area(shape) * (0.2 * min(width, height)) ** 2, rel=0.04)


def test_edges_are_antialiased_and_the_rest_is_flat() -> None:
    picture = render(Scene("blue", (Thing("circle", "yellow", 0.2, 0.5, 0.5),)), 256, 256)
    flat = [(picture == COLORS[name]).all(axis=-1) for name in ("blue", "yellow")]
    rim = ~(flat[0] | flat[1])
    assert flat[0][0, 0] and flat[1][128, 128]
    assert 0.001 < rim.mean() < 0.01
