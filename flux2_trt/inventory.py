"""Inventory: the canonical tensors, names and shapes, that a model must have; told from its spec alone.

Sources: black-forest-labs/flux2 `src/flux2/model.py`, `autoencoder.py`; transformers `modeling_qwen3.py`,
`modeling_mistral.py`.
"""

from __future__ import annotations

import re

from flux2_trt.errors import UsageError
from flux2_trt.naming import Family
from flux2_trt.spec import AutoencoderSpec, ModelSpec, TextEncoderSpec, TransformerSpec

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(spec: ModelSpec, family: Family) -> Shapes:
    """Canonical name -> shape of every tensor that the engine needs. Raises UsageError for a family the model lacks."""
    if family == "transformer":
        return _transformer_tensors(spec.transformer)
    if family == "autoencoder":
        return _autoencoder_tensors(spec.autoencoder)
    if spec.text_encoder is None:
        raise UsageError(f"{spec.name} has no text encoder; it takes prompt embeds")
    return _text_encoder_tensors(spec.text_encoder)


def is_above_used_layers(name: str, spec: ModelSpec) -> bool:
    """Whether a canonical name is of a language model layer above the last hidden state that is used."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return layer is not None and spec.text_encoder is not None and int(layer[1]) >= spec.text_encoder.num_layers


def _transformer_tensors(spec: TransformerSpec) -> Shapes:
    d, mlp = spec.hidden_size, spec.mlp_hidden_size
    shapes: Shapes = {"img_in.weight": (d, spec.in_channels), "txt_in.weight": (d, spec.context_dim)}
    for embedder in ("time_in", "guidance_in") if spec.guidance_embeds else ("time_in",):
        shapes[f"{embedder}.in_layer.weight"] = (d, spec.timestep_channels)
        shapes[f"{embedder}.out_layer.weight"] = (d, d)
    shapes["double_stream_modulation_img.lin.weight"] = shapes["double_stream_modulation_txt.lin.weight"] = (6 * d, d)
    shapes["single_stream_modulation.lin.weight"] = (3 * d, d)
    for block in range(spec.num_double_blocks):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            shapes[f"{prefix}_attn.qkv.weight"] = (3 * d, d)
            shapes[f"{prefix}_attn.norm.query_norm.scale"] = (spec.head_dim,)
            shapes[f"{prefix}_attn.norm.key_norm.scale"] = (spec.head_dim,)
            shapes[f"{prefix}_attn.proj.weight"] = (d, d)
            shapes[f"{prefix}_mlp.0.weight"] = (2 * mlp, d)
            shapes[f"{prefix}_mlp.2.weight"] = (d, mlp)
    for block in range(spec.num_single_blocks):
        prefix = f"single_blocks.{block}"
        shapes[f"{prefix}.linear1.weight"] = (3 * d + 2 * mlp, d)
        shapes[f"{prefix}.norm.query_norm.scale"] = (spec.head_dim,)
        shapes[f"{prefix}.norm.key_norm.scale"] = (spec.head_dim,)
        shapes[f"{prefix}.linear2.weight"] = (d, d + mlp)
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * d, d)
    shapes["final_layer.linear.weight"] = (spec.in_channels, d)
    return shapes


def _autoencoder_tensors(spec: AutoencoderSpec) -> Shapes:
    shapes: Shapes = {}
    latent, moments = spec.latent_channels, 2 * spec.latent_channels

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, kernel=1)

    def middle(name: str, channels: int) -> None:
        residual(f"{name}.block_1", channels, channels)
        if spec.mid_block_attention:
            norm(f"{name}.attn_1.norm", channels)
            for projection in ("q", "k", "v", "proj_out"):
                conv(f"{name}.attn_1.{projection}", channels, channels, kernel=1)
        residual(f"{name}.block_2", channels, channels)

    channels = spec.block_out_channels[0]
    conv("encoder.conv_in", 3, channels)
    for level, outputs in enumerate(spec.block_out_channels):
        for block in range(spec.layers_per_block):
            residual(f"encoder.down.{level}.block.{block}", channels, outputs)
            channels = outputs
        if level < len(spec.block_out_channels) - 1:
            conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    middle("encoder.mid", channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", channels, moments)
    if spec.quant_conv:
        conv("encoder.quant_conv", moments, moments, kernel=1)

    if spec.post_quant_conv:
        conv("decoder.post_quant_conv", latent, latent, kernel=1)
    channels = spec.decoder_block_out_channels[-1]
    conv("decoder.conv_in", latent, channels)
    middle("decoder.mid", channels)
    for level, outputs in reversed(list(enumerate(spec.decoder_block_out_channels))):
        for block in range(spec.layers_per_block + 1):
            residual(f"decoder.up.{level}.block.{block}", channels, outputs)
            channels = outputs
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3)
    shapes["bn.running_mean"] = shapes["bn.running_var"] = (spec.token_channels,)
    return shapes


def _text_encoder_tensors(spec: TextEncoderSpec) -> Shapes:
    hidden, query, key = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: Shapes = {"embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        shapes[f"layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{attention}.q_proj.weight"] = (query, hidden)
        shapes[f"{attention}.k_proj.weight"] = shapes[f"{attention}.v_proj.weight"] = (key, hidden)
        shapes[f"{attention}.o_proj.weight"] = (hidden, query)
        if spec.qk_norm:
            shapes[f"{attention}.q_norm.weight"] = shapes[f"{attention}.k_norm.weight"] = (spec.head_dim,)
        shapes[f"layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{mlp}.gate_proj.weight"] = shapes[f"{mlp}.up_proj.weight"] = (spec.intermediate_size, hidden)
        shapes[f"{mlp}.down_proj.weight"] = (hidden, spec.intermediate_size)
    return shapes
