"""All that a picture needs from the transformer's weights only once: modulation of every step, and the text tokens.

Architecture: black-forest-labs/flux2 `src/flux2/model.py` (`MLPEmbedder`, `Modulation`, `LastLayer.adaLN_modulation`,
`timestep_embedding`). In [dev] this moves 0.64 B parameters out of the denoising step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_trt.spec import TransformerSpec

MAX_PERIOD = 10_000
TIME_FACTOR = 1000.0


def sinusoidal_embedding(values: Tensor, channels: int) -> Tensor:
    """values [S] fp32 in 0..1 (or a guidance scale) to [S, channels] fp32: cosines, then sines."""
    half = channels // 2
    frequencies = torch.exp(
        -math.log(MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=values.device)
    )
    angles = (TIME_FACTOR * values.float())[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Embedder(nn.Module):
    """Two linears with SiLU between, [S, channels] to [S, d]."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.channels = spec.timestep_channels
        self.in_layer = nn.Linear(spec.timestep_channels, spec.hidden_size, bias=False)
        self.out_layer = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        embedding = sinusoidal_embedding(values, self.channels).to(self.in_layer.weight.dtype)
        return self.out_layer(F.silu(self.in_layer(embedding)))


class Modulation(nn.Module):
    """SiLU, then a linear to `count` vectors of width d."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, count * hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(F.silu(x))


class FinalModulation(nn.Module):
    """Shift and scale of the final layer, under BFL's parameter name `final_layer.adaLN_modulation.1`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.adaLN_modulation(x)


class Conditioning(nn.Module):
    """The conditioning table of a schedule, and the text stream's input."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        d = spec.hidden_size
        self.time_in = Embedder(spec)
        self.guidance_in = Embedder(spec) if spec.guidance_embeds else None
        self.double_stream_modulation_img = Modulation(d, 6)
        self.double_stream_modulation_txt = Modulation(d, 6)
        self.single_stream_modulation = Modulation(d, 3)
        self.final_layer = FinalModulation(d)
        self.txt_in = nn.Linear(spec.context_dim, d, bias=False)

    def forward(self, timestep: Tensor, prompt_embeds: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """timestep [S] (sigma, 0..1), prompt_embeds [B, T, context_dim], guidance [S] where the model embeds it.

        Returns the table [S, 17*d], whose rows are image 6d, text 6d, single 3d, final 2d, and text tokens [B, T, d].
        """
        x = self.time_in(timestep)
        if self.guidance_in is not None and guidance is not None:
            x = x + self.guidance_in(guidance)
        rows = (
            self.double_stream_modulation_img(x),
            self.double_stream_modulation_txt(x),
            self.single_stream_modulation(x),
            self.final_layer(x),
        )
        return torch.cat(rows, dim=-1), self.txt_in(prompt_embeds.to(self.txt_in.weight.dtype))
