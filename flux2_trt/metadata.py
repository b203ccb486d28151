"""Metadata: what a picture's file says beside its pixels, written and read.

PNG holds it in text chunks and EXIF; JPEG and WebP in EXIF alone. `parameters`, or EXIF's UserComment, is the form that
AUTOMATIC1111's web UI and the tools around it read. The lossless form, from which a picture is made again, is the chunk
`flux2-trt`, or EXIF's MakerNote behind that name. Software and Make are those of the reference (flux2 `cli.py`), which
detectors of generated pictures look for; our own name and version follow.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from flux2_trt.errors import UsageError
from flux2_trt.exif import exif_block
from flux2_trt.images import FORMATS, one_line
from flux2_trt.options import MetadataLevel
from flux2_trt.provenance import Parameters

TEXT_KEY = "parameters"
JSON_KEY = "flux2-trt"
SOFTWARE_KEY = "Software"  # which the PNG specification names; exiftool 12 loses EXIF's where a file is signed
SOFTWARE = "AI generated;flux2"
MAKER = "Black Forest Labs"
OWN_MODELS = ("tiny",)  # which nobody else made
# flux2 `cli.py`
QUALITY = 95
FULL_COLOR = 0  # Pillow's name for chroma that is not subsampled
EXIF_LIMIT_BYTES = 65533  # of a JPEG segment
_UNICODE = b"UNICODE\0"
_MAKER_NOTE = JSON_KEY.encode() + b"\0"


@dataclass(frozen=True)
class Metadata:
    """What was found: the readable text, the lossless one, EXIF's software and make. None: the file does not say."""

    text: str | None
    json: str | None
    software: str | None
    make: str | None


def encode(
    image: NDArray[np.uint8],
    format: str,
    parameters: Parameters,
    level: MetadataLevel = "full",
    quality: int | None = None,
) -> tuple[bytes, str | None]:
    """The file of `image`, u8 [H, W, 3], and what did not fit into it.

    `full`: everything; `minimal`: that it is generated, by which software; `none`: the pixels. `quality` is that of
    JPEG (default 95, chroma in full, as in the reference) and of WebP, which is lossless where none is given. Raises
    UsageError for another array, or a quality for PNG.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"the picture is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3]")
    check_quality(format, quality)
    picture, file = Image.fromarray(image), io.BytesIO()
    if format == "PNG":
        picture.save(file, format, **_png_chunks(parameters, level))
        return file.getvalue(), None
    exif, problem = _fitting_exif(format, parameters, level)
    said = {"exif": exif} if exif else {}
    if format == "JPEG":
        picture.save(file, format, quality=quality or QUALITY, subsampling=FULL_COLOR, **said)
    elif quality is None:
        picture.save(file, format, lossless=True, exact=True, **said)
    else:
        picture.save(file, format, quality=quality, **said)
    return file.getvalue(), problem


def check_quality(format: str, quality: int | None) -> None:
    """Raises UsageError where a quality is asked of a format that has none."""
    if quality is not None and format == "PNG":
        raise UsageError(f"quality {quality} is for JPEG and WebP, and PNG is lossless; write to a .jpg or .webp name")


def read_metadata(image: Image.Image) -> Metadata:
    """What an open picture says; PNG, JPEG or WEBP. Of text behind a PNG's pixels, nothing is read.

    Raises whatever Pillow raises on damaged files.
    """
    exif = image.getexif()
    details = exif.get_ifd(IFD.Exif)
    text, json = image.info.get(TEXT_KEY), image.info.get(JSON_KEY)
    if text is None and isinstance(comment := details.get(Base.UserComment), bytes):
        text = _comment_text(comment)
    if json is None and isinstance(note := details.get(Base.MakerNote), bytes) and note.startswith(_MAKER_NOTE):
        json = note[len(_MAKER_NOTE) :].decode("ascii", "replace")
    found = (text, json, exif.get(Base.Software), exif.get(Base.Make))
    text, json, software, make = (value if isinstance(value, str) else None for value in found)
    return Metadata(text, json, software, make)


def read_parameters(path: str | Path) -> Parameters:
    """The parameters in a picture's file, without decoding its pixels. Raises UsageError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            text = read_metadata(image).json
    except Exception as error:  # fed hostile bytes, the reader raises nearly anything
        raise UsageError(f"{str(path)!r} cannot be read as a PNG, JPEG or WEBP file ({one_line(error)})") from error
    if text is None:
        raise UsageError(f"{str(path)!r} holds no {JSON_KEY} parameters: another program made it or removed them")
    try:
        return Parameters.from_json(text)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{str(path)!r} holds {JSON_KEY} parameters that this version cannot read ({one_line(error)})"
        ) from error


def _readable(parameters: Parameters) -> str:
    # A lone surrogate (bytes of a terminal that are no UTF-8) has no Unicode form, and a PNG text ends at NUL; the
    # lossless form escapes both, this one replaces them.
    return parameters.to_text().replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _png_chunks(parameters: Parameters, level: MetadataLevel) -> dict[str, object]:
    if level == "none":
        return {}
    chunks = PngInfo()
    chunks.add_text(SOFTWARE_KEY, _software(parameters))
    if level == "full":
        chunks.add_itxt(TEXT_KEY, _readable(parameters))
        chunks.add_itxt(JSON_KEY, parameters.to_json())
    return {"pnginfo": chunks, "exif": _exif(parameters)}


def _fitting_exif(format: str, parameters: Parameters, level: MetadataLevel) -> tuple[bytes | None, str | None]:
    """Of what a JPEG cannot hold, the readable form goes first."""
    if level == "none":
        return None, None
    if level == "minimal":
        return _exif(parameters), None
    whole = _exif(parameters, text=True, json=True)
    if format != "JPEG" or len(whole) <= EXIF_LIMIT_BYTES:
        return whole, None
    lossless = _exif(parameters, json=True)
    if len(lossless) <= EXIF_LIMIT_BYTES:
        return lossless, "a JPEG file is too small for the prompt in the form that other programs read"
    too_small = "a JPEG file is too small for the prompt: write a PNG to be able to make it again"
    return _exif(parameters), too_small


def _software(parameters: Parameters) -> str:
    return f"{SOFTWARE};flux2-trt {parameters.version}"


def _exif(parameters: Parameters, text: bool = False, json: bool = False) -> bytes:
    texts = {Base.Software.value: _software(parameters)}
    if parameters.model not in OWN_MODELS:
        texts[Base.Make.value] = MAKER
    details: dict[int, bytes] = {}
    if text:
        details[Base.UserComment] = _UNICODE + _readable(parameters).encode("utf-16-be")
    if json:
        details[Base.MakerNote] = _MAKER_NOTE + parameters.to_json().encode("ascii")
    return exif_block(texts, details)


def _comment_text(comment: bytes) -> str | None:
    if comment.startswith(_UNICODE):
        return comment[len(_UNICODE) :].decode("utf-16-be", "replace")
    if comment.startswith(b"ASCII\0\0\0"):
        return comment[8:].decode("ascii", "replace")
    return None
