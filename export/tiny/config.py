"""Every number of the training of `tiny`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from export.tiny.dataset import Kind


@dataclass(frozen=True)
class AutoencoderPhase:
    """So many steps on pictures of `side` pixels."""

    steps: int
    side: int
    batch: int


@dataclass(frozen=True)
class AutoencoderConfig:
    """Reconstruction of collages and rendered scenes."""

    phases: tuple[AutoencoderPhase, ...] = (
        AutoencoderPhase(steps=1400, side=32, batch=8),
        AutoencoderPhase(steps=1000, side=64, batch=4),
        AutoencoderPhase(steps=400, side=128, batch=4),
        AutoencoderPhase(steps=120, side=256, batch=2),
    )
    muon_learning_rate: float = 0.025
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_share: float = 0.6
    noise: float = 0.5
    """The most noise that the decoder is given, relative to the spread of a latent channel."""
    size_weight: float = 1e-4
    """Weight in the loss of the mean square of the latents, which nothing else bounds."""
    collages: float = 0.75
    """Share of collages among the pictures."""
    statistics_pictures: int = 512


@dataclass(frozen=True)
class TextConfig:
    """Reading the facts of prompts."""

    steps: int = 1000
    batch: int = 128
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.5
    held_out: int = 1000
    """Held-out prompts that are read at the end."""


@dataclass(frozen=True)
class FlowPhase:
    """So many steps with these pictures of each kind in a step; `sizes` are drawn evenly."""

    steps: int
    sizes: tuple[tuple[int, int], ...]
    batch: Mapping[Kind, int]
    tokens: int
    """Tokens that a step looks at in every picture, drawn anew if a picture has more."""
    padded: float
    """Share of batches with all the padding that a prompt has at inference; the others spare the time."""


OTHER_SIZES = (
    *((128, 128), (192, 192), (384, 384), (512, 512)),
    *((320, 192), (192, 320), (384, 256), (256, 384), (512, 256), (256, 512)),
)
DEFAULT = ((256, 256),)
SIZES = (*DEFAULT * len(OTHER_SIZES), *OTHER_SIZES)
"""Half of the batches at the default size, half at others."""


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching of conditioning and transformer together."""

    phases: tuple[FlowPhase, ...] = (
        FlowPhase(steps=1250, sizes=SIZES, batch={"text": 4, "edit": 8, "combine": 1}, tokens=112, padded=0.25),
        FlowPhase(steps=1650, sizes=DEFAULT, batch={"text": 4, "edit": 9, "combine": 1}, tokens=128, padded=0.25),
        FlowPhase(steps=300, sizes=DEFAULT, batch={"text": 3, "edit": 7, "combine": 1}, tokens=256, padded=1.0),
    )
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_share: float = 0.8
    """Share of all steps, at the end, over which the learning rate falls linearly to zero."""
    timestep_shift: float = 6.0
    """Timesteps are uniform numbers shifted towards noise: t = s*u / (1 + (s - 1)*u)."""
    drawn_weight: float = 4.0
    """Weight in the loss of tokens that are more than background, in the target or a reference."""
    new_weight: float = 12.0
    """Weight in the loss of those of them that look as in no reference: what an edit is about."""
    layout_weight: float = 0.2
    """Weight in the loss of the head that reads the layout from the middle of the transformer."""
    prompt_dropout: float = 0.06
    ema_decay: float = 0.99
    pool_size: int = 1024
    """Encoded samples kept per kind and size; the oldest make room for new ones."""
    pool_start: int = 500
    """So many samples of a kind and size are drawn before any is used again."""
    fresh_share: float = 0.1
    """Share of a batch that is newly drawn after that; the rest comes from the pool with new noise."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts that the judge scores."""

    count: int = 100
    """Samples of every kind."""
    batch: int = 10
    size: tuple[int, int] = (256, 256)
    num_inference_steps: int = 8
    seed: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """The whole training, from one seed."""

    seed: int = 0
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
