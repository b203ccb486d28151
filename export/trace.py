"""Components to ONNX graphs, traced without any weight in memory.

A traced graph takes every parameter as an input: a plan is code, weights are data. The weights of a MatMul are [K, N],
so that no transpose is left in front of it; those of a Gemm, which transposes itself, stay [N, K]. `export.weights`
fills the inputs; `place_external` turns them back into constants that live in a weight file, for compilers that want
them.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from export.modules import build_module
from export.recipes import Dtype
from flux2_trt.errors import Flux2Error
from flux2_trt.spec import Component, ModelSpec

OPSET = 23
EXPORTER_LOG = "torch.onnx"  # it warns of torchvision, which is not needed, before every graph
TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WeightSlot:
    """A parameter that the graph takes as an input. `shape` is the graph's; `transposed` says that the checkpoint's
    tensor [N, K] is stored as [K, N]."""

    shape: tuple[int, ...]
    dtype: str
    transposed: bool


@dataclass(frozen=True)
class ScaleSlot:
    """Scales of quantized linears that the graph takes as an input.

    `quantize` fp32 [1]: 1 / input scale, of the input that the linears with these `weights` share. `dequantize` fp32
    [1]: input scale * weight scale, of the one linear. `block`: of every block of the one weight.
    """

    kind: Literal["quantize", "dequantize", "block"]
    weights: tuple[str, ...]
    shape: tuple[int, ...] = (1,)
    dtype: str = "float"


@dataclass(frozen=True)
class Graph:
    """A traced component: `model` takes its parameters as inputs; `weights` and `scales` say which inputs those are.

    `attentions`: how many there are, in whatever spelling.
    """

    component: Component
    model: onnx.ModelProto
    weights: Mapping[str, WeightSlot]
    attentions: int = 0
    scales: Mapping[str, ScaleSlot] = field(default_factory=dict)

    def shapes(self) -> dict[str, dict[str, Any]]:
        """dtype and shape of every input and output that is no parameter; dynamic sides are names."""
        values = [*self.model.graph.input, *self.model.graph.output]
        parameters = self.weights.keys() | self.scales.keys()
        return {value.name: _tensor_shape(value) for value in values if value.name not in parameters}


@dataclass(frozen=True)
class _Example:
    """Example inputs in the order of `forward`, and the names of their dynamic sides."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    dimensions: tuple[dict[int, str], ...]
    outputs: Mapping[str, dict[int, str]]


