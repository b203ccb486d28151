"""What a person runs on a GPU, on the stand-in: that it measures what it says, not how fast."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from runtime.conftest import TARGET, load_on
from runtime.standin import StandIn

from benchmarks import gpu_check
from benchmarks.gpu.loops import Case
from engines.targets import TARGETS
from flux2_trt.bundle import Bundle
from flux2_trt.runtime.device import Graph, Stream


class TimedStandIn(StandIn):
    multiprocessors = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.launched: list[float] = []

    def launch(self, graph: Graph, stream: Stream) -> None:
        begun = time.perf_counter()
        super().launch(graph, stream)
        self.launched.append(1e3 * (time.perf_counter() - begun))

    def forget_launches(self) -> None:
        self.launched.clear()

    def milliseconds(self, last: int) -> tuple[list[float], list[float]]:
        return self.launched[-last:], [0.0] * (last - 1)


@pytest.fixture
def check(built: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "TimedDevice", TimedStandIn)
    monkeypatch.setattr(gpu_check, "BATCHES", (Case(128, 128), Case(128, 128, batch=2)))
    monkeypatch.setattr(gpu_check, "OVERLAPPING_SIDES", (128,))
    monkeypatch.setitem(TARGETS, "stand-in", TARGET)
    store = built["synthetic"].path.parents[1]
    made = gpu_check.Check(store, tmp_path / "result.json", time.monotonic() + 600)
    made.target, made.compiler = "stand-in", None
    made._loader = lambda compiled: load_on(made.device)
    return made


def test_loops_batches_and_overlap_are_measured_and_what_cannot_be_is_said(check: gpu_check.Check) -> None:
    asked = {
        "models": ["tiny:fp32", "tiny:fp32:streamed:batches", "tiny:fp32:embedded:1", "tiny:fp32:half:eager:1"],
        "sizes": (Case(128, 128), Case(128, 128, 1)),
        "overlapping": ["tiny:fp32"],
    }
    for part in ("loops", "overlap"):
        check.part(part, asked)
    result = json.loads(check.path.read_text())
    assert result["left_out"] == [
        "loops of tiny:fp32:embedded:1: weights are embedded in compiled plans, and no compiler for this GPU is here"
    ]
    loops = result["loops"]
    assert [(row["case"]["references"], row["case"]["batch"], row["streamed"], row["graphs"]) for row in loops] == [
        (0, 1, [0, 0], True),
        (1, 1, [0, 0], True),
        (0, 1, [2, 5], True),
        (0, 2, [2, 5], True),
        (0, 1, [1, 2], True),
        (0, 1, [1, 2], True),
        (0, 1, [1, 2], False),
    ]
    assert all(row["finite"] and row["wall_step_ms"] > 0 and row["used_bytes"] > 0 for row in loops)
    assert all((row["step_ms"] is None) == (not row["graphs"]) for row in loops)
    assert loops[2]["streamed_bytes"] > loops[4]["streamed_bytes"] > 0 == loops[0]["streamed_bytes"]
    assert [(row["overlaps"], row["pictures"]) for row in result["overlap"]] == [(False, 8), (True, 8)]
    assert all(row["seconds_per_picture"] > 0 for row in result["overlap"])
    assert check.device.live == {}
