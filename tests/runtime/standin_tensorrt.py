"""TensorRT's bindings on the stand-in device: the part that the runtime uses, with the rules of their documentation.

What TensorRT would only compute wrongly, or crash at, raises RuleBroken; what it refuses, it refuses as TensorRT does:
with None or False, and the reason in the log. `kernels`: as TensorRT-RTX, which makes kernels for shapes when they are
first launched, and cannot while a stream is captured.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from runtime.standin import RuleBroken, StandIn
from runtime.standin_plan import StandInExecution, StandInPlan

from export.graph import Graph
from flux2_trt.bundle import Bundle
from flux2_trt.manifest import ComponentRecord
from flux2_trt.runtime.device import Address, Stream

Allocation = enum.Enum("Allocation", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
Specialization = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])
Mode = enum.Enum("Mode", ["INPUT", "OUTPUT"])
Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class Logger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


@dataclass
class StandInTensorRT:
    """`refuses`: "deserialize", "context", "profile", "shape", "address" or "launch". `made`: shapes for which kernels
    were made in this process; `loggers` must be one."""

    device: StandIn
    bundle: Bundle
    kernels: bool
    version: str = "1.7"
    refuses: str | None = None
    made: list[tuple[str, str]] = field(default_factory=list)
    loggers: list[Logger] = field(default_factory=list)

    def module(self) -> ModuleType:
        module = ModuleType("tensorrt_rtx" if self.kernels else "tensorrt")
        names: dict[str, Any] = {
            "__version__": self.version,
            "ILogger": Logger,
            "Runtime": lambda log: Runtime(self, log),
            "TensorIOMode": Mode,
            "ExecutionContextAllocationStrategy": Allocation,
        }
        if self.kernels:
            names |= {"IRuntimeCache": Kernels, "DynamicShapesKernelSpecializationStrategy": Specialization}
        vars(module).update(names)
        return module

    def refused(self, what: str) -> bool:
        """True, with a reason in the log, where `what` is refused."""
        if self.refuses == what:
            self.say(f"no {what} today")
        return self.refuses == what

    def say(self, message: str) -> None:
        self.loggers[-1].log(Severity.ERROR, message)


class Runtime:
    def __init__(self, of: StandInTensorRT, log: Logger) -> None:
        if of.loggers and of.loggers[0] is not log:
            raise RuleBroken("a second logger in one process")
        of.loggers.append(log)
        self._of = of

    def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
        self._of.device._call("deserialize")
        if self._of.refused("deserialize"):
            return None
        digest = hashlib.sha256(data).hexdigest()
        [record] = [each for each in self._of.bundle.manifest.components if each.plan.sha256 == digest]
        return CudaEngine(self._of, StandInPlan(self._of.device, Graph.from_bytes(data).model, record.name), record)


class CudaEngine:
    def __init__(self, of: StandInTensorRT, plan: StandInPlan, record: ComponentRecord) -> None:
        self.of, self.plan, self.record = of, plan, record
        self._names = [*sorted(plan.inputs), *plan.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.plan.inputs else Mode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side or -1 for side in self.plan.fixed[name])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Allocation | RuntimeConfig = Allocation.STATIC) -> ExecutionContext | None:
        if (how.allocation if isinstance(how, RuntimeConfig) else how) is not Allocation.USER_MANAGED:
            raise RuleBroken("a context allocates its own memory")
        return None if self.of.refused("context") else ExecutionContext(self, how)


@dataclass
class RuntimeConfig:
    allocation: Allocation = Allocation.STATIC
    dynamic_shapes_kernel_specialization_strategy: Specialization = Specialization.LAZY
    kernels: Kernels | None = None

    def set_execution_context_allocation_strategy(self, strategy: Allocation) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> Kernels:
        return Kernels()

    def set_runtime_cache(self, cache: Kernels) -> bool:
        self.kernels = cache
        return True


@dataclass
class Kernels:
    """IRuntimeCache."""

    there: set[tuple[str, str]] = field(default_factory=set)

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.there)).encode()

    def deserialize(self, data: bytes) -> bool:
        try:
            self.there = {(name, shapes) for name, shapes in json.loads(data)}
        except ValueError:
            return False
        return True


class ExecutionContext:
    def __init__(self, engine: CudaEngine, how: Allocation | RuntimeConfig) -> None:
        self._engine, self._of = engine, engine.of
        self._kernels = how.kernels if isinstance(how, RuntimeConfig) else None
        self._profile: Mapping[str, list[int]] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._execution: StandInExecution | None = None

    def set_optimization_profile_async(self, index: int, stream: Stream) -> bool:
        if self._of.refused("profile"):
            return False
        self._of.device._known(self._of.device._streams, stream, "stream")
        self._profile = self._engine.record.profiles[index]
        self._shapes = {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            raise RuleBroken("a shape is set before the profile")
        if self._of.refused("shape"):
            return False
        of = self._engine.record.shapes.get(name)
        sides = of["shape"] if of else self._engine.get_tensor_shape(name)
        for side, length in zip(sides, shape, strict=True):
            least, _, most = self._profile[side] if isinstance(side, str) else (side, side, side)
            if not least <= length <= most:
                self._of.say(f"{name}: {length} is not within {least} and {most}")
                return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self._engine.plan.inputs - self._shapes.keys())

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            raise RuleBroken("memory is asked for before all shapes are set")
        dynamic = {name: shape for name, shape in self._shapes.items() if name in self._engine.record.shapes}
        self._execution = self._engine.plan.execution(dynamic, 0, Stream(0))
        return self._execution.scratch_bytes

    def set_device_memory(self, address: int, size: int) -> None:
        if address % 256:
            raise RuleBroken(f"scratch at {address:#x} is not aligned")
        assert self._execution
        self._execution.use_scratch(Address(address), size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self._of.refused("address"):
            return False
        if name not in self._engine._names:
            self._of.say(f"{name} is no tensor of this plan")
            return False
        assert self._execution
        self._execution.bind({name: Address(address)})
        return True

    def execute_async_v3(self, stream: Stream) -> bool:
        if self._of.refused("launch"):
            return False
        if self._kernels is not None:
            key = (self._engine.record.name, json.dumps(sorted(self._shapes.items())))
            if key not in self._kernels.there:
                if self._of.device._captures(stream):
                    self._of.say("kernels cannot be made in a capture")
                    return False
                self._kernels.there.add(key)
                self._of.made.append(key)
        assert self._execution
        self._execution.enqueue(stream)
        return True

    def __del__(self) -> None:
        if self._execution:
            self._execution.close()
