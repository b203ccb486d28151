"""Graphs to quantized graphs: the linears of a recipe in FP8, every scale an input.

    y = MatMul(DQ(Q(x * quantize)), DQ(W)) * dequantize        with Q and DQ at the constant scale 1

`quantize` = 1 / input scale and `dequantize` = input scale * weight scale are fp32 inputs of the graph, so one plan
serves every calibration; compilers fold both multiplications into neighbouring kernels.

    y = MatMul(QDQ(Softmax(MatMul(QDQ(q / D^(1/4)), QDQ(k^T / D^(1/4)))), 1/448), QDQ(v))

is attention in FP8. E4M3 is as precise at 2^-6 as at 448, and queries and keys are normed, so that these need no scale
but 1; probabilities are scaled up to the whole range. TensorRT fuses this with all four pairs or with none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import onnx
from onnx import NodeProto, TensorProto, helper

from export.recipes import QUANTIZED_ATTENTION, QUANTIZED_LINEARS, Recipe
from export.trace import Graph, ScaleSlot, WeightSlot
from flux2_trt.errors import Flux2Error

ONE, ZERO = "fp8_scale", "fp8_zero_point"
ATTENTION_SCALE, PROBABILITY_SCALE = "attention_scale", "fp8_probability_scale"
FP8_DTYPE = "float8e4m3fn"
FP8_MAX = 448.0
ELEMENT_TYPES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}


def quantize(graph: Graph, recipe: Recipe) -> Graph:
    """The graph of a component in the formats of `recipe`; `graph` was traced in `recipe.dtype` and stays as it is.

    Weights of quantized linears become float8e4m3fn inputs of the shape that they had.
    """
    pattern = QUANTIZED_LINEARS.get(graph.component)
    if pattern is None or recipe.linears is None:
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    rewriter = _Rewriter(graph, model, recipe, pattern)
    rewriter.rewrite()
    onnx.checker.check_model(model, full_check=True)
    return replace(graph, model=model, weights=rewriter.weights, scales=rewriter.scales)


class _Rewriter:
    """One pass over the nodes of a graph."""

    def __init__(self, graph: Graph, model: onnx.ModelProto, recipe: Recipe, pattern: str) -> None:
        self.model, self.pattern = model, re.compile(pattern)
        self.weights, self.scales = dict(graph.weights), dict(graph.scales)
        self.element = ELEMENT_TYPES[recipe.dtype]
        self._quantizes_attention = recipe.attention is not None and graph.component in QUANTIZED_ATTENTION
        self.nodes: list[NodeProto] = []
        self.quantized_inputs: dict[str, str] = {}

    def rewrite(self) -> None:
        graph = self.model.graph
        shared: dict[str, list[str]] = defaultdict(list)
        for node in graph.node:
            if self._is_quantized(node):
                shared[node.input[0]].append(node.input[1])
        self._constant(ONE, self.element, 1.0)
        self._constant(ZERO, TensorProto.FLOAT8E4M3FN, 0.0)
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
        types = {name: slot.dtype for name, slot in self.weights.items()}
        for value in graph.input:
            if types.get(value.name) == FP8_DTYPE:
                value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
        for name in self.scales:
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))

    def _is_quantized(self, node: NodeProto) -> bool:
        weights = [name for name in node.input if self.pattern.fullmatch(name) and len(self.weights[name].shape) == 2]
        if weights and (node.op_type != "MatMul" or node.input[1] != weights[0]):
            raise Flux2Error(f"{weights[0]} is read by {node.op_type} {node.name}, which cannot be quantized")
        return bool(weights)

    def _linear(self, node: NodeProto, sharing: list[str]) -> None:
        x, weight = node.input
        module = weight.removesuffix(".weight")
        if x not in self.quantized_inputs:
            name = f"{module}.quantize"
            self.scales[name] = ScaleSlot("quantize", tuple(sharing))
            self.quantized_inputs[x] = self._scaled_round_trip(x, name, module)
        dequantize = f"{module}.dequantize"
        self.scales[dequantize] = ScaleSlot("dequantize", (weight,))
        self.weights[weight] = WeightSlot(self.weights[weight].shape, FP8_DTYPE, self.weights[weight].transposed)
        self._add("DequantizeLinear", [weight, ONE], f"{module}.weight_values")
        product = self._add("MatMul", [self.quantized_inputs[x], f"{module}.weight_values"], f"{module}.product")
        self._multiplied(product, dequantize, module, node.output[0])

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

    def _scaled_round_trip(self, x: str, factor: str, module: str) -> str:
        """`x * factor`, rounded to FP8 and back."""
        scaled = self._multiplied(x, factor, f"{module}.input", f"{module}.input_scaled")
        return self._round_trip(scaled, f"{module}.input")

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

    def _add(self, op_type: str, inputs: list[str], output: str, **attributes: int) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"node_{output}", **attributes))
        return output
