"""Values come back bit for bit, lazily; a damaged file is refused before a tensor of it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from flux2_trt.errors import CheckpointError
from flux2_trt.tensor_file import TensorFile


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_bfloat16_is_exact(tmp_path: Path) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(256, 256)
    save_torch_file({"x": values}, tmp_path / "x.safetensors")
    view = TensorFile(tmp_path / "x.safetensors").tensors["x"]
    assert (view.dtype, view.shape) == ("BF16", (256, 256))
    np.testing.assert_array_equal(view.float32().view(np.uint32), values.float().numpy().view(np.uint32))  # NaNs too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_magnitude_is_torchs(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.randn(3, 2**19 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    bad = {"nan": float("nan"), "-inf": float("-inf")}
    tensors = {"x": values, "zeros": torch.zeros(2, dtype=dtype)}
    tensors |= {name: torch.tensor([1.0, value, 2.0], dtype=dtype) for name, value in bad.items()}
    save_torch_file(tensors, path)
    views = TensorFile(path).tensors
    assert views["x"].largest() == values.abs().max().float()
    assert views["zeros"].largest() == 0
    assert np.isnan(views["nan"].largest())
    assert views["-inf"].largest() == np.inf


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_other_floats(tmp_path: Path, dtype: type) -> None:
    values: Any = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    save_file(
        {"x": values, "scalar": np.array(2, dtype), "nothing": np.zeros((0, 4), dtype)}, tmp_path / "x.safetensors"
    )
    tensors = TensorFile(tmp_path / "x.safetensors").tensors
    np.testing.assert_array_equal(tensors["x"].float32(), values.astype(np.float32))
    assert tensors["scalar"].float32() == 2 and tensors["scalar"].shape == ()
    assert tensors["nothing"].float32().shape == (0, 4)


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], "<f4")
    header = json.dumps({"a": entry(0, 1), "b": entry(1, 9, "F32", [2])}).encode()
    for padding in range(4):
        path = written(tmp_path / "x.safetensors", header + b" " * padding, b"\0" + values.tobytes())
        np.testing.assert_array_equal(TensorFile(path).tensors["b"].float32(), values)


def test_bytes_are_a_read_only_view(tmp_path: Path) -> None:
    save_file({"x": np.arange(4, dtype=np.uint8)}, tmp_path / "x.safetensors")
    data = TensorFile(tmp_path / "x.safetensors").tensors["x"].bytes()
    assert data.tolist() == [0, 1, 2, 3] and not data.flags.writeable and not data.flags.owndata


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to tell resident memory")
def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    size = 2**31  # a sparse file: no disk, and no RAM unless somebody reads it
    path = written(tmp_path / "x.safetensors", {"x": entry(0, size, "F16", [size // 2]), "y": entry(size, size + 8)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size + 8)
    before = resident_bytes()
    assert TensorFile(path).tensors["y"].bytes().tolist() == [0] * 8
    assert resident_bytes() - before < size / 8


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert "is missing" in refused(path)
    path.write_bytes(b"")
    assert "is empty" in refused(path)
    for content in (b"x", b"A text file that somebody renamed.", b"PK\3\4" + bytes(60), bytes(100), b"<html></html>"):
        path.write_bytes(content)
        assert "is not a .safetensors file" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    assert "git lfs pull" in refused(path)
    assert "cannot be read" in refused(tmp_path)


def test_truncated_at_any_length(tmp_path: Path) -> None:
    save_file({"x": np.zeros((8, 8)), "y": np.zeros(5, np.int8)}, tmp_path / "whole.safetensors")
    whole, path = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "x.safetensors"
    for length in range(9, len(whole)):
        path.write_bytes(whole[:length])
        assert "is truncated" in refused(path)
    path.write_bytes(whole + b"\0")
    assert "1 bytes follow the last tensor" in refused(path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{not json}", "not valid JSON"),
        (b'{"a":\xff}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', "'a' occurs twice"),
        ({}, "holds no tensors"),
        ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, "__metadata__"),
        ({"a": [1]}, "not described by"),
        ({"a": entry(0, 8) | {"stride": 1}}, "not described by"),
        ({"a": entry(0, 8, "FP8")}, "dtype 'FP8'"),
        ({"a": entry(0, 8, shape=[-8])}, "shape [-8]"),
        ({"a": entry(0, 8, shape=[True, 8])}, "shape [True, 8]"),
        ({"a": entry(0, 8, shape=[8.0])}, "shape [8.0]"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}, "data_offsets [8, 0]"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}}, "data_offsets [0, 4, 8]"),
        ({"a": entry(0, 8, "F32", [3])}, "is F32 [3] but has 8 bytes"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, "but has 8 bytes"),
        ({"a": entry(0, 5), "b": entry(3, 8)}, "b overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "b overlaps the tensor before it"),
        ({"a": entry(0, 3), "b": entry(5, 8)}, "b leaves a gap before it"),
        ({"a": entry(0, 9)}, "is truncated: 8 of 9 bytes of tensors"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, reason: str) -> None:
    assert reason in refused(written(tmp_path / "x.safetensors", header, bytes(8)))
