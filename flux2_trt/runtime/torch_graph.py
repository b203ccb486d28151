"""The ONNX graph of a component as a module of torch, for fixed shapes.

What a compiler of plans gets is here run by torch itself, operator by operator, on whatever device its tensors are:
something to compare plans with, and the way onto GPUs that no compiler of plans is at hand for. Operators as ONNX has
them (onnx `docs/Operators.md`, opset 23); sides and indices, which shapes alone decide, are computed on the way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from export.quantize import FP8_MAX
from flux2_trt.errors import BundleError
from flux2_trt.runtime.plan import Shape

TORCH_OF_ONNX: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}
FAST_ACCUMULATION = True
"""FP8 products of Hopper are summed in the tensor cores, as vLLM and torchao have it, and not promoted to fp32 each 128
of K."""

Known = NDArray[Any]
"""A value that the shapes decide."""


@dataclass(frozen=True)
class Traced:
    """A value that is computed: its node, and a tensor without data of its shape and dtype. `fp8`: the FP8 values that
    it is of, where it is those and nothing else."""

    node: torch.fx.Node
    meta: Tensor
    fp8: Traced | None = None


def torch_module(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> torch.fx.GraphModule:
    """A module that takes the inputs of `model` in their order, and gives its outputs as a tuple.

    Its `meta` has "inputs" and "outputs" as tensors without data.

    `shapes`: of the inputs with dynamic sides. Raises BundleError for an operator or a dtype that is not known here.
    """
    return _Lowering(model, shapes).module()


class _Lowering:
    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
        self._model, self._graph, self._root = model.graph, torch.fx.Graph(), torch.nn.Module()
        self._opsets = model.opset_import
        self._values: dict[str, Known | Traced] = {}
        self._constants: dict[tuple[Any, ...], Traced] = {}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self._model.node:
            for name in node.input:
                self._users[name].append(node)
        self._outputs = {output.name for output in self._model.output}
        self._done: set[int] = set()
        self._inputs: list[Traced] = []
        for tensor in self._model.initializer:
            self._values[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for value in self._model.input:
            kind = value.type.tensor_type
            shape = shapes.get(value.name) or tuple(side.dim_value for side in kind.shape.dim)
            meta = torch.empty(shape, dtype=_dtype(kind.elem_type, value.name), device="meta")
            name = f"input_{len(self._graph.nodes)}"
            self._inputs.append(Traced(self._graph.placeholder(name), meta))
            self._values[value.name] = self._inputs[-1]

    def module(self) -> torch.fx.GraphModule:
        for node in self._model.node:
            if id(node) not in self._done:
                self._lower(node)
        outputs = [self._traced(self._values[output.name]) for output in self._model.output]
        self._graph.output(tuple(output.node for output in outputs))
        self._graph.eliminate_dead_code()
        module = torch.fx.GraphModule(self._root, self._graph)
        module.meta = {"inputs": [each.meta for each in self._inputs], "outputs": [each.meta for each in outputs]}
        return module

    def _lower(self, node: onnx.NodeProto) -> None:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        inputs: list[Any] = [self._values[name] if name else None for name in node.input]
        if node.op_type == "Shape":
            sides = np.array(_shape(inputs[0]), np.int64)
            self._values[node.output[0]] = sides[attributes.get("start", 0) : attributes.get("end", len(sides))]
        elif all(value is None or isinstance(value, np.ndarray) for value in inputs):
            self._evaluate(node, inputs)
        elif node.op_type == "MatMul" and _is_fp8_linear(*inputs):
            self._fp8_linear(node, inputs[0].fp8, inputs[1].fp8, inputs[0].meta.dtype)
        elif node.op_type in OPERATORS:
            of_host = OF_HOST.get(node.op_type, ())
            operands = [
                _plain(value) if index in of_host or value is None else self._traced(value)
                for index, value in enumerate(inputs)
            ]
            results = self._emit(OPERATORS[node.op_type], *operands, count=len(node.output), **attributes)
            for name, result in zip(node.output, results, strict=True):
                self._values[name] = self._marked(node.op_type, inputs, attributes, result)
        else:
            raise BundleError(f"torch does not run the operator {node.op_type} here; use another --backend")

    def _evaluate(self, node: onnx.NodeProto, inputs: Sequence[Any]) -> None:
        model = onnx.helper.make_model(
            onnx.helper.make_graph(
                [node],
                "known",
                [onnx.helper.make_empty_tensor_value_info(name) for name in node.input if name],
                [onnx.helper.make_empty_tensor_value_info(name) for name in node.output],
            ),
            opset_imports=self._opsets,
        )
        feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
        for name, value in zip(node.output, ReferenceEvaluator(model).run(None, feeds), strict=True):
            self._values[name] = np.asarray(value)

    def _emit(self, function: Callable[..., Any], *operands: Any, count: int = 1, **attributes: Any) -> list[Traced]:
        """A node that calls `function`, and its results."""
        metas = [value.meta if isinstance(value, Traced) else value for value in operands]
        nodes = tuple(value.node if isinstance(value, Traced) else value for value in operands)
        found = function(*metas, **attributes)
        node = self._graph.call_function(function, nodes, attributes)
        if isinstance(found, Tensor):
            return [Traced(node, found)]
        taken = [self._graph.call_function(_item, (node, index)) for index in range(count)]
        return [Traced(each, meta) for each, meta in zip(taken, found, strict=True)]

    def _marked(self, kind: str, inputs: Sequence[Any], attributes: Mapping[str, Any], result: Traced) -> Traced:
        """`result`, with the FP8 values that it is of."""
        first = inputs[0]
        if kind == "DequantizeLinear" and first.meta.dtype == torch.float8_e4m3fn:
            scale = inputs[1]
            if isinstance(scale, np.ndarray) and scale.size == 1 and float(scale.item()) == 1:
                return Traced(result.node, result.meta, first)
        if kind == "Transpose" and first.fp8:
            [transposed] = self._emit(transpose, first.fp8, **attributes)
            return Traced(result.node, result.meta, transposed)
        return result

    def _fp8_linear(self, node: onnx.NodeProto, x: Traced, weight: Traced, dtype: torch.dtype) -> None:
        """A product of FP8 values, with the scale that follows as the graphs of `export.quantize` spell it."""
        name = node.output[0]
        scale = unit = self._constant(np.ones(1, np.float32))
        if chain := self._chain(name, ("Cast", "Mul", "Cast")):
            [other] = [self._values[each] for each in chain[1].input if each != chain[0].output[0]]
            if isinstance(other, Traced) and other.meta.shape == (1,):
                scale, name = other, chain[2].output[0]
                self._done |= {id(each) for each in chain}
        [self._values[name]] = self._emit(fp8_linear, x, weight, scale, unit, dtype=dtype)

    def _chain(self, name: str, kinds: Sequence[str]) -> list[onnx.NodeProto]:
        """The nodes of these kinds that follow `name` one after the other, with nobody else to use what they make."""
        found: list[onnx.NodeProto] = []
        for kind in kinds:
            users = self._users[name]
            if len(users) != 1 or users[0].op_type != kind or name in self._outputs:
                return []
            found.append(users[0])
            name = users[0].output[0]
        return found

    def _traced(self, value: Known | Traced) -> Traced:
        return value if isinstance(value, Traced) else self._constant(value)

    def _constant(self, value: Known) -> Traced:
        """A known value as a tensor that lies where the module is."""
        key = (value.shape, str(value.dtype), value.tobytes())
        if key not in self._constants:
            tensor, name = to_tensor(value), f"constant_{len(self._constants)}"
            self._root.register_buffer(name, tensor)
            self._constants[key] = Traced(self._graph.get_attr(name), tensor.to("meta"))
        return self._constants[key]


def to_tensor(value: Known) -> Tensor:
    """A numpy array, of ml_dtypes' types too, as a tensor on the CPU."""
    dtype = TORCH_OF_ONNX[onnx.helper.np_dtype_to_tensor_dtype(value.dtype)]
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):
        return torch.from_numpy(np.asarray(value, np.float32)).to(dtype)
    return torch.from_numpy(np.array(value))


