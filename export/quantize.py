"""Graphs to quantized graphs: the linears of a recipe in FP8 or NVFP4, every scale an input.

    y = MatMul(DQ(Q(x * quantize)), DQ(W)) * dequantize        with Q and DQ at the constant scale 1

`quantize` = 1 / input scale and `dequantize` = input scale * weight scale are fp32 inputs of the graph, so one plan
serves every calibration; compilers fold both multiplications into neighbouring kernels. In NVFP4, Q gives codes and the
scales of their blocks (TensorRT's `TRT_FP4DynamicQuantize`), and W has block scales as a second input. INT4 is
MatMul(x, DQ(W)) with block scales.

    y = MatMul(QDQ(Softmax(MatMul(QDQ(q / D^(1/4)), QDQ(k^T / D^(1/4)))), 1/448), QDQ(v))

is attention in FP8. E4M3 is as precise at 2^-6 as at 448, and queries and keys are normed, so that these need no scale
but 1; probabilities are scaled up to the whole range. TensorRT fuses this with all four pairs or with none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from export.graph import Graph, ScaleSlot, WeightSlot
from export.recipes import QUANTIZED_ATTENTION, QUANTIZED_LINEARS, Recipe
from flux2_trt.errors import Flux2Error
from flux2_trt.quantized import NVFP4_BLOCK

ONE, ZERO = "fp8_scale", "fp8_zero_point"
ATTENTION_SCALE, PROBABILITY_SCALE = "attention_scale", "fp8_probability_scale"
BLOCK_ONE, TENSORRT_DOMAIN = "nvfp4_scale", "trt"
FP8_DTYPE, NVFP4_DTYPE, INT4_DTYPE = "float8e4m3fn", "float4e2m1", "int4"
FP8_MAX, NVFP4_MAX, INT4_MAX = 448.0, 6.0, 7.0
INT4_BLOCK = 64
ELEMENT_TYPES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}


def quantize(graph: Graph, recipe: Recipe) -> Graph:
    """The graph of a component in the formats of `recipe`; `graph` was traced in `recipe.dtype` and stays as it is.

    Weights of quantized linears become inputs of the format: float8e4m3fn in the recipe's layout, or float4e2m1 [N, K]
    or int4 [K, N] with their block scales. Raises Flux2Error for a weight that the format or its place in the graph
    does not allow.
    """
    pattern = QUANTIZED_LINEARS.get(graph.component)
    if pattern is None or recipe.linears is None or not any(re.fullmatch(pattern, name) for name in graph.weights):
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    rewriter = _Rewriter(graph, model, recipe, pattern)
    rewriter.rewrite()
    onnx.checker.check_model(model, full_check=True)
    return replace(graph, model=model, weights=rewriter.weights, scales=rewriter.scales)


def product_name(weight: str) -> str:
    """The name of the node that multiplies with a quantized weight, which compilers keep."""
    return f"node_{weight.removesuffix('.weight')}.product"


def block_scale_name(weight: str) -> str:
    """The input with the block scales of an NVFP4 weight."""
    return f"{weight}_block_scale"


def _element(dtype: str) -> int:
    return int(TensorProto.DataType.Value(dtype.upper()))


class _Rewriter:
    """One pass over the nodes of a graph."""

    def __init__(self, graph: Graph, model: onnx.ModelProto, recipe: Recipe, pattern: str) -> None:
        self.model, self.pattern = model, re.compile(pattern)
        self.weights, self.scales = dict(graph.weights), dict(graph.scales)
        self.element, self.format = ELEMENT_TYPES[recipe.dtype], recipe.linears
        self.fp8_layout = recipe.fp8_layout
        self._quantizes_attention = recipe.attention is not None and graph.component in QUANTIZED_ATTENTION
        self.nodes: list[NodeProto] = []
        self.quantized_inputs: dict[str, str] = {}

    def rewrite(self) -> None:
        graph = self.model.graph
        shared: dict[str, list[str]] = defaultdict(list)
        for node in graph.node:
            if self._is_quantized(node):
                shared[node.input[0]].append(node.input[1])
        if self.format == "fp8" or self._quantizes_attention:
            self._constant(ONE, self.element, 1.0)
            self._constant(ZERO, TensorProto.FLOAT8E4M3FN, 0.0)
        if self.format == "nvfp4":
            self._constant(BLOCK_ONE, TensorProto.FLOAT, 1.0)
            self.model.opset_import.append(helper.make_opsetid(TENSORRT_DOMAIN, 1))
        if self._quantizes_attention:
            head_dim = next(slot.shape[0] for name, slot in self.weights.items() if name.endswith("query_norm.scale"))
            self._constant(ATTENTION_SCALE, self.element, head_dim**-0.25)
            self._constant(PROBABILITY_SCALE, self.element, 1 / FP8_MAX)
        for node in graph.node:
            if self._is_quantized(node):
                self._linear(node, shared[node.input[0]])
            elif node.op_type == "Attention" and self._quantizes_attention:
                self._attention(node)
            else:
                self.nodes.append(node)
        del graph.node[:]
        graph.node.extend(self.nodes)
        for value in graph.input:
            if value.name in self.weights:
                slot = self.weights[value.name]
                value.CopyFrom(helper.make_tensor_value_info(value.name, _element(slot.dtype), slot.shape))
        for name, scale in self.scales.items():
            graph.input.append(helper.make_tensor_value_info(name, _element(scale.dtype), scale.shape))

    def _is_quantized(self, node: NodeProto) -> bool:
        weights = [name for name in node.input if self.pattern.fullmatch(name) and len(self.weights[name].shape) == 2]
        if weights and (node.op_type != "MatMul" or node.input[1] != weights[0]):
            raise Flux2Error(f"{weights[0]} is read by {node.op_type} {node.name}, which cannot be quantized")
        return bool(weights)

    def _linear(self, node: NodeProto, sharing: list[str]) -> None:
        x, weight = node.input
        if self.format == "int4":
            inputs = [x, self._int4_weight(weight)]
            self.nodes.append(helper.make_node("MatMul", inputs, node.output, name=product_name(weight)))
            return
        module = weight.removesuffix(".weight")
        if x not in self.quantized_inputs:
            name = f"{module}.quantize"
            self.scales[name] = ScaleSlot("quantize", tuple(sharing))
            scaled = self._multiplied(x, name, f"{module}.input", f"{module}.input_scaled")
            rounded = self._block_round_trip if self.format == "nvfp4" else self._round_trip
            self.quantized_inputs[x] = rounded(scaled, f"{module}.input")
        dequantize = f"{module}.dequantize"
        self.scales[dequantize] = ScaleSlot("dequantize", (weight,))
        values = self._nvfp4_weight(weight) if self.format == "nvfp4" else self._fp8_weight(weight)
        product = f"{module}.product"
        matmul = helper.make_node("MatMul", [self.quantized_inputs[x], values], [product], name=product_name(weight))
        self.nodes.append(matmul)
        self._multiplied(product, dequantize, module, node.output[0])

    def _fp8_weight(self, weight: str) -> str:
        slot = replace(self.weights[weight], dtype=FP8_DTYPE)
        if self.fp8_layout == "nk":
            slot = replace(slot, shape=tuple(reversed(slot.shape)), transposed=not slot.transposed)
        self.weights[weight] = slot
        values = self._add("DequantizeLinear", [weight, ONE], f"{weight}_values")
        return values if self.fp8_layout == "kn" else self._transposed(values, weight)

    def _int4_weight(self, weight: str) -> str:
        """Codes [K, N] with a scale for 64 of them along K."""
        rows, columns = self.weights[weight].shape
        if rows % INT4_BLOCK:
            raise Flux2Error(f"{weight} has {rows} inputs; INT4 needs a multiple of {INT4_BLOCK}")
        block, dtype = block_scale_name(weight), self.weights[weight].dtype
        self.weights[weight] = replace(self.weights[weight], dtype=INT4_DTYPE)
        self.scales[block] = ScaleSlot("block", (weight,), (rows // INT4_BLOCK, columns), dtype)
        return self._add("DequantizeLinear", [weight, block], f"{weight}_values", axis=0, block_size=INT4_BLOCK)

    def _nvfp4_weight(self, weight: str) -> str:
        """Codes [N, K] with a scale for 16 of them along K, transposed once they are values: ModelOpt's spelling."""
        columns, rows = self.weights[weight].shape
        if columns % NVFP4_BLOCK:
            raise Flux2Error(f"{weight} has {columns} inputs; NVFP4 needs a multiple of {NVFP4_BLOCK}")
        self.weights[weight] = WeightSlot((rows, columns), NVFP4_DTYPE, transposed=False)
        block = block_scale_name(weight)
        self.scales[block] = ScaleSlot("block", (weight,), (rows, columns // NVFP4_BLOCK), FP8_DTYPE)
        return self._transposed(self._block_values(weight, block, weight), weight)

    def _transposed(self, values: str, weight: str) -> str:
        return self._add("Transpose", [values], f"{weight}_kn", perm=[1, 0])

    def _block_round_trip(self, x: str, name: str) -> str:
        """`x` rounded to NVFP4 and back, with scales of its blocks that come from their largest values."""
        codes, scales = f"{name}_fp4", f"{name}_block_scale"
        quantize = helper.make_node(
            "TRT_FP4DynamicQuantize",
            [x, BLOCK_ONE],
            [codes, scales],
            name=f"node_{codes}",
            domain=TENSORRT_DOMAIN,
            axis=-1,
            block_size=NVFP4_BLOCK,
            scale_type=TensorProto.FLOAT8E4M3FN,
        )
        self.nodes.append(quantize)
        return self._block_values(codes, scales, name)

    def _block_values(self, codes: str, scales: str, name: str) -> str:
        wide_scales = self._add("DequantizeLinear", [scales, BLOCK_ONE], f"{name}_block_scale_values")
        wide = self._add(
            "DequantizeLinear", [codes, wide_scales], f"{name}_values_wide", axis=-1, block_size=NVFP4_BLOCK
        )
        return self._add("Cast", [wide], f"{name}_values", to=self.element)

    def _attention(self, node: NodeProto) -> None:
        query, key, value = node.input
        name = node.name
        root = self._add("Mul", [query, ATTENTION_SCALE], f"{name}.query")
        queries = self._round_trip(root, f"{name}.query")
        transposed = helper.make_node("Transpose", [key], [f"{name}.key_transposed"], perm=[0, 1, 3, 2])
        self.nodes.append(transposed)
        keys = self._round_trip(self._add("Mul", [transposed.output[0], ATTENTION_SCALE], f"{name}.key"), f"{name}.key")
        logits = self._add("MatMul", [queries, keys], f"{name}.logits")
        softmax = self._add("Softmax", [logits], f"{name}.probability", axis=-1)
        probabilities = self._round_trip(softmax, f"{name}.probability", PROBABILITY_SCALE)
        self._add("MatMul", [probabilities, self._round_trip(value, f"{name}.value")], node.output[0])

    def _round_trip(self, x: str, name: str, scale: str = ONE) -> str:
        codes = self._add("QuantizeLinear", [x, scale, ZERO], f"{name}_fp8")
        return self._add("DequantizeLinear", [codes, scale], f"{name}_values")

    def _multiplied(self, x: str, factor: str, name: str, output: str) -> str:
        """`x * factor` in fp32, as the recipe's dtype."""
        if self.element == TensorProto.FLOAT:
            return self._add("Mul", [x, factor], output)
        wide = self._add("Cast", [x], f"{name}_wide", to=TensorProto.FLOAT)
        product = self._add("Mul", [wide, factor], f"{name}_product_wide")
        return self._add("Cast", [product], output, to=self.element)

    def _constant(self, name: str, element: int, value: float) -> None:
        self.model.graph.initializer.append(helper.make_tensor(name, element, [], [value]))

    def _add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"node_{output}", **attributes))
        return output
