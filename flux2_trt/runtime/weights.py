"""Weights on a device: uploaded once through pinned memory, shared by every plan that names their file.

A weight file is mapped, never read whole. A component's weights are resident, or swapped in for its stage and out
after it, or streamed block by block in every step (`flux2_trt.runtime.blocks`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flux2_trt.errors import BundleError
from flux2_trt.runtime.device import Address, Device, Layout, Scope, host_bytes
from flux2_trt.tensor_file import TensorFile

CHUNK_BYTES = 2**24
"""Of pinned memory, twice for each thread: one fills while the other is copied."""
FILLERS = min(8, os.cpu_count() or 1)
"""Threads: one alone fills pinned memory more slowly than the bus empties it."""

Bytes = NDArray[np.uint8]


class WeightSource(Protocol):
    """Where the bytes of a component's weights come from, in the layout that its plan takes."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def read(self, name: str) -> Bytes:
        """The bytes of a tensor [n], read-only."""
        ...

    def check(self) -> None:
        """Raises BundleError where what was read is not what was opened."""
        ...


class MappedFile:
    """A weight file of a bundle. Raises BundleError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = TensorFile(path).tensors
        self._state = self._stat()
        self.sizes = {name: sum(part.size for part in view.segments) for name, view in self._tensors.items()}

    def read(self, name: str) -> Bytes:
        return self._tensors[name].bytes()

    def check(self) -> None:
        """A file that is written to while it is mapped gives bytes of both."""
        if self._stat() != self._state:
            raise BundleError(f"{self.path} was changed while it was read; verify it: flux2-trt bundles verify")

    def _stat(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns


class Weights:
    """Some tensors of a source, all of them on the device or none."""

    def __init__(self, device: Device, source: WeightSource, names: Iterable[str] | None = None) -> None:
        self._device, self._source = device, source
        self.layout = Layout.of({name: source.sizes[name] for name in (source.sizes if names is None else names)})
        self._scope: Scope | None = None
        self._addresses: dict[str, Address] = {}
        self._users = 0

    @property
    def loaded(self) -> bool:
        return self._scope is not None

    def acquire(self) -> Mapping[str, Address]:
        """Their addresses, after an upload where they are not on the device; `release` ends the use of them."""
        if self._scope is None:
            scope = Scope(self._device)
            with scope.filling():
                base = scope.buffer(self.layout.bytes)
                upload(self._device, self._source, self.layout, base)
            self._scope, self._addresses = scope, self.layout.addresses(base)
        self._users += 1
        return self._addresses

    def release(self) -> None:
        """They stay on the device for the next user, until `unload`."""
        self._users -= 1

    def unload(self) -> None:
        """Frees the memory, if nobody uses it."""
        if self._scope is not None and self._users == 0:
            scope, self._scope = self._scope, None
            scope.close()


class WeightStore:
    """The weights on one device: plans that name the same file use the same memory."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._weights: dict[tuple[str, ...], Weights] = {}

    def get(self, digest: str, source: WeightSource, names: Iterable[str] | None = None) -> Weights:
        """`digest`: the file's; `names`: some of its tensors, all where None."""
        key = (digest, *(() if names is None else sorted(names)))
        return self._weights.setdefault(key, Weights(self.device, source, names))

    @property
    def loaded_bytes(self) -> int:
        return sum(weights.layout.bytes for weights in self._weights.values() if weights.loaded)

    def unload(self, but: Collection[Weights] = ()) -> None:
        """Frees what nobody uses, and keeps `but`."""
        for weights in self._weights.values():
            if weights not in but:
                weights.unload()


def upload(device: Device, source: WeightSource, layout: Layout, base: Address) -> None:
    """All tensors to `base`, a chunk at a time; returns when they are there."""
    with Scope(device) as scope:
        stream = scope.stream()
        slots = [(scope.pinned(CHUNK_BYTES), scope.event()) for _ in range(2 * FILLERS)]
        scope.callback(device.synchronize, stream)  # before what it reads from is freed
        threads = scope.enter_context(ThreadPoolExecutor(FILLERS, "upload"))
        filling: deque[tuple[Future[None], Address, int]] = deque()

        def copy_oldest(used: int) -> None:
            filled, target, size = filling.popleft()
            filled.result()
            pinned, copied = slots[(used - len(filling) - 1) % len(slots)]
            device.copy(target, pinned, size, stream)
            device.record(copied, stream)

        used = 0
        for target, piece in _chunks(source, layout, base):
            pinned, copied = slots[used % len(slots)]
            if used >= len(slots):
                device.wait_on_host(copied)
            filling.append((threads.submit(_fill, pinned, piece), target, piece.size))
            used += 1
            if len(filling) == FILLERS:
                copy_oldest(used)
        while filling:
            copy_oldest(used)
    source.check()


def _chunks(source: WeightSource, layout: Layout, base: Address) -> Iterator[tuple[Address, Bytes]]:
    for name, size in layout.sizes.items():
        data = source.read(name)
        for begin in range(0, size, CHUNK_BYTES):
            yield Address(base + layout.offsets[name] + begin), data[begin : begin + CHUNK_BYTES]


def _fill(pinned: Address, piece: Bytes) -> None:
    host_bytes(pinned, piece.size)[:] = piece
