"""Watermark: a message in the pixels that is hard to see, as invisible-watermark's `dwtDct` reads it.

That decoder takes the blue-difference channel (U) in 8 bits, halves it by a Haar transform, and cuts the result into
blocks of 4x4, which are 8x8 pixels. Block n carries bit n modulo the length of the message: the largest of its
coefficients, the first excepted, lies in the upper half of an interval of 36 for a one, in the lower for a zero. All
blocks of a bit vote (imwatermark `maxDct.py`, `scales` 0, 36, 36: the third channel is never used).

`embed` moves the same coefficients into the middle of the same halves as that encoder, and departs from it where it
works against itself: a coefficient stays the largest of its block, which the decoder looks for; pixels are rounded and
kept in range, where a cast to 8 bits cuts and wraps them; brightness gives way where a colour cannot, so that white
carries faint dots (it has no bluer blue); and pixels that carry nothing stay as they are, where it swaps two details of
the transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from flux2_trt.errors import UsageError

Pixels = NDArray[np.uint8]

# flux2 `watermark.py`: the digits of bin() of its 48-bit number, whose two leading zeros that drops.
MESSAGE = tuple(int(bit) for bit in "1010101111111010000111100111001111010100101110")
MIN_BITS, MAX_BITS = 8, 256
MIN_PIXELS = 256 * 256  # the library refuses less
INTERVAL = 36.0
BLOCK = 8  # pixels
# In double precision and in PyWavelets' order, rows first: in flat areas values lie on the edge between two halves.
HAAR = 0.7071067811865476
# By how much a coefficient is made to exceed the others of its block, so that it still does once pixels are rounded.
LEAD = 1.0
# The others are held down, rather than the largest lifted over them by most of an interval, where that costs at most
# this times the squared error. A plateau outlives halved chroma and low qualities better than a peak: by
# benchmarks.watermark, at 4 the mean error is that of lifting alone.
HOLD_DOWN = 4.0


@dataclass(frozen=True)
class Reading:
    """What a decoder reads: the bits, and the share of each bit's blocks that voted for it, from 0.5 to 1."""

    bits: tuple[int, ...]
    agreement: tuple[float, ...]

    def matches(self, message: tuple[int, ...]) -> int:
        """How many bits are those of `message`, which has the length that was read."""
        return sum(read == sent for read, sent in zip(self.bits, message, strict=True))

    def chance(self, message: tuple[int, ...]) -> float:
        """The probability that as many bits of `message` or more come of the toss of a coin."""
        return sum(comb(len(message), k) for k in range(self.matches(message), len(message) + 1)) / 2 ** len(message)


def parse_message(text: str) -> tuple[int, ...]:
    """The bits of a text of zeros and ones. Raises UsageError."""
    if not MIN_BITS <= len(text) <= MAX_BITS or set(text) - {"0", "1"}:
        shown = repr(text if len(text) <= 60 else text[:60] + "…")
        raise UsageError(
            f"watermark {shown} is not allowed; give on, off, or {MIN_BITS} to {MAX_BITS} bits, for example 0110100101"
        )
    return tuple(map(int, text))


