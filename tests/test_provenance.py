"""What made a picture, in a form that other tools know and in one that loses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flux2_trt.provenance import Parameters, Reference, UsedLora

PARAMETERS = Parameters(
    prompt="a red cube",
    seed=42,
    width=256,
    height=256,
    num_inference_steps=8,
    guidance_scale=1.0,
    model="tiny",
    model_key="tiny-cpu-0123456789ab",
    version="0.1.0",
)
FULL = replace(
    PARAMETERS,
    seed=2**64 - 1,
    guidance_scale=2.5,
    sigmas=(1.0, 0.6509, 0.1 + 0.2 - 0.2, 0.00031),
    references=(Reference("cat.png", "a" * 64), Reference("日本.webp", "b" * 64)),
    image_index=3,
    watermark="0110100101",
    loras=(UsedLora("style.safetensors", "c" * 64, -0.75),),
)


@pytest.mark.parametrize("parameters", [PARAMETERS, FULL])
def test_json_loses_nothing(parameters: Parameters) -> None:
    assert Parameters.from_json(parameters.to_json()) == parameters
    assert parameters.to_json().isascii()


def test_the_readable_form_is_the_one_that_other_tools_know() -> None:
    assert PARAMETERS.to_text() == (
        "a red cube\n"
        "Steps: 8, Sampler: Euler, CFG scale: 1, Seed: 42, Size: 256x256, Model: tiny, Version: flux2-trt 0.1.0"
    )
    assert "CFG scale: 2.5" in FULL.to_text()
    assert FULL.to_text().endswith(', LoRA: "style.safetensors:-0.75"')
    assert 'Model: "a, b: c", Version' in replace(PARAMETERS, model="a, b: c").to_text()


def test_numpy_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {
        "seed": np.uint64(2**63),
        "guidance_scale": np.float32(2.5),
        "sigmas": (np.float32(1), 0.5),
    }
    odd = replace(PARAMETERS, **numbers)
    assert Parameters.from_json(odd.to_json()) == replace(odd, seed=2**63)


def changed(**values: object) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **values})


DAMAGED = [
    ("{", "Expecting"),
    ("[" * 100_000, "recursion"),
    ("null", "NoneType"),
    ("{}", "missing"),
    (changed(seed="42"), "seed is a str"),
    (changed(seed=True), "seed is a bool"),
    (changed(width=256.0), "width is a float"),
    (changed(prompt=None), "prompt is a NoneType"),
    (changed(guidance_scale=float("nan")), "NaN is not finite"),
    (changed(guidance_scale=1).replace('"guidance_scale": 1', '"guidance_scale": 1e999'), "1e999 is not finite"),
    (changed(sigmas=["a"]), "float"),
    (changed(sigmas=[10**400]), "large"),
    (changed(references=["cat.png"]), "mapping"),
    (changed(references=5), "iterable"),
    (changed(references=[{"name": "cat.png", "sha256": 1}]), "sha256 is a int"),
    (changed(watermark=5), "watermark"),
    (changed(lora="x"), "lora"),
]


@pytest.mark.parametrize(("text", "word"), DAMAGED)
def test_damaged_json_is_refused(text: str, word: str) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError, RecursionError), match=word):
        Parameters.from_json(text)
