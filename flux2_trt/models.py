"""The published models, and the spec of any diffusers folder of the family.

Sizes: black-forest-labs/flux2 `src/flux2/model.py` and `util.py`; the text encoders' public `config.json` files;
diffusers `Flux2Transformer2DModel`, `AutoencoderKLFlux2`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.spec import (
    AutoencoderSpec,
    ModelSpec,
    PromptSpec,
    SamplingSpec,
    SourceSpec,
    TextEncoderSpec,
    TransformerSpec,
)

NON_COMMERCIAL = "FLUX Non-Commercial License"
TINY_ASSETS = Path(__file__).parent / "assets" / "tiny"
"""The built-in model's weights, tokenizer and calibration."""


def _qwen3(hidden_size: int, intermediate_size: int) -> TextEncoderSpec:
    return TextEncoderSpec(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_states=(9, 18, 27),
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qk_norm=True,
    )


MISTRAL_SMALL = TextEncoderSpec(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_states=(10, 20, 30),
    rope_theta=1e9,
    rms_norm_eps=1e-5,
    qk_norm=False,
)
QWEN3_4B, QWEN3_8B = _qwen3(2560, 9728), _qwen3(4096, 12288)

MISTRAL_PROMPT = PromptSpec("mistral", max_length=512, padding_side="left", pad_token_id=11)
QWEN3_PROMPT = PromptSpec("qwen3", max_length=512, padding_side="right", pad_token_id=151643)

GUIDANCE_DISTILLED = SamplingSpec("embedded", num_inference_steps=50, guidance_scale=4.0)
STEP_DISTILLED = SamplingSpec("none", num_inference_steps=4, guidance_scale=1.0, fixed_guidance=True)
BASE = SamplingSpec("classifier_free", num_inference_steps=50, guidance_scale=4.0)