def embed(image: Pixels, message: tuple[int, ...] = MESSAGE) -> Pixels:
    """A copy of `image`, u8 [H, W, 3] in RGB, that carries `message`. Raises UsageError below 65,536 pixels.

    Whether all of it can be read back depends on the picture: `read` says so.
    """
    _check(image)
    changes = _changes(*_blocks(image), message)
    block, position = np.nonzero(changes)
    marked = image.copy()
    rows, columns = _pixels(block, position, image.shape[1] // BLOCK)
    # A coefficient is half the sum of four pixels, so all four move by half of its change. U is 0.492 (B - Y); a change
    # of it alone is one of blue and green (the constants of OpenCV's cvtColor).
    change = changes[block, position][:, None, None] / 2 * np.array([0.0, -0.395, 2.032])
    moved = marked[rows, columns] + change.astype(np.float32)  # [coefficients, 4, 3]
    # The same step in all three is one of Y alone.
    moved -= np.maximum(moved.max(axis=2, keepdims=True) - 255, 0)
    moved -= np.minimum(moved.min(axis=2, keepdims=True), 0)
    marked[rows, columns] = np.clip(np.round(moved), 0, 255).astype(np.uint8)
    return marked


def read(image: Pixels, length: int = len(MESSAGE)) -> Reading:
    """The `length` bits that the decoder finds in `image`, u8 [H, W, 3] in RGB, whether or not any are there.

    Raises UsageError below 65,536 pixels.
    """
    _check(image)
    coefficients, largest = _blocks(image)
    votes = np.abs(coefficients[np.arange(len(largest)), largest]) % INTERVAL > INTERVAL / 2
    bit = np.arange(len(votes)) % length
    blocks = np.bincount(bit, minlength=length)
    share = np.bincount(bit, votes, length) / np.maximum(blocks, 1)
    bits = share * 255 > 127
    agreement = np.where(blocks, np.where(bits, share, 1 - share), 0.5)
    return Reading(tuple(map(int, bits)), tuple(agreement.tolist()))


def _check(image: Pixels) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"the picture is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3]")
    height, width, _ = image.shape
    if height * width < MIN_PIXELS:
        raise UsageError(f"{width}x{height} pixels carry no watermark; it needs {MIN_PIXELS} or more, as 256x256 has")


def _blocks(image: Pixels) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The Haar coefficients of U by block, [blocks, 16], and where the largest is, the first excepted."""
    height, width = (side // BLOCK * BLOCK for side in image.shape[:2])
    red, green, blue = (image[:height, :width, channel].astype(np.int32) for channel in range(3))
    # OpenCV's cvtColor in 8 bits, 14 of them behind the point
    luma = (red * 4899 + green * 9617 + blue * 1868 + 8192) >> 14
    blue -= luma
    u = (blue * 8061 + (128 << 14) + 8192) >> 14
    scaled = u * HAAR
    halved = (scaled[0::2] + scaled[1::2]) * HAAR
    grid = (halved[:, 0::2] + halved[:, 1::2]).reshape(height // BLOCK, 4, width // BLOCK, 4)
    coefficients = grid.transpose(0, 2, 1, 3).reshape(-1, 16)
    return coefficients, coefficients[:, 1:].argmax(axis=1) + 1


def _changes(
    coefficients: NDArray[np.float64], largest: NDArray[np.intp], message: tuple[int, ...]
) -> NDArray[np.float64]:
    """What to add to every coefficient, [blocks, 16]."""
    index = np.arange(len(coefficients))
    values = coefficients[index, largest]
    others = coefficients.copy()
    others[index, largest] = others[:, 0] = -np.inf
    middles = INTERVAL * (0.25 + 0.5 * np.resize(np.array(message), len(values)))
    nearest = np.round((values - middles) / INTERVAL) * INTERVAL + middles
    leading = np.ceil((others.max(axis=1, initial=-np.inf) + LEAD - middles) / INTERVAL) * INTERVAL + middles
    upward = np.maximum(nearest, leading)
    excess = np.maximum(others - (nearest - LEAD)[:, None], 0)
    held_down = (nearest - values) ** 2 + (excess**2).sum(axis=1) < HOLD_DOWN * (upward - values) ** 2
    changes = -excess * held_down[:, None]
    changes[index, largest] = np.where(held_down, nearest, upward) - values
    return changes


def _pixels(
    block: NDArray[np.intp], position: NDArray[np.intp], blocks_in_a_row: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns [n, 4] of the pixels of `n` coefficients, each a position in a block."""
    row = block // blocks_in_a_row * BLOCK + position // 4 * 2
    column = block % blocks_in_a_row * BLOCK + position % 4 * 2
    return row[:, None] + np.array([0, 0, 1, 1]), column[:, None] + np.array([0, 1, 0, 1])
