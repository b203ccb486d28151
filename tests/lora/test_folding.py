"""Merged weights against those that diffusers and peft merge, for the key formats of both and of those they read."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers_models import flow_scheduler, small_autoencoder, small_spec, small_transformer
from lora_files import Tensors, bfl_linears, kohya_keys, linears, named, peft_keys, random_layers, write
from peft import LoraConfig, get_peft_model

from export.tensor_source import RandomSource
from flux2_trt.checkpoint import Checkpoint
from flux2_trt.lora.file import Delta, Lora
from flux2_trt.lora.folding import FoldedSource
from flux2_trt.lora.request import LoraRequest
from flux2_trt.spec import ModelSpec
from flux2_trt.tensor_file import TensorFile

# fp32 on both sides; sums over a rank of 4 in another order.
ROUNDING = 1e-6

BFL = small_transformer(0)  # for its shapes
FORMATS: dict[str, Callable[[int], Tensors]] = {
    "diffusers": lambda seed: named(random_layers(linears(BFL), seed), peft_keys("transformer.")),
    "ai-toolkit": lambda seed: named(random_layers(bfl_linears(BFL), seed), peft_keys("diffusion_model.")),
    "peft with BFL's names": lambda seed: named(random_layers(bfl_linears(BFL), seed), peft_keys("base_model.model.")),
    "kohya": lambda seed: named(
        {
            name: layer
            for name, layer in random_layers(bfl_linears(BFL), seed).items()
            if "modulation" not in name  # which diffusers leaves out of this format, with a warning
        },
        kohya_keys,
        alpha=2.5,
    ),
}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return small_spec()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    small_transformer(1).save_pretrained(path)
    return path


def folded(folder: Path, spec: ModelSpec, *loras: LoraRequest) -> FoldedSource:
    return FoldedSource(Checkpoint(folder, "transformer"), [Lora.open(lora, spec) for lora in loras])


def diffusers_pipeline(folder: Path) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel.from_pretrained(folder)
    return Flux2KleinPipeline(flow_scheduler(), small_autoencoder(0), None, None, transformer)


def fused(pipeline: Flux2KleinPipeline) -> Flux2Transformer2DModel:
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.transformer


def assert_same(ours: FoldedSource, theirs: Flux2Transformer2DModel, tmp_path: Path) -> None:
    """Every weight is the other model's, and every one that a LoRA touches differs from the base's."""
    theirs.save_pretrained(tmp_path / "theirs")
    expected = Checkpoint(tmp_path / "theirs", "transformer")
    assert isinstance(ours.base, Checkpoint)
    assert set(expected.names()) == set(ours.base.names())
    for name in expected.names():
        values, base = expected.read(name), ours.base.read(name)
        np.testing.assert_allclose(ours.read(name), values, rtol=0, atol=ROUNDING * np.abs(values).max(), err_msg=name)
        assert (np.abs(values - base).max() > 0.05 * np.abs(base).max()) == (name in ours.touched), name


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_what_diffusers_merges(format, folder, spec, tmp_path):
    path = write(tmp_path / "lora.safetensors", FORMATS[format](3))
    pipeline = diffusers_pipeline(folder)
    pipeline.load_lora_weights(path)
    assert_same(folded(folder, spec, LoraRequest(path)), fused(pipeline), tmp_path)


def test_several_with_strengths_add_up(folder, spec, tmp_path):
    """Of three formats and ranks, one of them turned around."""
    strengths = {"diffusers": 0.75, "kohya": -0.5, "ai-toolkit": 1.25}
    pipeline, requests = diffusers_pipeline(folder), []
    for seed, (format, strength) in enumerate(strengths.items()):
        path = write(tmp_path / f"{format}.safetensors", FORMATS[format](seed))
        pipeline.load_lora_weights(path, adapter_name=format)
        requests.append(LoraRequest(path, strength))
    pipeline.set_adapters(list(strengths), list(strengths.values()))
    assert_same(folded(folder, spec, *requests), fused(pipeline), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 3},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"attn.to_out.0": 2},
            "alpha_pattern": {"attn.to_q": 1, "proj_out": 5},
        },
    ],
    ids=["alpha", "rank-stabilized", "patterns"],
)
def test_folders_of_peft_and_files_of_diffusers_have_alpha_beside_the_tensors(config, folder, spec, tmp_path):
    targets = ["to_q", "to_k", "to_add_out", "to_qkv_mlp_proj", "attn.to_out.0", "proj_out", "norm_out.linear"]
    base = Flux2Transformer2DModel.from_pretrained(folder)
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False, **config))
    model.save_pretrained(tmp_path / "peft")
    lora_config = model.peft_config["default"].to_dict()
    tensors = {
        name.replace("base_model.model.", "").replace(".default", ""): tensor.detach().clone()
        for name, tensor in model.named_parameters()
        if "lora_" in name
    }
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in lora_config.items()}
    Flux2KleinPipeline.save_lora_weights(tmp_path / "diffusers", tensors, transformer_lora_adapter_metadata=metadata)
    theirs = model.merge_and_unload()
    for saved in ("peft", "diffusers"):
        assert_same(folded(folder, spec, LoraRequest(tmp_path / saved)), theirs, tmp_path)
    pipeline = diffusers_pipeline(folder)
    pipeline.load_lora_weights(tmp_path / "diffusers")
    assert_same(folded(folder, spec, LoraRequest(tmp_path / "diffusers")), fused(pipeline), tmp_path)


def respelled(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    """With every name changed by regular expressions."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in changes:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


