"""TensorFile: one .safetensors file, its header checked and its data mapped, not read.

Format (huggingface/safetensors, README "Format"): 8 bytes with the header's length, little-endian; the header, a JSON
object `name -> {dtype, shape, data_offsets}`; then the tensors, row-major and back to back.
"""

from __future__ import annotations

import io
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flux2_trt.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit; dev's header has 40 kB
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
READABLE = ("BF16", "F16", "F32", "F64")
VALUES_AT_ONCE = 2**20  # few enough to stay in a core's cache
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TensorView:
    """A tensor on disk: `segments` are mapped bytes which, one after the other, are its rows."""

    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Bytes, ...]

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows(self, first: int, last: int) -> TensorView:
        """Those from `first` up to `last`, without it, along dimension 0; still on disk."""
        row_bytes = math.prod(self.shape[1:]) * BITS[self.dtype] // 8
        segments, start = [], 0
        for segment in self.segments:
            segments.append(segment[max(first * row_bytes - start, 0) : max(last * row_bytes - start, 0)])
            start += segment.size
        return TensorView(self.dtype, (last - first, *self.shape[1:]), tuple(part for part in segments if part.size))

    def bytes(self) -> Bytes:
        """The stored bytes as uint8 `[n]`, read-only and not copied where the tensor lies in one piece."""
        return self.segments[0] if len(self.segments) == 1 else np.concatenate(self.segments)

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32: exact from BF16, F16 and F32, rounded from F64. For dtypes in `READABLE` only."""
        values = np.empty(self.size, np.float32)
        start = 0
        for segment in self.segments:
            stored = segment.view(_STORED[self.dtype])
            part = values[start : start + stored.size]
            if self.dtype == "BF16":  # the upper half of a float32
                np.left_shift(stored, 16, out=part.view(np.uint32), dtype=np.uint32)
            else:
                part[:] = stored
            start += stored.size
        return values.reshape(self.shape)

    def largest(self) -> float:
        """The largest magnitude; NaN or infinity where there is one. For dtypes in `READABLE` only."""
        largest = np.zeros((), np.float32)
        for segment in self.segments:
            stored = segment.view(_STORED[self.dtype])
            for begin in range(0, stored.size, VALUES_AT_ONCE):
                values = stored[begin : begin + VALUES_AT_ONCE]
                if self.dtype == "BF16":  # without the sign they are in the order of their bits, NaN after infinity
                    top = np.bitwise_and(values, 0x7FFF).max().astype(np.uint32) << np.uint32(16)
                    largest = np.maximum(largest, top.view(np.float32))
                else:
                    largest = np.maximum(largest, np.abs(values).max().astype(np.float32))
        return float(largest)


class TensorFile:
    """The tensors of one .safetensors file by the names they have there.

    `data`: its bytes, where it is not on disk; `path` then is what messages call it. The mapping lives as long as a
    view of it. Raises CheckpointError for a file that is missing, empty, truncated, inconsistent, or of another format.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        mapped: mmap.mmap | bytes
        try:
            with path.open("rb") if data is None else io.BytesIO(data) as file:
                file_bytes = path.stat().st_size if data is None else len(data)
                header = _read_header(path, file, file_bytes)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if data is None else data
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; check the path or download it again") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self.metadata = _metadata(path, header.values.pop("__metadata__", {}))
        stored = np.frombuffer(mapped, np.uint8)[header.data_start :]
        self.tensors: Mapping[str, TensorView] = _views(path, header.values, stored)


@dataclass(frozen=True)
class _Header:
    values: dict[str, Any]
    data_start: int


def _read_header(path: Path, file: Any, file_bytes: int) -> _Header:
    start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    header_bytes = int.from_bytes(start[:8], "little")
    if len(start) < 9 or not 2 <= header_bytes <= MAX_HEADER_BYTES or start[8:9] != b"{":
        raise CheckpointError(f"{path} is not a .safetensors file; give the .safetensors file of the model")
    data_start = 8 + header_bytes
    if file_bytes < data_start:
        raise _truncated(path, file_bytes, f"at least {data_start}")
    file.seek(8)
    try:
        values = json.loads(file.read(header_bytes).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    return _Header(values, data_start)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values


def _metadata(path: Path, values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise _damaged(path, "its __metadata__ is not a table of strings")
    return values


def _views(path: Path, entries: Mapping[str, Any], data: Bytes) -> dict[str, TensorView]:
    if not entries:
        raise CheckpointError(f"{path} holds no tensors; download it again")
    checked = {name: _check_entry(path, name, entry) for name, entry in entries.items()}
    promised = max(end for _, _, _, end in checked.values())
    if promised > data.size:
        raise _truncated(path, data.size, str(promised), "of tensors")
    position = 0
    for name, (_, _, begin, end) in sorted(checked.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise _damaged(path, f"{name} {what}")
        position = end
    if position != data.size:
        raise _damaged(path, f"{data.size - position} bytes follow the last tensor")
    return {name: TensorView(dtype, shape, (data[begin:end],)) for name, (dtype, shape, begin, end) in checked.items()}


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"{name} has dtype {dtype!r}, which safetensors does not define")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name} has shape {shape} and data_offsets {offsets}")
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise _damaged(path, f"{name} is {dtype} {shape} but has {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _truncated(path: Path, found: int, promised: str, what: str = "in all") -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {found} of {promised} bytes {what}; download it again")


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}; download it again")
