"""The language model that encodes the prompt: one decoder stack for Mistral and Qwen3, without final norm and head.

Architecture: transformers `models/mistral/modeling_mistral.py` and `models/qwen3/modeling_qwen3.py` (which adds a norm
on queries and keys). Parameter names are theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_trt.spec import TextEncoderSpec


class Norm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [length, head_dim/2] fp32. Positions count from the first token, padding included."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the pairs (i, i + D/2), in fp32. x [B, H, T, D]; cos, sin [T, D/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_masks(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a padding mask [B, T]: which tokens each one attends to, bool [B, 1, T, T], and whether to any [B, T, 1].

    One that sees no token, as left padding does, is made to see itself, and what comes of it is for the caller to drop.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    causal = positions[:, None] >= positions
    visible = causal & attention_mask.bool()[:, None, None, :]
    sees = visible.any(dim=-1, keepdim=True)
    visible = visible | (~sees & (positions[:, None] == positions))
    return visible, sees.squeeze(1)


class SelfAttention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.groups = spec.num_heads // spec.num_kv_heads
        self.q_proj = nn.Linear(spec.hidden_size, spec.num_heads * spec.head_dim, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim, bias=False)
        self.o_proj = nn.Linear(spec.num_heads * spec.head_dim, spec.hidden_size, bias=False)
        self.q_norm = Norm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
        self.k_norm = Norm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        key, value = (heads.repeat_interleave(self.groups, dim=1) for heads in (key, value))
        attention = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.o_proj(attention.transpose(1, 2).flatten(2) * sees)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.input_layernorm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = SelfAttention(spec)
        self.post_attention_layernorm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, sees)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextEncoder(nn.Module):
    """Token ids to the hidden states that FLUX.2 reads, side by side on the last axis."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """What the first layer takes: embeddings [B, T, d], rotary tables, and `attention_masks`."""
        cos, sin = rotary_tables(input_ids.shape[1], self.spec.head_dim, self.spec.rope_theta, input_ids.device)
        visible, sees = attention_masks(attention_mask)
        x = self.embed_tokens(input_ids)
        return x, cos, sin, visible, sees.to(x.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] int64 to prompt embeds [B, T, len(hidden_states) * hidden_size] fp32.

        Padding on the left or on the right. A padded position that sees no token gets nothing from the attention, as
        in torch's scaled_dot_product_attention, instead of the NaN of a softmax over nothing.
        """
        x, *context = self.embed(input_ids, attention_mask)
        states = [x]
        for layer in self.layers:
            x = layer(x, *context)
            states.append(x)
        return side_by_side(*(states[index] for index in self.spec.hidden_states))


def side_by_side(*states: Tensor) -> Tensor:
    """Hidden states [B, T, d] as prompt embeds [B, T, len(states) * d] fp32."""
    return torch.cat(states, dim=-1).float()
