"""Plans on the stand-in device: ONNX graphs that ONNX Runtime computes with what lies at the bound addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from runtime.standin import RuleBroken, StandIn

from flux2_trt.runtime.device import Address, Stream
from flux2_trt.runtime.onnxruntime import _share_threads
from flux2_trt.runtime.plan import Shape

SCRATCH_FACTOR = 4
"""Times the bytes of what goes into a plan and is no weight."""


class StandInPlan:
    """A `Plan` of an ONNX model; constants in other files become inputs, as weights are."""

    def __init__(self, device: StandIn, model: onnx.ModelProto, name: str) -> None:
        bound = onnx.ModelProto()
        bound.CopyFrom(model)
        for tensor in [t for t in bound.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]:
            bound.graph.input.add().CopyFrom(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
            bound.graph.initializer.remove(tensor)
        self.device, self.name = device, name
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = not _share_threads()  # as the engines of the same process do
        data, providers = bound.SerializeToString(), ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(data, options, providers=providers)
        constants = {tensor.name for tensor in bound.graph.initializer}
        values = [value for value in bound.graph.input if value.name not in constants]
        self.dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in values}
        self.fixed = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
        self.inputs = frozenset(self.dtypes)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.open = 0

    def execution(self, shapes: Mapping[str, Shape], profile: int, stream: Stream) -> StandInExecution:
        self.device._call("execution")
        self.open += 1
        return StandInExecution(self, shapes)

    def close(self) -> None:
        if self.open:
            raise RuleBroken(f"{self.name} is closed before {self.open} of its executions")


class StandInExecution:
    def __init__(self, plan: StandInPlan, shapes: Mapping[str, Shape]) -> None:
        self.plan = plan
        given = sum(int(np.prod(shape)) * np.dtype(plan.dtypes[name]).itemsize for name, shape in shapes.items())
        self.scratch_bytes = SCRATCH_FACTOR * given
        self.shapes = {name: tuple(shapes.get(name, plan.fixed[name])) for name in plan.inputs}
        self.addresses: dict[str, Address] = {}
        self.scratch: tuple[int, int] | None = None

    def use_scratch(self, address: Address, size: int) -> None:
        if size < self.scratch_bytes:
            raise RuleBroken(f"{size} bytes of scratch for {self.plan.name}, which wants {self.scratch_bytes}")
        self.scratch = address, size

    def bind(self, addresses: Mapping[str, Address]) -> None:
        self.plan.device._call("bind")
        for name, address in addresses.items():
            if address % 256:
                raise RuleBroken(f"{name} of {self.plan.name} at {address:#x} is not aligned")
        self.addresses |= addresses

    def enqueue(self, stream: Stream) -> None:
        device, plan = self.plan.device, self.plan
        device._call("enqueue")
        at = dict(self.addresses)  # as they are when the work is put into the stream
        missing = (plan.inputs | set(plan.outputs)) - at.keys()
        if missing or self.scratch is None:
            raise RuleBroken(f"{plan.name} is launched without {', '.join(sorted(missing)) or 'scratch'}")
        sizes = {n: int(np.prod(s)) * np.dtype(plan.dtypes[n]).itemsize for n, s in self.shapes.items()}
        results: dict[str, np.ndarray] = {}

        def inputs() -> dict[str, Any]:
            return {
                name: device.view(at[name], size).view(plan.dtypes[name]).reshape(self.shapes[name])
                for name, size in sizes.items()
            }

        def do() -> None:
            outputs = plan.session.run(plan.outputs, inputs())
            results.update(zip(plan.outputs, outputs, strict=True))
            for name, value in results.items():
                device.view(at[name], value.nbytes)[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        start, size = self.scratch
        reads = [(at[name], at[name] + size) for name, size in sizes.items() if size]
        writes = [(start, start + size)]
        writes += [(at[name], at[name] + length) for name, length in self._output_bytes().items()]
        device.put(plan.name, stream, reads, writes, do)

    def _output_bytes(self) -> dict[str, int]:
        """Found by computing once with zeros of the same shapes."""
        key = tuple(sorted(self.shapes.items()))
        known = self.plan.__dict__.setdefault("output_bytes", {})
        if key not in known:
            zeros = {name: np.zeros(shape, self.plan.dtypes[name]) for name, shape in self.shapes.items()}
            known[key] = {
                name: value.nbytes
                for name, value in zip(self.plan.outputs, self.plan.session.run(self.plan.outputs, zeros), strict=True)
            }
        return known[key]

    def close(self) -> None:
        self.plan.open -= 1
        self.addresses = {}
