"""A weight file with some weights changed, against the one that `write_weights` makes of all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers_models import small_spec, small_transformer
from lora_files import bfl_linears, named, peft_keys, random_layers, write
from safetensors.torch import load_file, save_file
from traces import traced_once

from export.conversion import NO_SCALES, Scales
from export.graph import Graph, ScaleSlot, Slots, WeightSlot
from export.quantize import FP8_DTYPE, INT4_DTYPE, block_scale_name, quantize
from export.recipes import RECIPES
from export.rewriting import new_tensors, read_slots, rewrite_weights
from export.tensor_source import RandomSource
from export.weights import read_spans, write_weights
from flux2_trt.checkpoint import Checkpoint
from flux2_trt.errors import BundleError
from flux2_trt.inventory import expected_tensors
from flux2_trt.lora.file import Lora
from flux2_trt.lora.folding import FoldedSource
from flux2_trt.lora.request import LoraRequest

SPEC = small_spec()
SHAPES = expected_tensors(SPEC, "transformer")
TOUCHED = "double_blocks.0.img_attn.qkv.weight"
BESIDE = "double_blocks.0.txt_attn.qkv.weight"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Lora:
    """On a few layers, of which one changes only the keys' rows."""
    shapes = bfl_linears(small_transformer(0))
    bfl = ("img_in", "double_blocks.0.img_mlp.2", "single_blocks.0.linear1")
    tensors = named(random_layers({name: shapes[name] for name in bfl}, 0), peft_keys("diffusion_model."))
    keys = random_layers({"transformer_blocks.0.attn.to_k": (32, 32)}, 1)
    tensors |= named(keys, peft_keys("transformer."))
    path = write(tmp_path_factory.mktemp("lora") / "lora.safetensors", tensors)
    return Lora.open(LoraRequest(path, 0.7), SPEC)


def graph_and_scales(recipe: str) -> tuple[Graph, Scales]:
    graph = quantize(traced_once("transformer", SPEC), replace(RECIPES[recipe], dtype="fp32"))
    return graph, Scales({name: 0.01 + 0.001 * len(name) for name in graph.weights})


@pytest.mark.parametrize("recipe", ["fp32", "fp8", "nvfp4"])
def test_a_rewritten_file_is_the_one_that_is_written_from_nothing(recipe, lora, tmp_path):
    graph, scales = graph_and_scales(recipe)
    base = RandomSource(0, SHAPES)
    folded = FoldedSource(base, [lora])
    old, new, expected = (tmp_path / name for name in ("old", "new", "expected"))
    write_weights(graph, base, old, scales)
    write_weights(graph, folded, expected, scales)
    rewrite_weights(old, new, folded.touched, folded, scales)
    assert new.read_bytes() == expected.read_bytes() != old.read_bytes()


@pytest.mark.parametrize("recipe", ["fp32", "fp8", "nvfp4"])
def test_new_tensors_are_those_that_differ(recipe, lora, tmp_path):
    """Copied over the old ones they make the new file; nothing else differs."""
    graph, scales = graph_and_scales(recipe)
    base = RandomSource(0, SHAPES)
    folded = FoldedSource(base, [lora])
    old, expected = tmp_path / "old", tmp_path / "expected"
    spans = write_weights(graph, base, old, scales)
    write_weights(graph, folded, expected, scales)
    memory = np.frombuffer(old.read_bytes(), np.uint8).copy()
    given = dict(new_tensors(old, folded.touched, folded, scales))
    for name, data in given.items():
        offset, length = spans[name]
        assert data.size == length and data.dtype == np.uint8
        memory[offset : offset + length] = data
    assert memory.tobytes() == expected.read_bytes()
    assert given.keys() & graph.weights.keys() == folded.touched
    quantized = {name for name in given.keys() & graph.scales.keys()}
    assert (
        len(quantized) == {"fp32": 0, "fp8": 3, "nvfp4": 6}[recipe]
    )  # linears of blocks: a factor, and blocks' scales
    assert not any(graph.scales[name].kind == "quantize" for name in quantized)


