"""Records: frozen dataclasses as JSON and back, strictly. The dataclass is the schema."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class RecordError(ValueError):
    """Values that are not those of the record; says where, and what was expected."""


def from_json(kind: type[T], values: Any) -> T:
    """The record of JSON values: every field there, none unknown, each of its type, all numbers finite.

    Raises RecordError.
    """
    return _read(kind, values, "result")


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _record(kind, value, where)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        others = [each for each in arguments if each is not type(None)]
        return None if value is None and len(others) < len(arguments) else _read(others[0], value, where)
    if origin is Literal:
        _require(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        _require(isinstance(value, list), where, "a list", value)
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        _require(len(kinds) == len(value), where, f"{len(kinds)} values", value)
        return tuple(
            _read(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, dict), where, "an object", value)
        return {name: _read(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    return _plain(kind, value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), where, "an object", value)
    names = [field.name for field in fields(kind)]
    if missing := [name for name in names if name not in value]:
        raise RecordError(f"{where} lacks {', '.join(missing)}")
    if unknown := [name for name in value if name not in names]:
        raise RecordError(f"{where} has the unknown {', '.join(unknown)}")
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names})


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        _require(math.isfinite(value), where, "a finite number", value)
        return float(value)
    _require(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _require(condition: bool, where: str, expected: str, value: Any) -> None:
    if not condition:
        text = repr(value)
        raise RecordError(f"{where} is {text if len(text) <= 60 else text[:60] + '…'}, not {expected}")
