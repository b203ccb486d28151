"""Assembly: the graph of a component from the graphs of its parts.

All blocks of a stack are alike but for their weights, so that one of each kind is traced and written as often as the
model has it: tracing 48 blocks takes as long as tracing one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx

from export.graph import Graph, WeightSlot
from flux2_trt.spec import Component


class Assembly:
    """A graph that grows by parts; what a part takes and no part before it gave is an input of the whole."""

    def __init__(self, component: Component) -> None:
        self.component: Component = component
        self.model = onnx.ModelProto()
        self.weights: dict[str, WeightSlot] = {}
        self.attentions = 0
        self._parameters: list[onnx.ValueInfoProto] = []
        self._known: set[str] = set()
        self._last: list[onnx.ValueInfoProto] = []

    def add(self, part: Graph, name: str, inputs: Sequence[str], outputs: Sequence[str] | None = None) -> list[str]:
        """Append `part` with values of the whole as its `inputs`, in its order; returns the names of its outputs.

        All that is inside gets `name` in front of its own name; "blocks.3" reads the weights of blocks.3 where the
        part has those of blocks.0. `outputs`: other names for the outputs, those that the whole has.
        """
        if not self.model.opset_import:
            self.model.ir_version = part.model.ir_version
            self.model.producer_name = part.model.producer_name
            self.model.opset_import.extend(part.model.opset_import)
        traced = re.sub(r"\d+$", "0", name)
        source = part.model.graph
        names = {value.name: re.sub(rf"^{re.escape(traced)}\b", name, value.name) for value in source.input}
        names |= dict(zip((value.name for value in _data_inputs(part)), inputs, strict=True))
        if outputs:
            names |= dict(zip((value.name for value in source.output), outputs, strict=True))

        def renamed(value: str) -> str:
            return names.setdefault(value, f"{name}.{value}") if value else value

        target = self.model.graph
        for value in source.input:
            whole = renamed(value.name)
            if whole in self._known:
                continue
            self._known.add(whole)
            place = self._parameters if part.is_parameter(value.name) else target.input
            place.append(_copy(value, whole))
            if value.name in part.weights:
                self.weights[whole] = part.weights[value.name]
        for tensor in source.initializer:
            constant = target.initializer.add()
            constant.CopyFrom(tensor)
            constant.name = renamed(tensor.name)
        for node in source.node:
            copied = target.node.add()
            copied.CopyFrom(node)
            copied.name = f"{name}.{node.name}"
            copied.input[:] = map(renamed, node.input)
            copied.output[:] = map(renamed, node.output)
        self.attentions += part.attentions
        results = [renamed(value.name) for value in source.output]
        self._known.update(results)
        self._last = [_copy(value, result) for value, result in zip(source.output, results, strict=True)]
        return results

    def append(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append one operator, which needs no tracing; returns `output`."""
        self.model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], output, **attributes))
        self._known.add(output)
        return output

    def finish(self, outputs: Sequence[onnx.ValueInfoProto] = ()) -> Graph:
        """The whole, with the outputs of its last part or others. Raises onnx.checker.ValidationError if it is no
        model."""
        self.model.graph.name = self.component
        self.model.graph.input.extend(self._parameters)
        self.model.graph.output.extend(outputs or self._last)
        onnx.checker.check_model(self.model, full_check=True)
        return Graph(self.component, self.model, self.weights, self.attentions)


def _data_inputs(part: Graph) -> list[onnx.ValueInfoProto]:
    return [value for value in part.model.graph.input if not part.is_parameter(value.name)]


def _copy(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(value)
    copied.name = name
    return copied
