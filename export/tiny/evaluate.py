"""How well pictures show what held-out prompts ask for, by a judge that is no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from export.modules.autoencoder import VaeDecoder, VaeEncoder
from export.tiny.batches import draw_samples, encode
from export.tiny.config import EvaluationConfig
from export.tiny.dataset import DRAW, Sample, sample
from export.tiny.flow import FlowModel
from export.tiny.judge import judge, score
from flux2_trt.latents import pack
from flux2_trt.noise import noise_batch
from flux2_trt.schedule import sigmas
from flux2_trt.text import PromptTokenizer

Pictures = NDArray[np.uint8]
Generate = Callable[[Sequence[Sample], Sequence[int]], Pictures]
"""Samples of one kind and a seed for each to pictures uint8 [B, H, W, 3]."""


def held_out_scores(generate: Generate, config: EvaluationConfig) -> dict[str, float]:
    """Shares in 0..1 of what is right in `config.count` pictures of every kind; names as in `judge.score`."""
    verdicts = []
    for kind in DRAW:
        rng = np.random.default_rng(config.seed)
        samples = [sample(rng, held_out=True, kind=kind) for _ in range(config.count)]
        for first in range(0, config.count, config.batch):
            chunk = samples[first : first + config.batch]
            pictures = generate(chunk, range(first, first + len(chunk)))
            verdicts += [judge(each, picture) for each, picture in zip(chunk, pictures, strict=True)]
    return {name: round(value, 4) for name, value in score(verdicts).items()}


def torch_generator(
    model: FlowModel, encoder: VaeEncoder, decoder: VaeDecoder, tokenizer: PromptTokenizer, config: EvaluationConfig
) -> Generate:
    """Pictures by the torch modules themselves, all on one device, for scores after the training."""
    spec, device = model.spec, encoder.bn.running_mean.device
    width, height = (side // spec.autoencoder.pixels_per_token for side in config.size)
    count = width * height

    @torch.no_grad()
    def generate(samples: Sequence[Sample], seeds: Sequence[int]) -> Pictures:
        sizes = [config.size] * len(samples[0].references)
        drawing = draw_samples(samples, config.size, sizes, spec, tokenizer)
        batch = encode(drawing.map(lambda tensor: tensor.to(device)), encoder)
        levels = torch.from_numpy(sigmas(config.num_inference_steps, count)).float().to(device)
        table, text_tokens = model.conditioning(levels[:-1], model.text_encoder(batch.input_ids, batch.attention_mask))
        noise = noise_batch(seeds, spec.transformer.in_channels, height, width)
        tokens = torch.cat((torch.from_numpy(pack(noise)).to(device), batch.references), dim=1)
        dt = torch.zeros(len(table), tokens.shape[1], device=device)
        dt[:, :count] = levels.diff()[:, None]
        step = torch.zeros(1, dtype=torch.int32, device=device)
        for _ in table:
            tokens, step = model.transformer(tokens, table, text_tokens, *batch.tables, dt, step)
        return decoder(tokens[:, :count].unflatten(1, (height, width))).cpu().numpy()

    return generate
