"""Host: what ONNX Runtime computes faster, and in less memory, in operators that the traced graphs do not use.

* Attention without a mask is `MultiHeadAttention`, which keeps no scores of all pairs of tokens and uses every core.
* The rotary embedding is one operator in place of nine.
* Group norm is spelled as instance norm: ONNX Runtime has a kernel for it, and expands group norm to ten operators. The
  channels of a group become one channel; scale and bias, which are of channels and not of groups, follow.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""


def for_onnx_runtime(model: onnx.ModelProto, num_heads: int) -> onnx.ModelProto:
    """`model`, whose attention over [B, H, L, D] has `num_heads` heads, in the operators that suit ONNX Runtime.

    `num_heads`: of the transformer; that of the autoencoder, over [B, 1, L, D], is known by the `Squeeze` behind it.
    """
    rewritten = ir.serde.deserialize_model(model)
    RewriteRuleSet(
        [
            RewriteRule(_rotary, _fused_rotary),
            RewriteRule(_heads, _fused_heads(num_heads), _is_plain),
            RewriteRule(_single_head, _fused_single_head, _is_plain),
            RewriteRule(_group_norm, _instance_norm),
        ]
    ).apply_to_model(rewritten)
    return ir.serde.serialize_model(rewritten)


def _rotary(op: Any, x: Any, pairs: Any, cos: Any, sin: Any, whole: Any) -> Any:
    """Of interleaved pairs: x [B, H, L, D], cos and sin [L, D/2, 1] (`export.modules.transformer.rotate`)."""
    even, odd = op.Split(op.Reshape(x, pairs), num_outputs=2, axis=4, _outputs=2)
    turned = op.Sub(op.Mul(even, cos), op.Mul(odd, sin)), op.Add(op.Mul(even, sin), op.Mul(odd, cos))
    return op.Reshape(op.Concat(*turned, axis=-1), whole)


def _fused_rotary(op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
    last, first = op.Constant(value_ints=[2]), op.Constant(value_ints=[0])
    tables = op.Squeeze(cos, last), op.Squeeze(sin, last)
    return op.RotaryEmbedding(x, first, *tables, interleaved=1, _domain=DOMAIN, _version=1)


def _heads(op: Any, query: Any, key: Any, value: Any, shape: Any) -> Any:
    """[B, H, L, D] each to [B, L, H*D]."""
    attention = op.Attention(query, key, value, _outputs=["attention"])
    return op.Reshape(op.Transpose(attention, perm=[0, 2, 1, 3]), shape)


def _fused_heads(num_heads: int) -> Any:
    def fused(op: Any, query: Any, key: Any, value: Any, **_: Any) -> Any:
        shape = op.Constant(value_ints=[0, 0, -1])
        flat = [op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape) for x in (query, key, value)]
        return op.MultiHeadAttention(*flat, num_heads=num_heads, _domain=DOMAIN, _version=1)

    return fused


def _single_head(op: Any, query: Any, key: Any, value: Any, axes: Any) -> Any:
    """[B, 1, L, D] each to [B, L, D]."""
    return op.Squeeze(op.Attention(query, key, value, _outputs=["attention"]), axes)


def _fused_single_head(op: Any, query: Any, key: Any, value: Any, axes: Any, **_: Any) -> Any:
    flat = [op.Squeeze(x, axes) for x in (query, key, value)]
    return op.MultiHeadAttention(*flat, num_heads=1, _domain=DOMAIN, _version=1)


def _is_plain(_context: Any, attention: ir.Value, **__: Any) -> bool:
    """Whether it is the whole softmax of scaled products and no more."""
    node = attention.producer()
    assert node is not None
    causal, cap = node.attributes.get("is_causal"), node.attributes.get("softcap")
    return "scale" not in node.attributes and not (causal and causal.as_int()) and not (cap and cap.as_float())


def _group_norm(op: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Over [B, C, H, W]."""
    return op.GroupNormalization(x, scale, bias, _outputs=["normalized"])


def _instance_norm(op: Any, x: Any, scale: Any, bias: Any, normalized: ir.Value) -> Any:
    node = normalized.producer()
    assert node is not None
    groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes["epsilon"].as_float()
    one, zero = (op.Constant(value_floats=[number] * groups) for number in (1.0, 0.0))
    grouped = op.Reshape(x, op.Constant(value_ints=[0, groups, -1]))
    whole = op.Reshape(op.InstanceNormalization(grouped, one, zero, epsilon=epsilon), op.Shape(x))
    of_channels = op.Constant(value_ints=[-1, 1, 1])
    return op.Add(op.Mul(whole, op.Reshape(scale, of_channels)), op.Reshape(bias, of_channels))
