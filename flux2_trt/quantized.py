"""Quantized weights of public checkpoints: FP8 and NVFP4 codes with their scales, read as float32.

What the files hold for a linear `x`, whose weight is [N, K]:

    fp8            x.weight F8_E4M3 [N, K], x.weight_scale F32 [] (or x.scale_weight)
    fp8 by rows    x.weight F8_E4M3 [N, K], x.weight_scale F32 [N] or [N, 1]
    nvfp4          x.weight U8 [N, K/2], the even column in the low bits; x.weight_scale F8_E4M3 [N, K/16];
                   x.weight_scale_2 F32 []                       (diffusers `quantizers/bfl/utils.py`)
    nvfp4 blocked  as nvfp4, but the even column in the high bits, and x.weight_scale [N up to 128s, K/16 up to 4s] in
                   cuBLAS' order of 128x4 blocks                 (BFL's and ComfyUI's files; comfy-kitchen packs them)

and perhaps x.input_scale F32 [] (or x.scale_input), the calibrated scale of its input. The shapes of FLUX.2 do not tell
the two NVFP4 layouts apart, so the header must.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from flux2_trt.errors import CheckpointError
from flux2_trt.tensor_file import VALUES_AT_ONCE, Bytes, TensorView

Layout = Literal["fp8", "fp8 by rows", "nvfp4", "nvfp4 blocked"]
Floats: TypeAlias = "npt.NDArray[np.float32]"

WEIGHT_SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")
OUTER_SCALE, MARK = "weight_scale_2", "comfy_quant"
COMPANIONS = (*WEIGHT_SCALES, *INPUT_SCALES, OUTER_SCALE, MARK)
WHOLE_FILE_MARK = "scaled_fp8"  # older ComfyUI: says that scales follow, and holds nothing
BFL_METADATA, DIFFUSERS_METADATA = "_quantization_metadata", "quantization"
CODES = {"float8_e4m3fn": "F8_E4M3", "nvfp4": "U8"}
NVFP4_BLOCK = 16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""The values of the 8 positive codes of NVFP4."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """The weight [N, K] of one linear as it is stored."""

    layout: Layout
    codes: TensorView
    scale: Floats
    outer_scale: float = 1.0
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * (1 if self.layout.startswith("fp8") else 2)

    def rows(self, first: int, last: int) -> QuantizedTensor:
        """Those from `first` up to `last`, without it; still on disk."""
        scale = self.scale if self.layout == "fp8" else self.scale.reshape(self.shape[0], -1)[first:last]
        return replace(self, codes=self.codes.rows(first, last), scale=scale)

    def float32(self) -> Floats:
        """The values, [N, K]."""
        codes = self.codes.bytes().reshape(self.codes.shape)
        if self.layout.startswith("fp8"):
            values = e4m3_values()[codes]
            values *= self.scale.reshape(-1, 1)
            return values
        low, high = codes & 15, codes >> 4
        order = (high, low) if self.layout == "nvfp4 blocked" else (low, high)
        values = e2m1_values()[np.stack(order, axis=-1)].reshape(len(codes), -1, NVFP4_BLOCK)
        values *= (self.scale * np.float32(self.outer_scale))[:, :, None]
        return values.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A canonical weight [N, K]: stored ones, or rows of them, one below the other."""

    parts: tuple[QuantizedTensor, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].codes.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def weight_scale(self) -> float | None:
        """The one scale of all FP8 codes; None where there are several."""
        scales = {float(scale) for part in self.parts for scale in part.scale.flat}
        return scales.pop() if self.parts[0].layout == "fp8" and len(scales) == 1 else None

    @property
    def input_scale(self) -> float | None:
        """The largest of the parts', which share their input; None where one has none, and for NVFP4's finer ones."""
        scales = [part.input_scale for part in self.parts if part.layout == "fp8" and part.input_scale is not None]
        return max(scales) if len(scales) == len(self.parts) else None

    def rows(self, first: int, last: int) -> QuantizedWeight:
        """Those from `first` up to `last`, without it; still on disk."""
        parts, start = [], 0
        for part in self.parts:
            begin, end = (min(max(row - start, 0), part.shape[0]) for row in (first, last))
            if begin < end:
                parts.append(part.rows(begin, end))
            start += part.shape[0]
        return QuantizedWeight(tuple(parts))

    def float32(self) -> Floats:
        values = [part.float32() for part in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values)

    def largest(self) -> float:
        """The largest magnitude; NaN where a code or a scale is NaN."""
        rows, columns = self.shape
        step = max(VALUES_AT_ONCE // columns, 1)
        pieces = (self.rows(first, min(first + step, rows)).float32() for first in range(0, rows, step))
        return float(np.max([np.abs(piece).max() for piece in pieces]))

    def bytes(self) -> Bytes:
        """The codes."""
        codes = [part.codes.bytes() for part in self.parts]
        return codes[0] if len(codes) == 1 else np.concatenate(codes)


def split_quantized(
    stored: Mapping[str, TensorView], metadata: Mapping[str, str]
) -> tuple[dict[str, TensorView], dict[str, QuantizedTensor]]:
    """The tensors of a file that are no quantized weights, nor belong to one; and those that are, by weight name.

    Raises CheckpointError for a layout that is unknown or contradicts itself, with what was found.
    """
    owners = {name: name.rsplit(".", 1)[0] for name in stored if name.rsplit(".", 1)[-1] in COMPANIONS}
    formats = _named_formats(stored, metadata)
    quantized = {}
    for owner in dict.fromkeys(owners.values()):
        weight = f"{owner}.weight"
        if weight in stored:
            tensor = _quantized(owner, stored, formats, metadata)
            if tensor is not None:
                quantized[weight] = tensor
    for weight, format_name in formats.items():
        if weight in stored and weight not in quantized:
            raise CheckpointError(
                f"its header calls {weight} {format_name}, but it is {stored[weight].dtype} without scales"
            )
    known = {name for name, owner in owners.items() if f"{owner}.weight" in stored}
    plain = {
        name: view
        for name, view in stored.items()
        if name not in quantized and name not in known and name.rsplit(".", 1)[-1] != WHOLE_FILE_MARK
    }
    return plain, quantized


def _named_formats(stored: Mapping[str, TensorView], metadata: Mapping[str, str]) -> dict[str, str]:
    """Formats by weight name, as the header or a linear's own mark say them."""
    formats: dict[str, str] = {}
    try:
        layers = json.loads(metadata.get(BFL_METADATA, "{}")).get("layers", {})
        formats |= {f"{name}.weight": layer["format"] for name, layer in layers.items()}
        for name, view in stored.items():
            if name.endswith(f".{MARK}"):
                weight = f"{name.removesuffix(MARK)}weight"
                formats[weight] = json.loads(view.bytes().tobytes())["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"what it says of its quantization cannot be read ({error!r})") from error
    unknown = sorted(set(formats.values()) - set(CODES))
    if unknown:
        raise CheckpointError(f"it is quantized as {', '.join(unknown)}; {' and '.join(CODES)} are read")
    return formats


def _quantized(
    owner: str, stored: Mapping[str, TensorView], formats: Mapping[str, str], metadata: Mapping[str, str]
) -> QuantizedTensor | None:
    def found(names: tuple[str, ...]) -> TensorView | None:
        there = [stored[f"{owner}.{name}"] for name in names if f"{owner}.{name}" in stored]
        if len(there) > 1:
            raise CheckpointError(f"{owner} has both {' and '.join(names)}")
        return there[0] if there else None

    weight = f"{owner}.weight"
    codes, scale, outer = stored[weight], found(WEIGHT_SCALES), found((OUTER_SCALE,))
    input_scale = None if (view := found(INPUT_SCALES)) is None else _scalar(f"{owner}: input scale", view)
    expected = CODES.get(formats.get(weight, ""), codes.dtype)
    if scale is None and outer is None and weight not in formats:
        return None  # a bare input scale beside a weight in full
    described = f"{weight} is {codes.dtype} {list(codes.shape)}" + (
        "" if scale is None else f" with a scale {scale.dtype} {list(scale.shape)}"
    )
    if scale is None or len(codes.shape) != 2 or codes.dtype != expected:
        named = f", and its header says {formats[weight]}" if weight in formats else ""
        raise CheckpointError(f"{described}{named}, which is no layout that is read")
    rows, columns = codes.shape
    if codes.dtype == "F8_E4M3" and outer is None and scale.dtype == "F32":
        if scale.size == 1:
            return QuantizedTensor("fp8", codes, scale.float32(), input_scale=input_scale)
        if scale.size == rows:
            return QuantizedTensor("fp8 by rows", codes, scale.float32(), input_scale=input_scale)
    if codes.dtype == "U8" and outer is not None and scale.dtype == "F8_E4M3" and columns * 2 % NVFP4_BLOCK == 0:
        plain, blocks = metadata.get(DIFFUSERS_METADATA) == "nvfp4", columns * 2 // NVFP4_BLOCK
        if plain == (formats.get(weight) == "nvfp4"):
            says = "both of them" if plain else "neither"
            raise CheckpointError(
                f"{weight} is NVFP4 in one of two layouts, and the header names {says} "
                f"({DIFFUSERS_METADATA}: nvfp4, or a layer of {BFL_METADATA}); give a file with its original header"
            )
        shape = (rows, blocks) if plain else (-(-rows // 128) * 128, -(-blocks // 4) * 4)
        if scale.shape == shape:
            values = e4m3_values()[scale.bytes()].reshape(shape)
            values = values if plain else unblocked(values)[:rows, :blocks]
            layout: Layout = "nvfp4" if plain else "nvfp4 blocked"
            return QuantizedTensor(layout, codes, values, _scalar(f"{owner}: {OUTER_SCALE}", outer), input_scale)
    raise CheckpointError(f"{described}, which is no layout that is read")


def unblocked(scales: Floats) -> Floats:
    """Scales [R, C] out of cuBLAS' order, in which blocks of 128x4 lie one after the other, each as 32x4x4.

    Source: cuBLAS documentation, "1D Block Scaling Factors Layout".
    """
    rows, columns = scales.shape
    blocks = scales.reshape(rows // 128, columns // 4, 32, 4, 4)
    return blocks.transpose(0, 3, 2, 1, 4).reshape(rows, columns)


def _scalar(what: str, view: TensorView) -> float:
    if view.dtype != "F32" or view.size != 1:
        raise CheckpointError(f"{what} is {view.dtype} {list(view.shape)}, not one F32")
    value = float(view.float32().reshape(()))
    if not np.isfinite(value) or value <= 0:
        raise CheckpointError(f"{what} is {value}, not a positive number")
    return value


@cache
def e4m3_values() -> Floats:
    """The 256 values of F8_E4M3 (OCP 8-bit floating point): bias 7, no infinities, NaN at 0x7F and 0xFF."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


@cache
def e2m1_values() -> Floats:
    """The 16 values of E2M1: the upper 8 are the negative ones."""
    return np.concatenate([E2M1, -E2M1])
