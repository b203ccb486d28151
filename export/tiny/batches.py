"""Batches to train on: drawn and rendered in worker processes, labelled and encoded where the model is.

Every sample is new. What a step is shown depends on the seed and the step alone, not on workers or interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from export.modules.autoencoder import VaeEncoder
from export.tiny.config import FlowConfig
from export.tiny.dataset import Kind, Sample, sample
from export.tiny.scenes import COLORS, SHAPES, pick, render
from flux2_trt.latents import position_ids, rotary_tables
from flux2_trt.spec import ModelSpec
from flux2_trt.text import PromptTokenizer

T = TypeVar("T")
Size = tuple[int, int]
"""Width and height in pixels."""

TOKEN_SHAPES = ("background", *SHAPES)
TOKEN_COLORS = tuple(COLORS)
CELLS = 4
"""Cells along each side of a token, of which the share that is drawn is known."""
MOST_THINGS = 2


class Drawing(NamedTuple):
    """Samples of one kind as they are drawn.

    `pictures` [B, 1 + R, H, W, 3] uint8: target and references, all at the size of the target.
    `references`, each [B, h, w, 3] uint8: as the model is shown them.
    `input_ids`, `attention_mask` [B, T] int64; `cos`, `sin` [T + N, D/2] fp32: of prompt, target and references.
    `backgrounds` [B, 1 + R, 3] uint8: their colours; `background` [B] int64: the target's, an index in `TOKEN_COLORS`.
    `shapes`, `colors` [B, MOST_THINGS] int64: the target's things, as indices in `TOKEN_SHAPES` and `TOKEN_COLORS`.
    `centers` [B, MOST_THINGS, 2] fp32: where they are (x, y), infinitely far if there is none.
    """

    pictures: Tensor
    references: tuple[Tensor, ...]
    input_ids: Tensor
    attention_mask: Tensor
    cos: Tensor
    sin: Tensor
    backgrounds: Tensor
    background: Tensor
    shapes: Tensor
    colors: Tensor
    centers: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Drawing:
        """`change` of every tensor."""
        changed = {name: change(value) for name, value in self._asdict().items() if name != "references"}
        return Drawing(**changed, references=tuple(map(change, self.references)))

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [*(value for name, value in self._asdict().items() if name != "references"), *self.references]


@dataclass(frozen=True)
class Batch:
    """Latent tokens of targets [B, N, C] and references [B, M, C] fp32, token ids and mask [B, T] int64, rotary tables.

    `drawn` [B, N] bool: tokens where the target or a reference shows something other than its background.
    `new` [B, N] bool: tokens where the target shows something that no reference shows there; none without references.
    `shape`, `color` [B, N] int64: what the target shows at a token, as indices into `TOKEN_SHAPES` and `TOKEN_COLORS`.
    `coverage` [B, N, CELLS**2] fp32: the share of each cell of a token of the target that is not background.
    """

    target: Tensor
    references: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    tables: tuple[Tensor, Tensor]
    drawn: Tensor
    new: Tensor
    shape: Tensor
    color: Tensor
    coverage: Tensor


def draw_samples(
    samples: Sequence[Sample],
    size: Size,
    reference_sizes: Sequence[Size],
    spec: ModelSpec,
    tokenizer: PromptTokenizer,
) -> Drawing:
    """Render samples of one kind at `size`, their references at sizes of their own."""
    scenes = [(each.target, *each.references) for each in samples]
    pictures = np.stack([np.stack([render(scene, *size) for scene in row]) for row in scenes])
    references = tuple(
        pictures[:, index].copy()
        if own == size
        else np.stack([render(each.references[index - 1], *own) for each in samples])
        for index, own in enumerate(reference_sizes, start=1)
    )
    prompts = tokenizer([each.prompt for each in samples])
    side = spec.autoencoder.pixels_per_token
    (height, width), *grids = [(tall // side, wide // side) for wide, tall in (size, *reference_sizes)]
    ids = position_ids(prompts.input_ids.shape[1], height, width, grids)
    cos, sin = rotary_tables(ids, spec.transformer.axes_dim, spec.transformer.theta)

    shapes = np.zeros((len(samples), MOST_THINGS), dtype=np.int64)
    colors = np.zeros_like(shapes)
    centers = np.full((*shapes.shape, 2), np.inf, dtype=np.float32)
    for row, each in enumerate(samples):
        for column, thing in enumerate(each.target.things):
            shapes[row, column] = TOKEN_SHAPES.index(thing.shape)
            colors[row, column] = TOKEN_COLORS.index(thing.color)
            centers[row, column] = thing.center_x, thing.center_y
    return Drawing(
        pictures=torch.from_numpy(pictures),
        references=tuple(map(torch.from_numpy, references)),
        input_ids=torch.from_numpy(prompts.input_ids),
        attention_mask=torch.from_numpy(prompts.attention_mask),
        cos=torch.from_numpy(cos),
        sin=torch.from_numpy(sin),
        backgrounds=torch.tensor([[COLORS[scene.background] for scene in row] for row in scenes], dtype=torch.uint8),
        background=torch.tensor([TOKEN_COLORS.index(each.target.background) for each in samples]),
        shapes=torch.from_numpy(shapes),
        colors=torch.from_numpy(colors),
        centers=torch.from_numpy(centers),
    )


@torch.no_grad()
def encode(drawing: Drawing, encoder: VaeEncoder) -> Batch:
    """What the model learns from `drawing`, on the device of both."""
    side = encoder.spec.pixels_per_token
    pictures = drawing.pictures
    differs = (pictures != drawing.backgrounds[:, :, None, None]).any(dim=-1).float()
    shown = F.max_pool2d(differs, side).bool()
    shape, color = token_labels(drawing, shown[:, 0])
    cells = F.avg_pool2d(differs[:, :1], side // CELLS)
    changed = (pictures[:, 1:] != pictures[:, :1]).any(dim=-1).unflatten(3, (-1, side)).unflatten(2, (-1, side))
    new = changed.any(dim=5).any(dim=3).flatten(2)
    target, *references = (encoder(each).flatten(1, 2) for each in (pictures[:, 0], *drawing.references))
    return Batch(
        target=target,
        references=torch.cat(references, dim=1) if references else target[:, :0],
        input_ids=drawing.input_ids,
        attention_mask=drawing.attention_mask,
        tables=(drawing.cos, drawing.sin),
        drawn=shown.any(dim=1).flatten(1),
        new=new.all(dim=1) & new.any(dim=1),
        shape=shape,
        color=color,
        coverage=F.pixel_unshuffle(cells, CELLS).flatten(2).transpose(1, 2),
    )


def token_labels(drawing: Drawing, shown: Tensor) -> tuple[Tensor, Tensor]:
    """`Batch.shape` and `Batch.color` of targets that show their things at `shown` [B, h, w]: the nearest thing's."""
    _, height, width = shown.shape
    y = (torch.arange(height, device=shown.device) + 0.5)[:, None]
    x = (torch.arange(width, device=shown.device) + 0.5)[None, :]
    center_x, center_y = drawing.centers[..., None, None].unbind(dim=2)
    nearest = torch.hypot(x - center_x * width, y - center_y * height).argmin(dim=1).flatten(1)
    there = shown.flatten(1)
    shape = torch.where(there, drawing.shapes.gather(1, nearest), 0)
    return shape, torch.where(there, drawing.colors.gather(1, nearest), drawing.background[:, None])


