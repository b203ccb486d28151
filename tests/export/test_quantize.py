"""Quantized graphs, run by ONNX Runtime, against torch's own float8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers_models import ModuleSource, randomised, small_spec
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from traces import traced_once

from export.conversion import Scales
from export.graph import Graph, WeightSlot
from export.modules import build_module
from export.quantize import FP8_DTYPE, FP8_MAX, quantize
from export.recipes import RECIPES, Recipe
from export.trace import OPSET
from export.weights import place_external, write_weights
from flux2_trt.errors import Flux2Error
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.spec import Component

FP8 = Recipe("fp8 in fp32", "fp32", linears="fp8")  # ONNX Runtime has no bf16 kernels
WITH_ATTENTION = replace(FP8, attention="fp8")
RANGE = 6.0  # the largest input of a linear that an input scale is chosen for: some are larger, and saturate


class RoundedLinear(nn.Module):
    """A linear whose weight and input pass through torch's float8, with one scale each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.input_scale = RANGE / FP8_MAX
        self.weight_scale = float(linear.weight.detach().abs().max()) / FP8_MAX
        self.codes = rounded(linear.weight.detach() / self.weight_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(rounded(x / self.input_scale), self.codes) * (self.input_scale * self.weight_scale)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def rounded_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    root = query.shape[-1] ** -0.25
    logits = rounded(query * root) @ rounded(key * root).mT
    return rounded(logits.softmax(dim=-1) * FP8_MAX) / FP8_MAX @ rounded(value)


@pytest.mark.parametrize("recipe", [FP8, WITH_ATTENTION], ids=["linears", "linears and attention"])
def test_the_transformer_is_rounded_as_torch_rounds(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec()
    module = randomised(build_module("transformer", spec), seed=0)
    graph = quantize(traced_once("transformer", spec), recipe)
    session = engine(graph, module.state_dict(), tmp_path)
    rng = np.random.default_rng(3)
    batch, text, tokens, d = 2, 7, 24, spec.transformer.hidden_size
    angles = rng.standard_normal((text + tokens, spec.transformer.head_dim // 2), dtype=np.float32)
    feed = {
        "latents": rng.standard_normal((batch, tokens, spec.transformer.in_channels), dtype=np.float32),
        "modulation": rng.standard_normal((1, 17 * d), dtype=np.float32) * np.float32(0.5),
        "text_tokens": rng.standard_normal((batch, text, d), dtype=np.float32),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "dt": np.full((1, tokens), -1.0, np.float32),
        "step": np.zeros(1, np.int32),
        "guidance_mix": np.eye(batch, dtype=np.float32),
    }
    tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
    ours = session.run(feed)["updated_latents"]
    with torch.no_grad():
        plain = module(**tensors)[0].numpy()
        for name in quantized(graph):
            owner, leaf = name.removesuffix(".weight").rsplit(".", 1)
            parent = module.get_submodule(owner)
            setattr(parent, leaf, RoundedLinear(parent.get_submodule(leaf)))
        if recipe.attention:
            monkeypatch.setattr(F, "scaled_dot_product_attention", rounded_attention)
        theirs = module(**tensors)[0].numpy()
    # Values that fp32 rounds to either side of a tie become neighbours in FP8, 6 % apart: few, in sums of many.
    assert np.abs(ours - theirs).mean() < 0.1 * np.abs(theirs - plain).mean()
    assert np.abs(theirs - plain).max() > 1e-3


def test_int4_is_a_rounding_of_blocks_of_weights(tmp_path: Path) -> None:
    name = "double_blocks.0.img_mlp.2.weight"
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))  # [N, K]
    weight[3, :64] = 0.0
    inputs = [
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["tokens", 128]),
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [128, 96]),
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["tokens", 96])
    node = onnx.helper.make_node("MatMul", ["x", name], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "linear", inputs, [output]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=11,
    )
    plain = Graph("transformer", model, {name: WeightSlot((128, 96), "float", transposed=True)})
    graph = quantize(plain, Recipe("int4 in fp32", "fp32", linears="int4"))

    blocks = weight.unflatten(1, (2, 64))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 7
    rounded_weight = (torch.nan_to_num(blocks / scale).round() * scale).flatten(1)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    ours = engine(graph, {name: weight}, tmp_path).run({"x": x.numpy()})["y"]
    torch.testing.assert_close(torch.from_numpy(ours), F.linear(x, rounded_weight), rtol=1e-5, atol=1e-4)
    assert (rounded_weight - weight).abs().max() <= scale.max() / 2
    assert load_file(tmp_path / "weights.safetensors")[name].shape == (128, 48)  # two codes in a byte


def engine(graph: Graph, state: dict[str, torch.Tensor], folder: Path) -> OnnxRuntimeEngine:
    weights, plan = folder / "weights.safetensors", folder / "plan.onnx"
    scales = Scales(dict.fromkeys(quantized(graph), RANGE / FP8_MAX))
    spans = write_weights(graph, ModuleSource(state), weights, scales)
    plan.write_bytes(place_external(graph, spans, weights.name).SerializeToString())
    return OnnxRuntimeEngine(plan, weights)


def quantized(graph: Graph) -> list[str]:
    return [name for name, slot in graph.weights.items() if slot.dtype == FP8_DTYPE]


def test_block_linears_are_quantized_and_nothing_else() -> None:
    graph = traced_once("transformer", small_spec())
    result = quantize(graph, FP8)
    blocks = {name for name, slot in graph.weights.items() if "blocks." in name and len(slot.shape) == 2}
    assert set(quantized(result)) == blocks and len(blocks) == 10  # 8 in a double block, 2 in a single one
    assert {slot.shape for slot in result.weights.values()} == {slot.shape for slot in graph.weights.values()}
    assert result.shapes() == graph.shapes()
    assert len(result.scales) == 20
    assert not quantized(graph) and not graph.scales  # the graph that was given is as it was


def test_linears_of_one_input_share_its_rounding() -> None:
    result = quantize(traced_once("text_encoder", small_spec()), FP8)
    inputs = [scale.weights for scale in result.scales.values() if scale.kind == "quantize"]
    layer = "layers.0.self_attn.{}_proj.weight"
    assert tuple(layer.format(name) for name in "qkv") in inputs
    assert sorted(name for names in inputs for name in names) == sorted(quantized(result))
    rounding = [node for node in result.model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounding) == len(inputs) == 4 * 2  # qkv, output, gate and up, down of two layers


@pytest.mark.parametrize("component", ["conditioning", "vae_encoder", "vae_decoder"])
def test_other_components_stay_as_they_are(component: Component) -> None:
    graph = traced_once(component, small_spec())
    assert quantize(graph, WITH_ATTENTION) is graph


def test_a_recipe_without_formats_changes_nothing() -> None:
    graph = traced_once("transformer", small_spec())
    assert quantize(graph, RECIPES["fp32"]) is graph


def test_a_weight_that_is_read_otherwise_is_no_silent_omission() -> None:
    graph = traced_once("transformer", small_spec())
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    node = next(node for node in model.graph.node if "single_blocks.0.linear2.weight" in node.input)
    node.op_type = "Gemm"
    with pytest.raises(Flux2Error, match=r"single_blocks\.0\.linear2\.weight is read by Gemm"):
        quantize(replace(graph, model=model), FP8)
