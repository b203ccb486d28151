"""Group norm spelled as instance norm, for which ONNX Runtime has a kernel; it expands group norm to ten operators.

The channels of a group become one channel; scale and bias, which are of channels and not of groups, follow.
"""

from __future__ import annotations

import onnx

from export.trace import OPSET

DOMAIN = "flux2_trt"
GROUP_NORM = "GroupNormalization"
BY_INSTANCE_NORM = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{GROUP_NORM} <num_groups, epsilon> (x, scale, bias) => (y)
{{
    groups = Constant <value_int: int = @num_groups> ()
    first = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    count = Reshape (groups, rest)
    grouped_shape = Concat <axis = 0> (first, count, rest)
    grouped = Reshape (x, grouped_shape)
    one = Constant <value_float = 1.0> ()
    zero = Constant <value_float = 0.0> ()
    ones = Expand (one, count)
    zeros = Expand (zero, count)
    normalized = InstanceNormalization <epsilon: float = @epsilon> (grouped, ones, zeros)
    shape = Shape (x)
    restored = Reshape (normalized, shape)
    channels = Constant <value_ints = [-1, 1, 1]> ()
    channel_scale = Reshape (scale, channels)
    channel_bias = Reshape (bias, channels)
    scaled = Mul (restored, channel_scale)
    y = Add (scaled, channel_bias)
}}
"""


def spell_group_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with its group norms [B, C, H, W] as functions of `DOMAIN`; one without any stays as it is."""
    nodes = [node for node in model.graph.node if node.op_type == GROUP_NORM]
    if not nodes:
        return model
    spelled = onnx.ModelProto()
    spelled.CopyFrom(model)
    spelled.functions.append(onnx.parser.parse_function(BY_INSTANCE_NORM))
    spelled.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    for node in spelled.graph.node:
        if node.op_type == GROUP_NORM:
            node.domain = DOMAIN
    return spelled
