"""What a picture says becomes options again; what was given stays, and hostile values are refused as typed ones are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
from test_outputs import refused
from test_provenance import FULL, PARAMETERS

from flux2_trt.like import find_references, options_like
from flux2_trt.options import RunOptions
from flux2_trt.provenance import Reference

NOTHING = RunOptions()


def test_everything_comes_from_the_picture():
    assert options_like(PARAMETERS, NOTHING) == RunOptions(
        prompt="a red cube", model="tiny", width=256, height=256, steps=8, guidance=1.0, seed=42, watermark="off"
    )
    found = options_like(FULL, NOTHING)
    assert (found.sigmas, found.steps, found.seed, found.watermark) == (FULL.sigmas, None, 2**64 - 1, "0110100101")
    assert found.guidance == 2.5 and found.num_images == 1


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "a blue ball"},
        {"width": 512, "seed": 0, "guidance": 0.0},
        {"watermark": "on", "metadata": "none", "quality": 80, "output": Path("a.jpg")},
        {"num_images": 3, "image": (Path("a.png"),)},
    ],
)
def test_what_was_given_stays(given):
    assert options_like(FULL, RunOptions(**given)) == replace(options_like(FULL, NOTHING), **given)


def test_options_that_exclude_each_other_do_not_meet():
    assert options_like(FULL, RunOptions(steps=5)).sigmas is None
    assert options_like(PARAMETERS, RunOptions(sigmas=(1.0, 0.5))).steps is None
    matched = options_like(FULL, RunOptions(match_image=1))
    assert matched.width is matched.height is None


def test_another_model_keeps_its_own_steps_and_guidance():
    for other in ({"model": "klein-4b"}, {"bundle": Path("bundle")}):
        found = options_like(FULL, RunOptions(**other))
        assert (found.steps, found.sigmas, found.guidance) == (None, None, None) and found.prompt == "a red cube"
        assert (found.model, found.bundle) == (other.get("model"), other.get("bundle"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"width": 0}, "width '0'"),
        ({"height": -16}, "height '-16'"),
        ({"seed": 2**64}, r"2**64 - 1"),
        ({"num_inference_steps": 10**9}, "1 to 1000"),
        ({"guidance_scale": 10**400}, "guidance"),
        ({"sigmas": (0.5, 1.0)}, "strictly decrease"),
        ({"watermark": "\x1b[31m"}, "8 to 256 bits"),
        ({"model": ""}, "model"),
    ],
)
def test_a_file_may_say_what_no_option_allows(changes, word):
    refused(partial(options_like, replace(PARAMETERS, **changes), NOTHING), word)


def test_references_are_found_by_name_and_content(tmp_path):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder, content in ((beside, b"another cat"), (here, b"cat")):
        folder.mkdir()
        (folder / "cat.png").write_bytes(content)
    cat = Reference("cat.png", sha256(b"cat").hexdigest())
    assert find_references((cat, cat), (beside, here)) == (here / "cat.png",) * 2
    refused(partial(find_references, (cat,), (beside,)), "'cat.png'", "--image")


@pytest.mark.parametrize("name", ["", ".", "..", "nul\0", "x" * 300])
def test_odd_names_of_references_are_not_found(tmp_path, name):
    refused(partial(find_references, (Reference(name, "0" * 64),), (tmp_path,)), "--image")


def test_a_reference_cannot_name_a_file_of_another_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "here").mkdir()
    climbing = Reference("../secret.png", sha256(b"secret").hexdigest())
    refused(partial(find_references, (climbing,), (tmp_path / "here",)), "--image")
