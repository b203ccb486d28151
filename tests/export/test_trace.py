"""Traced graphs, run by ONNX Runtime with their weights beside them, give what the torch modules give at any size."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers_models import QWEN_VOCABULARY, ModuleSource, randomised, small_spec
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from traces import traced_once

from export.graph import Graph
from export.modules import build_module
from export.trace import OPSET, trace
from export.weights import place_external, write_weights
from flux2_trt.models import GUIDANCE_DISTILLED
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.spec import COMPONENTS, Component, ModelSpec

Feed = dict[str, NDArray[Any]]


CLASSIFIER_FREE = small_spec()
EMBEDDED = replace(
    CLASSIFIER_FREE,
    transformer=replace(CLASSIFIER_FREE.transformer, guidance_embeds=True),
    sampling=GUIDANCE_DISTILLED,
)
CASES: dict[str, tuple[Component, ModelSpec]] = {
    "text_encoder": ("text_encoder", CLASSIFIER_FREE),
    "conditioning": ("conditioning", CLASSIFIER_FREE),
    "transformer": ("transformer", CLASSIFIER_FREE),
    "vae_encoder": ("vae_encoder", CLASSIFIER_FREE),
    "vae_decoder": ("vae_decoder", CLASSIFIER_FREE),
    "conditioning, embedded guidance": ("conditioning", EMBEDDED),
    "transformer, embedded guidance": ("transformer", EMBEDDED),
}

# The same fp32 operations in other kernels: elements near 0 are judged against the outputs' size, which is about 1.
FP32 = SimpleCompareFunc(check_error_stat="elemwise", rtol=1e-4, atol=1e-4)
# 8-bit pictures: a tie of the rounding may fall to either side.
ONE_STEP = SimpleCompareFunc(check_error_stat="max", rtol=0.0, atol=1.0)


@dataclass(frozen=True)
class Traced:
    """A case's graph, its module with random weights, and ONNX Runtime's session of both."""

    case: str
    spec: ModelSpec
    graph: Graph
    module: torch.nn.Module
    engine: OnnxRuntimeEngine


class TorchRunner(BaseRunner):
    """Runs a module where Polygraphy wants a runner."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(name="torch")
        self.traced = traced

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, value in self.traced.graph.shapes().items():
            if name not in self.traced.engine.outputs:
                metadata.add(name, onnx_dtype(value["dtype"]), shape=value["shape"])
        return metadata

    def infer_impl(self, feed_dict: Feed) -> Feed:
        with torch.no_grad():
            outputs = self.traced.module(**{name: torch.from_numpy(value) for name, value in feed_dict.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        self.inference_time = 0.0
        return dict(zip(self.traced.engine.outputs, (output.numpy() for output in outputs), strict=True))


def onnx_dtype(name: str) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(name.upper()))


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    component, spec = CASES[request.param]
    folder = tmp_path_factory.mktemp("graph")
    graph = traced_once(component, spec)
    module = randomised(build_module(component, spec), seed=0)
    spans = write_weights(graph, ModuleSource(module.state_dict()), folder / "weights.safetensors")
    plan = folder / "plan.onnx"
    plan.write_bytes(place_external(graph, spans, "weights.safetensors").SerializeToString())
    engine = OnnxRuntimeEngine(plan, folder / "weights.safetensors")
    return Traced(request.param, spec, graph, module, engine)


@pytest.fixture(scope="module", params=COMPONENTS)
def in_bf16(request: pytest.FixtureRequest) -> Graph:
    return traced_once(request.param, CLASSIFIER_FREE, "bf16")


def feeds(case: str) -> Iterator[Feed]:
    """Inputs at several sizes, none of them the traced one."""
    component, spec = CASES[case]
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    d = spec.transformer.hidden_size
    match component:
        case "text_encoder":
            for batch, length in ((1, 12), (3, 5), (1, 70)):
                for kept in {length, length // 2, 1}:
                    mask = np.ones((batch, length), np.int64)
                    mask[0, kept:] = 0
                    ids = rng.integers(0, QWEN_VOCABULARY, (batch, length))
                    yield {"input_ids": ids, "attention_mask": mask}
                    yield {"input_ids": ids, "attention_mask": np.ascontiguousarray(mask[:, ::-1])}
        case "conditioning":
            for batch, length, steps in ((1, 5, 1), (3, 64, 7)):
                feed = {
                    "timestep": rng.random(steps, dtype=np.float32),
                    "prompt_embeds": normal(batch, length, spec.transformer.context_dim),
                }
                yield feed | ({"guidance": rng.random(steps, dtype=np.float32) * 5} if spec is EMBEDDED else {})
        case "transformer":
            for batch, text, tokens, steps in ((1, 5, 16, 1), (3, 64, 35, 5), (2, 1, 130, 2)):
                angles = normal(text + tokens, spec.transformer.head_dim // 2) * 3
                dt = np.full((steps, tokens), -0.3, np.float32)
                dt[:, tokens // 2 :] = 0.0
                feed = {
                    "latents": normal(batch, tokens, spec.transformer.in_channels),
                    "modulation": normal(steps, 17 * d) * np.float32(0.5),
                    "text_tokens": normal(batch, text, d),
                    "cos": np.cos(angles),
                    "sin": np.sin(angles),
                    "dt": dt,
                    "step": np.array([steps // 2], np.int32),
                }
                yield feed | ({} if spec is EMBEDDED else {"guidance_mix": normal(batch, batch)})
        case "vae_encoder":
            for batch, height, width in ((1, 64, 64), (3, 80, 112), (1, 176, 64)):
                yield {"image": rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)}
        case "vae_decoder":
            for batch, height, width in ((1, 4, 4), (3, 5, 7), (1, 11, 4)):
                yield {"latents": normal(batch, height, width, spec.autoencoder.token_channels)}


def test_graph_equals_torch_at_other_sizes(traced: Traced) -> None:
    inputs = list(feeds(traced.case))
    results = Comparator.run(
        [OnnxrtRunner(traced.engine.session, name="onnxruntime"), TorchRunner(traced)], data_loader=inputs
    )
    assert Comparator.validate(results, check_inf=True, check_nan=True)
    picture = traced.graph.component == "vae_decoder"
    accuracy = Comparator.compare_accuracy(results, compare_func=ONE_STEP if picture else FP32)
    assert bool(accuracy), accuracy
    assert all(len(iterations) == len(inputs) for result in accuracy for iterations in result.values())
    if picture:
        ours, theirs = (np.concatenate([run["image"].ravel() for run in runs]) for runs in results.values())
        assert (ours != theirs).mean() < 1e-3
        assert ((theirs > 0) & (theirs < 255)).mean() > 0.5  # else most of it would agree by being clipped


@pytest.mark.parametrize("traced", ["transformer", "transformer, embedded guidance"], indirect=True)
def test_reference_tokens_come_back_as_they_were(traced: Traced) -> None:
    for feed in feeds(traced.case):
        updated = traced.engine.run(feed)["updated_latents"]
        still = feed["dt"][0] == 0.0
        np.testing.assert_array_equal(updated[:, still], feed["latents"][:, still])
        assert (updated[:, ~still] != feed["latents"][:, ~still]).mean() > 0.99


@pytest.mark.parametrize("traced", ["transformer"], indirect=True)
def test_classifier_free_guidance_gives_both_rows_the_same_picture(traced: Traced) -> None:
    feed = next(f for f in feeds(traced.case) if f["latents"].shape[0] == 2)
    feed["latents"] = feed["latents"][:1].repeat(2, axis=0)
    identity, mixed = (
        traced.engine.run(feed | {"guidance_mix": np.array(mix, np.float32)})["updated_latents"]
        for mix in (np.eye(2), [[-3.0, 4.0]] * 2)
    )
    np.testing.assert_array_equal(mixed[0], mixed[1])
    # Sums of products with weights up to 4: four times the rounding of outputs of size 1.
    np.testing.assert_allclose(mixed[0], -3.0 * identity[0] + 4.0 * identity[1], atol=1e-5, rtol=1e-5)


def test_inputs_and_outputs_are_those_of_the_contract(traced: Traced) -> None:
    names = {
        "text_encoder": ("input_ids attention_mask", "prompt_embeds"),
        "conditioning": ("timestep prompt_embeds", "modulation text_tokens"),
        "transformer": ("latents modulation text_tokens cos sin dt step", "updated_latents next_step"),
        "vae_encoder": ("image", "latents"),
        "vae_decoder": ("latents", "image"),
    }
    inputs, outputs = (text.split() for text in names[traced.graph.component])
    if traced.graph.component == "conditioning" and traced.spec is EMBEDDED:
        inputs.append("guidance")
    if traced.graph.component == "transformer" and traced.spec is CLASSIFIER_FREE:
        inputs.append("guidance_mix")
    session = traced.engine.session
    assert sorted(value.name for value in session.get_inputs()) == sorted(inputs)
    assert [value.name for value in session.get_outputs()] == outputs
    assert {opset.domain: opset.version for opset in traced.graph.model.opset_import}[""] == OPSET


def test_weights_are_inputs_in_the_layout_of_a_matmul(traced: Traced) -> None:
    """Every parameter is an input; what a MatMul reads is [K, N], all else is as in the checkpoint."""
    state = traced.module.state_dict()
    assert set(traced.graph.weights) == set(state)
    readers = {name: node for node in traced.graph.model.graph.node for name in node.input}
    for name, slot in traced.graph.weights.items():
        assert slot.transposed == (readers[name].op_type == "MatMul"), name
        assert slot.shape == tuple(reversed(state[name].shape) if slot.transposed else state[name].shape), name
        if readers[name].op_type == "Gemm":
            assert [a.i for a in readers[name].attribute if a.name == "transB"] == [1], name


def test_no_large_constant_no_transposed_weight_no_path(traced: Traced) -> None:
    assert_clean(traced.graph)


def test_bf16_graph(in_bf16: Graph) -> None:
    onnx.checker.check_model(in_bf16.model, full_check=True)
    assert_clean(in_bf16)
    assert {slot.dtype for slot in in_bf16.weights.values()} == {"bfloat16"}
    between_components = {"modulation", "text_tokens"}  # what one graph hands to the next one in the compute dtype
    dtypes = {name: value["dtype"] for name, value in in_bf16.shapes().items()}
    for name, dtype in dtypes.items():
        if name in between_components:
            assert dtype == "bfloat16", name
        elif name in ("input_ids", "attention_mask"):
            assert dtype == "int64", name
        elif name in ("step", "next_step"):
            assert dtype == "int32", name
        else:
            assert dtype == ("uint8" if name == "image" else "float"), name


def test_tracing_twice_gives_the_same_graph() -> None:
    """A bundle records the digest of its graphs."""
    first, second = (trace("conditioning", EMBEDDED).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def assert_clean(graph: Graph) -> None:
    model = graph.model
    constants = [*model.graph.initializer]
    constants += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    assert all(np.prod(constant.dims) <= 1024 for constant in constants)
    readers = {(node.op_type, name) for node in model.graph.node for name in node.input if name in graph.weights}
    assert not {name for op, name in readers if op == "Transpose"}
    assert not model.functions

    texts = [p.value for holder in _holders(model) for p in holder.metadata_props]
    texts += [holder.doc_string for holder in _holders(model)] + [model.producer_name, model.producer_version]
    assert not [text for text in texts if re.search(r"(^|[\s'\"(\[])(/|[A-Za-z]:\\)\w", text)]
    whole = model.SerializeToString()
    for path in (str(Path(__file__).parents[2]), sys.prefix, ".py"):
        assert path.encode() not in whole, path


def _holders(model: onnx.ModelProto) -> list[Any]:
    graph = model.graph
    return [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
