"""Our modules, with weights that diffusers or transformers saved, give what diffusers and transformers give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers_models import (
    flow_scheduler,
    load,
    relative_error,
    small_autoencoder,
    small_language_model,
    small_transformer,
)

from export.modules import build_module
from export.modules.autoencoder import VaeDecoder, VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import TextEncoder
from export.modules.transformer import Transformer
from flux2_trt.checkpoint import Checkpoint
from flux2_trt.errors import UsageError
from flux2_trt.latents import position_ids, rotary_tables
from flux2_trt.models import published_spec, spec_from_diffusers
from flux2_trt.spec import ModelSpec

# The same mathematics in fp32, with sums in another order: about 1e-6 after a few layers, with room for ten times that.
FP32 = 1e-5
# Hidden states are compared before any norm of the whole, after layers whose residuals add up rounding.
FP32_LANGUAGE_MODEL = 1e-4


def saved(folder: Path, transformer: Any = None, vae: Any = None, text_encoder: Any = None) -> ModelSpec:
    """Save the models where a pipeline has them, and read the spec of the folder."""
    vae = vae or small_autoencoder()
    pipeline = Flux2KleinPipeline(flow_scheduler(), vae, None, None, transformer or small_transformer())
    pipeline.save_pretrained(folder)
    if text_encoder is not None:
        text_encoder.save_pretrained(folder / "text_encoder")
    return spec_from_diffusers(folder)


# --- transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 1, "num_single_layers": 1},
        {"num_layers": 2, "num_single_layers": 3},
        {"attention_head_dim": 24, "axes_dims_rope": (2, 10, 8, 4), "num_attention_heads": 3},
        {"rope_theta": 500, "mlp_ratio": 2.0, "timestep_guidance_channels": 64, "eps": 1e-3},
    ],
    ids=["1+1 blocks", "2+3 blocks", "head size and axes", "other numbers"],
)
def test_velocity_and_step_of_the_transformer(tmp_path: Path, sizes: dict[str, Any], guidance_embeds: bool) -> None:
    theirs = small_transformer(guidance_embeds=guidance_embeds, **sizes)
    spec = saved(tmp_path, transformer=theirs).transformer
    conditioning = load(Conditioning(spec), tmp_path, "transformer")
    transformer = load(Transformer(spec), tmp_path, "transformer")
    generator = torch.Generator().manual_seed(1)
    grid, references = (5, 3), [(2, 4), (3, 3)]
    ids = position_ids(7, *grid, references)
    tokens = len(ids) - 7
    latents = torch.randn(2, tokens, spec.in_channels, generator=generator)
    embeds = torch.randn(2, 7, spec.context_dim, generator=generator)
    sigma, guidance = torch.tensor([0.9, 0.371]), torch.tensor([4.0, 2.5])
    cos, sin = map(torch.from_numpy, rotary_tables(ids, spec.axes_dim, spec.theta))

    with torch.no_grad():
        table, text_tokens = conditioning(sigma, embeds, *([guidance] if guidance_embeds else []))
        for step in range(2):
            expected = theirs(
                hidden_states=latents,
                encoder_hidden_states=embeds,
                timestep=sigma[step].expand(2),
                img_ids=torch.from_numpy(ids[7:]),
                txt_ids=torch.from_numpy(ids[:7]),
                guidance=guidance[step].expand(2) if guidance_embeds else None,
            ).sample
            row = table[step : step + 1]
            velocity = transformer.velocity(latents, row, text_tokens, cos, sin)
            assert relative_error(velocity, expected) < FP32

            dt = torch.full((len(table), tokens), 7.0)
            dt[step, :15], dt[step, 15:] = -0.2, 0.0
            now = torch.tensor([step], dtype=torch.int32)
            updated, after = transformer(latents, table, text_tokens, cos, sin, dt, now)
            assert after.tolist() == [step + 1]
            assert relative_error(updated[:, :15], latents[:, :15] - 0.2 * expected[:, :15]) < FP32
            assert torch.equal(updated[:, 15:], latents[:, 15:])


def test_guidance_mix_is_classifier_free_guidance(tmp_path: Path) -> None:
    theirs = small_transformer()
    spec = saved(tmp_path, transformer=theirs)
    conditioning = load(build_module("conditioning", spec), tmp_path, "transformer")
    transformer = load(Transformer(spec.transformer), tmp_path, "transformer")
    generator = torch.Generator().manual_seed(2)
    ids = position_ids(5, 2, 3)
    latents = torch.randn(1, 6, spec.transformer.in_channels, generator=generator)
    embeds = torch.randn(2, 5, spec.transformer.context_dim, generator=generator)
    cos, sin = map(torch.from_numpy, rotary_tables(ids, spec.transformer.axes_dim, spec.transformer.theta))
    scale, dt = 3.0, torch.full((1, 6), -0.1)
    with torch.no_grad():
        unconditional, conditional = (
            theirs(
                hidden_states=latents,
                encoder_hidden_states=embeds[i : i + 1],
                timestep=torch.tensor([0.6]),
                img_ids=torch.from_numpy(ids[5:]),
                txt_ids=torch.from_numpy(ids[:5]),
            ).sample
            for i in range(2)
        )
        table, text_tokens = conditioning(torch.tensor([0.6]), embeds)
        mix = torch.tensor([[1 - scale, scale]] * 2)
        step = torch.zeros(1, dtype=torch.int32)
        updated, _ = transformer(latents.repeat(2, 1, 1), table, text_tokens, cos, sin, dt, step, mix)
    # Flux2KleinPipeline's formula
    expected = latents - 0.1 * (unconditional + scale * (conditional - unconditional))
    assert relative_error(updated[:1], expected) < FP32
    assert torch.equal(updated[0], updated[1])


# --- autoencoder -------------------------------------------------------------------------------------------------

AUTOENCODERS = {
    "small decoder": {},
    "decoder like the encoder": {"decoder_block_out_channels": None},
    "three blocks": {"decoder_block_out_channels": (4, 8, 8, 12), "layers_per_block": 2},
    "no quant convs": {"use_quant_conv": False, "use_post_quant_conv": False},
    "quant conv only": {"use_post_quant_conv": False, "mid_block_add_attention": False},
    "batch norm eps": {"batch_norm_eps": 0.1},
}


@pytest.mark.parametrize("sizes", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_picture_to_latents(tmp_path: Path, sizes: dict[str, Any]) -> None:
    vae = small_autoencoder(**sizes)
    spec = saved(tmp_path, vae=vae).autoencoder
    encoder = load(VaeEncoder(spec), tmp_path, "autoencoder")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 80, 112, 3), dtype=np.uint8)
    pipeline = Flux2KleinPipeline(flow_scheduler(), vae, None, None, small_transformer())
    with torch.no_grad():
        normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0
        expected = pipeline._encode_vae_image(normalised, generator=None)
        latents = encoder(torch.from_numpy(pixels))
    assert latents.shape == (2, 5, 7, 16) and latents.dtype == torch.float32
    assert relative_error(latents.permute(0, 3, 1, 2), expected) < FP32


@pytest.mark.parametrize("sizes", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_latents_to_picture(tmp_path: Path, sizes: dict[str, Any]) -> None:
    vae = small_autoencoder(**sizes)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.4)  # so that most of the picture is within -1..1
    spec = saved(tmp_path, vae=vae).autoencoder
    decoder = load(VaeDecoder(spec), tmp_path, "autoencoder")
    latents = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # the end of Flux2KleinPipeline.__call__
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        raw = Flux2KleinPipeline._unpatchify_latents(latents * deviation + vae.bn.running_mean.view(1, -1, 1, 1))
        expected = vae.decode(raw).sample
        unrounded: list[torch.Tensor] = []
        decoder.decoder.register_forward_hook(lambda module, inputs, output: unrounded.append(output))
        image = decoder(latents.permute(0, 2, 3, 1).contiguous())
    assert relative_error(unrounded[0], expected) < FP32
    assert image.shape == (2, 80, 112, 3) and image.dtype == torch.uint8

    theirs = np.stack([np.asarray(i) for i in VaeImageProcessor().postprocess(expected, output_type="pil")])
    difference = np.abs(image.numpy().astype(int) - theirs.astype(int))
    # Both round to the nearest step, of values that differ by fp32's rounding: only ties can fall to either side.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert ((theirs > 0) & (theirs < 255)).mean() > 0.5


# --- text encoder ------------------------------------------------------------------------------------------------

LENGTHS = (9, 5, 1)  # a full row, a padded one, and one of a single token
MASKS = {
    "full": np.ones((3, 9), np.int64),
    "left": np.array([[0] * (9 - n) + [1] * n for n in LENGTHS], np.int64),
    "right": np.array([[1] * n + [0] * (9 - n) for n in LENGTHS], np.int64),
}
LANGUAGE_MODELS = {
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "qwen3, no groups": ("qwen3", {"num_key_value_heads": 4, "head_dim": 6, "rms_norm_eps": 1e-3}),
    "mistral, one key head": (
        "mistral",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ),
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("kind", "sizes"), LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_hidden_states_of_the_language_model(tmp_path: Path, kind: str, sizes: dict[str, Any], padding: str) -> None:
    theirs = small_language_model(kind, **sizes)
    spec = saved(tmp_path, text_encoder=theirs).text_encoder
    assert spec is not None and spec.hidden_states == (1, 2) and spec.qk_norm == (kind == "qwen3")
    ours = load(TextEncoder(spec), tmp_path, "text_encoder")
    mask = torch.from_numpy(MASKS[padding])
    ids = torch.randint(0, 64, mask.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        states = theirs(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        expected = torch.cat([states[index] for index in spec.hidden_states], dim=-1)
        embeds = ours(ids, mask)
    assert embeds.shape == (3, 9, 24) and embeds.dtype == torch.float32
    valid = mask.bool()
    assert relative_error(embeds[valid], expected[valid]) < FP32_LANGUAGE_MODEL
    # The transformer reads padded positions too, so they have to agree as well.
    assert relative_error(embeds, expected) < FP32_LANGUAGE_MODEL


def test_the_published_choice_of_hidden_states(tmp_path: Path) -> None:
    theirs = small_language_model("qwen3", hidden_size=8, num_hidden_layers=28)
    assert saved(tmp_path, text_encoder=theirs).text_encoder.hidden_states == (9, 18, 27)  # type: ignore[union-attr]


# --- names -------------------------------------------------------------------------------------------------------


def test_modules_take_exactly_the_tensors_of_the_checkpoint(tmp_path: Path) -> None:
    spec = saved(tmp_path, text_encoder=small_language_model("qwen3"))
    for family, components in (
        ("transformer", ("conditioning", "transformer")),
        ("autoencoder", ("vae_encoder", "vae_decoder")),
        ("text_encoder", ("text_encoder",)),
    ):
        checkpoint = Checkpoint(tmp_path, family)  # type: ignore[arg-type]
        checkpoint.verify(spec)
        names = {name for component in components for name in build_module(component, spec).state_dict()}  # type: ignore[arg-type]
        unused = {name for name in set(checkpoint.names()) - names if not name.startswith("layers.2.")}
        assert unused == set() and names <= set(checkpoint.names())


def test_a_component_that_a_model_lacks_is_refused() -> None:
    spec = replace(published_spec("tiny"), text_encoder=None, prompt=None)
    with pytest.raises(UsageError, match="text_encoder"):
        build_module("text_encoder", spec)