def trace(component: Component, spec: ModelSpec, dtype: Dtype = "fp32") -> Graph:
    """Trace one component with dynamic batch, tokens, height and width, at opset 23.

    `dtype` is that of parameters and of tensors between components; latents, positions and the Euler step are fp32
    in every graph. Raises Flux2Error where a dimension that must be dynamic was specialised.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = _build(component, spec, dtype).eval()
        example = _example(component, spec, TORCH_DTYPES[dtype])
        logging.getLogger(EXPORTER_LOG).setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            program = torch.onnx.export(
                module,
                example.tensors,
                input_names=example.names,
                output_names=tuple(example.outputs),
                dynamic_shapes=tuple(
                    {axis: Dim.DYNAMIC for axis in dims} if dims else None for dims in example.dimensions
                ),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                verbose=False,
            )
    assert program is not None
    model = program.model
    parameters = {name: value for name, value in model.graph.initializers.items() if name in module.state_dict()}
    _parameters_to_inputs(model, parameters)
    optimizer.optimize(model, input_size_limit=1024, output_size_limit=4096)
    transposed = _fold_weight_transposes(model, set(parameters))
    _name_dimensions(model, example)
    _strip_metadata(model)
    proto = ir.to_proto(model)
    weights = {
        value.name: WeightSlot(tuple(int(side) for side in _dims(value)), _dtype_name(value), value.name in transposed)
        for value in proto.graph.input
        if value.name in parameters
    }
    onnx.checker.check_model(proto, full_check=True)
    graph = Graph(component, proto, weights, sum(node.op_type == "Attention" for node in proto.graph.node))
    _check_dynamic(graph, example)
    return graph


def _build(component: Component, spec: ModelSpec, dtype: Dtype) -> torch.nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[dtype])
    try:
        return build_module(component, spec)
    finally:
        torch.set_default_dtype(default)


def _example(component: Component, spec: ModelSpec, dtype: torch.dtype) -> _Example:
    """Tensors and sizes that all differ: the tracer takes one tensor, or one size, that appears twice for the same."""
    batch, text, height, width, steps = 2, 37, 6, 10, 3
    tokens, transformer = 59, spec.transformer
    pixels, channels = spec.autoencoder.pixels_per_token, spec.autoencoder.token_channels
    empty = torch.empty
    match component:
        case "text_encoder":
            ids, mask = empty(batch, text, dtype=torch.int64), empty(batch, text, dtype=torch.int64)
            dims = {0: "batch", 1: "text_tokens"}
            return _Example(("input_ids", "attention_mask"), (ids, mask), (dims, dims), {"prompt_embeds": dims})
        case "conditioning":
            guided = transformer.guidance_embeds
            embeds = empty(batch, text, transformer.context_dim)
            dims = {0: "batch", 1: "text_tokens"}
            return _Example(
                ("timestep", "prompt_embeds", *(["guidance"] if guided else [])),
                (empty(steps), embeds, *([empty(steps)] if guided else [])),
                ({0: "steps"}, dims, *([{0: "steps"}] if guided else [])),
                {"modulation": {0: "steps"}, "text_tokens": dims},
            )
        case "transformer":
            mixed = spec.sampling.guidance_kind == "classifier_free"
            rotary_shape = (text + tokens, transformer.head_dim // 2)
            latent_dims = {0: "batch", 1: "tokens"}
            return _Example(
                (
                    *("latents", "modulation", "text_tokens", "cos", "sin", "dt"),
                    *(["guidance_mix"] if mixed else []),
                ),
                (
                    empty(batch, tokens, transformer.in_channels),
                    empty(1, transformer.modulation_size, dtype=dtype),
                    empty(batch, text, transformer.hidden_size, dtype=dtype),
                    empty(rotary_shape),
                    empty(rotary_shape),
                    empty(tokens),
                    *([empty(batch, batch)] if mixed else []),
                ),
                (
                    latent_dims,
                    {},
                    {0: "batch", 1: "text_tokens"},
                    {0: "all_tokens"},
                    {0: "all_tokens"},
                    {0: "tokens"},
                    *([{0: "batch", 1: "batch"}] if mixed else []),
                ),
                {"updated_latents": latent_dims},
            )
        case "vae_encoder":
            image = empty(batch, height * pixels, width * pixels, 3, dtype=torch.uint8)
            return _Example(
                ("image",),
                (image,),
                ({0: "batch", 1: "height", 2: "width"},),
                {"latents": {0: "batch", 1: "latent_height", 2: "latent_width"}},
            )
        case "vae_decoder":
            return _Example(
                ("latents",),
                (empty(batch, height, width, channels),),
                ({0: "batch", 1: "latent_height", 2: "latent_width"},),
                {"image": {0: "batch", 1: "height", 2: "width"}},
            )


def _parameters_to_inputs(model: ir.Model, parameters: Mapping[str, ir.Value]) -> None:
    for name, value in parameters.items():
        model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)


def _fold_weight_transposes(model: ir.Model, names: set[str]) -> set[str]:
    """Replace `Transpose(weight)` by the weight stored transposed, where nothing else reads it; returns their names."""
    folded = set()
    for value in model.graph.inputs:
        uses = list(value.uses())
        if value.name not in names or not uses or any(use.node.op_type != "Transpose" for use in uses):
            continue
        assert value.shape is not None and len(value.shape) == 2
        value.shape = ir.Shape(list(reversed(list(value.shape))))
        for use in uses:
            ir.convenience.replace_all_uses_with(use.node.outputs[0], value)
            model.graph.remove(use.node, safe=True)
        folded.add(value.name)
    return folded


def _name_dimensions(model: ir.Model, example: _Example) -> None:
    """Give the dynamic sides of inputs and outputs their names, in place of the tracer's symbols."""
    inputs = {value.name: value for value in model.graph.inputs}
    for name, dims in zip(example.names, example.dimensions, strict=True):
        value = inputs[name]
        assert value.shape is not None
        for axis, dim in dims.items():
            if isinstance(value.shape[axis], ir.SymbolicDim):
                value.shape[axis] = ir.SymbolicDim(dim)
    for value, dims in zip(model.graph.outputs, example.outputs.values(), strict=True):
        assert value.shape is not None
        value.shape = ir.Shape([dims.get(axis, side) for axis, side in enumerate(value.shape)])
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None and output not in model.graph.outputs:
                output.shape = None


def _strip_metadata(model: ir.Model) -> None:
    """Drop the tracer's stack traces, which hold paths of this machine, but keep the module that a node came from."""
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    for value in (*model.graph.inputs, *model.graph.outputs, *(o for node in model.graph for o in node.outputs)):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _check_dynamic(graph: Graph, example: _Example) -> None:
    shapes = graph.shapes()
    expected = dict(zip(example.names, example.dimensions, strict=True)) | dict(example.outputs)
    if set(shapes) != set(expected):
        raise Flux2Error(f"the traced {graph.component} takes and gives {sorted(shapes)}, not {sorted(expected)}")
    for name, dims in expected.items():
        for axis in dims:
            side = shapes[name]["shape"][axis]
            if not isinstance(side, str):
                raise Flux2Error(f"tracing {graph.component} fixed axis {axis} of {name} to {side}; it must be dynamic")


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _dtype_name(value: onnx.ValueInfoProto) -> str:
    return onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()


def _tensor_shape(value: onnx.ValueInfoProto) -> dict[str, Any]:
    return {"dtype": _dtype_name(value), "shape": _dims(value)}
