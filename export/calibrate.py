"""Calibrate: the ranges of what quantized linears are given, from real prompts and pictures.

A picture is encoded and mixed with noise, (1 - sigma) * latents + sigma * noise, at several noise levels of the model's
own schedule, which is what the transformer sees along the flow. All samples pass one block after the other, so one
block's weights are in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.modules.autoencoder import VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import Layer, attention_masks, rotary_tables
from export.modules.transformer import DoubleBlock, SingleBlock, split_modulation
from export.quantize import FP8_MAX
from export.recipes import QUANTIZED_LINEARS
from export.rounding import SMALLEST_SCALE
from export.tensor_source import TensorSource
from flux2_trt.errors import Flux2Error
from flux2_trt.latents import position_ids
from flux2_trt.latents import rotary_tables as picture_rotary_tables
from flux2_trt.naming import Family
from flux2_trt.schedule import sigmas
from flux2_trt.spec import ModelSpec
from flux2_trt.text import PromptTokenizer

SCHEMA_VERSION = 1
LEVELS_A_SAMPLE = 4

Pixels = NDArray[np.uint8]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class CalibrationSample:
    """A prompt, the picture [H, W, 3] that it asks for, and the reference pictures that it speaks of."""

    prompt: str
    picture: Pixels
    references: tuple[Pixels, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Input scales by the name of a linear's weight: the largest magnitude that was seen, over 448.

    `weights`: what they were measured with, as `engines.sources.ModelSource.identity` says it. `samples`: how many.
    """

    model: str
    weights: Mapping[str, Any]
    samples: int
    input_scales: Mapping[str, float]
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.part")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @staticmethod
    def read(path: Path) -> Calibration:
        """Raises Flux2Error for a file that is no calibration, or one with impossible scales."""
        advice = "make it again: flux2-trt calibrate"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            calibration = Calibration(**values)
            scales = calibration.input_scales.values()
            sound = all(type(scale) is float and 0 < scale < float("inf") for scale in scales) and bool(scales)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise Flux2Error(f"{path} is no calibration ({error}); {advice}") from error
        if calibration.schema_version != SCHEMA_VERSION or not sound:
            raise Flux2Error(f"{path} is no calibration that this version reads; {advice}")
        return calibration


