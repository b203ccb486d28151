"""TorchFile: one dense tensor out of what `torch.save` wrote, without unpickling it and without torch.

The file is a zip archive with the tensor's description as a pickle and its numbers as plain bytes (torch
`serialization.py`, "_save"). A pickle is a program. This reader runs none: it walks through the opcodes (Python's
`pickletools`) with a stack of plain values, knows the two dozen that describe a dense tensor, and refuses every other;
names of functions are compared and never looked up.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 64 * 2**10  # of a tensor it has about 300
MAX_ENTRIES = 64

_REBUILD = "torch._utils _rebuild_tensor_v2"
_HOOKS = "collections OrderedDict"
# What numpy reads the elements as; bfloat16 is the upper half of a float32.
_STORAGE = {"torch FloatStorage": "f4", "torch HalfStorage": "f2", "torch BFloat16Storage": "u2"}
_BFLOAT16 = "torch BFloat16Storage"
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()
_NO_HOOKS = object()


def read_tensor(data: bytes, max_elements: int) -> NDArray[np.float32]:
    """The tensor as float32: exact from float32, float16 and bfloat16, the dtypes that are read.

    Raises ValueError for anything else: another type or layout, more than `max_elements` numbers, a file that is
    damaged or means to do harm. Nothing of it is run, and no more memory is taken than for the result.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise ValueError(f"{len(entries)} files in it")
            root = next((entry.filename.split("/")[0] for entry in entries if entry.filename.endswith("/data.pkl")), "")
            tensor = _described(_entry(archive, f"{root}/data.pkl", MAX_PICKLE_BYTES))
            if f"{root}/byteorder" in archive.namelist() and _entry(archive, f"{root}/byteorder", 16) != b"little":
                raise ValueError("its bytes are in another order")
            stored = _entry(archive, f"{root}/data/{tensor.storage.key}", len(data))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, UnicodeError) as error:
        raise ValueError(f"it is no file of torch.save ({error})") from None
    return _elements(tensor, stored, max_elements)


def _entry(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError("it is no file of torch.save: a part is missing") from None
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or not 0 < info.file_size <= max_bytes:
        raise ValueError("it is no file of torch.save: a part is compressed or too large")
    return archive.read(info)


def _described(pickle: bytes) -> _Tensor:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for name, argument in _opcodes(pickle):
        if name == "STOP":
            if len(stack) == 1 and isinstance(stack[0], _Tensor):
                return stack[0]
            raise ValueError("it holds no tensor")
        try:
            _step(name, argument, stack, memo)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError("its pickle is damaged") from error
    raise ValueError("its pickle has no end")


def _opcodes(pickle: bytes) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            yield opcode.name, argument
    except (ValueError, IndexError, OverflowError, UnicodeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in ("PROTO", "FRAME"):
        return
    if name in _NUMBERS or name in _TEXTS:
        stack.append(argument)
    elif name in ("NEWTRUE", "NEWFALSE"):
        stack.append(name == "NEWTRUE")
    elif name == "NONE":
        stack.append(None)
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_TUPLE":
        stack.append(())
    elif name == "TUPLE":
        stack.append(_since_mark(stack))
    elif name in _TUPLES:
        values = tuple(stack.pop() for _ in range(_TUPLES[name]))
        stack.append(values[::-1])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_known(argument))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_known(f"{module} {attribute}"))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_applied(function, arguments))
    else:
        raise ValueError(f"its pickle has {name}, which no dense tensor needs")


def _since_mark(stack: list[Any]) -> tuple[Any, ...]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return tuple(reversed(values))


def _known(name: str) -> _Name:
    if name not in (_REBUILD, _HOOKS, *_STORAGE):
        raise ValueError(f"its pickle names {name.replace(' ', '.')[:60]!r}, which no dense float tensor needs")
    return _Name(name)


def _storage(identity: Any) -> _Storage:
    kind, storage, key, _, size = _tuple_of(5, identity)
    if kind != "storage" or not isinstance(storage, _Name) or storage.name not in _STORAGE:
        raise ValueError("its numbers are not where a dense float tensor has them")
    if not isinstance(key, str) or not key.isalnum() or not _is_size(size):
        raise ValueError("its numbers are not where a dense float tensor has them")
    return _Storage(storage.name, key, size)


def _applied(function: Any, arguments: Any) -> Any:
    if function == _Name(_HOOKS) and arguments == ():
        return _NO_HOOKS
    if function != _Name(_REBUILD) or not isinstance(arguments, tuple) or len(arguments) not in (6, 7):
        raise ValueError("its pickle calls what no dense tensor needs")
    storage, offset, shape, strides, _, hooks = arguments[:6]
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 8
    if not isinstance(storage, _Storage) or hooks is not _NO_HOOKS or not sizes or any(arguments[6:]):
        raise ValueError("its tensor is not a dense one")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("its tensor has impossible sizes")
    return _Tensor(storage, offset, shape, strides)


def _tuple_of(length: int, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != length:
        raise ValueError("its pickle is damaged")
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _elements(tensor: _Tensor, stored: bytes, max_elements: int) -> NDArray[np.float32]:
    if math.prod(tensor.shape) > max_elements:
        raise ValueError(f"its tensor {list(tensor.shape)} is larger than what was asked for")
    kind = np.dtype("<" + _STORAGE[tensor.storage.kind])
    if 0 in tensor.shape or len(stored) != tensor.storage.size * kind.itemsize:
        raise ValueError("its tensor is empty, or has other bytes than it says")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= tensor.storage.size:
        raise ValueError("its tensor reaches beyond its numbers")
    flat = np.frombuffer(stored, kind)[tensor.offset :]
    strides = tuple(stride * kind.itemsize for stride in tensor.strides)
    values = as_strided(flat, tensor.shape, strides, writeable=False)
    if tensor.storage.kind != _BFLOAT16:
        return np.array(values, np.float32)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
