"""Device: memory, streams, events and graphs of one GPU, as everything above the driver sees them.

Addresses and handles are plain numbers, as CUDA's are. `flux2_trt.runtime.cuda` is the real one; tests have a stand-in
that checks the order of every access.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NewType, Protocol

import numpy as np
from numpy.typing import NDArray

Address = NewType("Address", int)
Stream = NewType("Stream", int)
Event = NewType("Event", int)
Graph = NewType("Graph", int)

ALIGNMENT = 256
"""Bytes: what TensorRT wants of every tensor's address (NvInferRuntime.h, `IExecutionContext::setTensorAddress`)."""


class Device(Protocol):
    """One GPU. Everything raises DeviceError, and DeviceMemoryError where memory is wanting.

    Work is put into a stream and done in its order; `record` and `wait` order streams among each other. Memory is freed
    by whoever allocated it, after the work that uses it is done.
    """

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> str: ...

    def use_in_this_thread(self) -> None:
        """The thread's calls go to this GPU from here on, those of libraries too; whoever made it need not say so."""
        ...

    def free_bytes(self) -> int: ...

    @property
    def held_bytes(self) -> int:
        """That were allocated here and not freed."""
        ...

    def allocate(self, size: int) -> Address: ...

    def free(self, address: Address) -> None: ...

    def allocate_pinned(self, size: int) -> Address:
        """Memory of the host that the device copies at the speed of the bus."""
        ...

    def free_pinned(self, address: Address) -> None: ...

    def stream(self) -> Stream: ...

    def destroy_stream(self, stream: Stream) -> None: ...

    def synchronize(self, stream: Stream) -> None: ...

    def copy(self, target: Address, source: Address, size: int, stream: Stream) -> None:
        """`size` bytes, between device and pinned memory in any direction."""
        ...

    def event(self) -> Event: ...

    def destroy_event(self, event: Event) -> None: ...

    def record(self, event: Event, stream: Stream) -> None: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What comes next in `stream` waits for `event`; the host does not."""
        ...

    def wait_on_host(self, event: Event) -> None: ...

    def begin_capture(self, stream: Stream) -> None:
        """What is put into `stream`, and into streams that wait for its events, is recorded and not done."""
        ...

    def end_capture(self, stream: Stream) -> Graph:
        """Raises DeviceError where something could not be recorded; it can still be done as it is."""
        ...

    def abandon_capture(self, stream: Stream) -> None:
        """Ends a capture after an error, whatever state it is in."""
        ...

    def launch(self, graph: Graph, stream: Stream) -> None: ...

    def destroy_graph(self, graph: Graph) -> None: ...


class Scope(ExitStack):
    """What is allocated or made here is freed when the scope is closed, the latest first and all of it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def buffer(self, size: int) -> Address:
        address = self.device.allocate(size)
        self.callback(self.device.free, address)
        return address

    def pinned(self, size: int) -> Address:
        address = self.device.allocate_pinned(size)
        self.callback(self.device.free_pinned, address)
        return address

    def stream(self) -> Stream:
        stream = self.device.stream()
        self.callback(self.device.destroy_stream, stream)
        return stream

    def event(self) -> Event:
        event = self.device.event()
        self.callback(self.device.destroy_event, event)
        return event

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Closes the scope where the block fails, and only there."""
        try:
            yield
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class Layout:
    """Tensors in one piece of memory, each at an aligned offset."""

    sizes: Mapping[str, int]
    offsets: Mapping[str, int]
    bytes: int

    @staticmethod
    def of(sizes: Mapping[str, int]) -> Layout:
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return Layout(sizes, offsets, max(end, ALIGNMENT))

    def addresses(self, base: Address) -> dict[str, Address]:
        return {name: Address(base + offset) for name, offset in self.offsets.items()}


def host_bytes(address: Address, size: int) -> NDArray[np.uint8]:
    """Pinned memory as an array; it must not be used after the memory is freed."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
