"""A conversion that was stopped is finished by the same call: nothing is done twice, and the bytes are the same."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import conversion, weights
from export.conversion import Scales
from export.graph import Graph, ScaleSlot, WeightSlot
from export.quantize import FP8_DTYPE, INT4_DTYPE, NVFP4_DTYPE, block_scale_name
from export.weights import write_weights

NAMES = [f"blocks.{number}.weight" for number in range(10)]
ROWS, COLUMNS = 328, 128  # rows that no number of rows at a time divides
SCALES = Scales(dict.fromkeys(NAMES, 0.125))
SPAWN = multiprocessing.get_context("spawn")
HANG_SECONDS = 300


class Source:
    """Tensors of its own; notes what is read, and kills the process or fails at `end`."""

    def __init__(self, end: str | None = None, error: OSError | None = None) -> None:
        self.read_names: list[str] = []
        self.end, self.error = end, error

    def shape(self, name: str) -> tuple[int, ...]:
        return ROWS, COLUMNS

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        if name == self.end and self.error:
            raise self.error
        if name == self.end:
            os.kill(os.getpid(), signal.SIGKILL)
        self.read_names.append(name)
        return np.random.default_rng(NAMES.index(name)).standard_normal((ROWS, COLUMNS), np.float32)[first:last]

    def largest(self, name: str) -> float:
        return float(np.abs(self.read(name)).max())


def linears(dtype: str = FP8_DTYPE) -> Graph:
    """Ten weights and their scales; what computes with them does not matter here."""
    slots, scales = {}, {}
    for name in NAMES:
        shape = (ROWS, COLUMNS) if dtype == NVFP4_DTYPE else (COLUMNS, ROWS)
        slots[name] = WeightSlot(shape, dtype, transposed=dtype != NVFP4_DTYPE)
        if dtype == NVFP4_DTYPE:
            scales[block_scale_name(name)] = ScaleSlot("block", (name,), (ROWS, COLUMNS // 16), FP8_DTYPE)
        if dtype == INT4_DTYPE:
            scales[block_scale_name(name)] = ScaleSlot("block", (name,), (COLUMNS // 64, ROWS), "bfloat16")
        if dtype in (FP8_DTYPE, NVFP4_DTYPE):
            scales |= {f"{name}.{kind}": ScaleSlot(kind, (name,)) for kind in ("quantize", "dequantize")}
    return Graph("transformer", onnx.ModelProto(), slots, scales=scales)


def convert(folder: Path, source: Source, dtype: str = FP8_DTYPE, workers: int = 4) -> bytes:
    write_weights(linears(dtype), source, folder / "weights", SCALES, folder / "journal", workers)
    return (folder / "weights").read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The file of a conversion that nothing stopped."""
    write_weights(linears(), Source(), tmp_path / "whole", SCALES)
    return (tmp_path / "whole").read_bytes()


def convert_until(folder: Path, end: str) -> None:
    convert(folder, Source(end), workers=1)


@pytest.mark.parametrize("end", [NAMES[0], NAMES[6]])
def test_after_a_kill_the_same_call_converts_the_rest(tmp_path, whole, end):
    process = SPAWN.Process(target=convert_until, args=(tmp_path, end))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    again = Source()
    assert convert(tmp_path, again) == whole
    assert set(again.read_names) == set(NAMES[NAMES.index(end) :])
    finished = Source()
    assert convert(tmp_path, finished) == whole and not finished.read_names


def test_after_a_full_disk_the_same_call_converts_the_rest(tmp_path, whole):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path, Source(NAMES[3], full), workers=1)
    again = Source()
    assert convert(tmp_path, again) == whole
    assert set(again.read_names) == set(NAMES[3:])


@pytest.mark.parametrize(
    "torn",
    [
        lambda journal: journal[:-3],
        lambda journal: journal[: journal.rindex(b"\n") + 1] + b"\0" * 40,
        lambda journal: journal.replace(NAMES[-1].encode(), b"\xff\xfe"),
        lambda journal: journal[:-4] + b"000]",
    ],
    ids=["cut", "zeros", "garbage", "another number"],
)
def test_a_torn_line_of_the_journal_costs_one_weight(tmp_path, whole, torn):
    convert(tmp_path, Source(), workers=1)
    journal = tmp_path / "journal"
    journal.write_bytes(torn(journal.read_bytes()))
    again = Source()
    assert convert(tmp_path, again) == whole
    assert set(again.read_names) == {NAMES[-1]}
    finished = Source()
    assert convert(tmp_path, finished) == whole and not finished.read_names  # the new line is no part of the torn one


def test_bytes_that_did_not_reach_the_disk_are_written_again(tmp_path, whole):
    convert(tmp_path, Source())
    spans = write_weights(linears(), Source(), tmp_path / "other", SCALES)
    with (tmp_path / "weights").open("r+b") as file:
        file.seek(spans[NAMES[4]][0] + 1000)
        file.write(bytes(500))
        file.truncate(spans[NAMES[8]][0] + 10)
    again = Source()
    assert convert(tmp_path, again) == whole
    assert set(again.read_names) >= {NAMES[4], NAMES[8]} and NAMES[0] not in again.read_names


def test_a_journal_without_its_file_or_with_that_of_another_recipe_counts_for_nothing(tmp_path, whole):
    convert(tmp_path, Source(), NVFP4_DTYPE)
    again = Source()
    assert convert(tmp_path, again) == whole and set(again.read_names) == set(NAMES)
    (tmp_path / "weights").unlink()
    again = Source()
    assert convert(tmp_path, again) == whole and set(again.read_names) == set(NAMES)


def test_without_a_journal_nothing_is_kept(tmp_path, whole):
    path = tmp_path / "weights"
    path.write_bytes(bytes(len(whole) + 1000))
    write_weights(linears(), Source(), path, SCALES)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("dtype", ["float", "bfloat16", FP8_DTYPE, NVFP4_DTYPE, INT4_DTYPE])
def test_neither_threads_nor_rows_at_a_time_change_the_bytes(tmp_path, monkeypatch, dtype):
    paths = [tmp_path / "one", tmp_path / "many"]
    write_weights(linears(dtype), Source(), paths[0], SCALES, workers=1)
    monkeypatch.setattr(conversion, "VALUES_AT_ONCE", 100 * COLUMNS)  # 64 rows: five times, and eight
    write_weights(linears(dtype), Source(), paths[1], SCALES, workers=5)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_weights_that_are_large_together_are_not_converted_together(monkeypatch):
    sizes = {"a": 6, "b": 4, "c": 25, "d": 7, "e": 1, "f": 1, "g": 1}
    monkeypatch.setattr(weights, "CONVERTED_BYTES", 10)
    running: dict[str, int] = {}
    together: list[dict[str, int]] = []

    def work(name: str) -> None:
        running[name] = sizes[name]
        together.append(dict(running))
        time.sleep(0.02)  # so that whatever may run beside it does
        del running[name]

    weights.for_each(work, sizes, workers=3)
    assert {name for names in together for name in names} == set(sizes)
    assert all(len(names) == 1 or sum(names.values()) <= 10 for names in together)
    assert all(len(names) <= 3 for names in together)
