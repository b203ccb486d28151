"""Provenance: what made a picture, written into its PNG file and read back from it."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.images import one_line

TEXT_KEY = "parameters"  # the chunk that AUTOMATIC1111's web UI and the tools around it read
JSON_KEY = "flux2-trt"


@dataclass(frozen=True)
class Reference:
    """A reference picture: its file name without folders, and the SHA-256 (hex) of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Parameters:
    """Everything that is needed to make one picture again.

    `seed` is the picture's own (`latents.picture_seeds`): the same seed makes it again by itself. `image_index` says
    which picture of its run it was, so the run's base seed is seed - image_index modulo 2**64. `sigmas` are the custom
    levels as given, None for the default schedule. `model_key` is the bundle's key.
    """

    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    model: str
    model_key: str
    version: str
    sigmas: tuple[float, ...] | None = None
    references: tuple[Reference, ...] = ()
    image_index: int = 0

    def to_text(self) -> str:
        """The form that AUTOMATIC1111's web UI writes: the prompt, then one line of settings."""
        settings = {
            "Steps": self.num_inference_steps,
            "Sampler": "Euler",
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            # Quoted like there where a comma, colon or line break would end the value.
            "Model": json.dumps(self.model, ensure_ascii=False) if set(self.model) & set(",:\n") else self.model,
            "Version": f"flux2-trt {self.version}",
        }
        return f"{self.prompt}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())

    def to_json(self) -> str:
        """Every field, losslessly, in ASCII; `from_json` gives the same parameters back."""
        return json.dumps(asdict(self), default=np.generic.item)

    @staticmethod
    def from_json(text: str) -> Parameters:
        """Raises ValueError, TypeError or OverflowError where a key is missing or unknown, a value of another type."""
        values: dict[str, Any] = dict(json.loads(text))
        if values.get("sigmas") is not None:
            values["sigmas"] = tuple(float(sigma) for sigma in values["sigmas"])
        values["references"] = tuple(_checked(Reference, reference) for reference in values.get("references", ()))
        return _checked(Parameters, values)


def _checked(cls: type, values: dict[str, Any]) -> Any:
    for name, kind in get_type_hints(cls).items():
        found = type(values[name]) if name in values else kind
        if kind in (str, int, float) and found is not kind and (kind, found) != (float, int):
            raise TypeError(f"{name} is a {found.__name__}, not a {kind.__name__}")
    return cls(**values)


def read_parameters(path: str | Path) -> Parameters:
    """The parameters in a PNG file that `write_png` wrote, without decoding the picture. Raises UsageError."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(JSON_KEY)
    except Exception as error:  # fed hostile bytes, the reader raises nearly anything
        raise UsageError(f"{str(path)!r} cannot be read as a PNG file ({one_line(error)})") from error
    if not isinstance(text, str):
        raise UsageError(f"{str(path)!r} holds no {JSON_KEY} parameters: another program made it or removed them")
    try:
        return Parameters.from_json(text)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{str(path)!r} holds {JSON_KEY} parameters that this version cannot read ({one_line(error)})"
        ) from error


def write_png(path: str | Path, image: NDArray[np.uint8], parameters: Parameters, overwrite: bool = False) -> None:
    """Writes `image`, u8 [H, W, 3], with its parameters: the whole file appears at once, or none of it.

    Raises UsageError where the file exists and `overwrite` is not set (also when it appears meanwhile), and for
    another suffix or array; Flux2Error where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{str(path)!r} does not end in .png; pictures are written as PNG: use {path.stem + '.png'!r}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"the picture is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3]")
    png = _encode(image, parameters)
    temporary = path.parent / f".flux2-trt-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with temporary.open("xb") as file:
                file.write(png)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(temporary, path)
            else:
                _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        free = next(name for name in _alternatives(path.parent, path.stem) if not os.path.lexists(name))
        raise UsageError(f"{str(path)!r} exists and is kept; write to {str(free)!r}, or allow overwriting") from None
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def next_free_name(folder: str | Path, stem: str) -> Path:
    """Reserves `stem`-0001.png or the next free number in `folder`: the name is the caller's, as an empty file.

    The file is created exclusively, so two runs never get the same name. Write it with `write_png(overwrite=True)`,
    or remove it if no picture comes. Raises Flux2Error where the folder cannot be written.
    """
    if Path(stem).name != stem:
        raise UsageError(f"the file name {stem!r} names a folder; give a name without slashes")
    names = _alternatives(Path(folder), stem)
    while True:
        path = next(names)
        try:
            path.open("xb").close()
            return path
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from error


def _alternatives(folder: Path, stem: str) -> Iterator[Path]:
    return (folder / f"{stem}-{number:04d}.png" for number in itertools.count(1))


def _encode(image: NDArray[np.uint8], parameters: Parameters) -> bytes:
    # A lone surrogate (bytes of a terminal that are no UTF-8) has no UTF-8 form, and a PNG text ends at NUL; the JSON
    # escapes both, the readable form replaces them.
    text = parameters.to_text().replace("\0", "\ufffd").encode("utf-8", "replace")
    chunks = PngInfo()
    chunks.add_itxt(TEXT_KEY, text)
    chunks.add_itxt(JSON_KEY, parameters.to_json())
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


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
    return Flux2Error(f"{str(path)!r} cannot be written: {one_line(error)}; {advice}")
