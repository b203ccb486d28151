"""Rewriting: what of a weight file changes when some weights of its source do, without the graph that it was made for.

The layout of a file follows from the graph alone, so that a plan takes the file with the new bytes as it took the old.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.conversion import NO_SCALES, STORED_DTYPES, Converter, Scales
from export.graph import ScaleSlot, Slots, WeightSlot
from export.quantize import INT4_DTYPE
from export.tensor_source import SCALES, TRANSPOSED, TensorSource
from export.weights import WORKERS, for_each, read_spans
from flux2_trt.errors import BundleError
from flux2_trt.tensor_file import TensorFile

Bytes = npt.NDArray[np.uint8]


def read_slots(path: Path) -> Slots:
    """The parameters that a weight file holds. Raises BundleError where it does not say which of them are scales."""
    file = TensorFile(path)
    if not {TRANSPOSED, SCALES} <= file.metadata.keys():
        raise BundleError(f"{path} was written by an earlier version; build the bundle again")
    owners = json.loads(file.metadata[SCALES])
    transposed = frozenset(file.metadata[TRANSPOSED].split())
    dtypes = {stored: dtype for dtype, (stored, _, _) in STORED_DTYPES.items()}
    weights: dict[str, WeightSlot] = {}
    scales: dict[str, ScaleSlot] = {}
    for name, view in file.tensors.items():
        dtype = dtypes[view.dtype]
        *rows, columns = view.shape
        shape = (*rows, columns * 2 if dtype == INT4_DTYPE else columns)
        if name in owners:
            kind, *of = owners[name]
            scales[name] = ScaleSlot(kind, tuple(of), shape, dtype)
        else:
            weights[name] = WeightSlot(shape, dtype, name in transposed)
    return Slots(weights, scales)


def new_tensors(
    path: Path, names: Collection[str], source: TensorSource, scales: Scales = NO_SCALES
) -> Iterator[tuple[str, Bytes]]:
    """The tensors of the weight file `path` that follow from the weights `names` of `source`, one after the other.

    Each is a name in the file and its new bytes, as long as the old ones: a weight in its format and layout, then its
    scales. Nothing is written: who keeps the weights in device memory copies the bytes there. `scales`: those that the
    file was written with, but for the weights' own (`Scales.without_weights`). Raises CheckpointError where a value is
    not finite.
    """
    slots = read_slots(path)
    converter = Converter(slots, source, scales)
    for name in slots.weights:
        if name in names:
            for part, values in converter.convert(name).items():
                yield part, values.flatten().numpy().view(np.uint8)


def rewrite_weights(
    old: Path,
    new: Path,
    names: Collection[str],
    source: TensorSource,
    scales: Scales = NO_SCALES,
    workers: int = WORKERS,
) -> None:
    """Write to `new` the weight file `old` with the weights `names` from `source`; the file `write_weights` would make.

    Arguments and errors are those of `new_tensors`.
    """
    shutil.copyfile(old, new)
    spans, converter = read_spans(old), Converter(read_slots(old), source, scales)

    def write(name: str) -> None:
        with new.open("r+b") as file:
            for part, values in converter.convert(name).items():
                file.seek(spans[part][0])
                file.write(values.flatten().numpy().data)

    for_each(write, {name: spans[name][1] for name in converter.parts if name in names}, workers)
