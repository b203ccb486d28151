"""Images: reference pictures, read as hostile input and brought to the grid, and the sizes that a model draws."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flux2_trt.errors import ImageError, UsageError
from flux2_trt.spec import ModelSpec, SamplingSpec

FORMATS = ("PNG", "JPEG", "WEBP")
# A camera's JPEG that carries further views or previews after the picture itself; Pillow opens it under "JPEG".
MULTI_PICTURE = "MPO"
MAX_PIXELS = 64_000_000
# flux2 `sampling.py`, diffusers `Flux2ImageProcessor.check_image_input`
MIN_SIDE = 64
MAX_ASPECT = 8


def load_reference(source: str | Path | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """A reference picture as 8-bit RGB, upright by its EXIF orientation, on white where it was transparent.

    `source` is a PNG, JPEG or WEBP file, a PIL image, or a uint8 array [H, W], [H, W, 1 | 3 | 4]. Sides are at least
    64 and at most 8:1, 64 megapixels at most (read from the header, before anything is decoded); 16-bit grey is scaled
    to 8 bits. Colour profiles are not applied, as in diffusers. Raises ImageError.
    """
    if isinstance(source, (str, Path)):
        return _from_file(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = repr(str(filename)) if filename else "the reference image"
        if source.format not in (None, MULTI_PICTURE, *FORMATS):
            raise ImageError(
                f"{name} is {source.format}; PNG, JPEG and WEBP are read; give image.convert('RGB') instead"
            )
        with _decoding(name):
            return _to_rgb(source, name)
    raise ImageError(f"a reference is a path, a PIL image or a uint8 array, not {type(source).__name__}")


def _from_file(path: str | Path) -> Image.Image:
    name = repr(str(path))  # quoted, so that a line break in a file name stays inside the line
    if "://" in str(path):
        raise ImageError(f"{name} is an address; download the picture and give the file")
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # before opening: a named pipe would wait for a writer
            raise ImageError(f"{name} is not a file; give a PNG, JPEG or WEBP file")
        file = Path(path).open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; give an existing PNG, JPEG or WEBP file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be opened: {one_line(error)}; give a readable file") from error
    with file, _decoding(name), Image.open(file, formats=FORMATS) as image:
        return _to_rgb(image, name)


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        advice = "(array * 255).round().clip(0, 255).astype('uint8')" if array.dtype.kind == "f" else "uint8 in 0..255"
        raise ImageError(f"the reference array has dtype {array.dtype}; uint8 is taken: give {advice}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"the reference array has shape {list(array.shape)}; give [H, W] or [H, W, 1 | 3 | 4]")
    name = "the reference array"
    _check_reference_size(array.shape[1], array.shape[0], name)
    return _to_rgb(Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array), name)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a readable PNG, JPEG or WEBP picture; convert it to PNG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller") from error
    except Exception as error:  # fed hostile bytes, a decoder raises nearly anything
        raise ImageError(f"{name} is damaged or cut off: {one_line(error)}; save it again as PNG") from error


def one_line(error: Exception) -> str:
    """What an error of the system or of a decoder says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and image.format != MULTI_PICTURE:
        raise ImageError(f"{name} is animated ({frames} frames); save one frame as PNG")
    _check_reference_size(*image.size, name)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = _to_8_bit(upright)
    elif upright.mode in ("I", "F"):
        raise ImageError(f"{name} has mode {upright.mode}, whose range is unknown; scale it to 0..255 and mode L")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    wide = np.asarray(image).astype(np.uint32)
    grey = ((wide + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to the nearest
    key = image.info.get("transparency")  # the one grey value that a PNG may call transparent
    return Image.fromarray(grey if key is None else np.where(wide == key, np.uint8(255), grey))


def _check_reference_size(width: int, height: int, name: str) -> None:
    size = f"{name} is {width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise ImageError(f"{size}; at most {MAX_PIXELS / 1e6:.0f} megapixels are read; make it smaller")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{size}; both sides must be at least {MIN_SIDE}; give a larger picture")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{size}; the long side may be {MAX_ASPECT} times the short one; crop it")


def reference_max_area(
    count: int, rule: Literal["reference", "diffusers"] = "reference", cap: int | None = None
) -> int:
    """Pixels that each of `count` references may have before it is shrunk.

    "reference": 2024**2 for one, 1024**2 each for more (flux2 `sampling.py`); "diffusers": always 1024**2. `cap` is
    the model's own limit.
    """
    area = 2024**2 if count == 1 and rule == "reference" else 1024**2
    return area if cap is None else min(area, cap)


def prepare_reference(
    image: Image.Image, max_area: int, multiple: int = 16, max_side: int | None = None
) -> NDArray[np.uint8]:
    """A loaded RGB reference as the autoencoder takes it, u8 [H, W, 3] with sides that are multiples of `multiple`.

    Shrunk with LANCZOS where it has more than `max_area` pixels or a side longer than `max_side`, then cropped around
    its centre; never enlarged (diffusers `Flux2ImageProcessor`). Raises ImageError where nothing is left.
    """
    width, height = image.size
    scale = min(math.sqrt(max_area / (width * height)), (max_side or math.inf) / max(width, height))
    if scale < 1:
        width, height = int(width * scale), int(height * scale)
    if min(width, height) < multiple:
        raise ImageError(
            f"the reference of {image.width}x{image.height} pixels becomes {width}x{height} within {max_area} pixels; "
            f"both sides must be at least {multiple}: crop it squarer"
        )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    crop_width, crop_height = width // multiple * multiple, height // multiple * multiple
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return np.array(image.crop((left, top, left + crop_width, top + crop_height)), dtype=np.uint8)


def as_reference(image: Image.Image, spec: ModelSpec, count: int) -> NDArray[np.uint8]:
    """`prepare_reference` within the limits of a model, for one of `count` references."""
    limits = spec.sampling
    area = reference_max_area(count, cap=limits.max_reference_area)
    return prepare_reference(image, area, spec.autoencoder.pixels_per_token, limits.max_reference_side)


def check_size(width: int, height: int, spec: SamplingSpec, multiple: int = 16) -> None:
    """Raises UsageError, naming the nearest allowed size, where the model does not draw `width` x `height` pixels.

    Sides are multiples of `multiple` (`AutoencoderSpec.pixels_per_token`) within the model's limits.
    """
    low = -(-spec.min_side // multiple) * multiple
    high = spec.max_side // multiple * multiple
    nearest = [min(max((side + multiple // 2) // multiple * multiple, low), high) for side in (width, height)]
    if nearest != [width, height]:
        raise UsageError(
            f"size {width}x{height} is not allowed; sides are multiples of {multiple} from {low} to {high}: "
            f"the nearest is {nearest[0]}x{nearest[1]}"
        )
