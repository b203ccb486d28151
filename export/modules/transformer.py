"""The FLUX.2 transformer with the Euler step inside: latents in, updated latents out.

Architecture: black-forest-labs/flux2 `src/flux2/model.py`. Parameter names are BFL's. What depends on the timestep, the
guidance or the prompt alone is in `export.modules.conditioning`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_trt.spec import TransformerSpec


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale, self.eps)


class QKNorm(nn.Module):
    """Per-head norm of queries and keys."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim, eps)
        self.key_norm = RMSNorm(head_dim, eps)


class SwiGLU(nn.Module):
    """`silu(a) * b` of the two halves of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def feed_forward(spec: TransformerSpec) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(spec.hidden_size, 2 * spec.mlp_hidden_size, bias=False),
        SwiGLU(),
        nn.Linear(spec.mlp_hidden_size, spec.hidden_size, bias=False),
    )


class Attention(nn.Module):
    """The projections of one stream of a double block; the attention itself is joint, in `DoubleBlock`."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.qkv = nn.Linear(spec.hidden_size, 3 * spec.hidden_size, bias=False)
        self.norm = QKNorm(spec.head_dim, spec.eps)
        self.proj = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)


def split_heads(qkv: Tensor, norm: QKNorm, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3*H*D] to normed q, normed k and v, each [B, H, L, D].

    All heads are laid out before the split: this spelling keeps one GEMM per weight in TensorRT.
    """
    batch, length, width = qkv.shape
    heads = qkv.reshape(batch, length, 3 * num_heads, width // (3 * num_heads)).transpose(1, 2)
    query, key, value = heads.split(num_heads, dim=1)
    return norm.query_norm(query), norm.key_norm(key), value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs in fp32. x [B, H, L, D]; cos, sin [L, D/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).chunk(2, dim=-1)  # indexing would become slow Gathers on a CPU
    cos, sin = cos.unsqueeze(-1), sin.unsqueeze(-1)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Full attention over all tokens after the rotary embedding. [B, H, L, D] each; returns [B, L, H*D]."""
    x = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
    return x.transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without affine parameters, then `(1 + scale) * x + shift`."""
    return (1 + scale) * F.layer_norm(x, (x.shape[-1],), eps=eps) + shift


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, joined in the attention (order: text, image)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.img_attn = Attention(spec)
        self.img_mlp = feed_forward(spec)
        self.txt_attn = Attention(spec)
        self.txt_mlp = feed_forward(spec)

    def forward(
        self, img: Tensor, txt: Tensor, img_modulation: Tensor, txt_modulation: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_modulation.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_modulation.chunk(6, dim=-1)

        img_qkv = self.img_attn.qkv(modulate(img, img_shift1, img_scale1, self.eps))
        txt_qkv = self.txt_attn.qkv(modulate(txt, txt_shift1, txt_scale1, self.eps))
        img_heads = split_heads(img_qkv, self.img_attn.norm, self.img_attn.num_heads)
        txt_heads = split_heads(txt_qkv, self.txt_attn.norm, self.txt_attn.num_heads)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(txt_heads, img_heads, strict=True))
        attention = attend(query, key, value, cos, sin)
        text_length = txt.shape[1]

        img = img + img_gate1 * self.img_attn.proj(attention[:, text_length:])
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2, self.eps))
        txt = txt + txt_gate1 * self.txt_attn.proj(attention[:, :text_length])
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2, self.eps))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and feed-forward in parallel on the joined stream, with one linear in and one out."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.num_heads = spec.num_heads
        self.widths = (3 * spec.hidden_size, 2 * spec.mlp_hidden_size)
        self.linear1 = nn.Linear(spec.hidden_size, sum(self.widths), bias=False)
        self.linear2 = nn.Linear(spec.hidden_size + spec.mlp_hidden_size, spec.hidden_size, bias=False)
        self.norm = QKNorm(spec.head_dim, spec.eps)
        self.activation = SwiGLU()

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        qkv, mlp = self.linear1(modulate(x, shift, scale, self.eps)).split(self.widths, dim=-1)
        attention = attend(*split_heads(qkv, self.norm, self.num_heads), cos, sin)
        return x + gate * self.linear2(torch.cat((attention, self.activation(mlp)), dim=-1))


class FinalLayer(nn.Module):
    """Modulated norm and projection to latent channels."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.linear = nn.Linear(spec.hidden_size, spec.in_channels, bias=False)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale, self.eps))


