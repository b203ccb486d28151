"""Reference pictures: whatever a file holds, the result is the right RGB picture or one line that names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from flux2_trt.errors import ImageError, UsageError
from flux2_trt.images import MAX_PIXELS, check_size, load_reference, prepare_reference, reference_max_area
from flux2_trt.models import published_spec

TINY, DEV = published_spec("tiny").sampling, published_spec("dev").sampling


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth structure plus noise: resampling and cropping show in every pixel."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=2)
    noise = np.random.default_rng(seed).integers(-20, 20, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file from raw filtered rows, for the layouts that Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def same(image: Image.Image, expected: Image.Image | np.ndarray) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(expected))


def refused(source: object, *words: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_reference(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_a_lossless_file_gives_its_pixels(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(photo(), image_format, lossless=True))
    for source in (path, str(path)):
        loaded = load_reference(source)
        assert loaded.mode == "RGB" and same(loaded, photo())


def test_a_jpeg_is_decoded_as_pillow_decodes_it(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo(), "JPEG"))
    assert same(load_reference(path), Image.open(path))


def test_a_cameras_multi_picture_jpeg_gives_its_first_picture(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    path.write_bytes(encoded(photo(), "MPO", save_all=True, append_images=[photo(seed=1)]))
    with Image.open(path, formats=("JPEG",)) as image:
        assert image.format == "MPO" and getattr(image, "n_frames", 1) == 2
        assert same(load_reference(path), image.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, image_format: str, orientation: int) -> None:
    # The definition of EXIF tag 0x0112: what has to be done to the stored rows to see the picture upright.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encoded(photo(), image_format, exif=exif.tobytes(), lossless=True))
    assert same(load_reference(path), upright(np.asarray(photo())))


def test_transparency_becomes_white(tmp_path: Path) -> None:
    colours = np.asarray(photo()).copy()
    alpha = np.tile(np.linspace(0, 255, 96).round().astype(np.uint8), (64, 1))
    path = tmp_path / "picture.png"
    Image.fromarray(np.dstack([colours, alpha])).save(path)
    weight = alpha[:, :, None] / 255
    expected = colours * weight + 255 * (1 - weight)
    # Compositing in 8 bits rounds once.
    assert np.abs(np.asarray(load_reference(path)) - expected).max() <= 1
    assert (np.asarray(load_reference(path))[:, 0] == 255).all()


def test_transparent_parts_of_grey_palette_and_keyed_pictures_become_white(tmp_path: Path) -> None:
    grey = np.full((64, 64), 90, np.uint8)
    grey[:32] = 10
    half = np.where(np.arange(64)[:, None] < 32, 0, 255).astype(np.uint8) * np.ones((1, 64), np.uint8)
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(half)])
    palette = Image.fromarray((grey == 90).astype(np.uint8))
    palette = palette.convert("P")
    palette.putpalette([10, 10, 10, 90, 90, 90])
    rgb = Image.fromarray(np.dstack([grey] * 3))
    files = {
        "LA": encoded(grey_alpha, "PNG"),
        "P with one transparent entry": encoded(palette, "PNG", transparency=0),
        "P with alpha per entry": encoded(palette, "PNG", transparency=b"\x00\xff"),
        "L with a transparent value": encoded(Image.fromarray(grey), "PNG", transparency=10),
        "RGB with a transparent colour": encoded(rgb, "PNG", transparency=(10, 10, 10)),
    }
    expected = np.dstack([np.where(grey == 10, 255, 90).astype(np.uint8)] * 3)
    for name, data in files.items():
        path = tmp_path / "picture.png"
        path.write_bytes(data)
        assert same(load_reference(path), expected), name


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    path = tmp_path / "scan.png"
    Image.fromarray(values).save(path)
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(load_reference(path)), np.dstack([expected] * 3))
    assert same(load_reference(Image.open(path)), load_reference(path))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(png(64, 64, 16, 0, rows, (b"tRNS", struct.pack(">H", int(values[3, 3])))))
    keyed = np.where(values == values[3, 3], 255, expected)
    assert np.array_equal(np.asarray(load_reference(path))[:, :, 0], keyed)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_scaled_and_not_clipped(tmp_path: Path, colour: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, channels), dtype=np.uint16)
    if channels in (2, 4):
        values[:, :, -1] = 65535
    path = tmp_path / "picture.png"
    path.write_bytes(png(64, 64, 16, colour, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)))
    expected = values[:, :, :3] if channels > 2 else np.repeat(values[:, :, :1], 3, axis=2)
    # Pillow takes the high byte, so up to one level below the nearest.
    assert np.abs(np.asarray(load_reference(path)).astype(float) - expected / 257).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "RGBX"])
def test_every_mode_of_the_formats_keeps_its_colours(mode: str) -> None:
    flat = Image.new("RGB", (64, 64), (200, 40, 90))
    expected = {"1": None, "L": (94, 94, 94), "LA": (94, 94, 94)}.get(mode, (200, 40, 90))
    loaded = np.asarray(load_reference(flat.convert(mode, dither=Image.Dither.NONE)))
    assert loaded.shape == (64, 64, 3)
    if expected is None:
        assert set(np.unique(loaded)) <= {0, 255}
    else:
        # YCbCr and HSV round to 8 bits on the way there; the web palette of P has steps of 51.
        tolerance = {"P": 26, "YCbCr": 3, "HSV": 3}.get(mode, 0)
        assert np.abs(loaded.astype(int) - expected).max() <= tolerance


def test_a_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(path)  # full magenta and yellow: red
    # JPEG at quality 75 moves a flat colour by a level or two.
    assert np.abs(np.asarray(load_reference(path)).astype(int) - (255, 0, 0)).max() <= 3


def test_arrays_are_taken_in_every_documented_shape() -> None:
    rgb = np.asarray(photo())
    grey = rgb[:, :, 0]
    assert same(load_reference(rgb), rgb)
    assert same(load_reference(rgb[::-1]), rgb[::-1])  # not contiguous
    assert same(load_reference(grey), np.dstack([grey] * 3))
    assert same(load_reference(grey[:, :, None]), np.dstack([grey] * 3))
    assert (np.asarray(load_reference(np.dstack([rgb, 0 * grey]))) == 255).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((64, 64, 3), np.float32), ("float32", "* 255", "uint8")),
        (np.zeros((64, 64, 3), np.float64), ("float64", "* 255")),
        (np.zeros((64, 64), np.uint16), ("uint16", "uint8")),
        (np.zeros((64, 64), bool), ("bool", "uint8")),
        (np.zeros((1, 64, 64, 3), np.uint8), ("[1, 64, 64, 3]", "[H, W]")),
        (np.zeros((3, 64, 64), np.uint8), ("[3, 64, 64]",)),
        (np.zeros((64, 64, 2), np.uint8), ("[64, 64, 2]",)),
        (np.zeros(64, np.uint8), ("[64]",)),
        (np.zeros((0, 64, 3), np.uint8), ("64x0", "at least 64")),
        (np.zeros((1, 1, 3), np.uint8), ("1x1", "at least 64")),
        (np.broadcast_to(np.uint8(0), (8001, 8000)), ("8000x8001", "64 megapixels")),
    ],
)
def test_other_arrays_are_refused_with_advice(array: np.ndarray, words: tuple[str, ...]) -> None:
    refused(array, *words)


def test_other_things_are_refused() -> None:
    refused(None, "NoneType")
    refused(b"\x89PNG", "bytes")
    refused(Image.new("F", (64, 64)), "mode F", "0..255")
    refused(Image.new("I", (64, 64)), "mode I")
    refused(Image.new("RGB", (0, 0)), "0x0")


def test_paths_that_are_no_file_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.png", "missing.png", "does not exist")
    refused(tmp_path, tmp_path.name, "not a file")
    refused("https://example.org/cat.png", "https://example.org/cat.png", "download")
    refused("a\0b.png", "cannot be opened")
    refused("x" * 300, "cannot be opened")
    refused(tmp_path / "two\nlines.png", r"two\nlines.png", "does not exist")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "pipe.png", "not a file")  # and does not wait for a writer


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    photo().save(path)
    path.chmod(0)
    refused(path, "secret.png", "Permission denied")


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_whatever_the_suffix(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(photo(), image_format))
    refused(path, "picture.png", "not a readable PNG, JPEG or WEBP")
    with Image.open(path) as opened:  # nor through an image that Pillow has opened but not yet decoded
        refused(opened, "picture.png", image_format, "convert('RGB')")
        load_reference(opened.convert("RGB"))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"not a picture", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
def test_files_that_are_no_picture_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    refused(path, "picture.png")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "cut.png"
    data = encoded(photo(), image_format)
    for share in (0.1, 0.5, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        refused(path, "cut.png")
    path.write_bytes(data[: len(data) // 2])
    if image_format != "WEBP":  # whose truncation Pillow sees on opening
        refused(Image.open(path), "cut.png", "damaged or cut off")


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_an_animation_is_refused_with_its_number_of_frames(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "moving.png"
    photo().save(path, image_format, save_all=True, append_images=[photo(seed=1), photo(seed=2)])
    refused(path, "moving.png", "3 frames", "one frame")
    with Image.open(path) as opened:
        refused(opened, "moving.png", "3 frames")


def test_the_pixel_cap_is_read_from_the_header(tmp_path: Path) -> None:
    # 65 MP: below Pillow's limits, so the cap is ours; the pixel data is missing, so decoding would say "cut off".
    path = tmp_path / "big.png"
    path.write_bytes(png(8000, 8001, 8, 2, b""))
    assert 8000 * 8000 == MAX_PIXELS
    refused(path, "big.png", "8000x8001", "64 megapixels")
    with Image.open(path) as opened:
        refused(opened, "big.png", "64 megapixels")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(2**31 - 1, 2**31 - 1, 8, 2, b""))
    refused(path, "bomb.png", "64 megapixels")


def test_a_bomb_in_a_text_chunk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    bomb = (b"zTXt", b"note\0\0" + zlib.compress(bytes(80_000_000)))
    path.write_bytes(png(64, 64, 8, 0, bytes(64 * 65), bomb))
    refused(path, "text.png")


@pytest.mark.parametrize(("width", "height"), [(0, 64), (1, 1), (63, 64), (64, 63)])
def test_pictures_below_64_pixels_are_refused(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "small.png"
    path.write_bytes(png(width, height, 8, 0, bytes(height * (width + 1))))
    refused(path, "small.png")


def test_pictures_longer_than_8_to_1_are_refused() -> None:
    assert load_reference(Image.new("RGB", (512, 64))).size == (512, 64)
    refused(Image.new("RGB", (513, 64)), "513x64", "8 times")
    refused(Image.new("RGB", (64, 513)), "64x513")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_give_a_picture_or_one_line(tmp_path: Path, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    original = encoded(photo(80, 64), image_format, exif=exif.tobytes())
    random = np.random.default_rng(1)
    path = tmp_path / "damaged.png"
    refusals = 0
    for _ in range(300):
        data = np.frombuffer(original, np.uint8).copy()
        places = random.integers(0, min(len(data), 400), 4)  # headers and tables are in front
        data[places] = random.integers(0, 256, 4)
        path.write_bytes(data.tobytes())
        try:
            loaded = load_reference(path)
            assert loaded.mode == "RGB" and min(loaded.size) >= 64
        except ImageError as error:
            refusals += 1
            assert "damaged.png" in str(error) and "\n" not in str(error)
    assert refusals > 10  # the damage reached the decoder


SIZES = [
    (1024, 1024),
    (1023, 1025),
    (1025, 1024),
    (1360, 768),
    (3000, 401),
    (640, 480),
    (65, 79),
    (64, 512),
    (2025, 999),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_prepared_reference_is_diffusers_bit_for_bit(width: int, height: int) -> None:
    image = photo(width, height)
    # Flux2Pipeline.__call__ step 4, with its cap and its multiple of 16.
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    theirs = processor.check_image_input(image)
    if theirs.width * theirs.height > 1024 * 1024:
        theirs = processor._resize_to_target_area(theirs, 1024 * 1024)
    target = {"height": theirs.height // 16 * 16, "width": theirs.width // 16 * 16}
    expected = processor.preprocess(theirs, **target, resize_mode="crop").numpy()[0].transpose(1, 2, 0)

    prepared = prepare_reference(load_reference(image), reference_max_area(1, rule="diffusers"))
    assert prepared.dtype == np.uint8 and prepared.flags.c_contiguous
    assert np.array_equal(prepared.astype(np.float32) / 255 * 2 - 1, expected)


def test_a_reference_that_fits_is_cropped_around_its_centre_and_never_enlarged() -> None:
    image = photo(101, 90)
    assert np.array_equal(prepare_reference(image, 2024**2), np.asarray(image)[5:85, 2:98])
    assert np.array_equal(prepare_reference(image, 101 * 90, multiple=8), np.asarray(image)[1:89, 2:98])


def test_a_reference_that_shrinks_to_nothing_is_refused() -> None:
    with pytest.raises(ImageError, match="at least 16"):
        prepare_reference(photo(512, 64), 1024)


def test_a_model_may_limit_the_sides_of_a_reference_too():
    assert prepare_reference(photo(1024, 512), 512**2, max_side=512).shape == (256, 512, 3)
    assert prepare_reference(photo(600, 500), 512**2, max_side=512).shape == (416, 512, 3)
    assert prepare_reference(photo(480, 320), 512**2, max_side=512).shape == (320, 480, 3)


def test_the_area_rule_is_the_reference_implementations() -> None:
    assert reference_max_area(1) == 2024**2
    assert reference_max_area(2) == reference_max_area(10) == 1024**2
    assert reference_max_area(1, rule="diffusers") == 1024**2
    assert reference_max_area(1, cap=512**2) == reference_max_area(3, cap=512**2) == 512**2
    assert reference_max_area(2, cap=2024**2) == 1024**2


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((1000, 700), "1008x704"),
        ((0, 0), "64x64"),
        ((-16, 64), "64x64"),
        ((5000, 4095), "4096x4096"),
        ((1360, 767), "1360x768"),
    ],
)
def test_a_size_off_the_grid_is_refused_with_the_nearest(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(UsageError, match=f"size {size[0]}x{size[1]} .* nearest is {nearest}$"):
        check_size(*size, DEV)


def test_every_size_named_as_nearest_is_allowed() -> None:
    for spec in (DEV, TINY):
        check_size(spec.width, spec.height, spec)
        check_size(spec.min_side, spec.max_side, spec)
    with pytest.raises(UsageError, match="128 to 512: the nearest is 512x128"):
        check_size(1024, 64, TINY)
    with pytest.raises(UsageError, match="multiples of 48 from 144 to 480: the nearest is 480x144"):
        check_size(512, 128, TINY, multiple=48)
