"""Watermark, metadata and signature in one file: each is there, each can be left out, and what is lost is said."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_credentials import files, references, signer  # noqa: F401 (fixtures)
from test_outputs import refused
from test_provenance import PARAMETERS

from flux2_trt.credentials import are_in, read
from flux2_trt.imprint import Imprint, imprint
from flux2_trt.metadata import read_metadata
from flux2_trt.provenance import Parameters
from flux2_trt.watermark import MESSAGE, embed
from flux2_trt.watermark import read as read_watermark

# Smooth, coloured and a little rough, as pictures are
ROWS, COLUMNS = np.mgrid[0:512, 0:512] / 512
PICTURE = np.stack([ROWS * 200, COLUMNS * 180 + 20, (1 - ROWS) * COLUMNS * 220], axis=2).astype(np.uint8)
PICTURE[::3] += 4
OTHER = (0, 1, 1, 0, 1, 0, 0, 1)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def parameters(data: bytes) -> Parameters:
    with Image.open(io.BytesIO(data)) as image:
        return Parameters.from_json(read_metadata(image).json)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_with_everything_on_everything_is_there(signer, files, format):  # noqa: F811
    file = imprint(PICTURE, format, PARAMETERS, Imprint("full", MESSAGE, None, signer), references(1))
    assert read_watermark(pixels(file.data)).bits == MESSAGE and file.watermark_bits == 46 and not file.problems
    assert parameters(file.data) == replace(PARAMETERS, watermark="".join(map(str, MESSAGE)))
    said = read(file.data, format, files.root.read_text())
    assert (said.state, said.ingredients) == ("Trusted", ("cat 0.png",))
    if format != "JPEG":
        assert np.array_equal(pixels(file.data), embed(PICTURE, MESSAGE))


def test_with_everything_off_there_are_pixels_alone():
    file = imprint(PICTURE, "PNG", PARAMETERS, Imprint("none"))
    plain = io.BytesIO()
    Image.fromarray(PICTURE).save(plain, "PNG")
    assert file.data == plain.getvalue() and file.watermark_bits is None and not file.problems


def test_each_part_stands_alone(signer):  # noqa: F811
    marked = imprint(PICTURE, "PNG", PARAMETERS, Imprint("none", OTHER))
    assert np.array_equal(pixels(marked.data), embed(PICTURE, OTHER)) and marked.watermark_bits == 8
    assert not are_in(marked.data, "PNG") and b"iTXt" not in marked.data and b"eXIf" not in marked.data
    said = imprint(PICTURE, "PNG", PARAMETERS, Imprint("full"))
    assert np.array_equal(pixels(said.data), PICTURE) and parameters(said.data) == PARAMETERS
    signed = imprint(PICTURE, "PNG", PARAMETERS, Imprint("none", None, None, signer))
    assert np.array_equal(pixels(signed.data), PICTURE) and read(signed.data, "PNG").state == "Valid"


def test_names_of_references_are_as_private_as_the_prompt(signer):  # noqa: F811
    file = imprint(PICTURE, "PNG", PARAMETERS, Imprint("minimal", None, None, signer), references(2))
    assert read(file.data, "PNG").ingredients == ("reference 1", "reference 2") and b"cat 0" not in file.data
    assert b"a red cube" not in file.data


def test_what_a_format_costs_the_watermark_is_said():
    file = imprint(PICTURE, "WEBP", PARAMETERS, Imprint("full", MESSAGE, 50))
    assert file.watermark_bits < 46 and f"{file.watermark_bits} of 46 bits" in file.problems[0]
    assert "WEBP of this quality" in file.problems[0]
    assert read_watermark(pixels(file.data)).matches(MESSAGE) == file.watermark_bits


def test_small_and_saturated_pictures_are_written_and_what_they_lack_is_said():
    small = PICTURE[:128, :128]
    file = imprint(small, "PNG", PARAMETERS, Imprint("full", MESSAGE))
    assert np.array_equal(pixels(file.data), small) and file.watermark_bits is None
    assert "128x128" in file.problems[0] and parameters(file.data).watermark is None
    blue = np.full((512, 512, 3), (0, 0, 255), np.uint8)
    file = imprint(blue, "PNG", PARAMETERS, Imprint("full", MESSAGE))
    assert file.watermark_bits < 46 and "too flat" in file.problems[0]


def test_a_quality_for_png_is_refused():
    refused(lambda: imprint(PICTURE, "PNG", PARAMETERS, Imprint("full", None, 90)), "quality 90", ".jpg")
