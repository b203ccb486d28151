"""Footprint: the bytes that a component keeps, of weights in a recipe exactly, of everything else by estimate.

Scratch is estimated from what TensorRT-RTX 1.7 reported of plans that were compiled and not run
(benchmarks/results/builds.json, and static sizes of the autoencoder): per token and channel it varies by 10 % among
models, precisions and sizes, and the largest is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from export.recipes import QUANTIZED_LINEARS, Dtype, Format, Recipe
from flux2_trt.drawing import MAX_STEPS, Drawing
from flux2_trt.inventory import Shapes, expected_tensors
from flux2_trt.naming import Family
from flux2_trt.spec import Component, ModelSpec

DTYPE_BYTES: Mapping[Dtype, int] = {"fp32": 4, "bf16": 2}
FP32_BYTES, INDEX_BYTES = 4, 8
ENCODED_SIZES = 2
"""Sizes of references whose buffers stay at once (`flux2_trt.runtime.component.SIZES_KEPT`)."""
NVFP4_BLOCK, INT4_BLOCK = 16, 64
SHARED_INPUT = re.compile(r".+\.(k_proj|v_proj|up_proj)\.weight")
"""Linears that share their input, and its scale, with the one before them."""

TENSORS: Mapping[Component, tuple[Family, str]] = {
    "text_encoder": ("text_encoder", r".+"),
    "conditioning": (
        "transformer",
        r"(txt_in|time_in|guidance_in|\w+_modulation(_\w+)?|final_layer\.adaLN\w+)\..+",
    ),
    "transformer": ("transformer", r"(img_in|double_blocks|single_blocks|final_layer\.linear)\..+"),
    "vae_encoder": ("autoencoder", r"(encoder|bn)\..+"),
    "vae_decoder": ("autoencoder", r"(decoder|bn)\..+"),
}
"""The canonical tensors of each component, as a regular expression of their names in a family."""

TOKEN_SCRATCH_BYTES = 40.5  # for a token and a channel of the transformer: most of 37.3 to 40.4
TEXT_SCRATCH_BYTES = 5.25  # for a token and a channel of queries, hidden state and feed-forward: most of 5.16 to 5.18
PIXEL_SCRATCH_BYTES: Mapping[Component, float] = {"vae_decoder": 7.5, "vae_encoder": 8.7}
"""For a pixel and a channel of the widest map of full size: most of 6.2 to 7.5, and of 6.3 to 8.6."""
SCORE_BYTES = 4  # for each pair of positions in the autoencoder's attention, which no kernel fuses: fp32
SCORE_PIXEL_BYTES = 80  # beside them, for a pixel: most of 67 to 80


@lru_cache(maxsize=64)
def tensors_of(component: Component, spec: ModelSpec) -> Shapes:
    """Canonical name -> shape of the tensors that a component holds. Raises UsageError for one the model lacks."""
    family, pattern = TENSORS[component]
    return {name: shape for name, shape in expected_tensors(spec, family).items() if re.fullmatch(pattern, name)}


def parameters(component: Component, spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in tensors_of(component, spec).values())


def weight_bytes(component: Component, spec: ModelSpec, recipe: Recipe, within: str = ".+") -> int:
    """Of the tensors whose names match `within`, with their scales, as a weight file holds them."""
    pattern = QUANTIZED_LINEARS.get(component)
    total = 0
    for name, shape in tensors_of(component, spec).items():
        if re.fullmatch(within, name):
            quantized = bool(pattern and recipe.linears and re.fullmatch(pattern, name))
            total += _linear_bytes(name, shape, recipe) if quantized else math.prod(shape) * DTYPE_BYTES[recipe.dtype]
    return total


def value_bytes(number_format: Dtype | Format, dtype: Dtype) -> float:
    """Of an activation in a format; INT4 is for weights, beside activations in the recipe's dtype."""
    sizes: Mapping[str, float] = {"fp8": 1, "nvfp4": 0.5 + 1 / NVFP4_BLOCK, "fp32": 4, "bf16": 2}
    return sizes.get(number_format, DTYPE_BYTES[dtype])


