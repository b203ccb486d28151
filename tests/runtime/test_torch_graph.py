"""Graphs by torch beside the same graphs by ONNX Runtime, and what is said of graphs that torch does not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file

import engines.components
import engines.targets
from engines.build import BuildRequest, build
from engines.targets import Target
from export.graph import Graph
from flux2_trt.bundle import Bundle
from flux2_trt.errors import BundleError
from flux2_trt.runtime.onnxruntime import _share_threads
from flux2_trt.runtime.torch_graph import torch_module
from flux2_trt.runtime.torch_plan import writing

SIZES = {
    "batch": 2, "text_tokens": 16, "tokens": 64, "all_tokens": 80, "steps": 4,
    "latent_height": 8, "latent_width": 12, "height": 128, "width": 192,
}  # fmt: skip
TARGET = Target("hopper-like", "tensorrt", ("fp32", "fp8", "fp8-attention"), "9.0", dtype="fp32", fp8_layout="nk")
# Sums in other orders; in FP8 they can round to the next code, one in seven, which later layers carry on.
BOUNDS = {"fp32": 1e-4, "fp8": 0.1, "fp8-attention": 0.1}


@pytest.fixture(scope="module", params=[("fp32", "whole"), ("fp8", "blocks"), ("fp8-attention", "whole")], ids=str)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    precision, plans = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.targets, "TARGETS", {**engines.targets.TARGETS, TARGET.name: TARGET})
        asked = BuildRequest(
            "tiny", TARGET.name, precision=precision, plans=plans, output=tmp_path_factory.mktemp("store")
        )
        return Bundle.open(build(asked, lambda _: None).bundle)


def test_every_graph_computes_what_onnx_runtime_does(bundle: Bundle) -> None:
    rng = np.random.default_rng(0)
    for record in bundle.manifest.components:
        graph = Graph.from_bytes(bundle.plan_path(record.name).read_bytes())
        path = bundle.weights_path(record.name)
        assert path
        weights, feeds = load_file(path), {}
        for value in graph.model.graph.input:
            if value.name not in graph.shapes():
                continue
            kind = graph.shapes()[value.name]
            shape = [SIZES.get(side, side) for side in kind["shape"]]
            if "int" in kind["dtype"]:
                feeds[value.name] = rng.integers(0, 2, shape).astype(kind["dtype"])
            else:
                feeds[value.name] = rng.standard_normal(shape, np.float32)
        if "attention_mask" in feeds:
            feeds["attention_mask"][0, :] = 1
        theirs = by_onnx_runtime(graph.model, feeds, weights)
        shapes = {name: value.shape for name, value in feeds.items()}
        tensors = {**{name: torch.from_numpy(value) for name, value in feeds.items()}, **weights}
        inputs = [tensors[value.name] for value in graph.model.graph.input]
        module = torch_module(graph.model, shapes)
        ours = module(*inputs)
        for one, other in zip(ours, theirs, strict=True):
            found, expected = one.float().numpy(), other.astype(np.float32)  # pixels may round to the next number
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < BOUNDS[bundle.manifest.recipe]
        outputs = [torch.empty(meta.shape, dtype=meta.dtype) for meta in module.meta["outputs"]]
        assert writing(torch_module(graph.model, shapes))(*inputs, *outputs) == ()
        for one, other in zip(ours, outputs, strict=True):
            assert torch.equal(one, other)


def by_onnx_runtime(model: onnx.ModelProto, feeds: dict[str, np.ndarray], weights: dict[str, Any]) -> list[np.ndarray]:
    make, values = onnxruntime.OrtValue, {}
    for value in model.graph.input:
        tensor = weights.get(value.name)
        if tensor is None:
            values[value.name] = make.ortvalue_from_numpy(feeds[value.name])
        elif tensor.dtype == torch.float8_e4m3fn:
            codes, kind = tensor.view(torch.uint8).numpy(), value.type.tensor_type.elem_type
            values[value.name] = make.ortvalue_from_numpy_with_onnx_type(codes, kind)
        else:
            values[value.name] = make.ortvalue_from_numpy(tensor.numpy())
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = not _share_threads()  # as the engines of the same process do
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [value.numpy() for value in session.run_with_ort_values(None, values)]


def test_an_operator_or_a_dtype_that_torch_does_not_take_is_named() -> None:
    def model(operator: str, kind: int) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, kind, [2]) for name in "xy"]
        nodes = [helper.make_node(operator, ["x"], ["y"])]
        return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))

    with pytest.raises(BundleError, match="does not run the operator Erf"):
        torch_module(model("Erf", TensorProto.FLOAT), {})
    with pytest.raises(BundleError, match="does not take x in FLOAT4E2M1"):
        torch_module(model("Identity", TensorProto.FLOAT4E2M1), {})
