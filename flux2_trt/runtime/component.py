"""Component: a plan with its weights in a lane, ready to be bound; and as an engine from arrays to arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flux2_trt.manifest import ComponentRecord
from flux2_trt.runtime.device import Address, Layout, Scope, host_bytes
from flux2_trt.runtime.engine import Arrays
from flux2_trt.runtime.lane import Lane
from flux2_trt.runtime.plan import NUMPY_DTYPES, Execution, Plan, Sizes, Tensors, profile_of
from flux2_trt.runtime.weights import Weights

SIZES_KEPT = 2
"""Sizes whose buffers and executions an engine keeps; the oldest goes first."""


class Component:
    """A plan, its record in the bundle, and its weights; None where they are in the plan."""

    def __init__(self, lane: Lane, plan: Plan, record: ComponentRecord, weights: Weights | None = None) -> None:
        self.lane, self.plan, self.record, self.weights = lane, plan, record, weights

    def tensors(self, sizes: Sizes) -> Tensors:
        return Tensors(self.record.shapes, sizes)

    def execution(self, sizes: Sizes, addresses: Mapping[str, Address]) -> Execution:
        """At `sizes`, bound to `addresses` and to the weights, which it holds until it is closed by `dismiss`.

        Raises UsageError for sizes that the plan was not built for.
        """
        profile = profile_of(self.record, sizes)
        shapes = self.tensors(sizes).shapes(self.plan.inputs)
        bound = dict(self.weights.acquire()) if self.weights else {}
        try:
            execution = self.plan.execution(shapes, profile, self.lane.stream)
            self.lane.adopt(execution)
            try:
                weights = self.plan.inputs - shapes.keys() if self.weights else ()
                execution.bind({name: bound[name] for name in weights} | dict(addresses))
            except BaseException:
                self.lane.dismiss(execution)
                raise
        except BaseException:
            self._release()
            raise
        return execution

    def dismiss(self, execution: Execution) -> None:
        self.lane.dismiss(execution)
        self._release()

    def _release(self) -> None:
        if self.weights:
            self.weights.release()


@dataclass
class Slots:
    """Tensors in one buffer of the device, and those that the host writes or reads in pinned memory too."""

    sizes: Mapping[str, int]
    device: Mapping[str, Address]
    pinned: Mapping[str, Address]

    @staticmethod
    def of(scope: Scope, sizes: Mapping[str, int], device_only: Container[str] = ()) -> Slots:
        layout = Layout.of(sizes)
        shared = Layout.of({name: size for name, size in sizes.items() if name not in device_only})
        device, pinned = scope.buffer(layout.bytes), scope.pinned(shared.bytes)
        return Slots(sizes, layout.addresses(device), shared.addresses(pinned))

    def put(self, lane: Lane, name: str, values: NDArray[Any], dtype: str, offset: int = 0) -> None:
        """Into pinned memory and on the way to the device; nothing that used either is still running."""
        data = _to_bytes(values, dtype)
        host_bytes(self.pinned[name], self.sizes[name])[offset : offset + data.size] = data
        target, source = self.device[name] + offset, self.pinned[name] + offset
        lane.device.copy(Address(target), Address(source), data.size, lane.stream)

    def fetch(self, lane: Lane, name: str) -> None:
        """On the way to pinned memory; `array` reads it there, once the lane is synchronized."""
        lane.device.copy(self.pinned[name], self.device[name], self.sizes[name], lane.stream)

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """A copy that is the caller's."""
        stored = host_bytes(self.pinned[name], self.sizes[name]).view(NUMPY_DTYPES[dtype]).reshape(shape)
        if dtype == "bfloat16":
            return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return stored.copy()


class DeviceEngine:
    """An `Engine`: arrays go to the device, through a plan, and back."""

    def __init__(self, component: Component, complete: Callable[[dict[str, int]], dict[str, int]]) -> None:
        """`complete`: adds the sizes of outputs to those of inputs."""
        self.component, self._complete = component, complete
        self._prepared: OrderedDict[tuple[tuple[str, int], ...], _Prepared] = OrderedDict()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Raises UsageError for sizes that the plan was not built for, DeviceError where the device fails."""
        lane, record = self.component.lane, self.component.record
        lane.device.use_in_this_thread()
        sizes = self._complete(sizes_of(record, inputs))
        prepared = self._prepare(sizes)
        tensors = self.component.tensors(sizes)
        outputs = [name for name in record.shapes if name not in inputs]
        with lane.settling():
            for name, values in inputs.items():
                prepared.slots.put(lane, name, values, tensors.dtype(name))
            prepared.launch()
            for name in outputs:
                prepared.slots.fetch(lane, name)
            lane.synchronize()
        return {name: prepared.slots.array(name, tensors.shape(name), tensors.dtype(name)) for name in outputs}

    def close(self) -> None:
        """Frees all but the weights."""
        for key in list(self._prepared):
            self._evict(key)

    def _prepare(self, sizes: Sizes) -> _Prepared:
        key = tuple(sorted(sizes.items()))
        if key not in self._prepared:
            while len(self._prepared) >= SIZES_KEPT:
                self._evict(next(iter(self._prepared)))
            self._prepared[key] = self._made(sizes, key)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _made(self, sizes: Sizes, key: tuple[tuple[str, int], ...]) -> _Prepared:
        component, lane = self.component, self.component.lane
        scope = Scope(lane.device)
        with scope.filling():
            tensors = component.tensors(sizes)
            slots = Slots.of(scope, {name: tensors.bytes(name) for name in component.record.shapes})
            execution = component.execution(sizes, slots.device)
        graph = (component.record.name, key)
        return _Prepared(scope, slots, execution, graph, lane)

    def _evict(self, key: tuple[tuple[str, int], ...]) -> None:
        prepared, lane = self._prepared.pop(key), self.component.lane
        with prepared.scope:
            lane.forget(lambda graph: graph == prepared.graph)
            self.component.dismiss(prepared.execution)


@dataclass
class _Prepared:
    scope: Scope
    slots: Slots
    execution: Execution
    graph: tuple[str, tuple[tuple[str, int], ...]]
    lane: Lane

    def launch(self) -> None:
        self.lane.repeat(self.graph, lambda: self.execution.enqueue(self.lane.stream))()


def sizes_of(record: ComponentRecord, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The dynamic sides of a component from the shapes of its inputs."""
    sizes: dict[str, int] = {}
    for name, values in inputs.items():
        for side, length in zip(record.shapes[name]["shape"], values.shape, strict=True):
            if isinstance(side, str):
                sizes[side] = length
    return sizes


def _to_bytes(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        values = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
    return np.ascontiguousarray(values, NUMPY_DTYPES[dtype]).reshape(-1).view(np.uint8)
