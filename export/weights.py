"""Weight files: the tensors that a graph takes, from a checkpoint, in the format and the layout that it wants.

Several weights are converted at a time, so that the cores round some while the disk reads or writes others.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, nullcontext
from pathlib import Path
from typing import BinaryIO

import onnx
import torch

from export.conversion import NO_SCALES, STORED_DTYPES, Converter, Scales
from export.graph import Graph, ScaleSlot, Slots, WeightSlot
from export.journal import Journal
from export.quantize import INT4_DTYPE
from export.tensor_source import SCALES, TRANSPOSED, TensorSource

WORKERS = max(2, min(2 * (os.cpu_count() or 1), 8))  # half of them may wait for the disk
CONVERTED_BYTES = 2**30  # of all weights that are converted at the same time; a larger one is alone
READ_BYTES = 2**20
HEADER_ALIGNMENT = 64

Span = tuple[int, int]
"""Byte offset and length in a file."""


def write_weights(
    graph: Graph | Slots,
    source: TensorSource,
    path: Path,
    scales: Scales = NO_SCALES,
    journal: Path | None = None,
    workers: int = WORKERS,
) -> dict[str, Span]:
    """Write the weights and scales of `graph` to a safetensors file; returns byte offset and length of each in it.

    `journal`: a file that keeps account of what is written. A call that was killed is finished by another with the same
    graph, source, scales and paths, which converts only what is missing; the bytes are those of one call. Raises
    CheckpointError where a tensor has not the shape that the graph takes, is not finite, or has no input scale.
    """
    converter = Converter(graph, source, scales)
    spans, header = _layout(converter.slots, graph.scales)
    _begin(path, header, spans, converter.input_factors(), resumes=journal is not None)

    def write(name: str) -> None:
        places = [spans[part] for part in converter.parts[name]]
        with path.open("r+b") as file:
            if written and name in written.claims and written.claims[name] == _crc32(file, places):
                return
            parts, crc32 = converter.convert(name), 0
            for (offset, _), part in zip(places, parts.values(), strict=True):
                data = part.view(torch.uint8).numpy().data
                file.seek(offset)
                file.write(data)
                crc32 = zlib.crc32(data, crc32)
        if written:
            written.add(name, crc32)

    with closing(Journal(journal)) if journal else nullcontext() as written:
        sizes = {name: sum(spans[part][1] for part in parts) for name, parts in converter.parts.items()}
        for_each(write, sizes, workers)
    return spans


def _begin(
    path: Path, header: bytes, spans: Mapping[str, Span], factors: Mapping[str, torch.Tensor], resumes: bool
) -> None:
    """A file of full size with all that follows from no weight; one with this header keeps what is in it."""
    start = len(header).to_bytes(8, "little") + header
    with path.open("r+b" if resumes and path.exists() else "w+b") as file:
        if file.read(len(start)) != start:
            file.truncate(0)
        file.truncate(max(offset + length for offset, length in spans.values()))
        file.seek(0)
        file.write(start)
        for name, factor in factors.items():
            file.seek(spans[name][0])
            file.write(factor.numpy().data)


def _crc32(file: BinaryIO, spans: Iterable[Span]) -> int:
    crc32 = 0
    for offset, length in spans:
        file.seek(offset)
        for begin in range(0, length, READ_BYTES):
            crc32 = zlib.crc32(file.read(min(READ_BYTES, length - begin)), crc32)
    return crc32


def for_each(work: Callable[[str], None], sizes: Mapping[str, int], workers: int) -> None:
    """Calls `work` in threads, with no more than `CONVERTED_BYTES` at a time; ends at the first error."""
    running: dict[Future[None], int] = {}

    def finish_one() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            del running[future]
            future.result()

    threads = torch.get_num_threads()
    try:
        # The workers are the threads: each computes in one.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, size in sizes.items():
                while len(running) == workers or (running and sum(running.values()) + size > CONVERTED_BYTES):
                    finish_one()
                running[pool.submit(work, name)] = size
            while running:
                finish_one()
    finally:
        torch.set_num_threads(threads)


def read_spans(path: Path) -> dict[str, Span]:
    """Byte offset and length of every tensor in a weight file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    del entries["__metadata__"]
    start = 8 + length
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    return {name: (start + first, last - first) for name, (first, last) in offsets.items()}


def place_external(graph: Graph, spans: Mapping[str, Span], file_name: str) -> onnx.ModelProto:
    """The graph with its weights and scales as constants whose data are in the weight file `file_name`."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for index in reversed(range(len(model.graph.input))):
        value = model.graph.input[index]
        if value.name not in spans:
            continue
        offset, length = spans[value.name]
        tensor = model.graph.initializer.add()
        tensor.name = value.name
        tensor.data_type = value.type.tensor_type.elem_type
        tensor.dims.extend(side.dim_value for side in value.type.tensor_type.shape.dim)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", file_name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)
        del model.graph.input[index]
    return model


def _layout(slots: Mapping[str, WeightSlot], scales: Mapping[str, ScaleSlot]) -> tuple[dict[str, Span], bytes]:
    """Where each tensor lies in the file, those of wide elements first, and the file's JSON header."""
    entries, places, position = {}, {}, 0
    for name, slot in sorted(slots.items(), key=lambda item: -STORED_DTYPES[item[1].dtype][1]):
        dtype, bits, _ = STORED_DTYPES[slot.dtype]
        length = math.prod(slot.shape) * bits // 8
        *rows, columns = slot.shape
        shape = [*rows, columns // 2 if slot.dtype == INT4_DTYPE else columns]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        places[name] = (position, length)
        position += length
    transposed = " ".join(sorted(name for name, slot in slots.items() if slot.transposed))
    owners = json.dumps({name: [scale.kind, *scale.weights] for name, scale in sorted(scales.items())})
    metadata = {TRANSPOSED: transposed, SCALES: owners}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header = header.ljust(-(-(len(header) + 8) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8)
    start = len(header) + 8
    return {name: (start + first, length) for name, (first, length) in places.items()}, header
