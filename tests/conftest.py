"""Builds of one run of the tests trace a component once: a graph follows from spec and dtype, and tracing takes most of
the time of a small build."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # every core has a worker already

from traces import parts_traced_once, share_traces


@pytest.fixture(scope="session", autouse=True)
def graphs_are_traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.getbasetemp()
    share_traces((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.tracing.trace_parts", parts_traced_once)
        patch.setattr("export.tracing.HELPERS", 0)
        yield
