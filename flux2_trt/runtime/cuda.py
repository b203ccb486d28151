"""The GPU through CUDA's runtime library: every call to the driver is in this file.

`pip install 'flux2-trt[rtx]'` or `[tensorrt]` brings the bindings (NVIDIA's cuda-python).
"""

from __future__ import annotations

import os
from typing import Any

from flux2_trt.errors import DeviceError, DeviceMemoryError
from flux2_trt.runtime.device import Address, Event, Graph, Stream

OLDEST_DRIVER = 12_000
"""CUDA 12.0, as `cudaDriverGetVersion` writes it: what the bindings need."""


class CudaDevice:
    """A `Device`. `index`: as `nvidia-smi` counts them, among those that CUDA_VISIBLE_DEVICES shows.

    Raises DeviceError where there is no driver, one that is too old, or no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise DeviceError(
                f"CUDA's bindings cannot be imported ({error}); install them: pip install 'flux2-trt[rtx]'"
            ) from error
        self._cuda: Any = runtime
        self._process = os.getpid()
        self._held: dict[Address, int] = {}
        driver = self._call("cudaDriverGetVersion")
        if driver == 0:
            raise DeviceError("there is no NVIDIA driver; install one, or build for the CPU: --target cpu")
        if driver < OLDEST_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver is for CUDA {driver // 1000}.{driver % 1000 // 10}; "
                f"{OLDEST_DRIVER // 1000}.0 or newer is needed: update the driver"
            )
        count = self._call("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise DeviceError(f"there is no GPU {index}; {count} are visible (CUDA_VISIBLE_DEVICES hides others)")
        self._index = index
        self._call("cudaSetDevice", index)
        properties = self._call("cudaGetDeviceProperties", index)
        name = properties.name
        self.name: str = name.decode() if isinstance(name, bytes) else name
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.multiprocessors: int = properties.multiProcessorCount

    def use_in_this_thread(self) -> None:
        self._call("cudaSetDevice", self._index)

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])

    @property
    def held_bytes(self) -> int:
        return sum(self._held.copy().values())

    def allocate(self, size: int) -> Address:
        error, address = self._cuda.cudaMalloc(size)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # it does not stay: what is allocated is as it was
            free = self.free_bytes()
            words = f"{size / 1e9:.2f} GB of device memory are wanted and {free / 1e9:.2f} GB are free"
            raise DeviceMemoryError(f"{words}; see what fits: flux2-trt plan", size, free)
        self._check(error, "cudaMalloc")
        self._held[Address(int(address))] = size
        return Address(int(address))

    def free(self, address: Address) -> None:
        self._call("cudaFree", address)
        self._held.pop(address, None)

    def allocate_pinned(self, size: int) -> Address:
        return Address(int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault)))

    def free_pinned(self, address: Address) -> None:
        self._call("cudaFreeHost", address)

    def stream(self) -> Stream:
        return Stream(int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)))

    def destroy_stream(self, stream: Stream) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Stream) -> None:
        self._call("cudaStreamSynchronize", stream)

    def copy(self, target: Address, source: Address, size: int, stream: Stream) -> None:
        self._call("cudaMemcpyAsync", target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDefault, stream)

    def event(self) -> Event:
        return Event(int(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)))

    def destroy_event(self, event: Event) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: Event, stream: Stream) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: Stream, event: Event) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def wait_on_host(self, event: Event) -> None:
        self._call("cudaEventSynchronize", event)

    def begin_capture(self, stream: Stream) -> None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Stream) -> Graph:
        template = self._call("cudaStreamEndCapture", stream)
        try:
            return Graph(int(self._call("cudaGraphInstantiate", template, 0)))
        finally:
            self._call("cudaGraphDestroy", template)

    def abandon_capture(self, stream: Stream) -> None:
        if (
            self._call("cudaStreamIsCapturing", stream)
            == self._cuda.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
        ):
            return
        error, template = self._cuda.cudaStreamEndCapture(stream)  # fails where the capture was broken: it ends anyway
        if error == self._cuda.cudaError_t.cudaSuccess and template:
            self._call("cudaGraphDestroy", template)
        self._cuda.cudaGetLastError()  # clears it

    def launch(self, graph: Graph, stream: Stream) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Graph) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        """What it gives beside its error code. Raises DeviceError with CUDA's own words for it."""
        if os.getpid() != self._process:
            raise DeviceError(
                "this process is a fork, and a GPU cannot be used across one; start it with multiprocessing's "
                "'spawn', or make the pipeline in it"
            )
        error, *values = getattr(self._cuda, function)(*arguments)
        self._check(error, function)
        return values[0] if len(values) == 1 else values

    def _check(self, error: Any, function: str) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            words = self._cuda.cudaGetErrorString(error)[1]
            raise DeviceError(f"{function} failed: {words.decode() if isinstance(words, bytes) else words}")
