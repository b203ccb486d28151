"""Plans for GPUs that bundles with LoRAs take over, compiled for real, and those that have to be compiled again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lora_files import kohya_keys, named, random_layers, write
from test_prepared import REQUEST, with_h100

from engines.build import BuildRequest, build
from flux2_trt.bundle import Bundle
from flux2_trt.lora.request import LoraRequest

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.filterwarnings("ignore:Use .* instead:DeprecationWarning")  # of calls that do nothing there

__all__ = ["with_h100"]


@pytest.fixture
def lora(tmp_path: Path) -> LoraRequest:
    """On tiny's conditioning, whose plan is the quickest to compile."""
    layers = random_layers({"single_stream_modulation.lin": (576, 192)}, 0)
    return LoraRequest(write(tmp_path / "lora.safetensors", named(layers, kohya_keys)), 0.5)


def both(request: BuildRequest, lora: LoraRequest) -> tuple[Bundle, Bundle, list[str]]:
    """The bundle without and with a LoRA, and what was told of the second."""
    told: list[str] = []
    base = build(request, lambda message: None)
    report = build(replace(request, loras=(lora,)), told.append)
    bundles = Bundle.open(base.bundle), Bundle.open(report.bundle)
    for bundle in bundles:
        bundle.verify()
    return *bundles, told


def test_a_plan_with_bound_weights_is_linked(tmp_path: Path, lora: LoraRequest) -> None:
    request = BuildRequest("tiny", "rtx4090", "bf16", components=("conditioning",), output=tmp_path / "store")
    base, ours, told = both(request, lora)
    assert told == ["writing the weights of conditioning: 1 that LoRAs change, all others as they are"]
    assert ours.plan_path("conditioning").samefile(base.plan_path("conditioning"))
    [before], [after] = base.manifest.components, ours.manifest.components
    assert replace(after, weights=before.weights) == before and after.weights != before.weights


def test_a_plan_with_its_weights_in_it_is_compiled_again_and_that_is_said(tmp_path: Path, lora: LoraRequest) -> None:
    request = BuildRequest("tiny", "rtx4090", "bf16", "embedded", ("conditioning", "vae_decoder"))
    base, ours, told = both(replace(request, output=tmp_path / "store"), lora)
    assert told[0] == "the weights of conditioning are in its plan: it is compiled again with the LoRAs"
    assert "compiling conditioning" in told and "compiling vae_decoder" not in told
    assert ours.plan_path("vae_decoder").samefile(base.plan_path("vae_decoder"))
    assert ours.component("conditioning").plan != base.component("conditioning").plan


def test_plans_that_were_compiled_on_the_device_are_linked(tmp_path: Path, lora: LoraRequest, with_h100: None) -> None:
    """The prepared bundle has weights of its own, the compiled one the plans of the compiled one without LoRAs."""
    request = replace(REQUEST, components=("conditioning", "text_encoder"), output=tmp_path / "store")
    base, ours, told = both(request, lora)
    assert not any(text.startswith("compiling") for text in told)
    for component in ("conditioning", "text_encoder"):
        assert ours.plan_path(component).samefile(base.plan_path(component))
    weights = [bundle.weights_path("text_encoder") for bundle in (base, ours)]
    assert weights[0] and weights[1] and weights[0].samefile(weights[1])
    assert ours.component("conditioning").weights != base.component("conditioning").weights
    assert ours.manifest.loras[0]["strength"] == 0.5
