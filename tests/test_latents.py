"""A seed gives the same picture in any batch; tokens, positions and rotary tables are diffusers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

from flux2_trt.errors import UsageError
from flux2_trt.latents import noise, noise_batch, pack, picture_seeds, position_ids, rotary_tables, unpack
from flux2_trt.models import published_spec

LAST_SEED = 2**64 - 1


def test_a_seed_gives_the_same_noise_forever() -> None:
    # Recorded with numpy 2.4.6. numpy may change a generator's stream in a new release; users' seeds may not change.
    expected = np.array([-1.48384106, -0.33662856, 0.20083328, -0.30365208], dtype=np.float32)
    # A few units in the last place: the tail of the distribution goes through the platform's logarithm.
    np.testing.assert_allclose(noise(42, (4,)), expected, rtol=5e-7)


def test_a_seed_gives_the_same_picture_whatever_the_batch() -> None:
    alone = noise_batch([7], 8, 4, 6)
    assert alone.shape == (1, 8, 4, 6) and alone.dtype == np.float32
    assert np.array_equal(noise_batch([1, 7, LAST_SEED], 8, 4, 6)[1], alone[0])


def test_pictures_of_neighbouring_seeds_are_independent_standard_normal_noise() -> None:
    first, second = noise_batch([0, 1], 128, 32, 32).reshape(2, -1)
    # 131072 samples: the mean, the deviation and the correlation of true noise stay within 5 / sqrt(n) = 0.014.
    for value in (first.mean(), first.std() - 1, second.mean(), second.std() - 1, np.corrcoef(first, second)[0, 1]):
        assert abs(value) < 5 / np.sqrt(first.size)


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


def test_pack_is_diffusers_pack_and_unpack_undoes_it() -> None:
    latents = noise_batch([3, 4], 8, 3, 5)
    tokens = pack(latents)
    assert np.array_equal(tokens, Flux2Pipeline._pack_latents(torch.from_numpy(latents)).numpy())
    assert np.array_equal(unpack(tokens, 3, 5), latents)
    # An engine reads raw memory: tokens [B, h*w, C] and channels-last latents [B, h, w, C] are the same bytes.
    assert tokens.flags.c_contiguous and tokens.tobytes() == latents.transpose(0, 2, 3, 1).tobytes()
    assert unpack(tokens, 3, 5).flags.c_contiguous


def test_positions_are_diffusers_positions() -> None:
    references = [(2, 4), (5, 3), (1, 1)]
    ids = position_ids(6, 3, 7, references)
    theirs = torch.cat(
        [
            Flux2Pipeline._prepare_text_ids(torch.zeros(1, 6, 8))[0],
            Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 8, 3, 7))[0],
            Flux2Pipeline._prepare_image_ids([torch.zeros(1, 8, h, w) for h, w in references])[0],
        ]
    )
    assert ids.dtype == np.int64
    assert np.array_equal(ids, theirs.numpy())
    # What the docstring promises, without diffusers: last text token, first image token, second token of reference 2.
    assert ids[5].tolist() == [0, 0, 0, 5] and ids[6].tolist() == [0, 0, 0, 0]
    assert ids[6 + 21 + 8 + 1].tolist() == [20, 0, 1, 0]


@pytest.mark.parametrize("model", ["dev", "tiny"])
def test_rotary_tables_are_diffusers_tables_without_the_repetition(model: str) -> None:
    transformer = published_spec(model).transformer
    ids = position_ids(512, 20, 30, [(9, 8)] * 3)
    cos, sin = rotary_tables(ids, transformer.axes_dim, transformer.theta)
    embed = Flux2PosEmbed(theta=int(transformer.theta), axes_dim=list(transformer.axes_dim))
    for ours, theirs in zip((cos, sin), embed(torch.from_numpy(ids)), strict=True):
        assert ours.dtype == np.float32 and ours.shape == (len(ids), transformer.head_dim // 2)
        # Both are float64 rounded to float32; at a rounding boundary one unit in the last place below 1 (2**-24).
        np.testing.assert_allclose(np.repeat(ours, 2, axis=1), theirs.numpy(), rtol=0, atol=6e-8)


def test_rotary_tables_stay_exact_far_from_the_origin() -> None:
    cos, sin = rotary_tables(np.array([[0, 4095, 0, 0]]), (4, 4, 4, 4), 2000.0)
    # Half a unit in the last place of a float32 below 1; angles in float32 would be off by 1e-4 here.
    np.testing.assert_allclose(cos[0, 2:4], np.cos([4095.0, 4095.0 / 2000.0**0.5]), rtol=0, atol=3e-8)
    np.testing.assert_allclose(sin[0, 2:4], np.sin([4095.0, 4095.0 / 2000.0**0.5]), rtol=0, atol=3e-8)
    assert np.array_equal(cos[0, [0, 1, 4, 5, 6, 7]], np.ones(6)) and not sin[0, [0, 1, 4, 5, 6, 7]].any()
