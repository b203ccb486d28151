"""Collage: reference pictures as one small picture, which is how a language model is shown them.

Rules of the reference: several are joined side by side, centred on white, and the whole is shrunk, never enlarged
(flux2 `sampling.py`, `concatenate_images` and `cap_pixels`; `text_encoder.py`, UPSAMPLING_MAX_IMAGE_SIZE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

MAX_AREA = 768**2


def side_by_side(pictures: Sequence[Image.Image], max_area: int = MAX_AREA) -> Image.Image:
    """One RGB picture of at most `max_area` pixels; `pictures`, at least one, are shrunk by the same factor."""
    width, height = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    scale = min(1.0, math.sqrt(max_area / (width * height)))
    # Each is shrunk before it is joined: ten photographs side by side would take gigabytes.
    parts = [_scaled(picture.convert("RGB"), scale) for picture in pictures]
    joined = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        joined.paste(part, (left, (joined.height - part.height) // 2))
        left += part.width
    return joined


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    if scale == 1.0:
        return picture
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)
