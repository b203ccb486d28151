"""The autoencoder: 8-bit pictures to normalised latents and back, with patchify and batch norm inside.

Architecture: black-forest-labs/flux2 `src/flux2/autoencoder.py`, whose parameter names these are. The decoder has a
channel list of its own, so the published small decoder fits.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_trt.spec import AutoencoderSpec

GROUP_NORM_EPS = 1e-6
PICTURE_CHANNELS = 3


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)


class ResnetBlock(nn.Module):
    """Two normed convolutions around a residual."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(attention.squeeze(1).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """The lowest resolution of both halves."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Strided convolution, padded on the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour times two, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution and the change to the next."""

    def __init__(self, channels: list[int], groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(i, o, groups) for i, o in pairwise(channels))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Picture [B, 3, H, W] in -1..1 to the posterior's mean and log-variance [B, 2*z, H/8, W/8]."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        channels, groups = spec.block_out_channels, spec.norm_num_groups
        self.conv_in = nn.Conv2d(PICTURE_CHANNELS, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(channels):
            level = Level([channels[max(index - 1, 0)], *[width] * spec.layers_per_block], groups)
            if index + 1 < len(channels):
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(channels[-1], groups, spec.mid_block_attention)
        self.norm_out = group_norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], 2 * spec.latent_channels, 3, padding=1)
        self.quant_conv = (
            nn.Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1) if spec.quant_conv else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """Latents [B, z, H/8, W/8] to a picture [B, 3, H, W] in about -1..1."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        channels, groups = spec.decoder_block_out_channels, spec.norm_num_groups
        self.post_quant_conv = (
            nn.Conv2d(spec.latent_channels, spec.latent_channels, 1) if spec.post_quant_conv else nn.Identity()
        )
        self.conv_in = nn.Conv2d(spec.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], groups, spec.mid_block_attention)
        self.up = nn.ModuleList()
        for index, width in enumerate(channels):
            before = channels[min(index + 1, len(channels) - 1)]
            level = Level([before, *[width] * (spec.layers_per_block + 1)], groups)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(channels[0], groups)
        self.conv_out = nn.Conv2d(channels[0], PICTURE_CHANNELS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LatentNorm(nn.Module):
    """The batch norm that puts patchified latents [B, C, h, w] on the transformer's scale."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.eps = spec.batch_norm_eps
        self.register_buffer("running_mean", torch.zeros(spec.token_channels))
        self.register_buffer("running_var", torch.ones(spec.token_channels))

    def deviation(self) -> Tensor:
        return torch.sqrt(self.running_var + self.eps)[:, None, None]

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.running_mean[:, None, None]) / self.deviation()

    def inverse(self, z: Tensor) -> Tensor:
        return z * self.deviation() + self.running_mean[:, None, None]


class VaeEncoder(nn.Module):
    """Picture to latents, as one compiled component."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.bn = LatentNorm(spec)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, H, W, 3] uint8 to latents [B, H/16, W/16, C] fp32: the posterior's mean, normalised."""
        x = image.to(self.encoder.conv_in.weight.dtype).permute(0, 3, 1, 2) / 127.5 - 1.0  # TensorRT only casts uint8
        mean = self.encoder(x).chunk(2, dim=1)[0]
        return self.bn(F.pixel_unshuffle(mean, self.spec.patch_size)).float().permute(0, 2, 3, 1)


class VaeDecoder(nn.Module):
    """Latents to picture, as one compiled component."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.decoder = Decoder(spec)
        self.bn = LatentNorm(spec)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, h, w, C] fp32, normalised, to image [B, 16*h, 16*w, 3] uint8."""
        z = self.bn.inverse(latents.permute(0, 3, 1, 2).to(self.decoder.conv_in.weight.dtype))
        x = self.decoder(F.pixel_shuffle(z, self.spec.patch_size))
        return (x.float() * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
