"""Outputs: the names of pictures, taken before the work on them begins, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flux2_trt.errors import Flux2Error, UsageError

STEM = "flux2"
# What Pillow calls the format of each kind of file that is written.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def format_of(path: Path) -> str:
    """PNG, JPEG or WEBP, by the suffix. Raises UsageError for another one."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(FORMATS)
        raise UsageError(f"{str(path)!r} has none of the suffixes {known}; use {path.stem + '.png'!r}") from None


def write_file(path: str | Path, data: bytes, overwrite: bool = False, mode: int = 0o666) -> None:
    """The whole file appears at once, or none of it; `mode` are its permissions, less the umask.

    Raises UsageError where the file exists and `overwrite` is not set (also when it appears meanwhile), Flux2Error
    where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.parent / f".flux2-trt-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(temporary, path)
            else:
                _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        free = next(name for name in _alternatives(path.parent, path.stem, path.suffix) if not os.path.lexists(name))
        raise UsageError(f"{str(path)!r} exists and is kept; write to {str(free)!r}, or allow overwriting") from None
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def next_free_name(folder: str | Path, stem: str) -> Path:
    """Reserves `stem`-0001.png or the next free number in `folder`: the name is the caller's, as an empty file.

    The file is created exclusively, so two runs never get the same name. Write it with `write_file(overwrite=True)`,
    or remove it if no picture comes. Raises Flux2Error where the folder cannot be written.
    """
    if Path(stem).name != stem:
        raise UsageError(f"the file name {stem!r} names a folder; give a name without slashes")
    names = _alternatives(Path(folder), stem, ".png")
    while True:
        path = next(names)
        try:
            path.open("xb").close()
            return path
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from error


@contextmanager
def reserved_names(output: Path | None, count: int, overwrite: bool = False) -> Iterator[list[Path]]:
    """`count` names that are ours until the end of the block: write them with `write_file(overwrite=True)`.

    `output`: a folder (None is the current one), where free names are chosen; or the name of a picture, which becomes
    `name-0001.png` and so on for several. New names are held as empty files, removed if no picture came.

    Raises UsageError for a name that exists (unless `overwrite`) or has no suffix of a picture, Flux2Error for a folder
    that cannot be written.
    """
    with ExitStack() as reservations:
        names: list[Path] = []
        if output is None or output.is_dir():
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
    if output.suffix.lower() not in FORMATS:
        folder = "does not exist" if not os.path.lexists(output) else "is a file"
        raise UsageError(
            f"the output {shown} is neither a folder ({folder}) nor the name of a picture ({', '.join(FORMATS)}); give "
            f"for example {str(output.with_suffix('.png'))!r}, or make the folder first"
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


def _alternatives(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    return (folder / f"{stem}-{number:04d}{suffix}" for number in itertools.count(1))


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name, then move over the reservation
        path.open("xb").close()
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


def _unwritable(path: Path, error: OSError | ValueError) -> Flux2Error:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some space" if full else "choose another name, or a folder that exists and can be written"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Flux2Error(f"{str(path)!r} cannot be written: {reason}; {advice}")
