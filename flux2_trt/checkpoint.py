"""Checkpoint: the tensors of one component, lazily, under canonical names whatever the layout of the files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flux2_trt.errors import CheckpointError
from flux2_trt.inventory import Shapes, expected_tensors, is_above_used_layers
from flux2_trt.models import FAMILY
from flux2_trt.naming import FAMILIES, Family, Source, canonical_sources
from flux2_trt.quantized import QuantizedTensor, QuantizedWeight, split_quantized
from flux2_trt.shards import open_tensor_files
from flux2_trt.spec import ModelSpec
from flux2_trt.tensor_file import READABLE, Bytes, TensorView

LISTED_NAMES = 8
NOUN: Mapping[Family, str] = {
    "transformer": "transformer",
    "autoencoder": "autoencoder",
    "text_encoder": "text encoder",
}


class Checkpoint:
    """A read-only mapping of canonical tensor names for one component; nothing is read before `read` or `raw`.

    `path`: a .safetensors file, a `*.safetensors.index.json`, a component folder, or a diffusers folder. The layout is
    told from the names of the tensors, never from the name of the file. Raises CheckpointError for files that are
    missing, damaged, or hold another component.
    """

    def __init__(self, path: Path, family: Family) -> None:
        self.path, self.family = Path(path).expanduser(), family
        files = open_tensor_files(self.path, family)
        stored: dict[str, TensorView] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            if twice := stored.keys() & file.tensors.keys():
                raise CheckpointError(f"{path} holds {min(twice)} in two shards; download it again")
            stored |= file.tensors
            self.metadata |= file.metadata
        try:
            plain, quantized = split_quantized(stored, self.metadata)
            tensors: dict[str, TensorView | QuantizedTensor] = {**plain, **quantized}
            sources = canonical_sources(tensors, family)
            if not _templates(family) & {_template(name) for name in sources}:
                raise CheckpointError(f"it holds no {NOUN[family]} of FLUX.2; {_what_else(stored)}")
            self._views = {name: _arranged(name, source, tensors) for name, source in sources.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def __len__(self) -> int:
        return len(self._views)

    def names(self) -> tuple[str, ...]:
        """All but the tensors that are known to be unused; a name that is not understood is the one in the file."""
        return tuple(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._view(name).shape

    def dtype(self, name: str) -> str:
        """As safetensors writes it: "BF16", "F32", "F8_E4M3", ..."""
        return self._view(name).dtype

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.float32]:
        """The tensor as a new float32 array: exact from BF16, F16 and F32, rounded from F64, dequantized from codes.

        `first`, `last`: only these rows of dimension 0 are read, as in a slice.
        Raises CheckpointError for a tensor that the checkpoint lacks or stores in another dtype (`raw` gives those).
        """
        view = self._readable(name)
        whole = first == 0 and last is None
        return view.float32() if whole else view.rows(*slice(first, last).indices(view.shape[0])[:2]).float32()

    def largest(self, name: str) -> float:
        """The largest magnitude in the tensor; NaN or infinity where it holds one. Raises as `read`."""
        return self._readable(name).largest()

    def raw(self, name: str) -> tuple[str, tuple[int, ...], Bytes]:
        """Dtype, shape and the bytes as stored, uint8 `[n]`; a view of the file where they lie in one piece."""
        view = self._view(name)
        return view.dtype, view.shape, view.bytes()

    def weight_scale(self, name: str) -> float | None:
        """The scale of a weight that is stored in FP8 with one; None for all others."""
        view = self._view(name)
        return view.weight_scale if isinstance(view, QuantizedWeight) else None

    def input_scale(self, name: str) -> float | None:
        """The calibrated FP8 scale of a linear's input by the name of its weight; None where the file has none."""
        view = self._view(name)
        return view.input_scale if isinstance(view, QuantizedWeight) else None

    def verify(self, spec: ModelSpec) -> None:
        """Checks names, shapes and dtypes against the spec. Raises CheckpointError that lists what differs."""
        expected, present = expected_tensors(spec, self.family), self._shapes_for(spec)
        missing = [name for name in expected if name not in present]
        extra = [name for name in present if name not in expected]
        misshaped = [
            f"{name} {list(present[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in present and present[name] != shape
        ]
        views = [self._view(name) for name in expected if name in present]
        unreadable = sorted({view.dtype for view in views if not _is_readable(view)})
        if unreadable:
            raise CheckpointError(
                f"{self.path} stores weights as {', '.join(unreadable)}; only {', '.join(READABLE)} are read, give the "
                "BF16 checkpoint"
            )
        if missing or extra or misshaped:
            alike = self._models_alike()
            advice = f"it looks like {' or '.join(alike)}; build that" if alike else "check which model it belongs to"
            lines = [f"{self.path} is not the {NOUN[self.family]} of {spec.name}: {advice}, or give another checkpoint"]
            for title, names in (("missing", missing), ("extra", extra), ("other shape", misshaped)):
                lines += [f"  {title}: {listed(names)}"] if names else []
            raise CheckpointError("\n".join(lines))

    def _readable(self, name: str) -> TensorView | QuantizedWeight:
        view = self._view(name)
        if not _is_readable(view):
            raise CheckpointError(
                f"{self.path}: {name} is {view.dtype}; only {', '.join(READABLE)} are read, give the BF16 checkpoint"
            )
        return view

    def _view(self, name: str) -> TensorView | QuantizedWeight:
        try:
            return self._views[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name}; run `Checkpoint.verify` first") from None

    def _shapes_for(self, spec: ModelSpec) -> Shapes:
        """Without the language model's layers that the spec does not run."""
        shapes = {name: view.shape for name, view in self._views.items()}
        if self.family != "text_encoder":
            return shapes
        return {name: shape for name, shape in shapes.items() if not is_above_used_layers(name, spec)}

    def _models_alike(self) -> list[str]:
        specs = {name: factory() for name, factory in FAMILY.items()}
        return [
            name
            for name, spec in specs.items()
            if (self.family != "text_encoder" or spec.text_encoder)
            and expected_tensors(spec, self.family) == self._shapes_for(spec)
        ]


