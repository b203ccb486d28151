"""The same pictures by diffusers, with the weights of our bundle: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import nn

from export.tensor_source import TensorSource
from flux2_trt.naming import Family, canonical_sources
from flux2_trt.spec import AutoencoderSpec, ModelSpec, TransformerSpec


def diffusers_pipeline(spec: ModelSpec, open_family: Callable[[Family], TensorSource]) -> Any:
    """diffusers' pipeline of a model, in fp32 on the CPU; it takes prompt embeds only."""
    transformer = diffusers_transformer(spec.transformer)
    vae = diffusers_autoencoder(spec.autoencoder)
    fill(transformer, open_family("transformer"), "transformer")
    fill(vae, open_family("autoencoder"), "autoencoder")
    kind, more = Flux2KleinPipeline, {"is_distilled": spec.sampling.guidance_kind == "none"}
    if spec.transformer.guidance_embeds:
        kind, more = Flux2Pipeline, {}
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        **more,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_transformer(spec: TransformerSpec) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=spec.in_channels,
        num_layers=spec.num_double_blocks,
        num_single_layers=spec.num_single_blocks,
        attention_head_dim=spec.head_dim,
        num_attention_heads=spec.num_heads,
        joint_attention_dim=spec.context_dim,
        timestep_guidance_channels=spec.timestep_channels,
        mlp_ratio=spec.mlp_ratio,
        axes_dims_rope=spec.axes_dim,
        rope_theta=int(spec.theta),
        eps=spec.eps,
        guidance_embeds=spec.guidance_embeds,
    )


def diffusers_autoencoder(spec: AutoencoderSpec) -> AutoencoderKLFlux2:
    levels = len(spec.block_out_channels)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=spec.block_out_channels,
        decoder_block_out_channels=spec.decoder_block_out_channels,
        layers_per_block=spec.layers_per_block,
        latent_channels=spec.latent_channels,
        norm_num_groups=spec.norm_num_groups,
        use_quant_conv=spec.quant_conv,
        use_post_quant_conv=spec.post_quant_conv,
        mid_block_add_attention=spec.mid_block_attention,
        batch_norm_eps=spec.batch_norm_eps,
        patch_size=(spec.patch_size, spec.patch_size),
    )


@torch.no_grad()
def fill(model: nn.Module, source: TensorSource, family: Family) -> None:
    """Give a diffusers model the values of canonical tensors: the reader's mapping, run backwards."""
    state = model.state_dict()
    stored = [name for name in state if not name.endswith("num_batches_tracked")]
    for canonical, origin in canonical_sources(stored, family).items():
        value: Any = torch.from_numpy(source.read(canonical))
        if origin.arrangement == "halves_swapped":
            value = torch.cat(value.chunk(2)[::-1])
        for name, part in zip(origin.names, value.chunk(len(origin.names)), strict=True):
            state[name].copy_(part.reshape(state[name].shape))