def input_scales(
    spec: ModelSpec,
    open_family: Callable[[Family], TensorSource],
    tokenizer: PromptTokenizer,
    samples: Sequence[CalibrationSample],
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Measure the input scales of all linears that a recipe may quantize, in fp32."""
    observer, run = _Observer(), _Run(spec, device, on_progress)
    with torch.no_grad():
        embeds = run.prompt_embeds(open_family("text_encoder"), tokenizer, [each.prompt for each in samples], observer)
        latents = run.latents(open_family("autoencoder"), samples)
        run.transformer(open_family("transformer"), embeds, latents, observer)
    return {name: max(amax / FP8_MAX, SMALLEST_SCALE) for name, amax in observer.largest.items()}


class _Observer:
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


@dataclass
class _Stream:
    """One noisy picture on its way through the transformer."""

    img: Tensor
    txt: Tensor
    rows: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class _Run:
    """The forward pass of every component over all samples, a block at a time."""

    spec: ModelSpec
    device: str
    on_progress: Callable[[str], None]

    def prompt_embeds(
        self, source: TensorSource, tokenizer: PromptTokenizer, prompts: Sequence[str], observer: _Observer
    ) -> Tensor:
        spec = self.spec.text_encoder
        assert spec is not None
        tokens = tokenizer(list(prompts))
        ids, mask = (torch.from_numpy(x).to(self.device) for x in (tokens.input_ids, tokens.attention_mask))
        x = F.embedding(ids, torch.from_numpy(source.read("embed_tokens.weight")).to(self.device))
        cos, sin = rotary_tables(ids.shape[1], spec.head_dim, spec.rope_theta, ids.device)
        states = [x]
        for index in range(spec.num_layers):
            self.on_progress(f"text encoder, layer {index + 1} of {spec.num_layers}")
            prefix = f"layers.{index}."
            layer = self._loaded(lambda: Layer(spec), prefix, source)
            observer.watch(layer, prefix, QUANTIZED_LINEARS["text_encoder"])
            rows = []
            for row, row_mask in zip(x.split(1), mask.split(1), strict=True):
                visible, sees = attention_masks(row_mask)
                rows.append(layer(row, cos, sin, visible, sees.to(x.dtype)))
            x = torch.cat(rows)
            states.append(x)
        return torch.cat([states[index] for index in spec.hidden_states], dim=-1)

    def latents(self, source: TensorSource, samples: Sequence[CalibrationSample]) -> list[list[Tensor]]:
        """Of every sample the latents [1, h, w, C] of its picture and its references."""
        self.on_progress("encoding pictures")
        encoder = self._loaded(lambda: VaeEncoder(self.spec.autoencoder), "", source)
        return [
            [encoder(torch.from_numpy(pixels[None]).to(self.device)) for pixels in (each.picture, *each.references)]
            for each in samples
        ]

    def transformer(
        self, source: TensorSource, embeds: Tensor, latents: list[list[Tensor]], observer: _Observer
    ) -> None:
        spec, pattern = self.spec.transformer, QUANTIZED_LINEARS["transformer"]
        streams = self._streams(source, embeds, latents)
        for index in range(spec.num_double_blocks):
            self.on_progress(f"transformer, double block {index + 1} of {spec.num_double_blocks}")
            prefix = f"double_blocks.{index}."
            double = self._loaded(lambda: DoubleBlock(spec), prefix, source)
            observer.watch(double, prefix, pattern)
            for stream in streams:
                img_row, txt_row, _, _ = stream.rows
                stream.img, stream.txt = double(stream.img, stream.txt, img_row, txt_row, stream.cos, stream.sin)
        joined = [torch.cat((stream.txt, stream.img), dim=1) for stream in streams]
        for index in range(spec.num_single_blocks):
            self.on_progress(f"transformer, single block {index + 1} of {spec.num_single_blocks}")
            prefix = f"single_blocks.{index}."
            single = self._loaded(lambda: SingleBlock(spec), prefix, source)
            observer.watch(single, prefix, pattern)
            joined = [
                single(x, stream.rows[2], stream.cos, stream.sin) for x, stream in zip(joined, streams, strict=True)
            ]

    def _streams(self, source: TensorSource, embeds: Tensor, latents: list[list[Tensor]]) -> list[_Stream]:
        """Every picture at `LEVELS_A_SAMPLE` noise levels, spread so that all samples together cover the schedule."""
        spec, steps = self.spec.transformer, self.spec.sampling.num_inference_steps
        conditioning = self._loaded(lambda: Conditioning(spec), "", source)
        img_in = torch.from_numpy(source.read("img_in.weight")).to(self.device)
        generator = torch.Generator().manual_seed(0)
        streams = []
        for number, (row, pictures) in enumerate(zip(embeds.split(1), latents, strict=True)):
            grids = [(picture.shape[1], picture.shape[2]) for picture in pictures]
            tokens = [picture.flatten(1, 2) for picture in pictures]
            ids = position_ids(embeds.shape[1], *grids[0], grids[1:])
            tables = picture_rotary_tables(ids, spec.axes_dim, spec.theta)
            cos, sin = (torch.from_numpy(table).to(self.device) for table in tables)
            levels = sigmas(steps, tokens[0].shape[1])[:-1]
            for part in range(min(LEVELS_A_SAMPLE, steps)):
                sigma = torch.tensor([levels[(number + part * steps // LEVELS_A_SAMPLE) % steps]]).float()
                noise = torch.randn(tokens[0].shape, generator=generator).to(self.device)
                noisy = torch.cat([torch.lerp(tokens[0], noise, float(sigma)), *tokens[1:]], dim=1)
                guidance = [torch.tensor([self.spec.sampling.guidance_scale])] if spec.guidance_embeds else []
                inputs = (value.to(self.device) for value in (sigma, row, *guidance))
                modulation, txt = conditioning(*inputs)
                rows = split_modulation(modulation, spec.hidden_size)
                streams.append(_Stream(F.linear(noisy, img_in), txt, rows, cos, sin))
        return streams

    def _loaded(self, make: Callable[[], Module], prefix: str, source: TensorSource) -> Module:
        """A module with its weights, which are those of `source` whose names begin with `prefix`."""
        with torch.device("meta"):
            module = make()
        state = {name: torch.from_numpy(source.read(f"{prefix}{name}")).to(self.device) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval()
