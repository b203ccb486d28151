"""Noise: the normal numbers that torch draws from a seed on a CUDA device, without torch and without the device.

The reference implementations draw a picture's noise as `torch.randn(shape, dtype=torch.bfloat16)` with a CUDA generator
(flux2 `scripts/cli.py`; diffusers `randn_tensor`, in the dtype of the prompt embeds). torch numbers the threads of its
launch, gives each a Philox stream of its own, and takes four normal numbers at a time from it (pytorch
`aten/src/ATen/native/cuda/DistributionTemplates.h`; cuRAND `curand_init`, `curand_normal4`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flux2_trt.errors import UsageError

Floats = NDArray[np.float32]
Words = NDArray[np.uint64]
"""32-bit words, in 64 bits so that products fit."""

SEED_COUNT = 2**64
BLOCK = 256  # threads of a block in torch's launch
NORMALS = 4  # that a thread draws at a time
CHUNK = 8192  # threads computed at a time: their words stay in a core's cache

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), a column for words 0 and 2
ROUNDS = 10
MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
LOW_WORD, WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)

UNIT = np.float32(2.0**-32)  # cuRAND's CURAND_2POW32_INV
ANGLE = UNIT * np.float32(2.0 * math.pi)  # CURAND_2POW32_INV_2PI


@dataclass(frozen=True)
class GpuThreads:
    """The threads that a GPU holds at once, on which the noise of larger pictures depends.

    torch launches no more threads than these, and they share a longer draw between them: a seed gives the same first
    `count` numbers on every GPU, and others from there on. Both fields are in `torch.cuda.get_device_properties`, as
    `multi_processor_count` and `max_threads_per_multi_processor`.
    """

    multiprocessors: int
    threads_per_multiprocessor: int

    @property
    def count(self) -> int:
        return self.multiprocessors * (self.threads_per_multiprocessor // BLOCK) * BLOCK


H100 = GpuThreads(multiprocessors=132, threads_per_multiprocessor=2048)
"""The SXM version."""


def picture_seeds(seed: int, count: int) -> list[int]:
    """The own seeds of `count` pictures made from a base seed: seed + index, modulo 2**64.

    Image k of prompt j has index j * num_images_per_prompt + k, so the own seed makes one picture again by itself.
    diffusers does the same with a list of generators, one a picture. From a single generator it draws all pictures as
    one tensor, of which only the first is that of its seed alone; flux2 makes one picture a seed.
    """
    _check_seed(seed)
    return [(int(seed) + index) % SEED_COUNT for index in range(count)]


def noise_batch(seeds: Sequence[int], channels: int, height: int, width: int, gpu: GpuThreads = H100) -> Floats:
    """Noise f32 [B, C, h, w], sides in latent tokens; a seed gives the same picture whatever the batch around it."""
    return np.stack([noise(seed, (channels, height, width), gpu) for seed in seeds])


def noise(seed: int, shape: Sequence[int], gpu: GpuThreads = H100) -> Floats:
    """Standard normal noise of one picture, f32 of `shape`: bfloat16 numbers, as the references draw them.

    Raises UsageError for a seed that is not a whole number from 0 to 2**64 - 1.
    """
    return rounded_to_bfloat16(normal(seed, math.prod(shape), gpu)).reshape(shape)


def normal(seed: int, count: int, gpu: GpuThreads = H100) -> Floats:
    """`torch.randn(count, dtype=torch.float32)`, f32 [count], as a new CUDA generator with that seed draws it.

    Up to the last bits: a GPU's own sines and cosines are off by about 2**-21 (CUDA C++ programming guide, "Intrinsic
    functions"), these by half a unit in the last place, so that all machines agree. A bfloat16 number rounds to the
    neighbour of the GPU's less than once in a thousand times.
    """
    _check_seed(seed)
    values = np.empty(count, np.float32)
    threads = min(gpu.count, math.ceil(count / BLOCK) * BLOCK)
    for turn, start in enumerate(range(0, count, NORMALS * threads)):
        drawn = values[start : start + NORMALS * threads]  # normal 0 of all threads, then normal 1, ...
        for first in range(0, min(threads, len(drawn)), CHUNK):
            last = min(first + CHUNK, threads, len(drawn))
            counters = np.zeros((4, last - first), np.uint64)
            counters[0], counters[2] = turn, np.arange(first, last)
            each = range(math.ceil(len(drawn) / threads))
            for index, numbers in zip(each, _normals(philox(counters, int(seed))), strict=False):
                place = drawn[index * threads + first : index * threads + last]
                place[:] = numbers[: len(place)]
    return values


def philox(counters: Words, seed: int) -> Words:
    """Random words [4, n] of `counters` [4, n], with `seed` as the 64-bit key."""
    key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint64)
    even, odd = counters[0::2], counters[1::2]
    for _ in range(ROUNDS):
        products = (even * MULTIPLIERS)[::-1]
        even, odd = products >> WORD_BITS ^ odd ^ key, products & LOW_WORD
        key = key + KEY_STEPS & LOW_WORD
    return np.stack((even[0], odd[0], even[1], odd[1]))


def _normals(words: Words) -> Iterator[Floats]:
    """The four normal numbers of every column of words [4, n], [n] at a time: cuRAND's `_curand_box_muller`.

    Functions are taken in float64 and rounded, which hides how mathematical libraries differ. An angle is rounded once,
    as by a GPU's fused multiply-add; products with UNIT are exact.
    """
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        uniform = first.astype(np.float32) * UNIT + UNIT / 2
        angle = (second.astype(np.float32) * np.float64(ANGLE) + np.float64(ANGLE / 2)).astype(np.float32)
        radius = np.sqrt(np.float32(-2.0) * np.log(uniform.astype(np.float64)).astype(np.float32))
        yield radius * np.sin(angle.astype(np.float64)).astype(np.float32)
        yield radius * np.cos(angle.astype(np.float64)).astype(np.float32)


def rounded_to_bfloat16(values: Floats) -> Floats:
    """The nearest bfloat16 numbers, ties to even, as f32; for finite values."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def _check_seed(seed: int) -> None:
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < SEED_COUNT:
        raise UsageError(f"seed {seed!r} is not allowed; give a whole number from 0 to 2**64 - 1, for example 42")
