"""What a picture says is shown whole and harmless, whoever wrote it."""

from __future__ import annotations

import json
import os
import zlib
from functools import partial
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_credentials import files, references, signer  # noqa: F401 (fixtures)
from test_imprint import OTHER, PICTURE
from test_outputs import refused
from test_provenance import PARAMETERS

from flux2_trt.errors import ImageError
from flux2_trt.imprint import Imprint, imprint
from flux2_trt.inspection import Finding, inspect_file
from flux2_trt.watermark import MESSAGE


def written(folder: Path, format: str, wanted: Imprint, ingredients=()) -> Path:
    path = folder / f"picture.{format.lower()}"
    path.write_bytes(imprint(PICTURE, format, PARAMETERS, wanted, ingredients).data)
    return path


def shown(finding: Finding) -> str:
    lines = list(finding.lines())
    assert json.loads(json.dumps(finding.to_dict(), allow_nan=False))
    return "\n".join(lines)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_all_that_a_picture_says_is_told(tmp_path, format, signer, files):  # noqa: F811
    path = written(tmp_path, format, Imprint("full", MESSAGE, None, signer), references(1))
    finding = inspect_file(path, anchors=files.root.read_text())
    assert (finding.format, finding.width, finding.height) == (format, 512, 512)
    assert finding.parameters.prompt == "a red cube" and finding.metadata.text == finding.parameters.to_text()
    mark = finding.watermark
    assert (mark.found, mark.matches, mark.bits) == (True, 46, "".join(map(str, MESSAGE)))
    assert mark.chance == 2.0**-46 and mark.agreement > 0.9
    assert (finding.credentials.state, finding.credentials.ingredients) == ("Trusted", ("cat 0.png",))
    text = shown(finding)
    for word in ("AI generated;flux2", "Seed: 42", "46 of 46", "trusted signer", "compositeWith", "cat 0.png"):
        assert word in text
    assert "nothing here vouches for" in shown(inspect_file(path))


def test_a_picture_that_says_nothing(tmp_path):
    finding = inspect_file(written(tmp_path, "PNG", Imprint("none")))
    assert (finding.parameters, finding.credentials, finding.metadata.software) == (None, None, None)
    assert not finding.watermark.found and finding.watermark.chance > 1e-3
    assert shown(finding).count("none") == 3 and "not said" in shown(finding)


def test_bits_of_ones_own_are_known_from_the_parameters_or_when_given(tmp_path):
    message = OTHER * 4
    full = inspect_file(written(tmp_path, "PNG", Imprint("full", message)))
    assert full.watermark.found and full.watermark.matches == 32
    path = written(tmp_path, "PNG", Imprint("none", message))
    assert not inspect_file(path).watermark.found
    assert inspect_file(path, message).watermark.found


def test_changed_credentials_are_shown_as_not_valid(tmp_path, signer):  # noqa: F811
    path = written(tmp_path, "JPEG", Imprint("full", None, None, signer))
    data = bytearray(path.read_bytes())
    data[data.find(b"a red cube")] ^= 1
    path.write_bytes(data)
    finding = inspect_file(path)
    assert finding.credentials.state == "Invalid" and "assertion.dataHash.mismatch" in shown(finding)


def test_without_c2pa_credentials_are_seen_and_not_judged(tmp_path, signer, monkeypatch):  # noqa: F811
    path = written(tmp_path, "PNG", Imprint("full", None, None, signer))
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    finding = inspect_file(path)
    assert finding.credentials is None and "pip install 'flux2-trt[c2pa]'" in finding.credentials_problem
    assert inspect_file(written(tmp_path, "PNG", Imprint("full"))).credentials_problem is None