def _dtype(element: int, name: str) -> torch.dtype:
    if element not in TORCH_OF_ONNX:
        kind = onnx.TensorProto.DataType.Name(element)
        raise BundleError(f"torch does not take {name} in {kind} here; use another --backend")
    return TORCH_OF_ONNX[element]


def _shape(value: Known | Traced | None) -> Shape:
    assert value is not None
    return tuple(value.meta.shape if isinstance(value, Traced) else value.shape)


def _is_fp8_linear(left: Known | Traced, right: Known | Traced) -> bool:
    if not (isinstance(left, Traced) and isinstance(right, Traced)):
        return False
    return left.fp8 is not None and right.fp8 is not None and right.meta.dim() == 2


def _plain(value: Any) -> Any:
    """A known value as numbers of Python."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        raise BundleError("this graph computes a shape from its inputs' values, which torch does not do here")
    return value.tolist()


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def cast(x: Tensor, to: int, **_: Any) -> Tensor:
    return x.to(TORCH_OF_ONNX[to])


def reshape(x: Tensor, shape: list[int], allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[i] if side == 0 and not allowzero else side for i, side in enumerate(shape)])


def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    return x.permute(*perm)


def unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def split(x: Tensor, sizes: list[int] | None = None, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    return x.split(sizes or -(-x.shape[axis] // num_outputs), axis)


def take(x: Tensor, starts: list[int], ends: list[int], axes: Any = None, steps: Any = None) -> Tensor:
    axes = range(x.dim()) if axes is None else axes
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        window = [slice(None)] * x.dim()
        window[axis] = slice(start, end, step)
        x = x[tuple(window)]
    return x


def gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def expand(x: Tensor, shape: list[int]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape))


def largest(x: Tensor, axes: list[int], keepdims: int = 1, **_: Any) -> Tensor:
    return x.amax(axes, bool(keepdims))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def gemm(a: Tensor, b: Tensor, transB: int = 0, **_: Any) -> Tensor:
    return a @ (b.t() if transB else b)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., K] @ weight [K, N] * scale, both FP8; `unit` [1] is 1."""
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        product = torch._scaled_mm(
            rows, weight, scale_a=scale, scale_b=unit, out_dtype=dtype, use_fast_accum=FAST_ACCUMULATION
        )
    else:
        product = (rows.float() @ weight.float() * scale).to(dtype)
    return product.reshape(*x.shape[:-1], weight.shape[1])


