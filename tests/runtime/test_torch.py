"""The torch engine beside ONNX Runtime's, on the weights of a bundle. On diffusers' models: tests/test_parity.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import relative_error
from PIL import Image

from engines.build import BuildRequest, build
from flux2_trt.bundle import Bundle
from flux2_trt.errors import BundleError, Flux2Error, UsageError
from flux2_trt.manifest import SYNTHETIC, ComponentRecord
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.torch import TorchEngine

PROMPT = "a large red circle on a blue background"
FP32 = 1e-5  # other kernels in another order, through three blocks
BF16 = 0.05  # 2**-9 a rounding, through three blocks and two steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flux2Pipeline]:
    report = build(BuildRequest("tiny", "cpu", output=tmp_path_factory.mktemp("tiny")), lambda message: None)
    yield Flux2Pipeline.from_bundle(report.bundle)


def test_tiny_draws_and_edits_the_same_pictures(tiny: Flux2Pipeline) -> None:
    by_torch = Flux2Pipeline.from_bundle(tiny.bundle.path, backend="torch")
    [drawn] = tiny(PROMPT, seed=3).images
    assert_alike(by_torch(PROMPT, seed=3).images[0], drawn)
    edit: dict[str, Any] = {"prompt": "make the circle green", "image": drawn, "seed": 4}
    [edited] = tiny(**edit).images
    assert_alike(by_torch(**edit).images[0], edited)
    assert (np.asarray(edited) != np.asarray(drawn)).any()


def assert_alike(ours: Image.Image, theirs: Image.Image) -> None:
    """Rounding: a value falls to either side of a half, no further."""
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2


def test_embeds_and_conditioning_equal_those_of_the_plans(tiny: Flux2Pipeline) -> None:
    """Padded positions too, and all that one component hands to another."""
    by_torch = Flux2Pipeline(tiny.bundle, "torch")
    embeds, _ = tiny.encode_prompt([PROMPT])
    assert relative_error(by_torch.encode_prompt([PROMPT])[0], embeds) < FP32
    inputs = {"timestep": np.array([1.0, 0.5, 0.1], np.float32), "prompt_embeds": embeds}
    expected = tiny.engine("conditioning").run(inputs)
    found = by_torch.engine("conditioning").run(inputs)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and relative_error(found[name], values) < FP32


def test_compiled_modules_give_the_same(tiny: Flux2Pipeline) -> None:
    engine = Flux2Pipeline(tiny.bundle, "torch-compile").engine("conditioning")
    inputs = {"timestep": np.array([1.0, 0.5], np.float32), "prompt_embeds": tiny.encode_prompt([PROMPT])[0]}
    compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = engine.run(inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled_before
    for name, values in tiny.engine("conditioning").run(inputs).items():
        assert relative_error(found[name], values) < FP32


def test_a_compiler_that_fails_is_named_with_what_to_do(tiny: Flux2Pipeline) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("no C++ compiler\nand more")

    engine = TorchEngine.from_bundle(tiny.bundle, "conditioning")
    engine.compute = torch.compile(engine.compute, backend=fails)
    inputs = {"timestep": np.ones(1, np.float32), "prompt_embeds": tiny.encode_prompt([PROMPT])[0]}
    with pytest.raises(Flux2Error, match=r"fails on conditioning: no C\+\+ compiler; use backend torch$"):
        engine.run(inputs)


def test_a_bundle_for_a_gpu_runs_in_its_precision(tiny: Flux2Pipeline, tmp_path: Path) -> None:
    """One in bf16 with its plans by block, which nothing else runs here, and with no compiler having been there."""
    request = BuildRequest("tiny", "h100", "bf16", components=("conditioning", "transformer"), plans="blocks")
    bundle = Bundle.open(build(replace(request, output=tmp_path), lambda message: None).bundle)
    by_torch = Flux2Pipeline(bundle, "torch")
    arguments: dict[str, Any] = {
        "prompt_embeds": tiny.encode_prompt([PROMPT])[0],
        "num_inference_steps": 2,
        "seed": 3,
        "output_type": "latent",
    }
    found, expected = by_torch(**arguments).images, tiny(**arguments).images
    engine = by_torch.engine("transformer")
    assert isinstance(engine, TorchEngine) and engine.dtype == torch.bfloat16
    assert found.dtype == np.float32 and 0 < relative_error(found, expected) < BF16


def test_made_up_weights_come_from_their_seed(tiny: Flux2Pipeline) -> None:
    records = tuple(replace(each, weights=None, weight_placement="bound") for each in tiny.bundle.manifest.components)
    drawn = [
        Flux2Pipeline(changed(tiny.bundle, records, source={SYNTHETIC: seed}), "torch").encode_prompt([PROMPT])[0]
        for seed in (0, 0, 1)
    ]
    assert np.isfinite(drawn).all() and np.array_equal(drawn[0], drawn[1])
    assert relative_error(drawn[2], drawn[0]) > 0.1


def changed(bundle: Bundle, records: tuple[ComponentRecord, ...], **values: Any) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, components=records, **values))


def test_weights_that_torch_cannot_use_are_refused_with_what_to_build(tiny: Flux2Pipeline) -> None:
    records = tiny.bundle.manifest.components
    quantized = changed(tiny.bundle, records, recipe="fp8")
    with pytest.raises(BundleError, match=r"is in fp8, .* flux2-trt build tiny --target cpu --precision fp32"):
        Flux2Pipeline(quantized, "torch").engine("transformer")
    embedded = tuple(replace(each, weights=None, weight_placement="embedded") for each in records)
    with pytest.raises(BundleError, match=r"weights of transformer in its plan; build it with --weights bound"):
        Flux2Pipeline(changed(tiny.bundle, embedded), "torch").engine("transformer")
    without = tuple(each for each in records if each.name != "vae_encoder")
    with pytest.raises(BundleError, match="has no vae_encoder"):
        Flux2Pipeline(changed(tiny.bundle, without), "torch").engine("vae_encoder")


def test_without_torch_it_says_what_to_install(tiny: Flux2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flux2_trt.runtime.torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Flux2Error, match=r"backend torch needs the package 'torch', .*; pip install torch, or"):
        Flux2Pipeline(tiny.bundle, "torch").engine("transformer")


def test_an_unknown_backend_is_refused_with_those_there_are(tiny: Flux2Pipeline) -> None:
    with pytest.raises(UsageError, match="backend 'onnx' is not known; give plans, torch, torch-compile"):
        Flux2Pipeline(tiny.bundle, "onnx")  # type: ignore[arg-type]