@pytest.mark.parametrize(
    "changes",
    [
        [("^transformer.", "")],
        [(r"(lora_[AB])", r"\1.default")],
        [("^transformer.", "base_model.model.")],
        [("^transformer.", "base_model.model.transformer.")],
        [("^transformer.", "diffusion_model.")],
        [("lora_A", "lora_down"), ("lora_B", "lora_up")],
        [("^transformer.", "lora_unet_"), (r"\.(?!lora_|weight)", "_")],
        [("^transformer.", "lora_transformer_"), (r"\.(?!lora_|weight)", "_")],
        [("^transformer.", "lycoris_"), (r"\.(?!lora_|weight)", "_")],
    ],
    ids=lambda changes: " ".join(new for _, new in changes) or "bare",
)
def test_other_spellings_of_the_same_lora(changes, folder, spec, tmp_path):
    """Those that diffusers does not read, or not all of, give the same bits as the one that it does."""
    tensors = FORMATS["diffusers"](3)
    known = folded(folder, spec, LoraRequest(write(tmp_path / "known.safetensors", tensors)))
    respelling = respelled(tensors, *changes)
    assert not respelling.keys() & tensors.keys()
    other = folded(folder, spec, LoraRequest(write(tmp_path / "other.safetensors", respelling)))
    assert known.touched == other.touched
    for name in known.touched:
        np.testing.assert_array_equal(known.read(name), other.read(name))


@pytest.mark.parametrize("keys", [peft_keys("diffusion_model."), kohya_keys], ids=["ai-toolkit", "kohya"])
def test_the_final_modulation_is_shift_and_scale_in_bfls_names(keys, folder, spec, tmp_path):
    """diffusers adds a LoRA with BFL's names to its (scale, shift) as it is, which mixes the two up."""
    name = "final_layer.adaLN_modulation.1"
    [(down, up)] = (layers := random_layers({name: (64, 32)}, 1)).values()
    path = write(tmp_path / "lora.safetensors", named(layers, keys))
    ours = folded(folder, spec, LoraRequest(path))
    base = Flux2Transformer2DModel.from_pretrained(folder).norm_out.linear.weight.detach()
    scale, shift = base.chunk(2)
    expected = torch.cat([shift, scale]) + up @ down
    np.testing.assert_allclose(ours.read(f"{name}.weight"), expected, atol=1e-6)


def test_single_blocks_with_separate_projections(folder, spec, tmp_path):
    """The rows of linear1 are those of q, k, v, then gate and up."""
    rows = {"attn.to_q": 32, "attn.to_k": 32, "attn.to_v": 32, "proj_mlp": 192}
    modules = {f"single_transformer_blocks.0.{name}": (count, 32) for name, count in rows.items()}
    layers = random_layers(modules, 1)
    path = write(tmp_path / "lora.safetensors", named(layers, peft_keys("transformer.")))
    ours = folded(folder, spec, LoraRequest(path))
    added = torch.cat([up @ down for down, up in (layers[module] for module in modules)])
    name = "single_blocks.0.linear1.weight"
    np.testing.assert_allclose(ours.read(name) - ours.base.read(name), added, atol=1e-6)


