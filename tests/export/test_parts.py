"""The transformer and the text encoder in parts, which are traced one by one and joined."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import QWEN_VOCABULARY, randomised, small_spec
from numpy.typing import NDArray
from traces import parts_traced_once

from export.graph import Graph
from export.modules import build_module
from export.parts import assemble, stack_of
from export.quantize import quantize
from export.recipes import RECIPES
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.spec import TRANSFORMER_PARTS

Arrays = dict[str, NDArray[Any]]

SMALL = small_spec()
SPEC = replace(SMALL, transformer=replace(SMALL.transformer, num_double_blocks=2, num_single_blocks=3))
# The same fp32 operations in another order; outputs are of size 1.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    return randomised(build_module("transformer", SPEC), seed=0)


@pytest.fixture(scope="module")
def parts() -> dict[str, Graph]:
    return parts_traced_once("transformer", SPEC)


def run(graph: Graph, weights: Arrays, inputs: list[NDArray[Any]], block: int = 0) -> list[NDArray[Any]]:
    """A graph with weights as inputs, those of `block` where it has those of block 0."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(graph.model.SerializeToString())
        file.flush()
        engine = OnnxRuntimeEngine(Path(file.name), Path(file.name))
    data = [name for name in graph.shapes() if name not in engine.outputs]
    feed = dict(zip(data, inputs, strict=True))
    for name, slot in graph.weights.items():
        value = weights[re.sub(r"(_blocks|layers)\.0\.", rf"\1.{block}.", name)]
        feed[name] = np.ascontiguousarray(value.T) if slot.transposed else value
    return list(engine.run(feed).values())


def weights_of(module: torch.nn.Module) -> Arrays:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def inputs_of_a_step(batch: int, text: int, tokens: int) -> Arrays:
    size, rng = SPEC.transformer, np.random.default_rng(3)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    angles = normal(text + tokens, size.head_dim // 2) * 3
    return {
        "latents": normal(batch, tokens, size.in_channels),
        "modulation": normal(3, size.modulation_size) * np.float32(0.5),
        "step": np.array([1], np.int32),
        "text_tokens": normal(batch, text, size.hidden_size),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "dt": normal(3, tokens),
        "guidance_mix": normal(batch, batch),
    }


def expected(module: torch.nn.Module, step: Arrays) -> NDArray[np.float32]:
    with torch.no_grad():
        return module(**{name: torch.from_numpy(value) for name, value in step.items()})[0].numpy()


@pytest.mark.parametrize(("batch", "text", "tokens"), [(1, 5, 16), (3, 40, 21)])
def test_plans_of_blocks_one_after_the_other_make_a_step(
    transformer: torch.nn.Module, parts: dict[str, Graph], batch: int, text: int, tokens: int
) -> None:
    """As a device runs them that streams its weights: one plan for all blocks of a kind."""
    assert set(TRANSFORMER_PARTS) == set(parts)
    step, weights, size = inputs_of_a_step(batch, text, tokens), weights_of(transformer), SPEC.transformer
    rotary = [step["cos"], step["sin"]]
    inputs = [step["latents"], step["modulation"], step["step"]]
    img, img_row, txt_row, single_row, final_row = run(parts["prologue"], weights, inputs)
    txt = step["text_tokens"]
    for block in range(size.num_double_blocks):
        img, txt = run(parts["double_block"], weights, [img, txt, img_row, txt_row, *rotary], block)
    hidden = np.concatenate([txt, img], axis=1)
    for block in range(size.num_single_blocks):
        (hidden,) = run(parts["single_block"], weights, [hidden, single_row, *rotary], block)
    inputs = [hidden, step["text_tokens"], final_row, *(step[name] for name in ("latents", "dt", "step"))]
    updated, following = run(parts["epilogue"], weights, [*inputs, step["guidance_mix"]])
    assert following == [2]
    np.testing.assert_allclose(updated, expected(transformer, step), atol=TOLERANCE, rtol=TOLERANCE)


def test_every_block_of_the_whole_has_its_own_weights(transformer: torch.nn.Module, parts: dict[str, Graph]) -> None:
    whole = assemble("transformer", SPEC, "fp32", parts)
    assert set(whole.weights) == set(transformer.state_dict())
    assert whole.attentions == SPEC.transformer.num_double_blocks + SPEC.transformer.num_single_blocks
    step = inputs_of_a_step(2, 7, 12)
    assert [name for name in whole.shapes() if name in step] == list(step)
    updated, _ = run(whole, weights_of(transformer), list(step.values()))
    np.testing.assert_allclose(updated, expected(transformer, step), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("hidden_states", [(0, 3), (2, 2)])
def test_hidden_states_of_any_layers_are_side_by_side(hidden_states: tuple[int, ...]) -> None:
    """Embeddings, and a layer that is used twice, among them."""
    size = SMALL.text_encoder
    assert size
    spec = replace(SMALL, text_encoder=replace(size, hidden_states=hidden_states))
    module = randomised(build_module("text_encoder", spec), seed=1)
    whole = assemble("text_encoder", spec, "fp32", parts_traced_once("text_encoder", spec))
    ids = np.random.default_rng(0).integers(0, QWEN_VOCABULARY, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[0, 6:] = 0
    (embeds,) = run(whole, weights_of(module), [ids, mask])
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert wanted.shape == (2, 9, 2 * size.hidden_size)
    np.testing.assert_allclose(embeds, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_model_without_single_blocks(parts: dict[str, Graph]) -> None:
    spec = replace(SMALL, transformer=replace(SMALL.transformer, num_single_blocks=0))
    names = stack_of("transformer", spec, "fp32").parts
    assert set(names) == set(TRANSFORMER_PARTS) - {"single_block"}
    whole = assemble("transformer", spec, "fp32", {name: parts[name] for name in names})
    assert set(whole.weights) == set(build_module("transformer", spec).state_dict())


def test_a_graph_survives_its_file() -> None:
    graph = quantize(parts_traced_once("transformer", SPEC, "bf16")["single_block"], RECIPES["nvfp4"])
    again = Graph.from_bytes(graph.to_bytes())
    assert again == graph and again.scales and again.weights and again.attentions == 1
    assert not again.model.metadata_props
