"""Builds of one test process trace a component once: a graph follows from spec and dtype, and tracing takes most of the
time of a small build."""

import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # every core has a worker already

from diffusers_models import parts_traced_once, traced_once


@pytest.fixture(scope="session", autouse=True)
def graphs_are_traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.components.trace", traced_once)
        patch.setattr("engines.components.trace_parts", parts_traced_once)
        yield
