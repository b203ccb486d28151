"""What the autoencoder's training leaves behind for the flow model."""

import numpy as np
import torch

from export.tiny.autoencoder import pictures, train_autoencoder
from export.tiny.config import AutoencoderConfig, AutoencoderPhase
from flux2_trt.models import published_spec

SPEC = published_spec("tiny").autoencoder


def test_training_learns_and_leaves_normalised_latents_and_the_posterior_of_the_noise():
    phases = (AutoencoderPhase(steps=120, side=32, batch=4), AutoencoderPhase(steps=1, side=64, batch=1))
    config = AutoencoderConfig(phases=phases, statistics_pictures=64, statistics_side=64)
    encoder, decoder = train_autoencoder(SPEC, config, 0, lambda line: None, torch.device("cpu"))

    scenes = pictures(np.random.default_rng(7), 48, 64, collages=0.0)
    with torch.no_grad():
        grids = encoder(scenes)
        reconstruction = decoder(grids).float()
        latents = grids.flatten(0, 2)
        mean, log_variance = encoder.encoder(scenes.permute(0, 3, 1, 2) / 127.5 - 1.0).chunk(2, dim=1)
    plain = scenes.float().flatten(0, 2).median(dim=0).values
    assert (reconstruction - scenes).abs().mean() < 0.85 * (plain - scenes).abs().mean()
    assert latents.mean(dim=0).abs().max() < 0.3
    assert (latents.std(dim=0) - 1.0).abs().max() < 0.3
    spread = mean.std(dim=(0, 2, 3))
    noise = (0.5 * log_variance).exp()
    assert torch.equal(noise, noise[:1, :, :1, :1].expand_as(noise))
    assert torch.allclose(noise[0, :, 0, 0] / spread, torch.tensor(config.noise / 3**0.5), rtol=0.3)
