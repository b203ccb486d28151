"""Canonical tensors are what diffusers and transformers saved, whatever the layout; wrong files are named clearly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from flux2_trt.checkpoint import Checkpoint
from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.inventory import expected_tensors
from flux2_trt.models import FAMILY, published_spec
from flux2_trt.naming import FAMILIES, Family
from flux2_trt.spec import AutoencoderSpec, ModelSpec, TextEncoderSpec, TransformerSpec

Tensors = dict[str, np.ndarray]

SPEC = ModelSpec(
    name="small",
    transformer=TransformerSpec(
        num_heads=2,
        head_dim=16,
        axes_dim=(4, 4, 4, 4),
        num_double_blocks=2,
        num_single_blocks=12,  # more than nine, so that "10" must not be taken for "1"
        context_dim=32,
        in_channels=8,
        guidance_embeds=True,
    ),
    autoencoder=AutoencoderSpec(
        block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(2, 4, 6),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
    ),
    text_encoder=TextEncoderSpec(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_states=(1, 2),
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        qk_norm=True,
    ),
    prompt=published_spec("klein-4b").prompt,
    sampling=published_spec("klein-4b").sampling,
)
assert SPEC.text_encoder is not None
MISTRAL = replace(SPEC, text_encoder=replace(SPEC.text_encoder, qk_norm=False))


def random_tensors(spec: ModelSpec, family: Family) -> Tensors:
    generator = np.random.default_rng(0)
    shapes = expected_tensors(spec, family)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def saved(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def assert_holds(checkpoint: Checkpoint, expected: Mapping[str, np.ndarray]) -> None:
    assert set(checkpoint.names()) == set(expected)
    for name, value in expected.items():
        assert checkpoint.shape(name) == value.shape, name
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
        np.testing.assert_array_equal(checkpoint.read(name, 1, len(value) - 1), value[1:-1], err_msg=name)


def refused(call: Callable[[], Any]) -> str:
    """The text of the error: one line, so that a terminal shows it whole."""
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- inventory ---------------------------------------------------------------------------------------------------


def test_inventory_has_the_published_number_of_tensors_and_parameters() -> None:
    shapes = expected_tensors(published_spec("dev"), "transformer")
    assert len(shapes) == 299  # flux2-dev.safetensors, counted by sglang PR#23625
    assert sum(map(prod, shapes.values())) == pytest.approx(32.223e9, rel=1e-4)
    klein = expected_tensors(published_spec("klein-4b"), "transformer")
    assert 2 * sum(map(prod, klein.values())) == pytest.approx(7.75e9, rel=1e-3)  # file size of flux-2-klein-4b
    autoencoder = expected_tensors(published_spec("dev"), "autoencoder")
    header_bytes = 336_213_556 - 4 * sum(map(prod, autoencoder.values()))  # file size of Comfy-Org's flux2-vae
    assert 80 < header_bytes / len(autoencoder) < 150


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model", FAMILY)
def test_inventory_of_every_published_model_is_complete(model: str, family: Family) -> None:
    assert all(all(size > 0 for size in shape) for shape in expected_tensors(published_spec(model), family).values())


def test_inventory_refuses_a_text_encoder_that_the_model_lacks() -> None:
    with pytest.raises(UsageError, match="prompt embeds"):
        expected_tensors(replace(SPEC, text_encoder=None, prompt=None), "text_encoder")


# --- the layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bfl_file_of_the_transformer(tmp_path: Path, prefix: str) -> None:
    tensors = random_tensors(SPEC, "transformer")
    path = saved(tmp_path / "any-name.safetensors", {prefix + name: value for name, value in tensors.items()})
    checkpoint = Checkpoint(path, "transformer")
    checkpoint.verify(SPEC)
    assert_holds(checkpoint, tensors)


def test_bfl_file_of_the_autoencoder(tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, "autoencoder")
    path = saved(tmp_path / "ae.safetensors", tensors | {"bn.num_batches_tracked": np.array(7)})
    checkpoint = Checkpoint(path, "autoencoder")
    checkpoint.verify(SPEC)
    assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("layout", ["folder", "sharded", "file", "pipeline"])
def test_diffusers_transformer(tmp_path: Path, layout: str, guidance_embeds: bool) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    spec = replace(SPEC, transformer=replace(SPEC.transformer, guidance_embeds=guidance_embeds))
    sizes = spec.transformer
    model = diffusers.Flux2Transformer2DModel(
        in_channels=sizes.in_channels,
        num_layers=sizes.num_double_blocks,
        num_single_layers=sizes.num_single_blocks,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=sizes.context_dim,
        timestep_guidance_channels=sizes.timestep_channels,
        axes_dims_rope=sizes.axes_dim,
        guidance_embeds=guidance_embeds,
    )
    # diffusers' own conversion of BFL's names is the oracle: our canonical names must come back.
    tensors = random_tensors(spec, "transformer")
    converted = convert_flux2_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(value) for name, value in tensors.items()}
    )
    model.load_state_dict(converted, strict=True)
    folder = tmp_path / "transformer"
    model.save_pretrained(folder, max_shard_size="40KB" if layout == "sharded" else "1GB")
    if layout == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 2
    path = {
        "folder": folder,
        "sharded": folder,
        "file": folder / "diffusion_pytorch_model.safetensors",
        "pipeline": tmp_path,
    }[layout]
    checkpoint = Checkpoint(path, "transformer")
    checkpoint.verify(spec)
    assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("layout", ["folder", "sharded", "pipeline"])
@pytest.mark.parametrize("decoder_channels", [None, (2, 4, 6)])
def test_diffusers_autoencoder(tmp_path: Path, layout: str, decoder_channels: tuple[int, ...] | None) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    sizes = replace(
        SPEC.autoencoder, decoder_block_out_channels=decoder_channels or SPEC.autoencoder.block_out_channels
    )
    spec, levels = replace(SPEC, autoencoder=sizes), len(sizes.block_out_channels)
    model = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.block_out_channels,
        decoder_block_out_channels=decoder_channels,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.norm_num_groups,
    )
    # diffusers' conversion of latent diffusion's names is the oracle; FLUX.2 differs in the quant convs and in bn.
    tensors = random_tensors(spec, "autoencoder")
    coders = {
        name.replace("encoder.quant_conv", "quant_conv").replace("decoder.post_quant_conv", "post_quant_conv"): value
        for name, value in tensors.items()
    }
    converted = convert_ldm_vae_checkpoint(
        {name: torch.from_numpy(value) for name, value in coders.items() if not name.startswith("bn.")}, model.config
    )
    statistics = {name: torch.from_numpy(value) for name, value in tensors.items() if name.startswith("bn.")}
    model.load_state_dict(converted | statistics | {"bn.num_batches_tracked": torch.tensor(3)}, strict=True)
    folder = tmp_path / "vae"
    model.save_pretrained(folder, max_shard_size="10KB" if layout == "sharded" else "1GB")
    checkpoint = Checkpoint(tmp_path if layout == "pipeline" else folder, "autoencoder")
    checkpoint.verify(spec)
    assert_holds(checkpoint, tensors)


def test_diffusers_autoencoder_without_its_options(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=SPEC.autoencoder.block_out_channels,
        layers_per_block=2,
        latent_channels=2,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    model.save_pretrained(tmp_path)
    sizes = replace(
        SPEC.autoencoder,
        decoder_block_out_channels=SPEC.autoencoder.block_out_channels,
        layers_per_block=2,
        quant_conv=False,
        post_quant_conv=False,
        mid_block_attention=False,
    )
    Checkpoint(tmp_path, "autoencoder").verify(replace(SPEC, autoencoder=sizes))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3Model", "MistralForCausalLM", "Mistral3"])
def test_transformers_text_encoder(tmp_path: Path, kind: str, sharded: bool) -> None:
    transformers = pytest.importorskip("transformers")
    spec = SPEC if kind.startswith("Qwen3") else MISTRAL
    sizes = spec.text_encoder
    assert sizes is not None
    config = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "num_hidden_layers": sizes.num_layers + 1,  # one that nobody needs
    }
    if kind == "Mistral3":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 16, "patch_size": 8}
        model = transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(
                text_config=transformers.MistralConfig(**config).to_dict(),
                vision_config=transformers.PixtralVisionConfig(**vision).to_dict(),
            )
        )
        language_model = model.model.language_model
    else:
        config_class = transformers.Qwen3Config if kind.startswith("Qwen3") else transformers.MistralConfig
        model = getattr(transformers, kind)(config_class(**config))
        language_model = getattr(model, "model", model)
    model.save_pretrained(tmp_path, max_shard_size="8KB" if sharded else "1GB")
    checkpoint = Checkpoint(tmp_path, "text_encoder")
    checkpoint.verify(spec)
    stored = {name: value.numpy() for name, value in language_model.state_dict().items() if name != "norm.weight"}
    assert_holds(checkpoint, stored)
    assert set(expected_tensors(spec, "text_encoder")) == {n for n in stored if not n.startswith("layers.2.")}


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.model.", "model.language_model.", "model.language_model.model."]
)
def test_text_encoder_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = random_tensors(MISTRAL, "text_encoder")
    others = [
        "lm_head.weight",
        f"{prefix}norm.weight",
        "model.vision_tower.transformer.layers.0.attention.k_proj.weight",
    ]
    others += ["multi_modal_projector.linear_1.weight", "tekken_model", "language_model.lm_head.weight"]
    stored = {prefix + name: value for name, value in tensors.items()} | {name: np.zeros(3) for name in others}
    checkpoint = Checkpoint(saved(tmp_path / "te.safetensors", stored), "text_encoder")
    checkpoint.verify(MISTRAL)
    assert_holds(checkpoint, tensors)


# --- verify ------------------------------------------------------------------------------------------------------


def test_verify_lists_what_differs(tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, "transformer")
    del tensors["txt_in.weight"], tensors["time_in.in_layer.weight"]
    tensors["img_in.weight"] = np.zeros((3, 3), np.float32)
    tensors |= {f"double_blocks.0.surplus_{i}": np.zeros(1, np.float32) for i in range(11)}
    checkpoint = Checkpoint(saved(tmp_path / "x.safetensors", tensors), "transformer")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(SPEC)
    title, missing, extra, misshaped = str(caught.value).splitlines()
    assert "is not the transformer of small" in title
    assert missing.split(": ")[1] == "txt_in.weight, time_in.in_layer.weight"
    assert "double_blocks.0.surplus_0, " in extra and extra.endswith("and 3 more")
    assert misshaped.split(": ")[1] == "img_in.weight [3, 3] instead of [32, 8]"


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_says_which_model_the_file_is(tmp_path: Path, family: Family) -> None:
    checkpoint = Checkpoint(saved(tmp_path / "x.safetensors", random_tensors(published_spec("tiny"), family)), family)
    checkpoint.verify(published_spec("tiny"))
    with pytest.raises(CheckpointError, match=r"of klein-9b: it looks like tiny; build that"):
        checkpoint.verify(published_spec("klein-9b"))


def test_verify_ignores_no_layer_below_the_last_that_is_used(tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, "text_encoder")
    del tensors["layers.1.mlp.up_proj.weight"]
    path = saved(tmp_path / "x.safetensors", tensors | {"layers.0.self_attn.q_proj.bias": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"(?s)missing: layers.1.mlp.up_proj.weight\n  extra: .*q_proj.bias$"):
        Checkpoint(path, "text_encoder").verify(SPEC)


def test_half_a_fused_projection_is_reported_under_both_names(tmp_path: Path) -> None:
    d = SPEC.transformer.hidden_size
    tensors = random_tensors(SPEC, "transformer")
    del tensors["double_blocks.1.img_attn.qkv.weight"]
    tensors |= {f"transformer_blocks.1.attn.to_{x}.weight": np.zeros((d, d), np.float32) for x in "qk"}
    with pytest.raises(
        CheckpointError, match=r"(?s)missing: double_blocks.1.img_attn.qkv.weight\n  extra: trans.*to_q"
    ):
        Checkpoint(saved(tmp_path / "x.safetensors", tensors), "transformer").verify(SPEC)


def test_codes_without_a_scale_keep_their_bytes_but_are_not_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch_file

    name = "single_blocks.0.linear1.weight"
    tensors = {key: torch.from_numpy(value) for key, value in random_tensors(SPEC, "transformer").items()}
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_torch_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(tmp_path / "x.safetensors", "transformer")
    assert "F8_E4M3" in refused(lambda: checkpoint.verify(SPEC))
    assert "give the BF16 checkpoint" in refused(lambda: checkpoint.read(name))
    dtype, shape, data = checkpoint.raw(name)
    assert (dtype, shape) == ("F8_E4M3", tuple(tensors[name].shape))
    assert data.tobytes() == tensors[name].view(torch.uint8).numpy().tobytes()
    assert checkpoint.metadata == {"format": "pt"}


def test_raw_puts_fused_tensors_together(tmp_path: Path) -> None:
    rows = [np.full((2, 3), value, np.float16) for value in (1, 2, 3)]
    stored = {f"transformer_blocks.0.attn.add_{x}_proj.weight": value for x, value in zip("qkv", rows, strict=True)}
    checkpoint = Checkpoint(saved(tmp_path / "x.safetensors", stored), "transformer")
    dtype, shape, data = checkpoint.raw("double_blocks.0.txt_attn.qkv.weight")
    assert (dtype, shape, data.tobytes()) == ("F16", (6, 3), np.concatenate(rows).tobytes())
    assert "has no tensor img_in.weight" in refused(lambda: checkpoint.read("img_in.weight"))


# --- paths and files that cannot be used -------------------------------------------------------------------------


def test_another_component_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", random_tensors(SPEC, "autoencoder"))
    assert "holds no transformer of FLUX.2; it looks like the autoencoder" in refused(
        lambda: Checkpoint(path, "transformer")
    )
    path = saved(tmp_path / "y.safetensors", {"shared.weight": np.zeros(3)})
    assert "its first tensor is 'shared.weight'" in refused(lambda: Checkpoint(path, "text_encoder"))
    path = saved(tmp_path / "z.safetensors", {"transformer.proj_out.lora_A.weight": np.zeros(3)})
    assert "it looks like a LoRA" in refused(lambda: Checkpoint(path, "transformer"))


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    stored = {"img_in.weight": np.zeros((4, 2)), "x_embedder.weight": np.zeros((4, 2))}
    path = saved(tmp_path / "x.safetensors", stored)
    assert "img_in.weight twice, as img_in.weight and as x_embedder.weight" in refused(
        lambda: Checkpoint(path, "transformer")
    )


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    shapes = [(4, 2), (4, 3), (4, 2)]
    path = saved(tmp_path / "x.safetensors", {n: np.zeros(s) for n, s in zip(names, shapes, strict=True)})
    assert "differ in dtype or width" in refused(lambda: Checkpoint(path, "transformer"))
    path = saved(tmp_path / "y.safetensors", {"norm_out.linear.weight": np.zeros((3, 2))})
    assert "not two halves" in refused(lambda: Checkpoint(path, "transformer"))


def test_paths_without_weights(tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: Checkpoint(tmp_path / "nothing", "transformer"))
    assert "holds no .safetensors weights" in refused(lambda: Checkpoint(tmp_path, "transformer"))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").touch()
    assert "transformer holds no .safetensors weights" in refused(lambda: Checkpoint(tmp_path, "transformer"))


def test_a_folder_that_leaves_a_choice(tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, "transformer")
    saved(tmp_path / "a.safetensors", tensors)
    Checkpoint(tmp_path, "transformer").verify(SPEC)
    saved(tmp_path / "b.safetensors", tensors)
    assert "2 checkpoints (a.safetensors, b.safetensors)" in refused(lambda: Checkpoint(tmp_path, "transformer"))
    saved(tmp_path / "diffusion_pytorch_model.safetensors", tensors)  # a standard name settles it
    Checkpoint(tmp_path, "transformer").verify(SPEC)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").touch()
    assert "2 checkpoints" in refused(lambda: Checkpoint(tmp_path, "transformer"))


def test_shards_that_are_missing_or_disagree_with_the_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"

    def write(weight_map: Any) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    saved(tmp_path / "one.safetensors", {"embed_tokens.weight": np.zeros(3)})
    write({"embed_tokens.weight": "one.safetensors", "layers.0.input_layernorm.weight": "two.safetensors"})
    assert "lacks 1 of 2 shards, first two.safetensors" in refused(lambda: Checkpoint(tmp_path, "text_encoder"))
    saved(tmp_path / "two.safetensors", {"other": np.zeros(3)})
    assert "says that two.safetensors holds layers.0." in refused(lambda: Checkpoint(index, "text_encoder"))
    saved(
        tmp_path / "two.safetensors",
        {"layers.0.input_layernorm.weight": np.zeros(3), "embed_tokens.weight": np.ones(1)},
    )
    assert "embed_tokens.weight in two shards" in refused(lambda: Checkpoint(tmp_path, "text_encoder"))
    write({"embed_tokens.weight": "../one.safetensors"})
    assert "has no weight_map of .safetensors files beside it" in refused(lambda: Checkpoint(tmp_path, "text_encoder"))
    index.write_text("no json")
    assert "cannot be read" in refused(lambda: Checkpoint(tmp_path, "text_encoder"))