def _is_readable(view: TensorView | QuantizedWeight) -> bool:
    return isinstance(view, QuantizedWeight) or view.dtype in READABLE


def _arranged(
    name: str, source: Source, stored: Mapping[str, TensorView | QuantizedTensor]
) -> TensorView | QuantizedWeight:
    plain = [part for stem in source.names if isinstance(part := stored[stem], TensorView)]
    quantized = [part for stem in source.names if isinstance(part := stored[stem], QuantizedTensor)]
    if (plain and quantized) or len({(part.layout, part.shape[1]) for part in quantized}) > 1:
        raise CheckpointError(f"{', '.join(source.names)} differ in how they are stored, so that they make no {name}")
    if quantized:
        if source.arrangement != "halves_swapped":
            return QuantizedWeight(tuple(quantized))
        rows = _even_rows(source, quantized[0].shape)
        return QuantizedWeight((quantized[0].rows(rows // 2, rows), quantized[0].rows(0, rows // 2)))
    return _arranged_plainly(name, source, plain)


def _arranged_plainly(name: str, source: Source, parts: list[TensorView]) -> TensorView:
    first = parts[0]
    if any((part.dtype, part.shape[1:]) != (first.dtype, first.shape[1:]) or not part.shape for part in parts[1:]):
        raise CheckpointError(f"{', '.join(source.names)} differ in dtype or width, so that they make no {name}")
    if source.arrangement == "concatenated":
        rows = sum(part.shape[0] for part in parts)
        return TensorView(first.dtype, (rows, *first.shape[1:]), tuple(s for part in parts for s in part.segments))
    if source.arrangement == "halves_swapped":
        data, _ = first.bytes(), _even_rows(source, first.shape)
        return TensorView(first.dtype, first.shape, (data[data.size // 2 :], data[: data.size // 2]))
    if source.arrangement == "pointwise_conv" and len(first.shape) == 2:
        return TensorView(first.dtype, (*first.shape, 1, 1), first.segments)
    return first


def _even_rows(source: Source, shape: tuple[int, ...]) -> int:
    if not shape or shape[0] % 2:
        raise CheckpointError(f"{source.names[0]} has shape {list(shape)}, not two halves along dimension 0")
    return shape[0]


@lru_cache
def _templates(family: Family) -> frozenset[str]:
    specs = [factory() for factory in FAMILY.values()]
    return frozenset(
        _template(name)
        for spec in specs
        if family != "text_encoder" or spec.text_encoder
        for name in expected_tensors(spec, family)
    )


def _template(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _what_else(names: Iterable[str]) -> str:
    names = list(names)
    if any(".lora_" in name for name in names):
        return "it looks like a LoRA; give the checkpoint that the LoRA belongs to"
    others = [
        NOUN[family]
        for family in FAMILIES
        if _templates(family) & {_template(name) for name in canonical_sources(names, family)}
    ]
    if others:
        return f"it looks like {' and '.join(f'the {other}' for other in others)}; check which path is which"
    return f"its first tensor is {names[0]!r}; check the path"


def listed(names: list[str]) -> str:
    rest = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")
