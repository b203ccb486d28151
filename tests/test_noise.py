"""Noise is torch's on CUDA: values that others published from their GPUs, and torch itself where a GPU is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from flux2_trt.errors import UsageError
from flux2_trt.noise import H100, GpuThreads, noise, noise_batch, normal, philox, picture_seeds, rounded_to_bfloat16

LAST_SEED = 2**64 - 1
A100 = GpuThreads(multiprocessors=108, threads_per_multiprocessor=2048)
RTX_A4000 = GpuThreads(multiprocessors=48, threads_per_multiprocessor=1536)
RTX_2070_SUPER = GpuThreads(multiprocessors=40, threads_per_multiprocessor=1024)

PRINTED = 6e-5  # torch prints four decimals, and a GPU's sines are off by 2**-21

# Random123 (DEShawResearch/random123), tests/kat_vectors, the lines "philox4x32 10": counter, key, expected
RANDOM123 = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", RANDOM123.split("\n")[1:-1])
def test_philox_is_random123s(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    counter, seed, expected = words[:4], words[4] | words[5] << 32, words[6:]
    # Between two others, so that a word that comes from another column is seen.
    counters = np.array([[0, word, 1] for word in counter], np.uint64)
    assert philox(counters, seed)[:, 1].tolist() == expected


def test_small_draws_are_those_of_every_gpu() -> None:
    # AUTOMATIC1111/stable-diffusion-webui, modules/rng_philox.py: seed 0, shape (3, 4)
    webui = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    # Its angles are rounded twice, to float32 near 2 pi: 2**-22, times a radius below 4.
    np.testing.assert_allclose(normal(0, 12).reshape(3, 4), webui, rtol=0, atol=1e-6)
    # pytorch/pytorch issue 79496: "always yields"
    np.testing.assert_allclose(normal(10, 3), [-0.1029, 1.6810, -0.2708], atol=PRINTED)
    # flashinfer, `LogitsPipe`: an example in its documentation
    flashinfer = [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175, 0.5280, -1.2753]
    np.testing.assert_allclose(normal(42, 10), flashinfer, atol=PRINTED)


@pytest.mark.parametrize(
    ("gpu", "end"),
    [(H100, [-0.6970, -0.7780, 0.3267]), (A100, [0.1549, -0.6797, -0.1656])],
    ids=["H100", "A100"],
)
def test_large_draws_are_those_of_that_gpu(gpu: GpuThreads, end: list[float]) -> None:
    # pytorch/pytorch issue 143086, torch 2.5.1: nine (H100) or eleven (A100) turns of all threads, the last one partial
    values = normal(1, 49 * 12 * 112 * 144, gpu)
    np.testing.assert_allclose(values[:3], [-0.2963, 2.6764, -0.1408], atol=PRINTED)
    np.testing.assert_allclose(values[-3:], end, atol=PRINTED)


def test_draws_of_gpus_with_fewer_threads_on_a_multiprocessor() -> None:
    # pytorch/pytorch issue 97097, torch 2.0.0, an RTX A4000: seed 14, mean 5, deviation sqrt(5)
    printed = [
        [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319],
        [3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698],
        [6.5552, 4.0857, 4.2315, 2.7704, 3.5479, 3.3063],
        [8.6297, 2.3137, 6.2596, 7.9358, 4.4697, 2.7475],
        [7.0551, 7.8583, 3.9990, 4.1139, 8.9315, 4.2042],
        [2.7337, 2.2106, 7.7815, 8.2207, 6.5395, 4.2604],
    ]
    rows = corners(normal(14, 100_000, RTX_A4000).reshape(1000, 100) * 5**0.5 + 5)
    np.testing.assert_allclose(rows, printed, atol=PRINTED)
    # There, a second machine's output begins with the same rows.
    assert np.array_equal(corners(normal(14, 100_000, RTX_2070_SUPER).reshape(1000, 100) * 5**0.5 + 5)[:3], rows[:3])


def test_half_precision_draws_are_the_same_numbers_rounded() -> None:
    # Triton's tutorial 03, matrix multiplication, as its documentation prints it for float16 inputs from an A100:
    # torch.manual_seed(0), then a and b = torch.randn((512, 512), dtype=torch.float16), and a @ b in float16. Every
    # product takes whole rows and columns, which the A100 draws with its threads and then with some of them again.
    printed = [
        [-10.9531, -4.7109, 15.6953, -28.4062, 4.3320, -26.4219],
        [26.8438, 10.0469, -5.4297, -11.2969, -8.5312, 30.7500],
        [-13.2578, 15.8516, 18.0781, -21.7656, -8.6406, 10.2031],
        [40.2812, 18.6094, -25.6094, -2.7598, -3.2441, 41.0000],
        [-6.1211, -16.8281, 4.4844, -21.0312, 24.7031, 15.0234],
        [-17.0938, -19.0000, -0.3831, 21.5469, -30.2344, -13.2188],
    ]
    size, turn = 512 * 512, 4 * A100.count  # the second tensor begins with a new turn of all threads
    first, second = normal(0, size, A100), normal(0, turn + size, A100)[turn:]
    a, b = (values.astype(np.float16).astype(np.float32).reshape(512, 512) for values in (first, second))
    # Half a unit of float16 below 64 is 2**-6, that of 41 2**-6 too; accumulation in another order adds less.
    np.testing.assert_allclose(corners(a @ b), printed, rtol=2**-10, atol=2**-10)


def corners(rows: np.ndarray) -> np.ndarray:
    """What torch prints of a matrix: the first and the last three rows and columns."""
    places = [0, 1, 2, -3, -2, -1]
    return rows[np.ix_(places, places)]


def test_noise_is_the_draw_in_bfloat16() -> None:
    values = normal(5, 128 * 40 * 30)
    expected = torch.from_numpy(values).bfloat16().float().reshape(128, 40, 30).numpy()
    assert np.array_equal(noise(5, (128, 40, 30)), expected)
    ties = np.array([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 2**-8 + 2**-17, 0.0, -0.0, 1e-39], np.float32)
    assert rounded_to_bfloat16(ties).tobytes() == torch.from_numpy(ties).bfloat16().float().numpy().tobytes()


def test_a_seed_gives_the_same_noise_on_every_machine() -> None:
    # bfloat16 numbers hold eight bits; a sine of another library that is off in the 50th does not show.
    expected = [0.1943359375, 2.15625, -0.171875, 0.84765625, -1.921875, 0.65234375]
    assert noise(42, (6,)).tolist() == expected


def test_a_seed_gives_the_same_picture_whatever_the_batch() -> None:
    alone = noise_batch([7], 8, 4, 6)
    assert alone.shape == (1, 8, 4, 6) and alone.dtype == np.float32
    assert np.array_equal(noise_batch([1, 7, LAST_SEED], 8, 4, 6)[1], alone[0])
    assert np.array_equal(noise_batch([7], 8, 4, 6, RTX_A4000), alone)


@pytest.mark.parametrize("picture", [1000, 256 * 270, H100.count + 1, 5 * H100.count])
def test_the_first_picture_of_one_draw_for_a_batch_is_that_of_the_seed(picture: int) -> None:
    # So the first picture of diffusers is ours, with one generator for the batch or one for each picture.
    assert np.array_equal(normal(7, 3 * picture)[:picture], normal(7, picture))


def test_pictures_of_neighbouring_seeds_are_independent_standard_normal_noise() -> None:
    first, second = noise_batch([0, 1], 128, 64, 64).reshape(2, -1)
    halves = first.reshape(2, -1)  # the second comes from the same threads as the first
    # Of n samples, the mean, the deviation and the correlation of true noise stay within 5 / sqrt(n).
    statistics = [first.mean(), first.std() - 1, second.mean(), second.std() - 1, np.corrcoef(first, second)[0, 1]]
    assert np.abs(statistics).max() < 5 * first.size**-0.5
    assert abs(np.corrcoef(*halves)[0, 1]) < 5 * halves.shape[1] ** -0.5


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_a_seed_outside_the_range_is_refused_with_the_range(seed: object) -> None:
    with pytest.raises(UsageError, match=r"seed .* whole number from 0 to 2\*\*64 - 1"):
        noise(seed, (1,))  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        picture_seeds(seed, 2)  # type: ignore[arg-type]


def test_the_pictures_of_a_run_count_up_from_its_seed_and_wrap() -> None:
    assert picture_seeds(40, 3) == [40, 41, 42]
    assert picture_seeds(LAST_SEED, 3) == [LAST_SEED, 0, 1]
    assert np.array_equal(noise(np.uint64(LAST_SEED), (3,)), noise(LAST_SEED, (3,)))  # type: ignore[arg-type]
    # The whole seed counts, its upper half too.
    assert not np.array_equal(noise(7, (3,)), noise(7 + 2**32, (3,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch without CUDA")
@pytest.mark.parametrize("shape", [(5,), (128, 16, 16), (128, 64, 64), (128, 128, 128), (128, 85, 48)])
@pytest.mark.parametrize("seed", [0, 42, LAST_SEED])
def test_noise_is_torchs_on_this_gpu(seed: int, shape: Sequence[int]) -> None:
    device = torch.cuda.get_device_properties(0)
    gpu = GpuThreads(device.multi_processor_count, device.max_threads_per_multi_processor)

    def drawn(dtype: torch.dtype) -> np.ndarray:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn((1, *shape), generator=generator, dtype=dtype, device="cuda").float().cpu().numpy()[0]

    # 2**-21 times a radius of up to sqrt(2 ln 2**33) = 6.8, and as much again for angles beyond pi.
    ours = normal(seed, int(np.prod(shape)), gpu).reshape(shape)
    np.testing.assert_allclose(ours, drawn(torch.float32), rtol=0, atol=2 * 6.8 * 2**-21)
    ours, theirs = noise(seed, shape, gpu), drawn(torch.bfloat16)
    np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=2 * 6.8 * 2**-21)
    assert (ours != theirs).mean() < 2e-3