def scratch_bytes(component: Component, spec: ModelSpec, drawing: Drawing) -> int:
    """Estimate of what a plan needs beside its inputs, outputs and weights while it runs; one picture at a time in the
    autoencoder, one prompt in the text encoder."""
    match component:
        case "text_encoder" if spec.text_encoder:
            text = spec.text_encoder
            width = text.intermediate_size + text.hidden_size + text.num_heads * text.head_dim
            return math.ceil(TEXT_SCRATCH_BYTES * drawing.text_tokens * width)
        case "transformer":
            tokens = drawing.sequences * drawing.all_tokens
            return math.ceil(TOKEN_SCRATCH_BYTES * tokens * spec.transformer.hidden_size)
        case "vae_encoder":
            channels = spec.autoencoder.block_out_channels[0]
            return _autoencoder_scratch(component, spec, channels, max(drawing.references, default=0))
        case "vae_decoder":
            channels = max(spec.autoencoder.decoder_block_out_channels[:2])
            return _autoencoder_scratch(component, spec, channels, drawing.pixels)
        case _:
            return buffer_bytes(spec, drawing)  # conditioning copies what it reads and writes, at most


def buffer_bytes(spec: ModelSpec, drawing: Drawing, dtype: Dtype = "bf16", in_blocks: bool = False) -> int:
    """What all components read and write, prompts to pictures: exact, but for how allocators round.

    `dtype`: of activations; `in_blocks`: the transformer is one plan a block, and activations lie between them.
    """
    size, rows, steps = spec.transformer, drawing.sequences, max(drawing.steps, MAX_STEPS)
    text = (rows + 1) * drawing.text_tokens * FP32_BYTES * size.context_dim  # the loop's, and the text encoder's own
    text += drawing.text_tokens * (rows * DTYPE_BYTES[dtype] * size.hidden_size + 2 * INDEX_BYTES)
    latents = 2 * FP32_BYTES * rows * drawing.latent_tokens * size.in_channels
    tables = FP32_BYTES * (drawing.all_tokens * size.head_dim + steps * drawing.latent_tokens + rows * rows)
    modulation = FP32_BYTES * steps * (size.modulation_size + 2)
    references = sorted(drawing.references)[-ENCODED_SIZES:]
    pixels = drawing.pixels + sum(references)
    pictures = 3 * pixels + FP32_BYTES * size.in_channels * pixels // drawing.pixels_per_token**2
    between = 0
    if in_blocks:
        flows = 2 * 2 * drawing.all_tokens * size.hidden_size  # streams apart and joined, each before and after a block
        between = rows * (DTYPE_BYTES[dtype] * flows + FP32_BYTES * size.modulation_size)
    return text + latents + tables + modulation + pictures + between


def _linear_bytes(name: str, shape: tuple[int, ...], recipe: Recipe) -> int:
    """Codes and scales of a quantized linear."""
    count = math.prod(shape)
    factors = FP32_BYTES * (1 if SHARED_INPUT.fullmatch(name) else 2)  # what it is multiplied by, and its input
    match recipe.linears:
        case "fp8":
            return count + factors
        case "nvfp4":
            return count // 2 + count // NVFP4_BLOCK + factors
        case _:
            return count // 2 + count // INT4_BLOCK * DTYPE_BYTES[recipe.dtype]


def _autoencoder_scratch(component: Component, spec: ModelSpec, channels: int, pixels: int) -> int:
    maps = PIXEL_SCRATCH_BYTES[component] * channels * pixels
    positions = pixels // 4 ** (len(spec.autoencoder.block_out_channels) - 1)
    scores = SCORE_BYTES * positions**2 + SCORE_PIXEL_BYTES * pixels if spec.autoencoder.mid_block_attention else 0
    return math.ceil(max(maps, scores))
