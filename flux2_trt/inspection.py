"""Inspection: what a picture says of itself, and whether that holds. Pictures are read as hostile input."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux2_trt import credentials, watermark
from flux2_trt.credentials import Statement
from flux2_trt.errors import Flux2Error, ImageError
from flux2_trt.images import FORMATS, MAX_PIXELS, MULTI_PICTURE, one_line
from flux2_trt.metadata import Metadata, read_metadata
from flux2_trt.provenance import Parameters

MAX_BYTES = 256 * 2**20
SHOWN_CHARACTERS = 2000  # of a text on a terminal; JSON has all of it
# The probability below which matching bits are not put down to chance.
SIGNIFICANT = 1e-6


@dataclass(frozen=True)
class WatermarkFinding:
    """Bits as read; how many are those that were looked for, and the chance of that many in any picture.

    `agreement`: the mean share of blocks that voted for what was read, from 0.5 to 1. `message`: what was looked for.
    """

    found: bool
    message: str
    bits: str
    matches: int
    chance: float
    agreement: float


@dataclass(frozen=True)
class Finding:
    """What one file says. None is nothing, and the `problem` beside it why it could not be read or checked."""

    file: str
    format: str
    width: int
    height: int
    metadata: Metadata
    parameters: Parameters | None
    parameters_problem: str | None
    watermark: WatermarkFinding | None
    watermark_problem: str | None
    credentials: Statement | None
    credentials_problem: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a terminal: nothing in a file reaches it as a control character."""
        yield f"{printable(self.file)}: {self.format}, {self.width}x{self.height}"
        yield _line("software", self.metadata.software or "not said")
        yield _line("parameters", self.metadata.text or "none")
        if self.parameters is not None:
            yield _line("made again", f"by flux2-trt run --like, with the bundle {self.parameters.model_key[:12]}")
        elif self.parameters_problem:
            yield _line("made again", self.parameters_problem)
        yield _line("watermark", self.watermark_problem or _watermark_text(self.watermark))
        yield _line("credentials", self.credentials_problem or _credentials_text(self.credentials))


def inspect_file(path: Path, message: tuple[int, ...] | None = None, anchors: str | None = None) -> Finding:
    """What the PNG, JPEG or WEBP file says of itself.

    `message`: the watermark to look for (default: the one that the parameters name, else `watermark.MESSAGE`).
    `anchors`: PEM certificates to trust as signers. Raises ImageError for what is no picture, or too large.
    """
    name, data = repr(str(path)), _bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, Pillow warns and goes on
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                format, (width, height) = image.format or "?", image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"{name} is {width}x{height} pixels; at most {MAX_PIXELS / 1e6:.0f} megapixels are read"
                    )
                metadata = read_metadata(image)
                pixels = np.asarray(image.convert("RGB"))
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a readable PNG, JPEG or WEBP picture") from error
    except Exception as error:  # fed hostile bytes, a decoder raises nearly anything
        raise ImageError(f"{name} is damaged, or what it says is too large: {one_line(error)}") from error
    parameters, parameters_problem = _parameters(metadata)
    mark, mark_problem = _watermark(pixels, message, parameters)
    statement, statement_problem = _credentials(data, format, anchors)
    return Finding(
        str(path), "JPEG" if format == MULTI_PICTURE else format, width, height, metadata,
        parameters, parameters_problem, mark, mark_problem, statement, statement_problem,
    )  # fmt: skip


def printable(text: str) -> str:
    """`text` with every character that could steer a terminal written out, and the end of a long one left out."""
    shown = text[:SHOWN_CHARACTERS]
    rest = f"… ({len(text) - len(shown)} more characters)" if len(text) > len(shown) else ""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in shown) + rest


def _bytes(path: Path) -> bytes:
    name = repr(str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a named pipe would wait for a writer
            raise ImageError(f"{name} is not a file; give a PNG, JPEG or WEBP file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; give an existing PNG, JPEG or WEBP file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be opened: {one_line(error)}; give a readable file") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} has more than {MAX_BYTES // 2**20} MB, which no picture here needs")
    return data


def _parameters(metadata: Metadata) -> tuple[Parameters | None, str | None]:
    if metadata.json is None:
        return None, None
    try:
        return Parameters.from_json(metadata.json), None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        return None, f"what is there cannot be read by this version ({one_line(error)})"


def _watermark(
    pixels: watermark.Pixels, message: tuple[int, ...] | None, parameters: Parameters | None
) -> tuple[WatermarkFinding | None, str | None]:
    try:
        if message is None and parameters is not None and parameters.watermark is not None:
            message = watermark.parse_message(parameters.watermark)
        message = message or watermark.MESSAGE
        reading = watermark.read(pixels, len(message))
    except Flux2Error as error:
        return None, str(error)
    chance = reading.chance(message)
    mean = sum(reading.agreement) / len(reading.agreement)
    text, bits = ("".join(map(str, digits)) for digits in (message, reading.bits))
    return WatermarkFinding(chance < SIGNIFICANT, text, bits, reading.matches(message), chance, mean), None


def _credentials(data: bytes, format: str, anchors: str | None) -> tuple[Statement | None, str | None]:
    try:
        return credentials.read(data, format, anchors), None
    except Flux2Error as error:
        return None, str(error)


def _line(name: str, text: str) -> str:
    return f"  {name:12}" + printable(text).replace("\n", "\n" + " " * 14)


def _watermark_text(found: WatermarkFinding | None) -> str:
    assert found is not None
    share = f"{found.matches} of {len(found.message)} bits, {found.agreement:.0%} of the blocks agree"
    if found.found:
        return f"found: {share}\n{found.bits}"
    return f"none: {share}, as in any picture"


def _credentials_text(said: Statement | None) -> str:
    if said is None:
        return "none"
    verdict = {
        "Trusted": "valid, of a trusted signer",
        "Valid": "valid, of a signer whom nothing here vouches for",
    }.get(said.state, f"not valid: {', '.join(said.problems) or said.state}")
    lines = [verdict, f"signed by {said.signer or '?'}, written by {said.generator or '?'}"]
    lines.append(", ".join((*said.actions, *said.source_types)))
    if said.ingredients:
        lines.append("made from " + ", ".join(said.ingredients))
    return "\n".join(lines)
