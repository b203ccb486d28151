"""The monitor with a stand-in for NVML: what is asked, and what becomes of the answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.harness.monitor import Monitor, _ticks_of, others_seconds


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
    with monitor.watch(os.getpid()) as reading:
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

    with Monitor((Silent(), "device")).watch(os.getpid()) as reading:
        pass
    assert reading.energy_joules is None


SPIN = "import time\nwhile time.process_time() < 1.2: pass"


def test_the_work_of_others_is_told_from_ours() -> None:
    """A process that spins for more than a second is someone else's until it is said to be ours."""
    if others_seconds(os.getpid()) is None:
        pytest.skip("this system has no /proc/stat")
    with Monitor().watch(os.getpid()) as reading:
        subprocess.run([sys.executable, "-c", SPIN], check=True)
    assert reading.others_seconds is not None and reading.others_seconds > 1
    assert reading.wall_seconds > 1
    with subprocess.Popen([sys.executable, "-c", f"{SPIN}\ninput()"], stdin=subprocess.PIPE) as ours:
        before = others_seconds(os.getpid())
        with Monitor().watch(ours.pid) as reading:
            while _ticks_of(ours.pid) < os.sysconf("SC_CLK_TCK"):
                time.sleep(0.05)
        after = others_seconds(os.getpid())
        ours.communicate(b"\n")
    assert before is not None and after is not None and reading.others_seconds is not None
    assert after - before - reading.others_seconds > 0.8  # its second, and nothing else
    assert reading.energy_joules is None and not reading.throttling and Monitor().identity() is None
