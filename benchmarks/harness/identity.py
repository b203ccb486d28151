"""Identity: what a result was measured on and with: machine, software, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness.monitor import Monitor
from benchmarks.machine import machine

PACKAGES = (
    "flux2-trt", "numpy", "onnxruntime", "torch", "diffusers", "transformers", "tensorrt", "tensorrt-rtx-cu13",
    "sglang", "scikit-image", "pillow", "nvidia-ml-py",
)  # fmt: skip
SOURCE = Path(__file__).parents[2]


def identity(monitor: Monitor) -> dict[str, Any]:
    """JSON values; None for what there is not. The load average is of the minute before."""
    return {
        "machine": {
            **machine(),
            "memory_bytes": _memory_bytes(),
            "clock_mhz": _clock_mhz(),
            "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "gpu": monitor.identity(),
        },
        "software": {
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "compiler": _compiler(),
            "git": git_state(SOURCE),
        },
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None where the code is installed, or there is no git."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    commit, status = (_said(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    return None if commit is None else {"commit": commit, "changed": bool(status)}


def _said(folder: Path, *words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def _compiler() -> str | None:
    """The C++ compiler, with which torch.compile makes its kernels on a CPU."""
    program = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not program:
        return None
    with suppress(OSError):
        said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        return said.splitlines()[0] if said else None
    return None


def _memory_bytes() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _clock_mhz() -> float | None:
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return float(next(line.split(":")[1] for line in lines if line.startswith("cpu MHz")))
    return None
