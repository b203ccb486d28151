"""Host: what ONNX Runtime computes faster, and in less memory, in operators that the traced graphs do not use.

* Attention without a mask is `MultiHeadAttention`, which keeps no scores of all pairs of tokens and uses every core.
* The rotary embedding is one operator in place of nine.
* Heads stay beside each other, [B, L, H, D], from the linear to the attention: nothing is transposed.
* A linear whose result is split becomes several, with the parts of its weight, which are cut out once, at loading.
* A modulated layer norm is one operator, with the modulation in the place of its weights.
* Group norm is spelled as instance norm: ONNX Runtime has a kernel for it, and expands group norm to ten operators. The
  channels of a group become one channel; scale and bias, which are of channels and not of groups, follow.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""

HEADS = [0, 2, 1, 3]
"""[B, L, H, D] to [B, H, L, D], and back."""

JOINED = [0, 0, -1]
"""[B, L, H, D] to [B, L, H*D]."""

SPLITS = [(False, 2), (True, 2), (True, 3)]
"""How the results of linears are split: whether in equal parts, and in how many."""


def for_onnx_runtime(model: onnx.ModelProto, num_heads: int) -> onnx.ModelProto:
    """`model`, whose attention over [B, H, L, D] has `num_heads` heads, in the operators that suit ONNX Runtime.

    `num_heads`: of the transformer; that of the autoencoder, over [B, 1, L, D], is known by the `Squeeze` behind it.
    """
    rewritten = ir.serde.deserialize_model(model)
    fused = [
        RewriteRule(_rotary, _fused_rotary(num_heads)),
        RewriteRule(_heads, _fused_heads(num_heads), _is_plain),
        RewriteRule(_single_head, _fused_single_head, _is_plain),
        RewriteRule(_modulated, _modulated_norm, _has_no_weights),
        RewriteRule(_group_norm, _instance_norm),
        RewriteRule(_split_heads, _split_tokens(num_heads)),
    ]
    moved = [RewriteRule(_norm_of_heads, _heads_of_norm), RewriteRule(_joined_heads, _heads_of_joined)]
    gone = [RewriteRule(_transposed_twice, _as_it_is), RewriteRule(_reshaped_twice, _as_it_is, _divides_and_joins)]
    split = [RewriteRule(_split_linear(equal, count), _linears(equal, count), _has_a_weight) for equal, count in SPLITS]
    for rules in (fused, moved, moved, gone, gone, split, split):  # a norm, then a joint; attention and feed-forward
        RewriteRuleSet(rules).apply_to_model(rewritten)
        IdentityEliminationPass()(rewritten)
    RemoveUnusedNodesPass()(rewritten)
    return ir.serde.serialize_model(rewritten)


def _rotary(op: Any, x: Any, pairs: Any, cos: Any, sin: Any, whole: Any) -> Any:
    """Of interleaved pairs: x [B, H, L, D], cos and sin [L, D/2, 1] (`export.modules.transformer.rotate`)."""
    even, odd = op.Split(op.Reshape(x, pairs), num_outputs=2, axis=4, _outputs=2)
    turned = op.Sub(op.Mul(even, cos), op.Mul(odd, sin)), op.Add(op.Mul(even, sin), op.Mul(odd, cos))
    return op.Reshape(op.Concat(*turned, axis=-1), whole)


def _fused_rotary(num_heads: int) -> Any:
    def fused(op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        last, first = op.Constant(value_ints=[2]), op.Constant(value_ints=[0])
        tables = op.Squeeze(cos, last), op.Squeeze(sin, last)
        turned = op.RotaryEmbedding(
            _side_by_side(op, x), first, *tables, interleaved=1, num_heads=num_heads, _domain=DOMAIN, _version=1
        )
        return _as_heads(op, turned, num_heads)

    return fused


def _side_by_side(op: Any, heads: Any) -> Any:
    """[B, H, L, D] to [B, L, H*D]."""
    return op.Reshape(op.Transpose(heads, perm=HEADS), op.Constant(value_ints=JOINED))


def _as_heads(op: Any, x: Any, num_heads: int) -> Any:
    """[B, L, H*D] to [B, H, L, D]."""
    return op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, num_heads, -1])), perm=HEADS)


def _heads(op: Any, query: Any, key: Any, value: Any, shape: Any) -> Any:
    """[B, H, L, D] each to [B, L, H*D]."""
    attention = op.Attention(query, key, value, _outputs=["attention"])
    return op.Reshape(op.Transpose(attention, perm=HEADS), shape)


def _fused_heads(num_heads: int) -> Any:
    def fused(op: Any, query: Any, key: Any, value: Any, **_: Any) -> Any:
        flat = [_side_by_side(op, x) for x in (query, key, value)]
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


def _modulated(op: Any, x: Any, weight: Any, scale: Any, shift: Any) -> Any:
    """`(1 + scale) * norm(x) + shift`, with the same scale and shift for every token of every picture."""
    return op.Add(op.Mul(scale, op.LayerNormalization(x, weight, _outputs=["normalized"])), shift)


def _modulated_norm(op: Any, x: Any, scale: Any, shift: Any, normalized: ir.Value, **_: Any) -> Any:
    row = op.Constant(value_ints=[-1])
    return op.LayerNormalization(x, op.Reshape(scale, row), op.Reshape(shift, row), **_attributes(normalized))


def _has_no_weights(_context: Any, weight: ir.Value, **__: Any) -> bool:
    return set(_constant(weight)) == {1.0}


def _split_heads(op: Any, x: Any, shape: Any) -> Any:
    """[B, L, 3*H*D] to queries, keys and values, [B, H, L, D] each (`export.modules.transformer.split_heads`)."""
    return op.Split(op.Transpose(op.Reshape(x, shape), perm=HEADS), num_outputs=3, axis=1, _outputs=3)


def _split_tokens(num_heads: int) -> Any:
    def split(op: Any, x: Any, **_: Any) -> Any:
        return tuple(_as_heads(op, part, num_heads) for part in op.Split(x, num_outputs=3, axis=2, _outputs=3))

    return split


def _norm_of_heads(op: Any, x: Any, weight: Any) -> Any:
    return op.RMSNormalization(op.Transpose(x, perm=HEADS), weight, _outputs=["normalized"])


def _heads_of_norm(op: Any, x: Any, weight: Any, normalized: ir.Value) -> Any:
    return op.Transpose(op.RMSNormalization(x, weight, **_attributes(normalized)), perm=HEADS)


def _joined_heads(op: Any, x: Any, y: Any) -> Any:
    return op.Concat(op.Transpose(x, perm=HEADS), op.Transpose(y, perm=HEADS), axis=2)


def _heads_of_joined(op: Any, x: Any, y: Any) -> Any:
    return op.Transpose(op.Concat(x, y, axis=1), perm=HEADS)


def _transposed_twice(op: Any, x: Any) -> Any:
    return op.Transpose(op.Transpose(x, perm=HEADS), perm=HEADS)


def _reshaped_twice(op: Any, x: Any, first: Any, second: Any) -> Any:
    return op.Reshape(op.Reshape(x, first), second)


def _divides_and_joins(_context: Any, first: ir.Value, second: ir.Value, **__: Any) -> bool:
    """[B, L, H*D] to [B, L, H, D] and back."""
    divided, joined = (_constant(value) for value in (first, second))
    return len(divided) == 4 and divided[:2] == JOINED[:2] and joined == JOINED


def _as_it_is(op: Any, x: Any, **_: Any) -> Any:
    return op.Identity(x)


def _split_linear(equal: bool, count: int) -> Any:
    def split(op: Any, x: Any, weight: Any) -> Any:
        return op.Split(op.MatMul(x, weight), num_outputs=count, axis=2, _outputs=count)

    def split_unequal(op: Any, x: Any, weight: Any, sides: Any) -> Any:
        return op.Split(op.MatMul(x, weight), sides, axis=2, _outputs=count)

    return split if equal else split_unequal


def _linears(equal: bool, count: int) -> Any:
    def linears(op: Any, x: Any, weight: Any, sides: Any = None) -> Any:
        into = {"num_outputs": count} if equal else {}
        parts = op.Split(weight, *([] if equal else [sides]), axis=1, **into, _outputs=count)
        return tuple(op.MatMul(x, part) for part in parts)

    return linears


def _has_a_weight(_context: Any, weight: ir.Value, **__: Any) -> bool:
    """Whether it is there when the graph is loaded, as a whole or as a part."""
    node = weight.producer()
    whole = node.inputs[0] if node is not None and node.op_type == "Split" else weight
    return whole is not None and whole.producer() is None


def _attributes(value: ir.Value) -> dict[str, Any]:
    """Those of the operator that gives `value`."""
    node = value.producer()
    assert node is not None
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _constant(value: ir.Value) -> list[Any]:
    """The numbers of a vector; none of one that is not known before the graph runs."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy().tolist() if tensor is not None else []
