"""Tokens, positions and rotary tables are diffusers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

from flux2_trt.latents import pack, position_ids, rotary_tables, unpack
from flux2_trt.models import published_spec
from flux2_trt.noise import noise_batch


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
