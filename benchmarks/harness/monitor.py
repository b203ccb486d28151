"""Monitor: what the machine did meanwhile: work of others on its cores; energy, memory, clocks and throttling of a GPU.

The GPU is asked through NVML, where nvidia-ml-py is installed; it is tested with a stand-in and was not tried on one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.05
STAT = Path("/proc/stat")
MEBI = 2**20
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: proc_stat(5)

THROTTLING = {
    "nvmlClocksThrottleReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "heat",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "heat",
}


@dataclass
class Reading:
    """Of one watched call. `others_seconds`: of all cores, by processes that are not ours; None where Linux does not
    tell."""

    wall_seconds: float = 0.0
    others_seconds: float | None = None
    energy_joules: float | None = None
    peak_device_bytes: int | None = None
    clocks_mhz: tuple[int, int] | None = None
    throttling: set[str] = field(default_factory=set)


class Monitor:
    """`nvml`: the initialized module and a device's handle, or None."""

    def __init__(self, nvml: tuple[Any, Any] | None = None) -> None:
        self._nvml = nvml

    @staticmethod
    def find() -> Monitor:
        """With the first GPU that NVML knows."""
        try:
            import pynvml
        except ImportError:
            return Monitor()
        try:
            pynvml.nvmlInit()
            return Monitor((pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)))
        except pynvml.NVMLError:
            return Monitor()

    @property
    def has_gpu(self) -> bool:
        return self._nvml is not None

    @contextmanager
    def watch(self, pid: int) -> Iterator[Reading]:
        """The reading is complete when the block ends. `pid`: a process that is ours, beside this one."""
        reading, done, begun = Reading(), threading.Event(), time.perf_counter()
        others, energy = others_seconds(pid), self._energy()
        sampler = threading.Thread(target=self._sample, args=(reading, done), daemon=True)
        if self._nvml:
            sampler.start()
        try:
            yield reading
        finally:
            done.set()
            if self._nvml:
                sampler.join()
            after, spent = others_seconds(pid), self._energy()
            reading.wall_seconds = time.perf_counter() - begun
            reading.others_seconds = None if others is None or after is None else after - others
            reading.energy_joules = None if energy is None or spent is None else spent - energy

    def _energy(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._nvml is None:
            return None
        nvml, device = self._nvml
        with suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000.0
        return None

    def _sample(self, reading: Reading, done: threading.Event) -> None:
        assert self._nvml is not None
        nvml, device = self._nvml
        while True:
            with suppress(nvml.NVMLError):
                used = int(nvml.nvmlDeviceGetMemoryInfo(device).used)
                reading.peak_device_bytes = max(used, reading.peak_device_bytes or 0)
            with suppress(nvml.NVMLError):
                clock = int(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM))
                low, high = reading.clocks_mhz or (clock, clock)
                reading.clocks_mhz = (min(low, clock), max(high, clock))
            with suppress(nvml.NVMLError):
                reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)
                reading.throttling |= {text for name, text in THROTTLING.items() if reasons & getattr(nvml, name, 0)}
            if done.wait(SAMPLE_SECONDS):
                return

    def identity(self) -> dict[str, Any] | None:
        """Name, driver, power limit and locked clocks of the GPU."""
        if self._nvml is None:
            return None
        nvml, device = self._nvml
        found: dict[str, Any] = {}
        questions = {
            "name": lambda: nvml.nvmlDeviceGetName(device),
            "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
            "memory_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(device).total),
            "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000.0,
            "application_clock_mhz": lambda: int(nvml.nvmlDeviceGetApplicationsClock(device, nvml.NVML_CLOCK_SM)),
            "max_clock_mhz": lambda: int(nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)),
        }
        for name, ask in questions.items():
            with suppress(nvml.NVMLError):
                found[name] = ask()
        return found


def others_seconds(pid: int) -> float | None:
    """Seconds that cores were busy, all together, but for this process and `pid`; None where Linux does not tell."""
    with suppress(OSError, ValueError, IndexError):
        ticks = list(map(int, STAT.read_text(encoding="ascii").splitlines()[0].split()[1:]))
        own = sum(_ticks_of(each) for each in {pid, os.getpid()})
        return (sum(ticks[index] for index in BUSY) - own) / os.sysconf("SC_CLK_TCK")
    return None


def _ticks_of(pid: int) -> int:
    """Of all threads of a process: proc_pid_stat(5), utime and stime, counted after the name, which may have blanks."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
