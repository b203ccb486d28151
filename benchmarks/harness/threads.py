"""Threads: every system gets the same cores. Libraries size their pools by variables, or by a process's cores."""

from __future__ import annotations

import os

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def thread_environment(threads: int) -> dict[str, str]:
    """The environment of a process that gets so many threads; to be set before its libraries load."""
    return {**os.environ, **dict.fromkeys(VARIABLES, str(threads))}


def pin(threads: int) -> None:
    """Keep this process on the first so many of its cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
