"""Passes: components over many inputs, block by block, so that one block's weights are in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.modules import Module, load_module
from export.modules.autoencoder import VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import Layer, attention_masks, rotary_tables, side_by_side
from export.modules.transformer import DoubleBlock, FinalLayer, SingleBlock, image_tokens, join, split_modulation
from export.recipes import QUANTIZED_LINEARS
from export.tensor_source import TensorSource
from flux2_trt.errors import Flux2Error
from flux2_trt.naming import Family
from flux2_trt.spec import ModelSpec, TransformerSpec
from flux2_trt.text import PromptTokenizer


class Observer:
    """The largest magnitude that each watched linear was given."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def watch(self, module: nn.Module, prefix: str, pattern: str) -> None:
        for name, linear in module.named_modules():
            weight = f"{prefix}{name}.weight"
            if isinstance(linear, nn.Linear) and re.fullmatch(pattern, weight):
                linear.register_forward_pre_hook(self._note(weight))

    def _note(self, weight: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = float(inputs[0].abs().max())
            if not np.isfinite(largest):
                raise Flux2Error(f"{weight} was given NaN or infinity during the calibration; check the checkpoint")
            self.largest[weight] = max(largest, self.largest.get(weight, 0.0))

        return note


@dataclass(frozen=True)
class Picture:
    """What the transformer is given of a sample: `latents` [1, N, C] of the picture, those of `references` [1, R, C]
    each, prompt `embeds` [1, T, context_dim], the `levels` [S + 1] of the schedule, `cos`, `sin` [T + N + ..., D/2]."""

    latents: Tensor
    references: tuple[Tensor, ...]
    embeds: Tensor
    levels: NDArray[np.float32]
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Noisy:
    """`latents` [1, N, C] of a picture at the noise level `sigma`."""

    picture: Picture
    latents: Tensor
    sigma: float


@dataclass
class _Stream:
    """A noisy picture on its way through the transformer."""

    img: Tensor
    txt: Tensor
    rows: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Passes:
    """The components of one model in fp32, whose linears `observer` watches where a recipe may quantize them."""

    spec: ModelSpec
    open_family: Callable[[Family], TensorSource]
    device: str
    on_progress: Callable[[str], None]
    observer: Observer = field(default_factory=Observer)

    def prompt_embeds(self, tokenizer: PromptTokenizer, prompts: Sequence[str]) -> Tensor:
        """[B, T, context_dim] of B prompts."""
        spec, source = self.spec.text_encoder, self.open_family("text_encoder")
        assert spec is not None
        tokens = tokenizer(list(prompts))
        ids, mask = (torch.from_numpy(x).to(self.device) for x in (tokens.input_ids, tokens.attention_mask))
        x = F.embedding(ids, torch.from_numpy(source.read("embed_tokens.weight")).to(self.device))
        cos, sin = rotary_tables(ids.shape[1], spec.head_dim, spec.rope_theta, ids.device)
        states = [x]
        for index in range(spec.num_layers):
            self.on_progress(f"text encoder, layer {index + 1} of {spec.num_layers}")
            prefix = f"layers.{index}."
            layer = self.loaded(lambda: Layer(spec), prefix, source)
            self.observer.watch(layer, prefix, QUANTIZED_LINEARS["text_encoder"])
            rows = []
            for row, row_mask in zip(x.split(1), mask.split(1), strict=True):
                visible, sees = attention_masks(row_mask)
                rows.append(layer(row, cos, sin, visible, sees.to(x.dtype)))
            x = torch.cat(rows)
            states.append(x)
        return side_by_side(*(states[index] for index in spec.hidden_states))

    def vae_encoder(self) -> VaeEncoder:
        self.on_progress("encoding pictures")
        return self.loaded(lambda: VaeEncoder(self.spec.autoencoder), "", self.open_family("autoencoder"))

    def transformer(self) -> TransformerPasses:
        return TransformerPasses(self, self.open_family("transformer"))

    def loaded(self, make: Callable[[], Module], prefix: str, source: TensorSource) -> Module:
        """A module with its weights, which are those of `source` whose names begin with `prefix`."""
        return load_module(make, source, self.device, prefix=prefix)


class TransformerPasses:
    """The transformer for any number of noisy pictures, a block at a time."""

    def __init__(self, passes: Passes, source: TensorSource) -> None:
        self.passes, self.source, self.spec = passes, source, passes.spec.transformer
        self.conditioning = passes.loaded(lambda: Conditioning(self.spec), "", source)
        self.final_layer = passes.loaded(lambda: FinalLayer(self.spec), "final_layer.", source)
        self.img_in = torch.from_numpy(source.read("img_in.weight")).to(passes.device)

    def velocities(self, noisy: Sequence[Noisy], on_progress: Callable[[str], None] = lambda _: None) -> list[Tensor]:
        """Of every picture its velocity [1, N, C]."""
        streams = [self._stream(each) for each in noisy]
        for index in range(self.spec.num_double_blocks):
            on_progress(f"transformer, double block {index + 1} of {self.spec.num_double_blocks}")
            double = self._block(DoubleBlock, f"double_blocks.{index}.")
            for stream in streams:
                img_row, txt_row, _, _ = stream.rows
                stream.img, stream.txt = double(stream.img, stream.txt, img_row, txt_row, stream.cos, stream.sin)
        joined = [join(stream.txt, stream.img) for stream in streams]
        for index in range(self.spec.num_single_blocks):
            on_progress(f"transformer, single block {index + 1} of {self.spec.num_single_blocks}")
            single = self._block(SingleBlock, f"single_blocks.{index}.")
            joined = [
                single(x, stream.rows[2], stream.cos, stream.sin) for x, stream in zip(joined, streams, strict=True)
            ]
        return [
            self.final_layer(image_tokens(x, stream.txt), stream.rows[3])[:, : each.latents.shape[1]]
            for x, stream, each in zip(joined, streams, noisy, strict=True)
        ]

    def _stream(self, noisy: Noisy) -> _Stream:
        picture, sampling = noisy.picture, self.passes.spec.sampling
        guidance = [torch.tensor([sampling.guidance_scale])] if self.spec.guidance_embeds else []
        inputs = (value.to(self.passes.device) for value in (torch.tensor([noisy.sigma]), picture.embeds, *guidance))
        modulation, txt = self.conditioning(*inputs)
        img = F.linear(torch.cat((noisy.latents, *picture.references), dim=1), self.img_in)
        return _Stream(img, txt, split_modulation(modulation, self.spec.hidden_size), picture.cos, picture.sin)

    def _block(self, kind: Callable[[TransformerSpec], Module], prefix: str) -> Module:
        block = self.passes.loaded(lambda: kind(self.spec), prefix, self.source)
        self.passes.observer.watch(block, prefix, QUANTIZED_LINEARS["transformer"])
        return block
