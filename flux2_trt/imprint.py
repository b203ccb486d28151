"""Imprint: a picture's pixels become its file, with all that it says of where it comes from, in the order that holds.

The watermark goes into the pixels, then the metadata into the file; the signature covers both. `imprint` is a function
of values and takes a while: call it where pictures are written, not where engines are fed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from flux2_trt import watermark
from flux2_trt.credentials import Ingredient, Signer, sign
from flux2_trt.metadata import check_quality, encode
from flux2_trt.options import MetadataLevel, RunOptions
from flux2_trt.outputs import FORMATS
from flux2_trt.provenance import Parameters


@dataclass(frozen=True)
class Imprint:
    """What is to be said and how: None is no watermark, no signature, the format's own quality."""

    metadata: MetadataLevel = "full"
    watermark: tuple[int, ...] | None = None
    quality: int | None = None
    signer: Signer | None = None

    @staticmethod
    def from_options(options: RunOptions, marked: bool) -> Imprint:
        """What was asked for; `marked`: whether there is a watermark where nothing was said of it.

        Raises UsageError for a quality without a use, Flux2Error for a signer that cannot sign.
        """
        into_folder = options.output is None or options.output.is_dir()
        suffix = ".png" if into_folder or options.output is None else options.output.suffix.lower()
        if suffix in FORMATS:  # for another one, there will be no name
            check_quality(FORMATS[suffix], options.quality)
        choice = options.watermark or ("on" if marked else "off")
        messages = {"on": watermark.MESSAGE, "off": None}
        message = messages[choice] if choice in messages else watermark.parse_message(choice)
        signer = Signer.from_options(options.c2pa_cert, options.c2pa_key)
        return Imprint(options.metadata, message, options.quality, signer)


@dataclass(frozen=True)
class File:
    """A file's bytes, how many bits of the watermark are read back from it, and what could not be done, in lines."""

    data: bytes
    watermark_bits: int | None
    problems: tuple[str, ...]


def imprint(
    image: watermark.Pixels,
    format: str,
    parameters: Parameters,
    wanted: Imprint,
    ingredients: Sequence[Ingredient] = (),
) -> File:
    """The file of `image`, u8 [H, W, 3], in a format of `outputs.FORMATS`.

    A watermark that the picture cannot carry, or that the format loses, is a problem and no failure. Raises UsageError
    for values that are not allowed, Flux2Error where signing fails.
    """
    problems: list[str] = []
    message = wanted.watermark
    if message is not None and image.shape[0] * image.shape[1] < watermark.MIN_PIXELS:
        size = f"{image.shape[1]}x{image.shape[0]} pixels"
        problems.append(f"no watermark: the picture has {size}, and it takes {watermark.MIN_PIXELS} or more")
        message = None
    if message is not None:
        image = watermark.embed(image, message)
        parameters = replace(parameters, watermark="".join(map(str, message)))
    data, unsaid = encode(image, format, parameters, wanted.metadata, wanted.quality)
    if unsaid:
        problems.append(unsaid)
    bits = None
    if message is not None:
        bits = watermark.read(_decoded(data), len(message)).matches(message)
        if bits < len(message):
            whole = watermark.read(image, len(message)).matches(message) == len(message)
            reason = f"{format} of this quality loses the rest" if whole else "the picture is too flat for the rest"
            problems.append(f"of the watermark, {bits} of {len(message)} bits can be read: {reason}")
    if wanted.signer is not None:
        titled = [replace(each, title=_title(each, i, wanted.metadata)) for i, each in enumerate(ingredients, start=1)]
        data = sign(data, format, parameters.version, titled, wanted.signer)
    return File(data, bits, tuple(problems))


def _title(ingredient: Ingredient, number: int, level: MetadataLevel) -> str:
    """Names of files are as private as prompts."""
    name = ingredient.title.encode("utf-8", "replace").decode()
    return name if level == "full" else f"reference {number}"


def _decoded(data: bytes) -> watermark.Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
