"""LoRAs of small random models in the key formats of the programs that write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""(down [rank, K], up [N, rank]) by the name of a module."""

# diffusers' name -> BFL's, of the layers that are the same linear in both; numbers stay.
SAME_LAYER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn.proj",
    "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
    "transformer_blocks.0.ff.linear_out": "double_blocks.0.img_mlp.2",
    "transformer_blocks.0.ff_context.linear_in": "double_blocks.0.txt_mlp.0",
    "transformer_blocks.0.ff_context.linear_out": "double_blocks.0.txt_mlp.2",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
    "single_transformer_blocks.0.attn.to_out": "single_blocks.0.linear2",
}
FUSED = {"double_blocks.0.img_attn.qkv": (96, 32), "double_blocks.0.txt_attn.qkv": (96, 32)}


def linears(model: Flux2Transformer2DModel) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear, by diffusers' names."""
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}  # type: ignore[misc]


def bfl_linears(model: Flux2Transformer2DModel) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear of a model with one block of each kind and a width of 32, by BFL's names."""
    theirs = linears(model)
    return {bfl: theirs[name] for name, bfl in SAME_LAYER.items()} | FUSED


def random_layers(shapes: Mapping[str, tuple[int, int]], seed: int, rank: int = 4) -> Layers:
    """About a third as large as `randomised` weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    return {
        name: (normal(rank, k) * (0.3 / (rank * k) ** 0.5), normal(n, rank)) for name, (n, k) in sorted(shapes.items())
    }


def peft_keys(prefix: str) -> Callable[[str], tuple[str, str]]:
    return lambda module: (f"{prefix}{module}.lora_A.weight", f"{prefix}{module}.lora_B.weight")


def kohya_keys(module: str) -> tuple[str, str]:
    flat = "lora_unet_" + module.replace(".", "_")
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"


def named(layers: Layers, keys: Callable[[str], tuple[str, str]], alpha: float | None = None) -> Tensors:
    """The tensors of a file; `alpha` beside the tensors of every layer, as sd-scripts writes it."""
    tensors: Tensors = {}
    for module, (down, up) in layers.items():
        first, second = keys(module)
        tensors |= {first: down, second: up}
        if alpha is not None:
            tensors[re.sub(r"\.lora_.+", ".alpha", first)] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path