def quantize(x: Tensor, scale: Any, zero_point: Tensor, **_: Any) -> Tensor:
    scaled = x if scale == 1 else x / scale
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(zero_point.dtype)


def dequantize(x: Tensor, scale: Tensor, zero_point: Any = None, **_: Any) -> Tensor:
    return x.to(scale.dtype) * scale


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.layer_norm(x, scale.shape, scale, bias, epsilon)


def rms_norm(x: Tensor, scale: Tensor, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.rms_norm(x, scale.shape, scale, epsilon)


def group_norm(x: Tensor, scale: Tensor, bias: Tensor, num_groups: int = 1, epsilon: float = 1e-5, **_: Any) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
    **_: Any,
) -> Tensor:
    top, left, bottom, right = pads
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, tuple(strides), (top, left))


def depth_to_space(x: Tensor, blocksize: int, **_: Any) -> Tensor:
    return F.pixel_shuffle(x, blocksize)


def resize(x: Tensor, roi: Any, scales: list[float], *_: Any, **__: Any) -> Tensor:
    return F.interpolate(x, scale_factor=tuple(scales[2:]), mode="nearest")


def clip(x: Tensor, least: float | None = None, most: float | None = None) -> Tensor:
    return x.clamp(least, most)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Attention": attention,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "Cos": torch.cos,
    "DepthToSpace": depth_to_space,
    "DequantizeLinear": dequantize,
    "Div": torch.div,
    "Equal": torch.eq,
    "Expand": expand,
    "Gather": gather,
    "Gemm": gemm,
    "GreaterOrEqual": torch.ge,
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "MatMul": matmul,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "QuantizeLinear": quantize,
    "RMSNormalization": rms_norm,
    "ReduceMax": largest,
    "Reshape": reshape,
    "Resize": resize,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": take,
    "Softmax": softmax,
    "Split": split,
    "Sqrt": torch.sqrt,
    "Squeeze": squeeze,
    "Sub": torch.sub,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
OF_HOST: Mapping[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "Expand": (1,),
    "QuantizeLinear": (1,),
    "ReduceMax": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}
"""The places of operands that are numbers of Python: they are known before anything runs."""
