"""Encoded samples to train on: drawn, rendered, tokenized and encoded once, used several times with new noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export.modules.autoencoder import VaeEncoder
from export.tiny.dataset import Kind, Sample, sample
from export.tiny.scenes import COLORS, SHAPES, Scene, render
from flux2_trt.text import PromptTokenizer

TOKEN_SHAPES = ("background", *SHAPES)
TOKEN_COLORS = tuple(COLORS)
CELLS = 4
"""Cells along each side of a token, of which the share that is drawn is known."""


@dataclass(frozen=True)
class Batch:
    """Latent tokens of targets [B, N, C] and references [B, R*N, C] fp32, token ids and mask [B, T] int64.

    `drawn` [B, N] bool: tokens where the target or a reference shows something other than its background.
    `new` [B, N] bool: tokens where the target shows something that no reference shows there; none without references.
    `shape`, `color` [B, N] int64: what the target shows at a token, as indices into `TOKEN_SHAPES` and `TOKEN_COLORS`.
    `coverage` [B, N, CELLS**2] fp32: the share of each cell of a token of the target that is not background.
    """

    target: Tensor
    references: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    drawn: Tensor
    new: Tensor
    shape: Tensor
    color: Tensor
    coverage: Tensor

    def select(self, indices: Tensor) -> Batch:
        """Some of the samples."""
        return Batch(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))

    def at(self, places: Tensor) -> Batch:
        """The same samples at some tokens of the target, and at the same tokens of every reference."""
        count = self.target.shape[1]
        return replace(
            self,
            references=self.references.unflatten(1, (-1, count))[:, :, places].flatten(1, 2),
            **{
                name: getattr(self, name)[:, places]
                for name in ("target", "drawn", "new", "shape", "color", "coverage")
            },
        )


@torch.no_grad()
def encode_samples(
    samples: list[Sample], size: tuple[int, int], encoder: VaeEncoder, tokenizer: PromptTokenizer
) -> Batch:
    """One batch of samples of one kind (so all have the same number of references) at `size` = (width, height)."""
    count, side = len(samples), encoder.spec.pixels_per_token
    scenes = [scene for each in samples for scene in (each.target, *each.references)]
    pixels = torch.from_numpy(np.stack([render(scene, *size) for scene in scenes]))
    device = encoder.encoder.conv_in.weight.device
    latents = torch.cat([encoder(chunk.to(device)).flatten(1, 2) for chunk in pixels.split(16)])
    tokens, pictures = latents.unflatten(0, (count, -1)), pixels.unflatten(0, (count, -1))

    backgrounds = torch.tensor([COLORS[scene.background] for scene in scenes]).reshape(count, -1, 1, 1, 3)
    differs = (pictures != backgrounds).any(dim=-1).float()
    shown = F.max_pool2d(differs, side).bool()
    shape, color = token_labels([each.target for each in samples], shown[:, 0])
    cells = F.avg_pool2d(differs[:, :1], side // CELLS)
    changed = (pictures[:, 1:] != pictures[:, :1]).any(dim=-1).unflatten(3, (-1, side)).unflatten(2, (-1, side))
    new = changed.any(dim=5).any(dim=3).flatten(2)
    prompts = tokenizer([each.prompt for each in samples])
    return Batch(
        target=tokens[:, 0],
        references=tokens[:, 1:].flatten(1, 2),
        input_ids=torch.from_numpy(prompts.input_ids).to(device),
        attention_mask=torch.from_numpy(prompts.attention_mask).to(device),
        drawn=shown.any(dim=1).flatten(1).to(device),
        new=(new.all(dim=1) & new.any(dim=1)).to(device),
        shape=shape.to(device),
        color=color.to(device),
        coverage=F.pixel_unshuffle(cells, CELLS).flatten(2).transpose(1, 2).to(device),
    )


def token_labels(scenes: list[Scene], shown: Tensor) -> tuple[Tensor, Tensor]:
    """`Batch.shape` and `Batch.color` of scenes that show their things at `shown` [B, h, w]: the nearest thing's."""
    batch, height, width = shown.shape
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    shape = torch.zeros(batch, height, width, dtype=torch.long)
    color = torch.zeros_like(shape)
    for index, scene in enumerate(scenes):
        distances = [torch.hypot((x - thing.center_x) * width, (y - thing.center_y) * height) for thing in scene.things]
        nearest = torch.stack(distances).argmin(dim=0)
        shapes = torch.tensor([TOKEN_SHAPES.index(thing.shape) for thing in scene.things])
        colors = torch.tensor([TOKEN_COLORS.index(thing.color) for thing in scene.things])
        shape[index] = torch.where(shown[index], shapes[nearest], 0)
        color[index] = torch.where(shown[index], colors[nearest], TOKEN_COLORS.index(scene.background))
    return shape.flatten(1), color.flatten(1)


class Pool:
    """Up to `capacity` encoded samples of one kind and size, of which the oldest are replaced.

    The first `start` samples are used once before any is used again.
    """

    def __init__(
        self,
        kind: Kind,
        size: tuple[int, int],
        capacity: int,
        start: int,
        encoder: VaeEncoder,
        tokenizer: PromptTokenizer,
    ) -> None:
        self.kind, self.size, self.capacity, self.start = kind, size, capacity, min(start, capacity)
        self.encoder, self.tokenizer = encoder, tokenizer
        self.store: Batch | None = None
        self.filled = self.cursor = 0

    def batch(self, rng: np.random.Generator, count: int, fresh_share: float) -> Batch:
        """`count` samples, of which on average `fresh_share` are newly drawn once the pool has its start."""
        fresh = count if self.filled < self.start else int(count * fresh_share + rng.random())
        places = (torch.arange(fresh) + self.cursor) % self.capacity
        if fresh:
            self._replace(rng, places)
        old = torch.from_numpy(rng.integers(self.filled, size=count - fresh))
        assert self.store is not None
        return self.store.select(torch.cat([places, old]))

    def _replace(self, rng: np.random.Generator, places: Tensor) -> None:
        fresh = len(places)
        samples = [sample(rng, kind=self.kind) for _ in range(fresh)]
        new = encode_samples(samples, self.size, self.encoder, self.tokenizer)
        if self.store is None:
            self.store = new.select(torch.zeros(self.capacity, dtype=torch.long))
        for name in Batch.__dataclass_fields__:
            getattr(self.store, name)[places] = getattr(new, name)
        self.cursor = (self.cursor + fresh) % self.capacity
        self.filled = min(self.filled + fresh, self.capacity)
