"""What is made of the answers of CUDA's runtime library, where there is none: its bindings in short."""

from __future__ import annotations

import enum
import os
import sys
from types import ModuleType
from typing import Any

import pytest

from flux2_trt.errors import DeviceError, DeviceMemoryError
from flux2_trt.runtime.cuda import CudaDevice

Error = enum.IntEnum("Error", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorLaunchFailure": 719})


class Bindings(ModuleType):
    """cuda.bindings.runtime: `driver`, as cudaDriverGetVersion has it, and so many GPUs."""

    cudaError_t = Error

    def __init__(self, driver: int, gpus: int, free: int = 10**9) -> None:
        super().__init__("cuda.bindings.runtime")
        self.driver, self.gpus, self.free = driver, gpus, free
        self.current, self.calls = 0, list[str]()

    def cudaDriverGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, self.driver

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return Error.cudaSuccess, self.gpus

    def cudaSetDevice(self, index: int) -> tuple[Error]:
        self.current = index
        return (Error.cudaSuccess,)

    def cudaGetDeviceProperties(self, index: int) -> tuple[Error, Any]:
        properties = type("Properties", (), {"name": b"NVIDIA GeForce RTX 4090", "major": 8, "minor": 9})()
        properties.multiProcessorCount = 128
        return Error.cudaSuccess, properties

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self.free, 24 * 10**9

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        if size > self.free:
            return Error.cudaErrorMemoryAllocation, 0
        self.free -= size
        return Error.cudaSuccess, 2**40 + self.free

    def cudaFree(self, address: int) -> tuple[Error]:
        self.calls.append("cudaFree")
        return (Error.cudaSuccess,)

    def cudaGetLastError(self) -> tuple[Error]:
        self.calls.append("cudaGetLastError")
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaErrorLaunchFailure,)

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, b"unspecified launch failure"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(driver: int = 13_000, gpus: int = 1) -> Bindings:
        bindings, package, cuda = Bindings(driver, gpus), ModuleType("cuda.bindings"), ModuleType("cuda")
        vars(package)["runtime"] = bindings
        vars(cuda)["bindings"] = package
        for module in (cuda, package, bindings):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return bindings

    return put


@pytest.mark.parametrize(
    ("driver", "gpus", "words"),
    [
        (0, 0, "there is no NVIDIA driver; install one, or build for the CPU: --target cpu"),
        (11_080, 1, r"the NVIDIA driver is for CUDA 11\.8; 12\.0 or newer is needed: update the driver"),
        (13_000, 0, r"there is no GPU 0; 0 are visible \(CUDA_VISIBLE_DEVICES hides others\)"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(machine: Any, driver: int, gpus: int, words: str) -> None:
    machine(driver, gpus)
    with pytest.raises(DeviceError, match=words):
        CudaDevice()


def test_bindings_that_are_not_there_are_told_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"install them: pip install 'flux2-trt\[rtx\]'"):
        CudaDevice()


def test_a_device_knows_what_it_holds_and_refusals_do_not_stay(machine: Any) -> None:
    bindings = machine()
    device = CudaDevice()
    assert (device.name, device.compute_capability, device.multiprocessors) == ("NVIDIA GeForce RTX 4090", "8.9", 128)
    address = device.allocate(6 * 10**8)
    assert (device.held_bytes, device.free_bytes()) == (6 * 10**8, 4 * 10**8)
    with pytest.raises(DeviceMemoryError, match=r"0\.50 GB of device memory are wanted and 0\.40 GB are free") as told:
        device.allocate(5 * 10**8)
    assert (told.value.needed_bytes, told.value.free_bytes) == (5 * 10**8, 4 * 10**8)
    assert bindings.calls == ["cudaGetLastError"]
    device.free(address)
    assert device.held_bytes == 0
    with pytest.raises(DeviceError, match="cudaStreamSynchronize failed: unspecified launch failure"):
        device.synchronize(1)


def test_each_device_is_the_one_of_the_thread_that_uses_it(machine: Any) -> None:
    bindings = machine(gpus=2)
    first, second = CudaDevice(0), CudaDevice(1)
    assert bindings.current == 1
    first.use_in_this_thread()
    assert bindings.current == 0
    second.use_in_this_thread()
    assert bindings.current == 1


def test_a_fork_is_refused(machine: Any) -> None:
    machine()
    device = CudaDevice()
    if (child := os.fork()) == 0:
        try:
            device.free_bytes()
        except DeviceError as error:
            os._exit(0 if "is a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
