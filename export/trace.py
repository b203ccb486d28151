"""Components to ONNX graphs, traced without any weight in memory.

A traced graph takes every parameter as an input: a plan is code, weights are data. The weights of a MatMul are [K, N],
so that no transpose is left in front of it; those of a Gemm, which transposes itself, stay [N, K]. `export.weights`
fills the inputs; `place_external` turns them back into constants that live in a weight file, for compilers that want
them.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from export.examples import TORCH_DTYPES, Example
from export.graph import Graph, WeightSlot, dims, dtype_name
from export.parts import assemble, stack_of
from export.recipes import Dtype
from flux2_trt.errors import Flux2Error
from flux2_trt.spec import Component, ModelSpec

OPSET = 23
PREFIX = "module."  # of the names of parameters, in what the tracer sees
EXPORTER_LOG = "torch.onnx"  # it warns of torchvision, which is not needed, before every graph


class _Function(nn.Module):
    """A function of a module, as a module for the tracer."""

    def __init__(self, module: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.compute = module, compute

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.compute(self.module, *inputs)


def trace(component: Component, spec: ModelSpec, dtype: Dtype = "fp32") -> Graph:
    """Trace one component with dynamic batch, tokens, height and width, at opset 23.

    `dtype` is that of parameters and of tensors between components; latents, positions and the Euler step are fp32
    in every graph. Raises Flux2Error where a dimension that must be dynamic was specialised.
    """
    return assemble(component, spec, dtype, trace_parts(component, spec, dtype))


def trace_parts(component: Component, spec: ModelSpec, dtype: Dtype = "fp32") -> dict[str, Graph]:
    """The parts that `export.parts` divides a component into, by name; its own name where it is one piece.

    Arguments and errors as of `trace`.
    """
    stack = stack_of(component, spec, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = _in_dtype(dtype, stack.module)
        module.requires_grad_(False)  # a tenth of the time goes into gradients otherwise
        return {
            name: _trace(component, _Function(module, part.compute), part.example) for name, part in stack.parts.items()
        }


def _in_dtype(dtype: Dtype, build: Callable[[], nn.Module]) -> nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[dtype])
    try:
        return build()
    finally:
        torch.set_default_dtype(default)


def _trace(component: Component, module: nn.Module, example: Example) -> Graph:
    logging.getLogger(EXPORTER_LOG).setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        program = torch.onnx.export(
            module.eval(),
            example.tensors(),
            input_names=example.names,
            output_names=tuple(example.outputs),
            dynamic_shapes=(
                tuple({axis: Dim.DYNAMIC for axis in each.dims} if each.dims else None for each in example.inputs),
            ),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model
    parameters = _parameters_to_inputs(model, module.state_dict().keys())
    optimizer.optimize(model, input_size_limit=1024, output_size_limit=4096)
    transposed = _fold_weight_transposes(model, parameters)
    _name_dimensions(model, example)
    _strip_metadata(model)
    proto = ir.to_proto(model)
    weights = {
        value.name: WeightSlot(tuple(int(side) for side in dims(value)), dtype_name(value), value.name in transposed)
        for value in proto.graph.input
        if value.name in parameters
    }
    onnx.checker.check_model(proto, full_check=True)
    graph = Graph(component, proto, weights, sum(node.op_type == "Attention" for node in proto.graph.node))
    _check_dynamic(graph, example)
    return graph


def _parameters_to_inputs(model: ir.Model, names: Collection[str]) -> set[str]:
    """Make inputs of the parameters that something reads; returns their names, without `PREFIX`."""
    parameters = {name: value for name, value in model.graph.initializers.items() if name in names}
    taken = set()
    for name, value in parameters.items():
        model.graph.initializers.pop(name)
        if value.uses():
            value.const_value = None
            value.name = name.removeprefix(PREFIX)
            model.graph.inputs.append(value)
            taken.add(value.name)
    return taken


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


def _name_dimensions(model: ir.Model, example: Example) -> None:
    """Give the dynamic sides of inputs and outputs their names, in place of the tracer's symbols."""
    inputs = {value.name: value for value in model.graph.inputs}
    for each in example.inputs:
        value = inputs[each.name]
        assert value.shape is not None
        for axis, dim in each.dims.items():
            if isinstance(value.shape[axis], ir.SymbolicDim):
                value.shape[axis] = ir.SymbolicDim(dim)
    for value, names in zip(model.graph.outputs, example.outputs.values(), strict=True):
        assert value.shape is not None
        value.shape = ir.Shape([names.get(axis, side) for axis, side in enumerate(value.shape)])
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None and output not in model.graph.outputs:
                output.shape = None


def _strip_metadata(model: ir.Model) -> None:
    """Drop the tracer's stack traces, which hold paths of this machine."""
    for node in model.graph:
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *(o for node in model.graph for o in node.outputs)):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _check_dynamic(graph: Graph, example: Example) -> None:
    shapes = graph.shapes()
    expected = {each.name: each.dims for each in example.inputs} | dict(example.outputs)
    if set(shapes) != set(expected):
        raise Flux2Error(f"the traced {graph.component} takes and gives {sorted(shapes)}, not {sorted(expected)}")
    for name, names in expected.items():
        for axis in names:
            side = shapes[name]["shape"][axis]
            if not isinstance(side, str):
                raise Flux2Error(f"tracing {graph.component} fixed axis {axis} of {name} to {side}; it must be dynamic")
