from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from runtime.standin import StandIn
from runtime.standin_plan import StandInPlan

import engines.components
import engines.targets
from engines.build import BuildRequest, build
from engines.hardware import HARDWARE, Rates
from engines.targets import Target
from export.graph import Graph
from flux2_trt.bundle import Bundle
from flux2_trt.manifest import ComponentRecord
from flux2_trt.runtime import placement

TARGET = Target("stand-in", "tensorrt", ("fp32",), compute_capability="8.9", dtype="fp32")
"""What TensorRT would compile here: graphs with their weights as inputs, in fp32, which ONNX Runtime can compute."""


RESERVED = 2**20
"""Bytes for what alignment takes, of some hundred tensors."""


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's target, with the rates of a card."""
    monkeypatch.setitem(engines.targets.TARGETS, "stand-in", TARGET)
    monkeypatch.setitem(HARDWARE, "stand-in", HARDWARE["rtx4090"])
    rate = Rates.of
    monkeypatch.setattr(Rates, "of", lambda self, kind: rate(self, "bf16" if kind == "fp32" else kind))
    monkeypatch.setattr(placement, "RESERVED_BYTES", RESERVED)


def load_on(device: StandIn):
    def load(record: ComponentRecord, data: bytes) -> StandInPlan:
        return StandInPlan(device, Graph.from_bytes(data).model, record.name)

    return load


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bundle]]:
    """`tiny` for the CPU, and for the stand-in in one plan and in blocks, also with a seed in the place of weights.

    They are built by the first process of a run that asks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.targets, "TARGETS", {**engines.targets.TARGETS, "stand-in": TARGET})
        base = tmp_path_factory.getbasetemp()
        folder: Path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundles"
        requests = {
            "cpu": BuildRequest("tiny", "cpu", output=folder / "cpu"),
            "whole": BuildRequest("tiny", "stand-in", max_batch=3, output=folder / "whole"),
            "blocks": BuildRequest("tiny", "stand-in", plans="blocks", max_batch=3, output=folder / "blocks"),
            "synthetic": BuildRequest("tiny", "stand-in", checkpoint="random:5", output=folder / "synthetic"),
            "synthetic blocks": BuildRequest(
                "tiny", "stand-in", plans="blocks", checkpoint="random:5", output=folder / "synthetic"
            ),
        }
        with FileLock(folder.with_suffix(".lock")):
            made = {name: Bundle.open(build(each, lambda _: None).bundle) for name, each in requests.items()}
        yield made
