"""Embeds travel as a file that says who made them, and another model's are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from flux2_trt.embeds import FORMAT, PromptEmbeds, distinct, encoder_identity, from_bytes, read_embeds, to_bytes
from flux2_trt.errors import UsageError
from flux2_trt.manifest import ComponentRecord, FileRecord, Manifest
from flux2_trt.models import published_spec

TINY = published_spec("tiny")
SHAPE = (1, TINY.prompt.max_length, TINY.transformer.context_dim)  # type: ignore[union-attr]
IDENTITY = "a" * 64


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def made(prompts: tuple[str, ...] = ("a cube",), negative: bool = False) -> PromptEmbeds:
    embeds = numbers(len(prompts), *SHAPE[1:])
    return PromptEmbeds(embeds, numbers(*SHAPE, seed=1) if negative else None, prompts, IDENTITY, "tiny")


def manifest(model: str = "tiny", recipe: str = "fp32", target: str = "cpu", **source: Any) -> Manifest:
    plan = FileRecord("plans/conditioning.onnx", 1, "0" * 64)
    record = ComponentRecord("conditioning", plan, "0" * 64, "onnxruntime", "1", None, "embedded", {}, {})
    weights = {"text_encoder": {"model.safetensors": "1" * 64}, "transformer": {"x.safetensors": "2" * 64}}
    return Manifest(
        key="0" * 64,
        model=published_spec(model),
        recipe=recipe,
        target=target,
        source={"weights_sha256": weights, "revisions": {}, "tokenizer_sha256": "3" * 64} | source,
        components=(record,),
        assets=(),
        created="2026-01-01T00:00:00+00:00",
        flux2_trt_version="1",
    )


def refused(action: Any, *arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("negative", [False, True])
def test_a_file_gives_back_what_was_written(tmp_path: Path, negative: bool) -> None:
    before, path = made(("a cube", '日本 "x"'), negative), tmp_path / "e.safetensors"
    path.write_bytes(to_bytes(before))
    for after in (read_embeds(path), from_bytes(path.read_bytes(), "the answer")):
        np.testing.assert_array_equal(after.embeds, before.embeds)
        assert (after.negative is not None) == negative
        assert (after.prompts, after.text_encoder, after.model) == (before.prompts, IDENTITY, "tiny")
        assert after.checked(TINY, IDENTITY, "the file") is after
    assert load_file(path)["prompt_embeds"].shape == before.embeds.shape  # by their own library


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_programs_files_are_read_too(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(*SHAPE).to(dtype)
    save_torch_file({"prompt_embeds": values}, tmp_path / "e.safetensors")
    found = read_embeds(tmp_path / "e.safetensors").checked(TINY, IDENTITY, "the file")
    np.testing.assert_array_equal(found.embeds, values.float().numpy())
    assert found.prompts is found.text_encoder is None


def test_the_identity_is_that_of_what_decides_the_embeds() -> None:
    here = encoder_identity(manifest())
    assert here == encoder_identity(manifest(recipe="fp8", target="rtx4090", revisions={"a": "b"}))
    weights = manifest().source["weights_sha256"]
    renamed = {**weights, "text_encoder": {"qwen.safetensors": "1" * 64}, "transformer": {"y": "9" * 64}}
    assert here == encoder_identity(manifest(weights_sha256=renamed))
    others = (
        manifest("klein-4b"),
        manifest(tokenizer_sha256="4" * 64),
        manifest(weights_sha256={**weights, "text_encoder": {"model.safetensors": "5" * 64}}),
        manifest(weights_sha256={}, random=0),
        manifest(weights_sha256={}, random=1),
    )
    assert len({here, *map(encoder_identity, others)}) == 1 + len(others)
    bare = manifest()
    assert encoder_identity(replace(bare, model=replace(TINY, text_encoder=None, prompt=None))) is None


def test_what_does_not_fit_is_refused() -> None:
    fits = made(negative=True)
    assert "another text encoder" in refused(fits.checked, TINY, "b" * 64, "e.safetensors")
    assert "takes [B, 512, 7680]" in refused(fits.checked, published_spec("klein-4b"), IDENTITY, "e.safetensors")
    for wrong in (numbers(*SHAPE)[..., :-1], numbers(*SHAPE)[:, :-1], numbers(*SHAPE)[0]):
        assert "have shape" in refused(replace(fits, embeds=wrong, negative=None).checked, TINY, IDENTITY, "e")
    for value in (np.nan, np.inf, -np.inf):
        for name in ("embeds", "negative"):
            broken = getattr(fits, name).copy()
            broken[0, -1, -1] = value
            assert "not finite" in refused(replace(fits, **{name: broken}).checked, TINY, IDENTITY, "e")
    two = np.concatenate([fits.negative, fits.negative])  # type: ignore[list-item]
    assert "empty prompt" in refused(replace(fits, negative=two).checked, TINY, IDENTITY, "e")


def test_a_prompt_picks_its_embeds() -> None:
    all_of_them = made(("a cube", "a ball"))
    picked = all_of_them.of("a ball")
    np.testing.assert_array_equal(picked.embeds, all_of_them.embeds[1:])
    assert picked.prompts == ("a ball",)
    assert "only of 'a cube', 'a ball'" in refused(all_of_them.of, "a cone")
    assert "unknown" in refused(replace(all_of_them, prompts=None).of, "a cube")


@pytest.mark.parametrize(
    "prompts",
    ['["a"]', '["a", "b", "c"]', "[1, 2]", "7", "{", '["a", "\\u0000"]', '["a", "' + "x" * 20_001 + '"]', "[" * 10**5],
)
def test_prompts_of_a_hostile_file(tmp_path: Path, prompts: str) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"prompt_embeds": numbers(2, *SHAPE[1:])}, path, {"format": FORMAT, "prompts": prompts})
    assert str(path) in refused(read_embeds, path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": numbers(*SHAPE)},
        {"prompt_embeds": numbers(*SHAPE), "other": numbers(1)},
        {"prompt_embeds": numbers(*SHAPE)[0]},
        {"prompt_embeds": numbers(*SHAPE)[:0]},
        {"prompt_embeds": np.ones(SHAPE, np.int64)},
    ],
)
def test_files_with_something_else(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "e.safetensors")
    refused(read_embeds, tmp_path / "e.safetensors")
    refused(from_bytes, (tmp_path / "e.safetensors").read_bytes(), "the answer")


def test_files_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"hello", to_bytes(made())[:-1], to_bytes(made())[:40], b"\xff" * 100):
        (tmp_path / "e.safetensors").write_bytes(content)
        refused(read_embeds, tmp_path / "e.safetensors")
        assert "download" not in refused(from_bytes, content, "the answer")
    refused(read_embeds, tmp_path / "missing.safetensors")
    refused(read_embeds, tmp_path)


def test_prompts_to_encode() -> None:
    assert distinct(["a", "b", "a"]) == ("a", "b")
    for wrong in (["a", ""], [" \n"], ["a\0"], ["x"] + [str(number) for number in range(2000)]):
        refused(distinct, wrong)