def split_modulation(modulation: Tensor, hidden_size: int) -> tuple[Tensor, ...]:
    """Rows of the conditioning table [B, 17*d] to those of image, text, single blocks and final layer, [B, 1, n*d]."""
    d = hidden_size
    return modulation.unsqueeze(1).split((6 * d, 6 * d, 3 * d, 2 * d), dim=-1)


class Transformer(nn.Module):
    """One denoising step.

    The compute dtype is that of the parameters; latents and the Euler update are fp32.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.hidden_size = spec.hidden_size
        self.img_in = nn.Linear(spec.in_channels, spec.hidden_size, bias=False)
        self.double_blocks = nn.ModuleList(DoubleBlock(spec) for _ in range(spec.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(spec) for _ in range(spec.num_single_blocks))
        self.final_layer = FinalLayer(spec)

    def prologue(self, latents: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        """The image stream [B, N, d], and the rows of modulation of image and text stream, single blocks, final layer.

        latents [B, N, C] fp32; modulation [1, 17*d] or [B, 17*d]; the rows are as `split_modulation` gives them.
        """
        return self.img_in(latents.to(self.img_in.weight.dtype)), *split_modulation(modulation, self.hidden_size)

    def velocity(self, latents: Tensor, modulation: Tensor, text_tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The flow-matching velocity [B, N, C] in the compute dtype; modulation as in `prologue`, others as in
        `forward`."""
        img, img_row, txt_row, single_row, final_row = self.prologue(latents, modulation)
        txt = text_tokens
        for block in self.double_blocks:
            img, txt = block(img, txt, img_row, txt_row, cos, sin)
        hidden = join(txt, img)
        for block in self.single_blocks:
            hidden = block(hidden, single_row, cos, sin)
        return self.final_layer(image_tokens(hidden, text_tokens), final_row)

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        text_tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        dt: Tensor,
        step: Tensor,
        guidance_mix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """latents [B, N, C] fp32 to updated latents [B, N, C] fp32, and the number of the next step.

        step [1] int32 is the row of two tables: modulation [S, 17*d], the conditioning table, and dt [S, N] fp32, the
        step of sigma, zero for reference tokens, which therefore stay as they are. text_tokens [B, T, d]; cos, sin
        [T + N, D/2] fp32; guidance_mix [B, B] fp32 combines the velocities of a batch of unconditional and conditional
        pictures.
        """
        velocity = self.velocity(latents, row_of(modulation, step), text_tokens, cos, sin)
        return euler_step(latents, velocity, row_of(dt, step), guidance_mix), step + 1


def row_of(table: Tensor, step: Tensor) -> Tensor:
    """Row `step` [1] of a table [S, n], as [1, n]."""
    return table.index_select(0, step)


def join(txt: Tensor, img: Tensor) -> Tensor:
    """Text and image stream as one, [B, T + N, d]."""
    return torch.cat((txt, img), dim=1)


def image_tokens(hidden: Tensor, text_tokens: Tensor) -> Tensor:
    """What follows the text in the joined stream, [B, N, d]."""
    return hidden[:, text_tokens.shape[1] :]


def euler_step(latents: Tensor, velocity: Tensor, dt: Tensor, guidance_mix: Tensor | None = None) -> Tensor:
    """`latents + dt * velocity` in fp32, [B, N, C]; dt [1, N], others as in `Transformer.forward`."""
    velocity = velocity.float()
    if guidance_mix is not None:
        velocity = (guidance_mix @ velocity.flatten(1)).reshape(velocity.shape)
    return latents + dt[:, :, None] * velocity
