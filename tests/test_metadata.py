"""What a file says is read back whole, by us and by readers of other makers; pixels are kept."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import piexif
import piexif.helper
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_outputs import refused
from test_provenance import DAMAGED, FULL, PARAMETERS

from flux2_trt.exif import exif_block
from flux2_trt.metadata import encode, read_metadata, read_parameters
from flux2_trt.provenance import Parameters

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
FORMATS = ("PNG", "JPEG", "WEBP")


def written(folder: Path, format: str, parameters: Parameters, *choices, **more) -> Path:
    path = folder / f"out.{format.lower()}"
    path.write_bytes(encode(PICTURE, format, parameters, *choices, **more)[0])
    return path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("parameters", [PARAMETERS, FULL, replace(FULL, model="klein-4b")])
def test_parameters_survive_the_file(tmp_path, format, parameters):
    path = written(tmp_path, format, parameters)
    assert read_parameters(path) == read_parameters(str(path)) == parameters
    with Image.open(path) as image:
        assert image.format == format
        found = read_metadata(image)
        assert found.text == parameters.to_text()
        assert json.loads(found.json)["seed"] == parameters.seed


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("level", ["full", "minimal", "none"])
def test_without_a_quality_pixels_are_kept(tmp_path, format, level):
    with Image.open(written(tmp_path, format, FULL, level)) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), PICTURE)


def test_quality_makes_files_smaller_and_a_jpeg_keeps_its_chroma(tmp_path):
    sizes = {quality: len(encode(PICTURE, "JPEG", FULL, "none", quality)[0]) for quality in (10, 95, 100)}
    assert sizes[10] < sizes[95] < sizes[100] and len(encode(PICTURE, "JPEG", FULL, "none")[0]) == sizes[95]
    assert len(encode(PICTURE, "WEBP", FULL, "none", 50)[0]) < len(encode(PICTURE, "WEBP", FULL, "none")[0])
    with Image.open(written(tmp_path, "JPEG", FULL)) as image:
        assert {component[1:3] for component in image.layer} == {(1, 1)}  # no component is subsampled
        assert image.quantization == Image.open(io.BytesIO(reference_jpeg())).quantization
    refused(partial(encode, PICTURE, "PNG", FULL, "full", 95), "quality 95", ".jpg")


def reference_jpeg() -> bytes:
    """As flux2 `cli.py` saves it."""
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def test_png_has_the_chunks_that_other_tools_read(tmp_path):
    with Image.open(written(tmp_path, "PNG", PARAMETERS)) as image:
        assert image.info["parameters"] == PARAMETERS.to_text()
        assert json.loads(image.info["flux2-trt"])["seed"] == 42


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_piexif_reads_the_comment_as_the_web_ui_does(tmp_path, format):
    exif = piexif.load(str(written(tmp_path, format, replace(FULL, prompt="Zürich 日本 🐈"))))
    comment = piexif.helper.UserComment.load(exif["Exif"][piexif.ExifIFD.UserComment])
    assert comment.startswith("Zürich 日本 🐈\nSteps: 8, Sampler: Euler")


def test_the_block_is_the_one_that_piexif_would_write():
    """Texts that fit into an entry and texts that do not, of odd and even length."""
    texts = {305: "abc", 271: "abcd", 272: "abcde"}
    details = {37510: b"\0" * 9, 37500: b"12", 37121: b"abcd"}
    ours, theirs = piexif.load(exif_block(texts, details)), piexif.load(piexif.dump({"0th": texts, "Exif": details}))
    assert ours["0th"].pop(34665) % 2 == 0 and theirs["0th"].pop(34665)  # where the rest is; they do not pad
    assert ours == theirs
    assert piexif.load(exif_block(texts, {}))["Exif"] == {}


@pytest.mark.parametrize("format", FORMATS)
def test_software_and_make_are_the_references(tmp_path, format):
    for model, make in (("klein-4b", "Black Forest Labs"), ("tiny", None)):
        for level in ("full", "minimal"):
            with Image.open(written(tmp_path, format, replace(FULL, model=model), level)) as image:
                assert image.getexif()[305] == "AI generated;flux2;flux2-trt 0.1.0"
                assert image.info.get("Software", image.getexif()[305]) == image.getexif()[305]
                assert image.getexif().get(271) == read_metadata(image).make == make


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_to_be_said_is_not_in_the_file(tmp_path, format):
    secret = replace(FULL, prompt="a secret", model="confidential")
    for level in ("minimal", "none"):
        path = written(tmp_path, format, secret, level)
        for word in ("secret", "confidential", "cat.png", str(FULL.seed)):
            for form in (word.encode(), word.encode("utf-16-be"), word.encode("utf-16-le")):
                assert form not in path.read_bytes()
        refused(partial(read_parameters, path), "no flux2-trt parameters")
    with Image.open(path) as image:
        assert not dict(image.getexif()) and not {"parameters", "flux2-trt", "Software"} & set(image.info)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "two\nlines\r\n\n",
        "Zürich 日本 🐈‍⬛ \u202e",
        "Steps: 3, Seed: 1",
        "nul\0inside",
        "lone \udce4 surrogate",
        "x" * 10_000,
    ],
)
def test_any_prompt_survives_the_file(tmp_path, prompt, format):
    path = written(tmp_path, format, replace(PARAMETERS, prompt=prompt))
    assert read_parameters(path).prompt == prompt
    with Image.open(path) as image:
        shown = read_metadata(image).text.rpartition("\nSteps: 8")[0]
    assert shown == prompt.replace("\0", "\ufffd").replace("\udce4", "?")


def test_of_what_a_jpeg_cannot_hold_the_readable_form_goes_first_and_the_picture_stays(tmp_path):
    for length, text, parameters, word in (
        (20_000, True, True, None),
        (50_000, False, True, "other programs"),
        (100_000, False, False, "PNG"),
    ):
        data, problem = encode(PICTURE, "JPEG", replace(PARAMETERS, prompt="x" * length))
        with Image.open(io.BytesIO(data)) as image:
            found = read_metadata(image)
            assert image.size == (32, 48) and found.software.startswith("AI generated;flux2")
        assert (found.text is not None, found.json is not None) == (text, parameters)
        assert problem is None if word is None else word in problem
    for format in ("PNG", "WEBP"):
        path = written(tmp_path, format, replace(PARAMETERS, prompt="x" * 100_000))
        assert len(read_parameters(path).prompt) == 100_000


def png_with(path: Path, text: str | None) -> Path:
    chunks = PngInfo()
    if text is not None:
        chunks.add_itxt("flux2-trt", text)
    Image.fromarray(PICTURE).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(("text", "word"), DAMAGED)
def test_damaged_parameters_are_refused_on_one_line(tmp_path, text, word):
    path = png_with(tmp_path / "odd.png", text)
    refused(partial(read_parameters, path), "odd.png", "cannot read", word)


def test_files_without_parameters_are_refused(tmp_path):
    refused(partial(read_parameters, png_with(tmp_path / "plain.png", None)), "plain.png", "no flux2-trt parameters")
    refused(partial(read_parameters, tmp_path / "missing.png"), "missing.png", "No such file")
    (tmp_path / "text.png").write_text("hello")
    refused(partial(read_parameters, tmp_path / "text.png"), "text.png", "PNG")
    refused(partial(read_parameters, tmp_path), "cannot be read")


def test_a_cameras_own_exif_is_no_parameters(tmp_path):
    note = {piexif.ExifIFD.MakerNote: b"Nikon\0\2\x10", piexif.ExifIFD.UserComment: b"ASCII\0\0\0on holiday"}
    exif = piexif.dump({"0th": {piexif.ImageIFD.Make: b"NIKON"}, "Exif": note})
    Image.fromarray(PICTURE).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as image:
        found = read_metadata(image)
    assert (found.text, found.json, found.make) == ("on holiday", None, "NIKON")
    refused(partial(read_parameters, tmp_path / "photo.jpg"), "no flux2-trt parameters")


def test_reading_parameters_does_not_decode_the_picture(tmp_path):
    path = written(tmp_path, "PNG", FULL)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") + 4])
    assert read_parameters(path) == FULL


def test_other_arrays_are_refused():
    for picture in (PICTURE.astype(np.float32), PICTURE[:, :, 0], PICTURE[:, :, :2], PICTURE[None]):
        refused(partial(encode, picture, "PNG", PARAMETERS), "uint8 [H, W, 3]")
