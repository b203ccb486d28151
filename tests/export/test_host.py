"""Graphs for ONNX Runtime against the same graphs in the reference evaluator."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers_models import small_spec
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from traces import traced_once

from export.host import for_onnx_runtime
from export.trace import OPSET
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine

SMALL = small_spec()
NONE_LEFT = {"Attention": 0, "GroupNormalization": 0}
FUSED = {
    "text_encoder": {"Attention": 2},
    "transformer": NONE_LEFT | {"MultiHeadAttention": 2, "RotaryEmbedding": 4, "Transpose": 0},
    "vae_decoder": NONE_LEFT | {"MultiHeadAttention": 1},
    "vae_encoder": NONE_LEFT | {"MultiHeadAttention": 1},
}

SIZES = {"batch": 2, "tokens": 12, "text_tokens": 4, "all_tokens": 16, "steps": 3}
SIZES |= {"latent_height": 4, "latent_width": 3, "height": 64, "width": 48}


def ran(model: onnx.ModelProto, inputs: dict, folder: Path) -> list:
    plan = folder / "plan.onnx"
    plan.write_bytes(model.SerializeToString())
    return list(OnnxRuntimeEngine(plan, folder / "none.safetensors").run(inputs).values())


@pytest.mark.parametrize("component", FUSED)
def test_components_come_out_the_same(component, tmp_path):
    graph = traced_once(component, SMALL)
    model = for_onnx_runtime(graph.model, SMALL.transformer.num_heads)
    operators = Counter(node.op_type for node in model.graph.node)
    assert {name: operators[name] for name in FUSED[component]} == FUSED[component]

    rng = np.random.default_rng(0)
    inputs = {}
    for value in graph.model.graph.input:
        kind = value.type.tensor_type
        shape = [SIZES[dim.dim_param] if dim.dim_param else dim.dim_value for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        scale = {"step": 0.0, "image": 255.0}.get(value.name, 0.1 if value.name in graph.weights else 1.0)
        positive = value.name == "image" or value.name.endswith("var")
        drawn = rng.random(shape) if positive else rng.standard_normal(shape)
        inputs[value.name] = (scale * drawn).astype(dtype)
    for mine, expected in zip(
        ran(model, inputs, tmp_path), ReferenceEvaluator(graph.model).run(None, inputs), strict=True
    ):
        assert mine.shape == expected.shape
        spread = np.abs(expected.astype(np.float64)).max()
        atol = 1.0 if expected.dtype == np.uint8 else 1e-4 * spread
        np.testing.assert_allclose(mine.astype(np.float64), expected.astype(np.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (24, 8), (64, 32), (6, 1)])
def test_group_norm_is_torchs(channels, groups, tmp_path):
    values = {"x": ["b", channels, "h", "w"], "scale": [channels], "bias": [channels], "y": ["b", channels, "h", "w"]}
    x, scale, bias, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in values.items())
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=groups, epsilon=1e-3)
    graph = helper.make_graph([node], "group_norm", [x, scale, bias], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    fused = for_onnx_runtime(model, 1)
    onnx.checker.check_model(fused, full_check=True)
    rng = np.random.default_rng(0)
    shapes = {"x": (2, channels, 5, 7), "scale": (channels,), "bias": (channels,)}
    inputs = {name: rng.normal(0.3, 2.0, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    expected = torch.nn.functional.group_norm(tensors["x"], groups, tensors["scale"], tensors["bias"], eps=1e-3)
    np.testing.assert_allclose(ran(fused, inputs, tmp_path)[0], expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"scale": 0.5}, {"softcap": 10.0}])
def test_attention_of_another_kind_stays(attributes):
    q, k, v = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, "l", 8]) for name in "qkv")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "l", 16])
    nodes = [
        helper.make_node("Attention", ["q", "k", "v"], ["a"], **attributes),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Constant", [], ["s"], value_ints=[0, 0, 16]),
        helper.make_node("Reshape", ["t", "s"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "attention", [q, k, v], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    assert "Attention" in {node.op_type for node in for_onnx_runtime(model, 2).graph.node}
