"""The monitor with a stand-in for NVML: what is asked, and what becomes of the answers."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from benchmarks.harness.monitor import Monitor, busy_seconds


class NvmlError(Exception):
    pass


class Nvml:
    """An H100 that takes 400 W, clocks down while it is asked, and does not tell its application clock."""

    NVMLError = NvmlError
    NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonGpuIdle = 1

    def __init__(self) -> None:
        self.millijoules, self.clocks, self.used = 1000, [1980, 1755, 1755], [10, 30, 20]

    def nvmlDeviceGetTotalEnergyConsumption(self, device: str) -> int:
        self.millijoules += 4000
        return self.millijoules

    def nvmlDeviceGetMemoryInfo(self, device: str) -> SimpleNamespace:
        return SimpleNamespace(used=self.used.pop(0) if self.used else 0, total=80 * 10**9)

    def nvmlDeviceGetClockInfo(self, device: str, kind: int) -> int:
        return self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: str) -> int:
        return 4 | 1

    def nvmlDeviceGetApplicationsClock(self, device: str, kind: int) -> int:
        raise NvmlError("not supported")

    def nvmlDeviceGetMaxClockInfo(self, device: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, device: str) -> int:
        return 700_000

    def nvmlDeviceGetName(self, device: str) -> str:
        return "NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "590.1"


def test_energy_memory_clocks_and_throttling_of_a_call() -> None:
    monitor = Monitor((Nvml(), "device"))
    with monitor.watch() as reading:
        while reading.peak_device_bytes != 30:
            time.sleep(0.01)
    assert reading.energy_joules == pytest.approx(4.0)
    assert reading.clocks_mhz == (1755, 1980)
    assert reading.throttling == {"power cap"}


def test_identity_leaves_out_what_the_driver_does_not_tell() -> None:
    assert Monitor((Nvml(), "device")).identity() == {
        "name": "NVIDIA H100",
        "driver": "590.1",
        "memory_bytes": 80 * 10**9,
        "power_limit_watts": 700.0,
        "max_clock_mhz": 1980,
    }


def test_a_driver_that_tells_no_energy_gives_none() -> None:
    class Silent(Nvml):
        def nvmlDeviceGetTotalEnergyConsumption(self, device: str) -> int:
            raise NvmlError("not supported")

    with Monitor((Silent(), "device")).watch() as reading:
        pass
    assert reading.energy_joules is None


def test_without_a_gpu_there_is_the_work_of_the_cores() -> None:
    if busy_seconds() is None:
        pytest.skip("this system has no /proc/stat")
    with Monitor().watch() as reading:
        begun = time.process_time()
        while time.process_time() - begun < 0.3:
            pass
    assert reading.busy_seconds is not None and reading.busy_seconds > 0.2
    assert reading.energy_joules is None and not reading.throttling and Monitor().identity() is None
