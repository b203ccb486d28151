"""Measures of quality against scikit-image's, and the judge on pictures that are right."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.harness.case import Case
from benchmarks.harness.quality import Gallery, compare, psnr, relative_error, tasks_of, unscored
from benchmarks.harness.system import Drawn
from export.tiny.scenes import render
from flux2_trt.models import published_spec

TINY = published_spec("tiny")
CASE = Case(128, 128, 2)


def gallery(pictures: list[np.ndarray], latents: list[tuple[np.ndarray, ...]]) -> Gallery:
    found = Gallery()
    for picture, steps in zip(pictures, latents, strict=True):
        found.add(Drawn(picture[None], latents=steps))
    return found


def test_distances_are_scikit_images_and_those_of_the_norm() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8) for _ in range(2))
    theirs[1] = ours[1]  # an identical picture, which has no PSNR
    assert psnr(ours[0], theirs[0]) == pytest.approx(peak_signal_noise_ratio(theirs[0], ours[0]))
    steps = [(np.full((2, 2), 1.1), np.full((2, 2), 4.0)), (np.full((2, 2), 1.3), np.full((2, 2), 2.0))]
    exact = [(np.ones((2, 2)), np.full((2, 2), 2.0))] * 2
    found = compare("a", "b", [], gallery(list(ours), steps), gallery(list(theirs), exact))
    assert found.identical == 1 and found.pictures == 2
    assert found.psnr_db == pytest.approx(psnr(ours[0], theirs[0]))
    ssim = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(ours, theirs, strict=True)]
    assert found.ssim == pytest.approx(np.median(ssim))
    assert found.latent_error_by_step == pytest.approx((0.2, 0.5))
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(4 / 3)


def test_a_reference_is_identical_with_itself() -> None:
    pictures = [np.zeros((16, 16, 3), np.uint8)] * 2
    each = gallery(pictures, [(np.ones(2),)] * 2)
    found = compare("a", "a", [], each, each)
    assert found.psnr_db is None and found.identical == 2 and found.ssim == 1 and found.latent_error_by_step == (0,)


def test_the_judge_knows_right_pictures_from_wrong_ones() -> None:
    tasks = tasks_of(TINY, 2, CASE)
    assert {task.sample.kind for task in tasks} == {"text", "edit", "combine"} and len(tasks) == 6
    assert all(len(task.references) == len(task.sample.references) for task in tasks)
    right = [render(task.sample.target, 128, 128) for task in tasks]
    wrong = [np.full((128, 128, 3), 128, np.uint8) for _ in tasks]
    steps = [(np.ones(2),)] * len(tasks)
    found = compare("a", "b", tasks, gallery(right, steps), gallery(wrong, steps))
    assert found.scores["passed"] == 1
    assert compare("b", "b", tasks, gallery(wrong, steps), gallery(wrong, steps)).scores["passed"] < 0.5


def test_other_models_draw_prompts_that_no_judge_knows() -> None:
    tasks = tasks_of(published_spec("klein-4b"), 8, Case(1024, 1024, 4))
    assert len(tasks) == 8 and not any(task.sample for task in tasks)
    assert len({(task.prompt, task.seed) for task in tasks}) == 8


def test_measures_whose_weights_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    missing = {each.name: each.reason for each in unscored(TINY)}
    assert "LPIPS" in missing
    assert missing["CLIP score"] == "openai/clip-vit-base-patch16 is not in the Hugging Face cache"
    monkeypatch.setattr("benchmarks.harness.quality.find_spec", lambda name: None)
    missing = {each.name: each.reason for each in unscored(TINY)}
    assert "pip install 'flux2-trt[benchmark]'" in missing["SSIM"]
    assert "torch, scipy not installed" in missing["judge's scores"]