def test_a_file_says_what_is_in_it(tmp_path):
    """Every kind of slot; also INT4, whose bytes hold two."""
    graph, scales = graph_and_scales("nvfp4")
    write_weights(graph, RandomSource(0, SHAPES), tmp_path / "file", scales)
    assert read_slots(tmp_path / "file") == Slots(graph.weights, graph.scales)
    slots = Slots(
        {"a.weight": WeightSlot((128, 64), INT4_DTYPE, transposed=True), "b": WeightSlot((8,), "bfloat16", False)},
        {block_scale_name("a.weight"): ScaleSlot("block", ("a.weight",), (2, 64), "bfloat16")},
    )
    write_weights(slots, RandomSource(0, {"a.weight": (64, 128), "b": (8,)}), tmp_path / "int4")
    assert read_slots(tmp_path / "int4") == slots


def test_a_file_of_an_earlier_version_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "old", {"transposed": ""})
    with pytest.raises(BundleError, match="written by an earlier version; build the bundle again"):
        read_slots(tmp_path / "old")


def test_fp8_codes_of_a_checkpoint_change_where_a_lora_is_and_nowhere_else(lora, tmp_path):
    """Dequantized, added, and rounded at a scale of their own; input scales are the checkpoint's."""
    weight_scale, input_scale = 0.0078125, 0.03125
    base = RandomSource(0, SHAPES)
    tensors: dict[str, torch.Tensor] = {}
    for name in SHAPES:
        values = torch.from_numpy(base.read(name))
        if "blocks" in name and values.ndim == 2:
            module = name.removesuffix(".weight")
            tensors[name] = (values / weight_scale).to(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale"] = torch.tensor(weight_scale)
            tensors[f"{module}.input_scale"] = torch.tensor(input_scale)
        else:
            tensors[name] = values
    path: Path = tmp_path / "fp8.safetensors"
    save_file(tensors, path)
    checkpoint = Checkpoint(path, "transformer")
    graph, _ = graph_and_scales("fp8")
    names = [name for name, slot in graph.weights.items() if slot.dtype == FP8_DTYPE]
    scales = Scales(dict.fromkeys(names, input_scale), dict.fromkeys(names, weight_scale))
    folded = FoldedSource(checkpoint, [lora])
    written = tmp_path / "weights.safetensors"
    write_weights(graph, folded, written, scales.without_weights(folded.touched))
    stored = load_file(written)

    untouched = stored[BESIDE].view(torch.uint8)
    assert torch.equal(untouched.T, tensors[BESIDE].view(torch.uint8))
    assert stored[BESIDE.replace("weight", "dequantize")].item() == input_scale * weight_scale

    [delta] = lora.deltas[TOUCHED]
    assert delta.down is not None and delta.first == 32
    expected = tensors[TOUCHED].float() * weight_scale
    expected[32:64] += 0.7 * torch.from_numpy(delta.up.float32() @ delta.down.float32())
    scale = expected.abs().max().item() / 448
    codes = (expected / scale).to(torch.float8_e4m3fn)
    found = stored[TOUCHED].T.float()
    # fp32 sums in another order can fall to either side of a rounding
    assert (found != codes.float()).float().mean() < 1e-2
    assert (found - codes.float()).abs().max() <= 32  # the step of the largest codes
    assert stored[TOUCHED.replace("weight", "dequantize")].item() == pytest.approx(input_scale * scale, rel=1e-6)
    assert stored[TOUCHED.replace("weight", "quantize")].item() == 1 / input_scale


def test_nothing_changes_without_names(tmp_path):
    graph, scales = graph_and_scales("fp8")
    base = RandomSource(0, SHAPES)
    write_weights(graph, base, tmp_path / "old", scales)
    rewrite_weights(tmp_path / "old", tmp_path / "new", frozenset(), base, scales)
    assert (tmp_path / "old").read_bytes() == (tmp_path / "new").read_bytes()
    assert not list(new_tensors(tmp_path / "old", frozenset(), base, scales))
    assert read_spans(tmp_path / "new") == read_spans(tmp_path / "old")
    assert NO_SCALES.without_weights(["x"]) == NO_SCALES