def test_a_small_picture_has_no_watermark_to_read(tmp_path):
    Image.fromarray(PICTURE[:100, :100]).save(tmp_path / "small.png")
    finding = inspect_file(tmp_path / "small.png")
    assert finding.watermark is None and "100x100" in finding.watermark_problem and "65536" in shown(finding)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_any_kind_of_picture_is_read(tmp_path, mode):
    image = Image.fromarray(PICTURE[..., 0]).convert("I" if mode == "I;16" else mode)
    (image.convert("I;16") if mode == "I;16" else image).save(tmp_path / "odd.png")
    assert inspect_file(tmp_path / "odd.png").width == 512


# hostile files


def chunk(kind: bytes, data: bytes) -> bytes:
    return pack(">L", len(data)) + kind + data + pack(">L", zlib.crc32(kind + data))


def png_with(path: Path, *chunks: bytes) -> Path:
    Image.fromarray(PICTURE).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return path


def test_texts_that_unpack_to_more_than_allowed_are_refused_on_one_line(tmp_path):
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * 100_000_000))
    refused(partial(inspect_file, png_with(tmp_path / "bomb.png", bomb)), "bomb.png", "too large", kind=ImageError)
    many = chunk(b"tEXt", b"parameters\0" + b"x" * 1_000_000) * 70
    refused(partial(inspect_file, png_with(tmp_path / "many.png", many)), "many.png", "too large", kind=ImageError)


def test_nothing_in_a_file_steers_the_terminal(tmp_path):
    chunks = PngInfo()
    chunks.add_itxt("parameters", "\x1b]0;owned\x07\x1b[2J red\r\u202e\u009b31m" + "x" * 100_000)
    exif = Image.Exif()
    exif[305] = "soft\x1b[31mware"
    Image.fromarray(PICTURE).save(tmp_path / "odd.png", pnginfo=chunks, exif=exif)
    text = shown(inspect_file(tmp_path / "odd.png"))
    assert all(each.isprintable() or each == "\n" for each in text) and len(text) < 5000
    assert r"\x1b[2J" in text and "more characters" in text


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"seed": 1}'])
def test_damaged_parameters_are_said_beside_the_rest(tmp_path, text):
    chunks = PngInfo()
    chunks.add_itxt("flux2-trt", text)
    Image.fromarray(PICTURE).save(tmp_path / "odd.png", pnginfo=chunks)
    finding = inspect_file(tmp_path / "odd.png")
    assert finding.parameters is None and "cannot be read" in shown(finding)


def test_damaged_credentials_are_said_beside_the_rest(tmp_path):
    finding = inspect_file(png_with(tmp_path / "odd.png", chunk(b"caBX", os.urandom(1000))))
    assert finding.credentials is None and "\n" not in finding.credentials_problem
    assert "cannot be read" in finding.credentials_problem


def test_what_is_no_picture_is_refused_on_one_line(tmp_path):
    refusal = partial(refused, kind=ImageError)
    refusal(partial(inspect_file, tmp_path / "missing.png"), "missing.png", "does not exist")
    refusal(partial(inspect_file, tmp_path), "not a file")
    refusal(partial(inspect_file, tmp_path / "nul\0"), "cannot be opened")
    (tmp_path / "text.png").write_text("hello")
    refusal(partial(inspect_file, tmp_path / "text.png"), "text.png", "not a readable")
    Image.fromarray(PICTURE).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    refusal(partial(inspect_file, tmp_path / "cut.png"), "cut.png", "damaged")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    refusal(partial(inspect_file, tmp_path / "large.png"), "large.png", "64 megapixels")
    os.mkfifo(tmp_path / "pipe.png")
    refusal(partial(inspect_file, tmp_path / "pipe.png"), "not a file")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_random_damage_is_read_or_refused_and_never_anything_else(tmp_path, format, signer):  # noqa: F811
    data = written(tmp_path, format, Imprint("full", MESSAGE, None, signer)).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "odd"
    for _ in range(40):
        odd = np.frombuffer(data, np.uint8).copy()
        places = random.integers(0, min(len(odd), 8000), 20)
        odd[places] = random.integers(0, 256, 20)
        path.write_bytes(odd.tobytes())
        try:
            shown(inspect_file(path))
        except ImageError as error:
            assert "\n" not in str(error)
