"""Graph: an ONNX model that takes its parameters as inputs, and what those inputs are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import onnx

from flux2_trt.spec import Component

METADATA = "flux2_trt"


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
class Slots:
    """The parameters of a graph without the graph, as a weight file lists them."""

    weights: Mapping[str, WeightSlot]
    scales: Mapping[str, ScaleSlot]


@dataclass(frozen=True)
class Graph:
    """A component or a part of one. `model` takes its parameters as inputs; `weights` and `scales` say which those are.

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
        return {value.name: _tensor_shape(value) for value in values if not self.is_parameter(value.name)}

    def is_parameter(self, name: str) -> bool:
        return name in self.weights or name in self.scales

    def to_bytes(self) -> bytes:
        """An ONNX file that says all of this, to be compiled elsewhere."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        values = {
            "component": self.component,
            "weights": {name: asdict(slot) for name, slot in self.weights.items()},
            "scales": {name: asdict(slot) for name, slot in self.scales.items()},
            "attentions": self.attentions,
        }
        model.metadata_props.add(key=METADATA, value=json.dumps(values))
        return bytes(model.SerializeToString(deterministic=True))

    @staticmethod
    def from_bytes(data: bytes) -> Graph:
        """What `to_bytes` gave."""
        model = onnx.ModelProto.FromString(data)
        (place,) = (index for index, entry in enumerate(model.metadata_props) if entry.key == METADATA)
        values = json.loads(model.metadata_props[place].value)
        del model.metadata_props[place]
        return Graph(
            values["component"],
            model,
            {name: WeightSlot(**_tuples(slot)) for name, slot in values["weights"].items()},
            values["attentions"],
            {name: ScaleSlot(**_tuples(slot)) for name, slot in values["scales"].items()},
        )


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    """The sides of a value; dynamic ones are names."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def dtype_name(value: onnx.ValueInfoProto) -> str:
    return onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _tensor_shape(value: onnx.ValueInfoProto) -> dict[str, Any]:
    return {"dtype": dtype_name(value), "shape": dims(value)}