def _dev() -> ModelSpec:
    return ModelSpec(
        name="dev",
        transformer=TransformerSpec(
            num_heads=48, num_double_blocks=8, num_single_blocks=48, context_dim=15360, guidance_embeds=True
        ),
        autoencoder=AutoencoderSpec(),
        text_encoder=MISTRAL_SMALL,
        prompt=MISTRAL_PROMPT,
        sampling=GUIDANCE_DISTILLED,
        source=SourceSpec(
            transformer_repo="black-forest-labs/FLUX.2-dev",
            transformer_file="flux2-dev.safetensors",
            text_encoder_repo="mistralai/Mistral-Small-3.2-24B-Instruct-2506",
            tokenizer_repo="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        ),
        license=NON_COMMERCIAL,
    )


def _klein(size: str, sampling: SamplingSpec) -> ModelSpec:
    text_encoder = QWEN3_4B if size == "4b" else QWEN3_8B
    heads, double_blocks, single_blocks = (24, 5, 20) if size == "4b" else (32, 8, 24)
    variant = "klein-base" if sampling is BASE else "klein"
    qwen_repo = "Qwen/Qwen3-4B" if size == "4b" else "Qwen/Qwen3-8B"
    return ModelSpec(
        name=f"{variant}-{size}",
        transformer=TransformerSpec(
            num_heads=heads,
            num_double_blocks=double_blocks,
            num_single_blocks=single_blocks,
            context_dim=text_encoder.context_dim,
            guidance_embeds=False,
        ),
        autoencoder=AutoencoderSpec(),
        text_encoder=text_encoder,
        prompt=QWEN3_PROMPT,
        sampling=sampling,
        source=SourceSpec(
            transformer_repo=f"black-forest-labs/FLUX.2-{variant}-{size.upper()}",
            transformer_file=f"flux-2-{variant}-{size}.safetensors",
            text_encoder_repo=qwen_repo,
            tokenizer_repo=qwen_repo,
        ),
        license="Apache-2.0" if size == "4b" else NON_COMMERCIAL,
    )


def _tiny() -> ModelSpec:
    """The built-in model: FLUX.2's architecture at about 9 M parameters, trained by `python -m export.tiny.train`."""
    text_encoder = TextEncoderSpec(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        hidden_states=(1, 2, 3),
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        qk_norm=True,
    )
    return ModelSpec(
        name="tiny",
        transformer=TransformerSpec(
            num_heads=3,
            head_dim=64,
            axes_dim=(8, 24, 24, 8),
            theta=10.0,  # its pictures have up to 32 tokens a side, not hundreds
            num_double_blocks=2,
            num_single_blocks=5,
            context_dim=text_encoder.context_dim,
            in_channels=32,
            guidance_embeds=False,
        ),
        autoencoder=AutoencoderSpec(
            block_out_channels=(16, 32, 64, 64),
            decoder_block_out_channels=(16, 24, 48, 64),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=8,
        ),
        text_encoder=text_encoder,
        prompt=PromptSpec("plain", max_length=32, padding_side="right", pad_token_id=0),
        sampling=SamplingSpec(
            "classifier_free",
            num_inference_steps=8,
            guidance_scale=1.0,
            width=256,
            height=256,
            min_side=128,
            max_side=512,
            max_reference_area=512 * 512,
        ),
        license="Apache-2.0",
    )


FAMILY: Mapping[str, Callable[[], ModelSpec]] = {
    "tiny": _tiny,
    "dev": _dev,
    "klein-4b": lambda: _klein("4b", STEP_DISTILLED),
    "klein-9b": lambda: _klein("9b", STEP_DISTILLED),
    "klein-base-4b": lambda: _klein("4b", BASE),
    "klein-base-9b": lambda: _klein("9b", BASE),
}


def published_spec(name: str) -> ModelSpec:
    """The spec of a published model. Raises UsageError for a name that is not in `FAMILY`."""
    if name not in FAMILY:
        raise UsageError(
            f"unknown model {name!r}; known are {', '.join(FAMILY)}, a diffusers folder, a .safetensors file"
        )
    return FAMILY[name]()


def spec_from_diffusers(folder: Path) -> ModelSpec:
    """The spec of a diffusers folder, read from its `config.json` files.

    `transformer/` and `vae/` are required; without `text_encoder/` the model takes prompt embeds only.
    Raises CheckpointError for a missing or unreadable file, UsageError where the components do not fit together.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    transformer = _transformer_spec(_read_json(folder / "transformer" / "config.json"))
    autoencoder = _autoencoder_spec(_read_json(folder / "vae" / "config.json"))
    text_encoder = prompt = None
    if (folder / "text_encoder" / "config.json").exists():
        config = _read_json(folder / "text_encoder" / "config.json")
        text_encoder = _text_encoder_spec(config, transformer.context_dim)
        prompt = QWEN3_PROMPT if text_encoder.qk_norm else MISTRAL_PROMPT
    if transformer.guidance_embeds:
        sampling = GUIDANCE_DISTILLED
    else:
        sampling = STEP_DISTILLED if index.get("is_distilled", False) else BASE
    return ModelSpec(
        name=folder.resolve().name.lower(),
        transformer=transformer,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        prompt=prompt,
        sampling=sampling,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a diffusers folder of FLUX.2 has it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; download the folder again")
    return values


def _transformer_spec(config: Mapping[str, Any]) -> TransformerSpec:
    if config.get("_class_name", "Flux2Transformer2DModel") != "Flux2Transformer2DModel":
        raise CheckpointError(f"the transformer is a {config['_class_name']}; this engine runs Flux2Transformer2DModel")
    if config.get("patch_size", 1) != 1 or config.get("out_channels") not in (None, config.get("in_channels", 128)):
        raise CheckpointError(
            "the transformer's patch_size and out_channels differ from FLUX.2's (1, same as in_channels)"
        )
    return TransformerSpec(
        num_heads=config.get("num_attention_heads", 48),
        head_dim=config.get("attention_head_dim", 128),
        num_double_blocks=config.get("num_layers", 8),
        num_single_blocks=config.get("num_single_layers", 48),
        context_dim=config.get("joint_attention_dim", 15360),
        guidance_embeds=config.get("guidance_embeds", True),
        axes_dim=tuple(config.get("axes_dims_rope", (32, 32, 32, 32))),
        in_channels=config.get("in_channels", 128),
        theta=float(config.get("rope_theta", 2000)),
        mlp_ratio=float(config.get("mlp_ratio", 3.0)),
        timestep_channels=config.get("timestep_guidance_channels", 256),
        eps=config.get("eps", 1e-6),
    )


def _autoencoder_spec(config: Mapping[str, Any]) -> AutoencoderSpec:
    default = AutoencoderSpec()
    channels = tuple(config.get("block_out_channels", default.block_out_channels))
    patch_height, patch_width = config.get("patch_size", (2, 2))
    if patch_height != patch_width:
        raise CheckpointError(f"the autoencoder's patch_size {config['patch_size']} is not square")
    return AutoencoderSpec(
        block_out_channels=channels,
        decoder_block_out_channels=tuple(config.get("decoder_block_out_channels") or channels),
        layers_per_block=config.get("layers_per_block", default.layers_per_block),
        latent_channels=config.get("latent_channels", default.latent_channels),
        norm_num_groups=config.get("norm_num_groups", default.norm_num_groups),
        patch_size=patch_height,
        quant_conv=config.get("use_quant_conv", True),
        post_quant_conv=config.get("use_post_quant_conv", True),
        mid_block_attention=config.get("mid_block_add_attention", True),
        batch_norm_eps=config.get("batch_norm_eps", default.batch_norm_eps),
    )


def _text_encoder_spec(config: Mapping[str, Any], context_dim: int) -> TextEncoderSpec:
    text = config.get("text_config", config)
    kind = text.get("model_type", "")
    if kind not in ("mistral", "qwen3"):
        raise CheckpointError(f"the text encoder is a {kind!r} model; this engine runs mistral and qwen3")
    hidden_size, num_layers = text["hidden_size"], text["num_hidden_layers"]
    count = context_dim // hidden_size
    published = {"mistral": (10, 20, 30), "qwen3": (9, 18, 27)}[kind]
    hidden_states = published if count == 3 and num_layers > max(published) else tuple(range(1, count + 1))
    if num_layers <= max(hidden_states):  # transformers norms the last hidden state, FLUX.2's are all from before
        raise CheckpointError(
            f"the text encoder has {num_layers} layers; prompt embeds of width {context_dim} need more than "
            f"{max(hidden_states)} of width {hidden_size}"
        )
    rope = text.get("rope_parameters") or text
    return TextEncoderSpec(
        vocab_size=text["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text.get("num_key_value_heads", text["num_attention_heads"]),
        head_dim=text.get("head_dim") or hidden_size // text["num_attention_heads"],
        hidden_states=hidden_states,
        rope_theta=float(rope.get("rope_theta", 1e4)),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
    )
