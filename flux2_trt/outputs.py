"""Outputs: the names of pictures, taken before the work on them begins."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flux2_trt.errors import Flux2Error, UsageError

STEM = "flux2"


@contextmanager
def reserved_names(output: Path | None, count: int, overwrite: bool = False) -> Iterator[list[Path]]:
    """`count` names that are ours until the end of the block: write them with `write_png(overwrite=True)`.

    `output`: a folder (None is the current one), where free names are chosen; or a .png name, which becomes
    `name-0001.png` and so on for several pictures. New names are held as empty files, removed if no picture came.

    Raises UsageError for a name that exists (unless `overwrite`) or does not end in .png, Flux2Error for a folder that
    cannot be written.
    """
    with ExitStack() as reservations:
        names: list[Path] = []
        if output is None or output.is_dir():
            from flux2_trt.provenance import next_free_name

            for _ in range(count):
                names.append(next_free_name(output or Path(), STEM))
                reservations.callback(_remove_empty, names[-1])
        else:
            for name in _numbered(_checked(output), count):
                names.append(name)
                if overwrite and name.is_file():
                    _probe(name)
                elif _reserve(name, output, count):
                    reservations.callback(_remove_empty, name)
        yield names


def _checked(output: Path) -> Path:
    shown = repr(str(output))
    if output.suffix.lower() != ".png":
        folder = "does not exist" if not os.path.lexists(output) else "is a file"
        raise UsageError(
            f"the output {shown} is neither a folder ({folder}) nor a .png name; give for example "
            f"{str(output.with_suffix('.png'))!r}, or make the folder first"
        )
    if not output.parent.is_dir():
        raise Flux2Error(f"the folder {str(output.parent)!r} does not exist; make it first, or choose another name")
    return output


def _numbered(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number:04d}{output.suffix}") for number in range(1, count + 1)]


def _reserve(name: Path, output: Path, count: int) -> bool:
    try:
        name.open("xb").close()
    except FileExistsError:
        candidates = (output.with_name(f"{output.stem}-{k}{output.suffix}") for k in itertools.count(2))
        free = next(c for c in candidates if not any(os.path.lexists(path) for path in _numbered(c, count)))
        raise UsageError(f"{str(name)!r} exists and is kept; write to {str(free)!r}, or add --overwrite") from None
    except (OSError, ValueError) as error:
        raise _unwritable(name, error) from error
    return True


def _probe(name: Path) -> None:
    """A file is replaced by renaming, so it is the folder that must take a new one."""
    try:
        tempfile.TemporaryFile(dir=name.parent).close()
    except OSError as error:
        raise _unwritable(name, error) from error


def _remove_empty(name: Path) -> None:
    if name.is_file() and name.stat().st_size == 0:
        name.unlink()


def _unwritable(name: Path, error: OSError | ValueError) -> Flux2Error:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return Flux2Error(f"{str(name)!r} cannot be written: {reason}; choose a folder that exists and can be written")