def test_differences_are_added_as_they_are(folder, spec, tmp_path):
    """Of a whole weight, of a part of one, and of a norm, with both names that its weight goes by."""
    torch.manual_seed(0)
    tensors = {
        "diffusion_model.double_blocks.0.img_mlp.0.diff": torch.randn(192, 32),
        "transformer.transformer_blocks.0.attn.to_k.diff": torch.randn(32, 32),
        "lora_unet_single_blocks_0_norm_query_norm.diff": torch.randn(16),
        "diffusion_model.single_blocks.0.norm.key_norm.scale.diff": torch.randn(16),
        "transformer.transformer_blocks.0.attn.norm_added_q.diff": torch.randn(16),
    }
    ours = folded(folder, spec, LoraRequest(write(tmp_path / "a.safetensors", tensors), 0.5))
    for name, (first, last), diff in zip(
        (
            "double_blocks.0.img_mlp.0.weight",
            "double_blocks.0.img_attn.qkv.weight",
            "single_blocks.0.norm.query_norm.scale",
            "single_blocks.0.norm.key_norm.scale",
            "double_blocks.0.txt_attn.norm.query_norm.scale",
        ),
        ((0, 192), (32, 64), (0, 16), (0, 16), (0, 16)),
        tensors.values(),
        strict=True,
    ):
        added = np.zeros(ours.shape(name), np.float32)
        added[first:last] = diff.numpy() * 0.5
        np.testing.assert_array_equal(ours.read(name), ours.base.read(name) + added)
    assert len(ours.touched) == 5


def test_rows_are_those_of_the_whole(folder, spec, tmp_path):
    """Read in pieces that fit no boundary of q, k and v, from any row on; the largest is the largest of all."""
    ours = folded(folder, spec, LoraRequest(write(tmp_path / "a.safetensors", FORMATS["diffusers"](3)), 0.8))
    assert isinstance(ours.base, Checkpoint)
    for name in ours.base.names():
        whole = ours.read(name)
        rows = len(whole)
        for step in (1, 7, 40):
            pieces = [ours.read(name, first, first + step) for first in range(0, rows, step)]
            np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours.read(name, -5, None), whole[-5:], rtol=0, atol=1e-6)
        assert ours.largest(name) == pytest.approx(np.abs(whole).max(), rel=1e-6)


def test_strength_0_is_the_base_bit_for_bit(folder, spec, tmp_path):
    ours = folded(folder, spec, LoraRequest(write(tmp_path / "a.safetensors", FORMATS["kohya"](3)), 0.0))
    assert not ours.touched and isinstance(ours.base, Checkpoint)
    for name in ours.base.names():
        np.testing.assert_array_equal(ours.read(name).view(np.int32), ours.base.read(name).view(np.int32))
        assert ours.largest(name) == ours.base.largest(name)


def test_bf16_and_fp16_files_are_read_exactly(folder, spec, tmp_path):
    tensors = FORMATS["diffusers"](3)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        narrow = folded(folder, spec, LoraRequest(write(tmp_path / "n.safetensors", rounded)))
        wide = folded(
            folder, spec, LoraRequest(write(tmp_path / "w.safetensors", {n: t.float() for n, t in rounded.items()}))
        )
        for name in wide.touched:
            np.testing.assert_array_equal(narrow.read(name), wide.read(name))


def test_memory_follows_the_rows_that_are_read(tmp_path):
    """And the rank; numpy's allocations are traced."""
    rows, columns, rank = 8192, 512, 8
    up, down = torch.randn(rows, rank), torch.randn(rank, columns)
    file = TensorFile(write(tmp_path / "a.safetensors", {"up": up, "down": down}))
    delta = Delta(0, file.tensors["up"], file.tensors["down"], 1.0)
    lora = Lora(LoraRequest(Path("a")), {"x": (delta,)})
    base = RandomSource(0, {"x": (rows, columns)})
    folded = FoldedSource(base, [lora])
    whole = 4 * rows * columns
    tracemalloc.start()
    try:
        for first in range(0, rows, 128):
            folded.read("x", first, first + 128)
        folded.largest("x")
        assert tracemalloc.get_traced_memory()[1] < whole
    finally:
        tracemalloc.stop()
