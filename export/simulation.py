"""Simulation: NVFP4 for a runtime that has FP8 but no FP4, in the operators that it has.

Every value of E2M1 is one of E4M3, so codes become E4M3 and the rest of the graph stays as it is. Weights keep their
codes, as numbers of rows in a table. TensorRT's operator becomes a function: block scales and codes are rounded to
nearest even and saturate ("Quantization Schemes" in TensorRT's documentation).
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from export.quantize import NVFP4_MAX, TENSORRT_DOMAIN
from export.trace import OPSET
from flux2_trt.quantized import NVFP4_BLOCK, e2m1_values

TABLE = "e2m1_values"
DYNAMIC_QUANTIZE = f"""
<domain: "{TENSORRT_DOMAIN}", opset_import: ["": {OPSET}]>
TRT_FP4DynamicQuantize <axis, block_size, scale_type> (x, scale) => (codes, block_scales)
{{
    zero = Constant <value_float = 0.0> ()
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    largest = Constant <value_float = {NVFP4_MAX}> ()
    smallest = Neg (largest)
    last = Constant <value_ints = [-1]> ()

    rows = Shape <end = -1> (x)
    block = Constant <value_ints = [-1, {NVFP4_BLOCK}]> ()
    block_shape = Concat <axis = 0> (rows, block)
    blocks = Reshape (x, block_shape)
    magnitudes = Abs (blocks)
    amax = ReduceMax <keepdims = 0> (magnitudes, last)
    wanted = Div (amax, largest)
    wanted_codes = Div (wanted, scale)
    block_scales = Cast <to = {TensorProto.FLOAT8E4M3FN}> (wanted_codes)

    scales = Cast <to = {TensorProto.FLOAT}> (block_scales)
    steps = Mul (scales, scale)
    step = Unsqueeze (steps, last)
    scaled = Div (blocks, step)
    has_step = Greater (step, zero)
    quotients = Where (has_step, scaled, zero)

    quotient_sizes = Abs (quotients)
    below_two = Less (quotient_sizes, two)
    below_four = Less (quotient_sizes, four)
    coarse = Where (below_four, one, two)
    spacing = Where (below_two, half, coarse)
    spacings = Div (quotients, spacing)
    whole = Round (spacings)
    rounded = Mul (whole, spacing)
    values = Clip (rounded, smallest, largest)
    shape = Shape (x)
    reshaped = Reshape (values, shape)
    codes = Cast <to = {TensorProto.FLOAT8E4M3FN}> (reshaped)
}}
"""


def simulate_nvfp4(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, whose weights are initializers, without FP4 types and operators of TensorRT; it may have none."""
    simulated = onnx.ModelProto()
    simulated.CopyFrom(model)
    graph = simulated.graph
    weights = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT4E2M1]
    if not weights:
        return simulated
    simulated.functions.append(onnx.parser.parse_function(DYNAMIC_QUANTIZE))
    values = {tensor.name: f"{tensor.name}_e4m3" for tensor in weights}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = values.get(name, name)
    lookups = []
    for tensor in weights:
        tensor.data_type = TensorProto.UINT4  # the same bytes
        row, value = f"{tensor.name}_row", f"{tensor.name}_e2m1"
        lookups += [
            helper.make_node("Cast", [tensor.name], [row], to=TensorProto.INT32),
            helper.make_node("Gather", [TABLE, row], [value]),
            helper.make_node("Cast", [value], [values[tensor.name]], to=TensorProto.FLOAT8E4M3FN),
        ]
    nodes = [*lookups, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(onnx.numpy_helper.from_array(e2m1_values(), TABLE))
    return simulated
