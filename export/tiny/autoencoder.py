"""Training of the built-in model's autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.modules.autoencoder import PICTURE_CHANNELS, VaeDecoder, VaeEncoder
from export.tiny.batches import drawn
from export.tiny.config import AutoencoderConfig, AutoencoderPhase
from export.tiny.dataset import sample
from export.tiny.optimizer import Optimizer, schedule_factor
from export.tiny.scenes import COLORS, SHAPES, Scene, Thing, pick, render
from flux2_trt.spec import AutoencoderSpec

COLLAGE_THINGS = 9
COLLAGE_SIZES = (0.06, 0.35)


def collage(rng: np.random.Generator) -> Scene:
    """Many overlapping things of all sizes: every place has a colour of its own, so none can be guessed from afar."""
    colors = list(COLORS)
    things = tuple(
        Thing(pick(rng, SHAPES), pick(rng, colors), rng.uniform(*COLLAGE_SIZES), *rng.uniform(0.0, 1.0, 2))
        for _ in range(int(rng.integers(2, COLLAGE_THINGS + 1)))
    )
    return Scene(pick(rng, colors), things)


def pictures(rng: np.random.Generator, count: int, side: int, collages: float) -> Tensor:
    """[count, side, side, 3] uint8: a share of collages, the rest target scenes of the training side of the split."""
    scenes = (collage(rng) if rng.random() < collages else sample(rng).target for _ in range(count))
    return torch.from_numpy(np.stack([render(scene, side, side) for scene in scenes]))


def _draw(phases: list[AutoencoderPhase], collages: float, rng: np.random.Generator, step: int) -> Tensor:
    return pictures(rng, phases[step].batch, phases[step].side, collages)


def train_autoencoder(
    spec: AutoencoderSpec,
    config: AutoencoderConfig,
    seed: int,
    log: Callable[[str], None],
    device: torch.device,
    workers: int = 0,
) -> tuple[VaeEncoder, VaeDecoder]:
    """Both halves, trained on reconstruction from noisy latents, with the latent batch norm measured at the end.

    Noise in proportion to the spread of each channel makes the encoder give shapes as much room as colours, which is
    what the flow model can learn, and makes the decoder draw clean areas and edges from latents that are not quite so.
    """
    torch.manual_seed(seed)
    encoder, decoder = VaeEncoder(spec).to(device), VaeDecoder(spec).to(device)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    kernels = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) > PICTURE_CHANNELS]
    optimizer = Optimizer(parameters, kernels, config.muon_learning_rate, config.adam_learning_rate)
    phases = [phase for phase in config.phases for _ in range(phase.steps)]
    total = len(phases)
    draw = partial(_draw, phases, config.collages)
    for step, shown in enumerate(drawn(draw, seed, range(total), device, workers), start=1):
        target = shown.to(device, non_blocking=True).permute(0, 3, 1, 2) / 127.5 - 1.0
        mean = encoder.encoder(target).chunk(2, dim=1)[0]
        scale = mean.std(dim=(0, 2, 3), keepdim=True)
        noise = config.noise * torch.rand(len(mean), 1, 1, 1, device=device) * torch.randn_like(mean)
        output = decoder.decoder(mean + scale * noise)
        reconstruction = F.l1_loss(output, target) + F.mse_loss(output, target)
        (reconstruction + config.size_weight * mean.square().mean()).backward()
        optimizer.step(schedule_factor(step - 1, total, config.warmup_steps, config.decay_share))
        if step % 100 == 0 or step == total:
            log(f"autoencoder {step}/{total} side {target.shape[-1]} loss {reconstruction.item():.4f}")
    _measure_latents(encoder, decoder, config, np.random.default_rng((seed, total)))
    return encoder.eval(), decoder.eval()


@torch.no_grad()
def _measure_latents(
    encoder: VaeEncoder, decoder: VaeDecoder, config: AutoencoderConfig, rng: np.random.Generator
) -> None:
    """Set the batch norm of both halves from the latents of training pictures, and the posterior to the noise."""
    side, batch, device = config.statistics_side, 16, encoder.bn.running_mean.device
    latents = torch.cat(
        [
            encoder(pictures(rng, batch, side, collages=0.0).to(device)).flatten(0, 2)
            for _ in range(config.statistics_pictures // batch)
        ]
    )
    for half in (encoder, decoder):
        half.bn.running_mean.copy_(latents.mean(dim=0))
        half.bn.running_var.copy_(latents.var(dim=0))
    channels = encoder.spec.latent_channels
    variance = latents.var(dim=0).unflatten(0, (channels, -1)).mean(dim=1) * config.noise**2 / 3  # of uniform * normal
    posterior = encoder.encoder.quant_conv
    assert isinstance(posterior, nn.Conv2d) and posterior.bias is not None
    posterior.weight[channels:] = 0
    posterior.bias[channels:] = variance.log()
