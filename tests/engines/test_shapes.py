"""Optimization profiles cover what the pipeline feeds."""

import numpy as np
import pytest

from engines.shapes import ShapeRequest, profiles, shape_of
from flux2_trt.errors import UsageError
from flux2_trt.models import FAMILY, published_spec


@pytest.mark.parametrize("model", FAMILY)
@pytest.mark.parametrize("references", [0, 1, 4])
def test_every_published_size_fits_a_profile(model: str, references: int) -> None:
    spec = published_spec(model)
    made = profiles("transformer", spec, ShapeRequest(max_references=references))
    sampling, pixels = spec.sampling, spec.autoencoder.pixels_per_token
    area = min(1024 * 1024, sampling.max_reference_area or 1024 * 1024)
    text = spec.prompt.max_length
    guided = 2 if sampling.guidance_kind == "classifier_free" else 1
    for width, height in ((sampling.width, sampling.height), (sampling.min_side, sampling.min_side), (1024, 1024)):
        if max(width, height) > sampling.max_side:
            continue
        tokens = width * height // pixels**2 + references * area // pixels**2
        fitting = [
            profile
            for profile in made
            if profile["tokens"].least <= tokens <= profile["tokens"].most
            and profile["all_tokens"].least <= tokens + text <= profile["all_tokens"].most
            and profile["batch"].least <= guided <= profile["batch"].most
        ]
        assert fitting, (width, height)


@pytest.mark.parametrize("component", ["text_encoder", "conditioning", "transformer", "vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("model", FAMILY)
def test_ranges_are_ordered(model: str, component: str) -> None:
    for profile in profiles(component, published_spec(model), ShapeRequest(max_batch=4, max_references=2)):
        for name, side in profile.items():
            assert 1 <= side.least <= side.best <= side.most, name


def test_a_profile_a_class_the_smallest_first() -> None:
    made = profiles("transformer", published_spec("dev"), ShapeRequest(("4mp", "512", "1mp"), max_references=0))
    assert [profile["tokens"].best for profile in made] == [1024, 4096, 16384]
    assert len(profiles("text_encoder", published_spec("dev"), ShapeRequest(("512", "1mp")))) == 1


def test_one_profile_by_default_best_at_a_megapixel() -> None:
    (profile,) = profiles("transformer", published_spec("dev"), ShapeRequest(max_references=0))
    assert (profile["tokens"].best, profile["tokens"].most) == (4096, 16384)


def test_classes_beyond_the_model_are_one() -> None:
    (profile,) = profiles("vae_decoder", published_spec("tiny"), ShapeRequest(("1mp", "4mp")))
    assert profile["height"].most == 512


def test_shapes_of_an_input() -> None:
    (profile,) = profiles("text_encoder", published_spec("dev"), ShapeRequest(max_batch=3))
    shapes = np.array(shape_of(["batch", "text_tokens", 7], profile))
    assert shapes.tolist() == [[1, 16, 7], [1, 512, 7], [3, 512, 7]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ("8mp",)}, r"unknown size class '8mp'; known are any, 512, 1mp, 4mp"),
        ({"sizes": ()}, r"no size class; known are"),
        ({"max_batch": 0}, r"--max-batch is 0; it is at least 1"),
        ({"max_references": -1}, r"--max-references is -1; it is at least 0"),
    ],
)
def test_bad_requests(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ShapeRequest(**values)