@dataclass(frozen=True)
class FlowDrawings:
    """What a step of the flow model's training is shown: a drawing of every kind, each at a size of its own."""

    config: FlowConfig
    spec: ModelSpec
    tokenizer: PromptTokenizer

    def __call__(self, rng: np.random.Generator, step: int) -> dict[Kind, Drawing]:
        return {kind: self._draw(rng, kind, count) for kind, count in self.config.batch.items()}

    def _draw(self, rng: np.random.Generator, kind: Kind, at_default: int) -> Drawing:
        """As many samples as cost about as much as `at_default` ones of the default size."""
        config = self.config
        size = config.size if rng.random() < config.default_share else pick(rng, config.other_sizes)
        reference_size = config.size if rng.random() < config.default_reference_share else size
        count = max(1, round(at_default * config.size[0] * config.size[1] / (size[0] * size[1])))
        samples = [sample(rng, kind=kind) for _ in range(count)]
        reference_sizes = [reference_size] * len(samples[0].references)
        empty = rng.random(count) < config.prompt_dropout
        shown = [replace(each, prompt="") if none else each for each, none in zip(samples, empty, strict=True)]
        return draw_samples(shown, size, reference_sizes, self.spec, self.tokenizer)


Draw = Callable[[np.random.Generator, int], T]
"""What a step, counted from 0, is shown; all chance comes from the generator, which is of the seed and the step."""


@dataclass(frozen=True)
class _Steps(Dataset[T]):
    draw: Draw[T]
    seed: int

    def __getitem__(self, step: int) -> T:
        return self.draw(np.random.default_rng((self.seed, step)), step)


def drawn(draw: Draw[T], seed: int, steps: range, device: torch.device, workers: int) -> Iterable[T]:
    """What `draw` makes of each of `steps`, in order: ahead by `workers` processes, or here if there are none.

    Tensors are pinned where they go to a GPU.
    """
    return DataLoader(
        _Steps(draw, seed),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
