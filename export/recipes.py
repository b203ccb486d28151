"""Recipes: the number format of everything that a component computes with. Data only.

FP8 is E4M3 with one scale a tensor, for weights and for inputs of linears. NVFP4 is E2M1 with an E4M3 scale for 16
values and one fp32 scale a tensor; blocks of inputs get their scales when they are computed. INT4 is for weights only,
-8..7 with a scale in the recipe's dtype for 64 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flux2_trt.manifest import WeightPlacement
from flux2_trt.spec import Component

Dtype = Literal["fp32", "bf16"]
Format = Literal["fp8", "nvfp4", "int4"]
WeightLayout = Literal["kn", "nk"]
"""Order of a weight's axes in memory: inputs then outputs, as a MatMul reads it, or outputs then inputs."""

QUANTIZED_LINEARS: Mapping[Component, str] = {
    "transformer": r"(double|single)_blocks\.\d+\..+\.weight",
    "text_encoder": r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight",
}
"""Names of the weights of linears that a recipe may quantize, as regular expressions.

All else stays in `Recipe.dtype`: img_in and final_layer.linear, since 128 channels on one side leave no time to gain
and their errors go straight to latents; conditioning, which runs once a picture, and an error of whose modulation
multiplies every token of every block; norms, which are vectors; embed_tokens, a lookup; the autoencoder, whose errors
are seen in every pixel.
"""

QUANTIZED_ATTENTION: tuple[Component, ...] = ("transformer",)
"""Components whose attention a recipe may quantize: the text encoder runs once, on few tokens."""


@dataclass(frozen=True)
class Recipe:
    """`dtype`: of all that is not quantized, and of activations. `linears`: of `QUANTIZED_LINEARS`. `attention`: of
    queries, keys, probabilities and values in the transformer.

    `placements`: how a TensorRT plan may get its weights; the first is the default. `fp8_layout`: the target's.
    """

    name: str
    dtype: Dtype
    linears: Format | None = None
    attention: Format | None = None
    placements: tuple[WeightPlacement, ...] = ("bound", "embedded")
    fp8_layout: WeightLayout = "kn"


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "fp32"),
        Recipe("bf16", "bf16"),
        Recipe("fp8", "bf16", linears="fp8"),
        Recipe("fp8-attention", "bf16", linears="fp8", attention="fp8"),
        Recipe("nvfp4", "bf16", linears="nvfp4"),
        # A compiler that does not see the codes multiplies with them in bf16, after kernels that dequantize them.
        Recipe("int4", "bf16", linears="int4", placements=("embedded",)),
    )
}
