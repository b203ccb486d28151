"""Plans for RTX targets, compiled here without a GPU: compiled, not run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from diffusers_models import small_spec
from safetensors.torch import load_file
from traces import traced_once

from engines.audit import lost_formats
from engines.build import BuildReport, BuildRequest, build
from engines.shapes import ShapeRequest, profiles
from engines.targets import TARGETS
from engines.tensorrt import compile_plan
from export.quantize import quantize
from export.recipes import RECIPES
from flux2_trt.bundle import Bundle
from flux2_trt.errors import Flux2Error, Interrupted
from flux2_trt.models import published_spec
from flux2_trt.spec import TRANSFORMER_PARTS

pytest.importorskip("tensorrt_rtx")

FP8_ATTENTION = RECIPES["fp8-attention"]
REQUEST = BuildRequest("tiny", target="rtx4090", precision="fp8-attention", checkpoint="random:0", sizes=("512",))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    return build(replace(REQUEST, output=tmp_path_factory.mktemp("store")), lambda message: None)


def test_every_linear_and_attention_is_what_the_recipe_says(report: BuildReport) -> None:
    layers = {component.name: component.layers["profiles"] for component in report.components}
    spec = published_spec("tiny")
    (transformer,) = layers["transformer"]
    blocks = (spec.transformer.num_double_blocks, spec.transformer.num_single_blocks)
    assert transformer["gemms"]["FP8"] == 8 * blocks[0] + 2 * blocks[1]
    assert transformer["fused_attentions"] == {"FP8": sum(blocks)}
    (text_encoder,) = layers["text_encoder"]
    assert text_encoder["gemms"] == {"FP8": 7 * spec.text_encoder.num_layers}
    assert text_encoder["fused_attentions"] == {"BFloat16": spec.text_encoder.num_layers}
    assert set(layers["conditioning"][0]["gemms"]) == {"BFloat16"}


def test_a_bundle_of_made_up_weights_holds_plans_and_a_seed(report: BuildReport) -> None:
    bundle = Bundle.open(report.bundle)
    bundle.verify()
    assert bundle.manifest.source["random"] == 0
    assert {record.weight_placement for record in bundle.manifest.components} == {"bound"}
    assert all(record.weights is None for record in bundle.manifest.components)
    assert {record.compiler for record in bundle.manifest.components} == {"tensorrt_rtx"}
    assert not (Path(report.bundle) / "weights").exists()
    assert not bundle.manifest.makes_pictures


def test_plans_of_blocks_share_one_weight_file(tmp_path: Path) -> None:
    request = BuildRequest("tiny", "rtx4090", "fp8-attention", components=("transformer",), plans="blocks")
    bundle = Bundle.open(build(replace(request, sizes=("512",), output=tmp_path), lambda message: None).bundle)
    parts = {record.name.removeprefix("transformer."): record for record in bundle.manifest.components}
    assert set(parts) == set(TRANSFORMER_PARTS)
    profiles = {name: record.layers["profiles"][0] for name, record in parts.items()}
    assert {name: profile["gemms"].get("FP8", 0) for name, profile in profiles.items()} == {
        "prologue": 0,
        "double_block": 8,
        "single_block": 2,
        "epilogue": 0,
    }
    assert profiles["double_block"]["fused_attentions"] == profiles["single_block"]["fused_attentions"] == {"FP8": 1}
    files = {path.name for path in (bundle.path / "weights").iterdir()}
    assert files == {"transformer.fp8-attention.safetensors"}
    stored = set(load_file(bundle.weights_path("transformer.double_block")))
    size = bundle.manifest.model.transformer
    for block in range(size.num_double_blocks):
        assert {f"double_blocks.{block}.{name}" for name in ("img_attn.qkv.weight", "img_attn.qkv.quantize")} <= stored


def test_the_same_request_finds_it_again_and_other_shapes_do_not(report: BuildReport) -> None:
    request = replace(REQUEST, output=Path(report.bundle).parents[1])
    again = build(request, lambda message: None)
    assert again.reused and again.bundle == report.bundle
    other = build(replace(request, max_batch=2, components=("conditioning",)), lambda message: None)
    assert not other.reused


def test_the_compilers_words_reach_the_user() -> None:
    """FP8 on a GPU that has none."""
    spec = small_spec()
    graph = quantize(traced_once("text_encoder", spec, "bf16"), FP8_ATTENTION)
    with pytest.raises(Flux2Error, match=r"cannot compile text_encoder for rtx3090: .*fp8_e4m3"):
        compile_plan(graph, profiles("text_encoder", spec, ShapeRequest()), TARGETS["rtx3090"])


def test_nvfp4_is_for_blackwell() -> None:
    spec = small_spec()
    graph = quantize(traced_once("transformer", spec, "bf16"), RECIPES["nvfp4"])
    ranges = profiles("transformer", spec, ShapeRequest())
    compiled = compile_plan(graph, ranges, TARGETS["rtx5090"])
    assert lost_formats(graph, RECIPES["nvfp4"], compiled.report) == ""
    assert compiled.report.profiles[0].gemms["FP4E2M1+FP8"] == 10
    with pytest.raises(Flux2Error, match=r"cannot compile transformer for rtx4090: .*fp4_e2m1"):
        compile_plan(graph, ranges, TARGETS["rtx4090"])


@pytest.mark.parametrize(("precision", "target"), [("int4", "rtx3090"), ("nvfp4", "rtx5090")])
def test_embedded_weights_are_in_the_plan_and_nowhere_else(tmp_path: Path, precision: str, target: str) -> None:
    request = BuildRequest(
        "tiny", target, precision, "embedded", ("text_encoder",), "random:0", sizes=("512",), output=tmp_path
    )
    bundle = Bundle.open(build(request, lambda message: None).bundle)
    (record,) = bundle.manifest.components
    assert (record.weights, record.weight_placement) == (None, "embedded")
    files = sorted(path.name for path in bundle.path.rglob("*") if path.is_file())
    assert files == ["bundle.json", "text_encoder.plan", "tokenizer.json"]
    layers = published_spec("tiny").text_encoder.num_layers
    (profile,) = record.layers["profiles"]
    if precision == "int4":
        assert profile["fused_int4"] == 7 * layers
    else:  # queries, keys and values are one product now that their weights are known, and gate and up are
        assert profile["gemms"] == {"FP4E2M1+FP8": 4 * layers}


def test_nvfp4_needs_whole_blocks() -> None:
    with pytest.raises(Flux2Error, match=r"self_attn\.q_proj\.weight has 12 inputs; NVFP4 needs a multiple of 16"):
        quantize(traced_once("text_encoder", small_spec(), "bf16"), RECIPES["nvfp4"])


def test_a_build_can_be_cancelled() -> None:
    spec = small_spec()
    graph = traced_once("conditioning", spec, "bf16")
    told: list[str] = []

    def stop(phase: str, step: int, steps: int) -> bool:
        told.append(phase)
        assert 1 <= step <= steps
        return len(told) < 3

    with pytest.raises(Interrupted, match="conditioning was cancelled"):
        compile_plan(graph, profiles("conditioning", spec, ShapeRequest()), TARGETS["rtx5090"], stop)
    assert 3 <= len(told) < 10


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_a_signal_during_a_build_ends_it_and_is_passed_on(signal: type[BaseException]) -> None:
    spec = small_spec()

    def stop(phase: str, step: int, steps: int) -> bool:
        raise signal

    with pytest.raises(signal):
        compile_plan(
            traced_once("conditioning", spec, "bf16"),
            profiles("conditioning", spec, ShapeRequest()),
            TARGETS["rtx5090"],
            stop,
        )


def test_what_the_compiler_did_not_give_is_an_error() -> None:
    """A bf16 plan where the recipe wanted FP8."""
    spec = small_spec()
    graph = traced_once("transformer", spec, "bf16")
    report = compile_plan(graph, profiles("transformer", spec, ShapeRequest()), TARGETS["rtx4090"]).report
    assert lost_formats(graph, RECIPES["bf16"], report) == ""
    assert lost_formats(quantize(graph, FP8_ATTENTION), FP8_ATTENTION, report).startswith(
        "10 of 10 linears have no fp8 kernel in profile 0 (node_double_blocks.0.img_attn.proj.product, "
    )
    wanted = replace(FP8_ATTENTION, linears=None)
    assert "0 of 2 attentions are a fused FP8 kernel in profile 0" in lost_formats(graph, wanted, report)
    one_more = replace(graph, attentions=3)
    assert "2 of 3 attentions are a fused kernel" in lost_formats(one_more, RECIPES["bf16"], report)
