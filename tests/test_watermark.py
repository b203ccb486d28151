"""The watermark is the one that invisible-watermark reads, in photographs, drawings and flat colours."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_trt.errors import UsageError
from flux2_trt.watermark import MESSAGE, embed, parse_message, read

imwatermark = pytest.importorskip("imwatermark", exc_type=ImportError, reason="its opencv needs libGL")
skimage = pytest.importorskip("skimage")

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "rocket.jpg", "retina.jpg")
TINY = Path(__file__).parents[1] / "benchmarks" / "results" / "tiny.png"
OTHER = tuple(int(bit) for bit in "0110100101101001011010010110100111")


@cache
def picture(name: str, width: int, height: int) -> np.ndarray:
    """A photograph of scikit-image, a drawing by tiny (`tiny 0` and so on, enlarged), or one colour."""
    if name.startswith("tiny"):
        with Image.open(TINY) as sheet:
            left = 12 + 204 * int(name.split()[1])
            image = sheet.convert("RGB").crop((left, 12, left + 192, 204))
    elif name.startswith("#"):
        image = Image.new("RGB", (width, height), name)
    else:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as photograph:
            image = photograph.convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def bgr(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[..., ::-1])


def library_bits(image: np.ndarray, length: int = len(MESSAGE)) -> tuple[int, ...]:
    return tuple(map(int, imwatermark.WatermarkDecoder("bits", length).decode(bgr(image), "dwtDct")))


def library_embed(image: np.ndarray, message: tuple[int, ...] = MESSAGE) -> np.ndarray:
    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bits", message)
    return bgr(encoder.encode(bgr(image), "dwtDct"))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("size", [(512, 512), (768, 512), (1024, 1024)])
@pytest.mark.parametrize("name", [*PHOTOGRAPHS, "tiny 0", "tiny 1", "tiny 2", "tiny 3"])
def test_the_library_reads_every_bit_from_the_pixels_and_from_a_jpeg(name, size):
    original = picture(name, *size)
    marked = embed(original)
    assert library_bits(marked) == library_bits(jpeg(marked, 95)) == MESSAGE
    assert psnr(original, marked) > 35


@pytest.mark.parametrize("color", ["#ffffff", "#000000", "#ffff00", "#808080", "#1e5adc", "#e6c800"])
def test_flat_colours_carry_the_message_that_the_librarys_own_encoder_loses_there(color):
    flat = picture(color, 512, 512)
    assert library_bits(embed(flat)) == MESSAGE
    if color in ("#ffffff", "#ffff00"):
        assert library_bits(library_embed(flat)) != MESSAGE


def test_a_colour_that_cannot_be_bluer_is_not_read_and_says_so():
    reading = read(embed(picture("#0000ff", 512, 512)))
    assert reading.bits != MESSAGE and reading.chance(MESSAGE) > 1e-3


@pytest.mark.parametrize("size", [(256, 256), (250, 263), (257, 1023), (8, 8192), (9000, 9)])
@pytest.mark.parametrize("kind", ["noise", "flat", "marked", "marked by the library"])
def test_the_decoder_reads_what_the_librarys_reads(kind, size):
    width, height = size
    if kind == "noise":
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    elif kind == "flat":  # U is 135 there, which lies on the very edge between a one and a zero
        image = np.full((height, width, 3), (128, 128, 142), np.uint8)
    else:
        image = (embed if kind == "marked" else library_embed)(picture("coffee.png", width, height), OTHER)
    assert read(image, len(OTHER)).bits == library_bits(image, len(OTHER))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_same_coefficients_carry_the_same_halves_as_with_the_librarys_encoder(name):
    """The value is in the middle of a half; the first coefficient stays, and no other is lifted."""
    import cv2
    import pywt

    def haar(image: np.ndarray) -> np.ndarray:
        frame = pywt.dwt2(cv2.cvtColor(bgr(image), cv2.COLOR_BGR2YUV)[..., 1], "haar")[0]
        return frame.reshape(64, 4, 64, 4).transpose(0, 2, 1, 3).reshape(-1, 16)

    original = picture(name, 512, 512)
    ours, before = haar(embed(original)), haar(original)
    largest = before[:, 1:].argmax(axis=1) + 1
    rows = np.arange(len(before))
    wanted = np.resize(np.array(MESSAGE), len(before)) * 18 + 9
    distance = np.abs((ours[rows, largest] - wanted + 18) % 36 - 18)
    assert np.mean(distance <= 2) > 0.99  # rounded pixels: by half a step each of blue and green, four pixels
    untouched = np.ones_like(ours, bool)
    untouched[rows, largest] = False
    rest = untouched & (np.arange(16) > 0)
    limit = np.broadcast_to(ours[rows, largest][:, None], ours.shape)
    assert np.all(ours[rest] <= np.maximum(before[rest], limit[rest]))  # held down, or as it was
    assert np.array_equal(ours[:, 0], before[:, 0])


def test_most_pixels_stay_and_the_original_does():
    original = picture("coffee.png", 512, 512)
    before = original.copy()
    marked = embed(original)
    assert np.array_equal(original, before)
    changed = (marked != original).any(axis=2)
    assert changed.mean() < 0.4 < (library_embed(original) != original).any(axis=2).mean()
    assert not changed.reshape(64, 8, 64, 8)[:, :2, :, :2].any()  # where each block has its first coefficient


@pytest.mark.parametrize("length", [8, 46, 256])
def test_messages_of_any_allowed_length_come_back(length):
    message = tuple(np.random.default_rng(length).integers(0, 2, length).tolist())
    marked = embed(picture("coffee.png", 512, 512), message)
    assert read(marked, length).bits == library_bits(marked, length) == message
    assert read(marked, length).matches(message) == length and min(read(marked, length).agreement) > 0.9


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, "#ffffff", "tiny 0"])
def test_a_picture_without_one_is_not_mistaken(name):
    assert read(picture(name, 512, 512)).chance(MESSAGE) > 1e-3


def test_the_chance_is_that_of_coins():
    reading = read(embed(picture("coffee.png", 512, 512)))
    assert reading.chance(MESSAGE) == 2.0**-46
    opposite = tuple(1 - bit for bit in MESSAGE)
    assert reading.matches(opposite) == 0 and reading.chance(opposite) == 1.0


def test_a_picture_too_narrow_for_a_block_carries_nothing():
    line = np.zeros((70_000, 7, 3), np.uint8)
    assert np.array_equal(embed(line), line) and set(read(line).agreement) == {0.5}


def test_small_pictures_and_other_arrays_are_refused():
    small = np.zeros((255, 256, 3), np.uint8)
    for action in (embed, read):
        with pytest.raises(UsageError, match=r"256x255 pixels .* 65536"):
            action(small)
    for array in (np.zeros((512, 512, 3), np.float32), np.zeros((512, 512), np.uint8), np.zeros((512, 512, 4), "u1")):
        with pytest.raises(UsageError, match="uint8"):
            embed(array)


@pytest.mark.parametrize("text", ["", "0", "01" * 129, "01012345", "on off", "0110 1001", "٠١٠١٠١٠١"])
def test_bits_are_zeros_and_ones(text):
    with pytest.raises(UsageError, match="8 to 256 bits") as caught:
        parse_message(text)
    assert len(str(caught.value)) < 200
    assert parse_message("01101001") == (0, 1, 1, 0, 1, 0, 0, 1)
