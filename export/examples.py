"""Example inputs: what components and their parts are traced with.

Tensors and sizes all differ: the tracer takes one tensor, or one size, that appears twice for the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from export.recipes import Dtype
from flux2_trt.spec import Component, ModelSpec

TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

Dims = dict[int, str]
"""The dynamic sides of a tensor by axis."""

SIZES = {"batch": 2, "text_tokens": 37, "tokens": 59, "all_tokens": 37 + 59, "steps": 3}
LATENT_SIZES = {"latent_height": 6, "latent_width": 10}


@dataclass(frozen=True)
class Input:
    """An input by its shape, where dynamic sides are names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    @property
    def dims(self) -> Dims:
        return {axis: side for axis, side in enumerate(self.shape) if isinstance(side, str)}

    def tensor(self, sizes: Mapping[str, int]) -> torch.Tensor:
        return torch.empty([sizes[side] if isinstance(side, str) else side for side in self.shape], dtype=self.dtype)


@dataclass(frozen=True)
class Example:
    """Inputs in the order of the traced function, the dynamic sides of its outputs, and a size for each name."""

    inputs: tuple[Input, ...]
    outputs: Mapping[str, Dims]
    sizes: Mapping[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.inputs)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(each.tensor(self.sizes) for each in self.inputs)


def component_example(component: Component, spec: ModelSpec) -> Example:
    """Of a component that is traced in one piece."""
    pixels, channels = spec.autoencoder.pixels_per_token, spec.autoencoder.token_channels
    sizes = SIZES | LATENT_SIZES
    sizes |= {"height": sizes["latent_height"] * pixels, "width": sizes["latent_width"] * pixels}
    image: tuple[int | str, ...] = ("batch", "height", "width", 3)
    latents: tuple[int | str, ...] = ("batch", "latent_height", "latent_width", channels)
    match component:
        case "conditioning":
            guidance = [Input("guidance", ("steps",))] if spec.transformer.guidance_embeds else []
            inputs = (
                Input("timestep", ("steps",)),
                Input("prompt_embeds", ("batch", "text_tokens", spec.transformer.context_dim)),
                *guidance,
            )
            outputs = {"modulation": {0: "steps"}, "text_tokens": {0: "batch", 1: "text_tokens"}}
            return Example(inputs, outputs, sizes)
        case "vae_encoder":
            return Example((Input("image", image, torch.uint8),), {"latents": Input("latents", latents).dims}, sizes)
        case "vae_decoder":
            return Example((Input("latents", latents),), {"image": Input("image", image).dims}, sizes)
    raise ValueError(f"{component} is traced in parts")
