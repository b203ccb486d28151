"""Writing: pictures become files, by threads while later ones are drawn; what came of each is told in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from flux2_trt.finishing import PictureSettings, executor_of
from flux2_trt.imprint import File
from flux2_trt.outputs import format_of, write_file
from flux2_trt.watermark import Pixels

THREADS = 4
"""A marked PNG of a megapixel takes one core 0.4 s, twice as long as the fastest model and GPU draw it."""


@dataclass(frozen=True)
class _Taken:
    """A picture, counted from 1: why it was refused, or its file."""

    number: int
    name: Path
    refused: str | None
    file: Future[File] | None


class Writing:
    """The files of a request's pictures, whose `names` are the caller's.

    `put` takes pictures, from any thread. With `threads` these make the files; without, `put` does, and raises. `tell`
    and the end of the block say what is done, in order, to `on_written` and `warn`, on the caller's thread. A block
    that fails starts on no more files, and waits for those that it has begun: each is whole, or not there.
    """

    def __init__(
        self,
        names: Sequence[Path],
        imprinted: Callable[[PictureSettings, Pixels, str], File],
        on_written: Callable[[Path], None],
        warn: Callable[[str], None],
        threads: int = 0,
    ) -> None:
        """`imprinted`: the file of pixels u8 [H, W, 3] in a format of `outputs.FORMATS`."""
        self._names, self._imprinted, self._on_written, self._warn = names, imprinted, on_written, warn
        self._executor, self._in_place = executor_of(threads, "write"), not threads
        self._taken: list[_Taken] = []
        self._told = 0
        self.watermark_bits: list[int | None] = []
        """Of each file, once it was told."""

    def put(self, settings: PictureSettings, image: Image.Image, refused: str | None) -> None:
        name = self._names[settings.index]
        file = None if refused else self._executor.submit(self._write, name, settings, image)
        self._taken.append(_Taken(settings.index + 1, name, refused, file))
        if self._in_place:
            self.tell()

    def tell(self, wait: bool = False) -> None:
        """Says what is done and was not said; `wait`: for all that was put. Raises what went wrong with a file."""
        while self._told < len(self._taken):
            taken = self._taken[self._told]
            if taken.file and not (wait or taken.file.done()):
                return
            file = taken.file.result() if taken.file else None
            self._told += 1
            self._say(taken, file)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.tell(wait=True)
        finally:
            self._executor.shutdown(cancel_futures=True)
            for taken in self._taken[self._told :]:
                if taken.file is None:
                    self._say(taken, None)
                elif not taken.file.cancelled() and not taken.file.exception():
                    self._say(taken, taken.file.result())

    def _say(self, taken: _Taken, file: File | None) -> None:
        if file is None:
            self._warn(f"picture {taken.number} was refused and not written: {taken.refused}")
            return
        self.watermark_bits.append(file.watermark_bits)
        for problem in file.problems:
            self._warn(f"{taken.name}: {problem}")
        self._on_written(taken.name)

    def _write(self, name: Path, settings: PictureSettings, image: Image.Image) -> File:
        file = self._imprinted(settings, np.asarray(image), format_of(name))
        write_file(name, file.data, overwrite=True)  # the name is ours
        return replace(file, data=b"")
