"""Memory: the most that a process had resident, as Linux counts it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc_pid_clear_refs(5)


def reset_peak() -> None:
    """Begin anew to count the most; where the kernel does not allow it, the count is since the start."""
    with suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def peak_host_bytes() -> int | None:
    """Most resident bytes of this process since `reset_peak`; None where there is no /proc.

    Not ru_maxrss: a child begins with that of the process which started it.
    """
    with suppress(OSError):
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
