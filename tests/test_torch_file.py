"""What torch saved is read as torch reads it; what else a pickle can be is refused, and nothing of it runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux2_trt.torch_file import read_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def saved(value: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def repacked(data: bytes, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with parts replaced, or left out (None), by the ends of their names."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            end = next((end for end in changes if name.endswith(end)), None)
            content = old.read(name) if end is None else changes[end]
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def part(data: bytes, end: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(end)))


def refused(data: bytes, max_elements: int = 100) -> str:
    with pytest.raises(ValueError) as caught:
        read_tensor(data, max_elements)
    return str(caught.value)


VIEWS = {
    "plain": lambda: torch.randn(2, 3, 5),
    "transposed": lambda: torch.randn(5, 3, 2).permute(2, 1, 0),
    "a part of another": lambda: torch.randn(4, 9, 5)[1:3, ::3],
    "expanded": lambda: torch.randn(1, 1, 5).expand(2, 3, 5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_values_are_those_that_torch_reads(dtype: torch.dtype, view: str) -> None:
    data = saved(VIEWS[view]().to(dtype))
    expected = torch.load(io.BytesIO(data), weights_only=True).float().numpy()
    np.testing.assert_array_equal(read_tensor(data, 30), expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(protocol: int) -> None:
    tensor = torch.randn(1, 4, 6)
    np.testing.assert_array_equal(read_tensor(saved(tensor, pickle_protocol=protocol), 24), tensor.numpy())


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.empty(3, device="meta"),
        torch.empty(0, 3),
        [torch.ones(3)],
        {"x": torch.ones(3)},
        "text",
        None,
        torch.nn.Linear(2, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_but_a_dense_float_tensor_is_refused(value: Any) -> None:
    refused(saved(value))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_the_program_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "was-here"
    evil = pickle.dumps(Evil(path), protocol=2)
    pickle.loads(evil)
    assert path.exists()  # it would
    path.unlink()
    harmless = saved(torch.ones(2, 3))
    for data in (saved(Evil(path)), repacked(harmless, {"data.pkl": evil}), evil):
        refused(data)
    assert not path.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R}(S'a'\nK\x01ub.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02" + b"(" * 1000 + b"t" * 1000 + b".",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x8a\xff" + b"\xff" * 255 + b".",
        b"\x82\x01.",
        b"Va\n0.",
        b".",
        b"",
        b"\xff",
        b"K\x01",
    ],
)
def test_other_programs_are_refused(program: bytes) -> None:
    refused(repacked(saved(torch.ones(2, 3)), {"data.pkl": program}))


def test_sizes_are_checked_before_memory_is_taken() -> None:
    assert "larger" in refused(saved(torch.ones(1).expand(2**20, 2**20)))
    assert "larger" in refused(saved(torch.ones(101)))
    data = saved(torch.ones(2, 3))
    described = part(data, "data.pkl")
    for old, new in (
        (b"K\x02K\x03", b"K\x02K\x20"),  # a shape beyond the numbers
        (b"K\x03K\x01\x86", b"K\x63K\x01\x86"),  # a stride beyond them
        (b"K\x06t", b"K\x07t"),  # more numbers than bytes
    ):
        assert described.count(old) == 1
        refused(repacked(data, {"data.pkl": described.replace(old, new)}))


def test_parts_that_are_missing_compressed_or_large() -> None:
    data = saved(torch.ones(2, 3))
    refused(repacked(data, {"data.pkl": None}))
    refused(repacked(data, {"data/0": None}))
    refused(repacked(data, {"data/0": b"\0" * 23}))
    refused(repacked(data, {"data/0": b"\0" * 25}))
    refused(repacked(data, {"byteorder": b"big"}))
    refused(repacked(data, {}, zipfile.ZIP_DEFLATED))
    refused(repacked(data, {"data.pkl": b"K\x01" * 40_000 + b"."}))
    assert "files in it" in refused(repacked_many(data))


def repacked_many(data: bytes) -> bytes:
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(100):
            archive.writestr(f"more/{number}", b"")
    return file.getvalue()


def test_flipped_bytes_are_an_error_or_do_not_matter() -> None:
    data, generator = saved(torch.ones(2, 3)), random.Random(0)
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(generator.choice((1, 2, 8))):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        if generator.random() < 0.2:
            del broken[generator.randrange(len(broken)) :]
        try:
            found = read_tensor(bytes(broken), 6)
        except ValueError as error:
            assert len(str(error)) < 300
        else:
            assert found.size <= 6 and found.dtype == np.float32
