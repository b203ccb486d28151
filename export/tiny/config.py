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
        AutoencoderPhase(steps=500, side=128, batch=2),
        AutoencoderPhase(steps=150, side=256, batch=1),
    )
    muon_learning_rate: float = 0.025
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_share: float = 0.6
    kl_weight: float = 2e-5
    collages: float = 0.75
    """Share of collages among the pictures."""
    statistics_pictures: int = 512


@dataclass(frozen=True)
class FlowPhase:
    """So many steps with these pictures of each kind in a step; `sizes` are drawn evenly."""

    steps: int
    sizes: tuple[tuple[int, int], ...]
    batch: Mapping[Kind, int]


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching of text encoder, conditioning and transformer together."""

    phases: tuple[FlowPhase, ...] = (
        FlowPhase(steps=1300, sizes=((128, 128),), batch={"text": 16, "edit": 8, "combine": 4}),
        FlowPhase(
            steps=250,
            sizes=((256, 256), (256, 256), (256, 256), (128, 128), (192, 320), (320, 192)),
            batch={"text": 8, "edit": 4, "combine": 2},
        ),
    )
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.35
    """Share of all steps, at the end, over which the learning rate falls linearly to zero."""
    timestep_shift: float = 4.5
    """Timesteps are uniform numbers shifted towards noise: t = s*u / (1 + (s - 1)*u)."""
    drawn_weight: float = 4.0
    """Weight in the loss of tokens that are more than background, in the target or a reference."""
    layout_weight: float = 0.2
    """Weight in the loss of the head that reads shapes and colours from the middle of the transformer."""
    prompt_dropout: float = 0.06
    ema_decay: float = 0.99
    pool_size: int = 6144
    """Encoded samples kept per kind and size; a share is replaced in every step."""
    fresh_share: float = 0.3
    """Share of a batch that is newly drawn; the rest comes from the pool with new noise."""


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
    flow: FlowConfig = field(default_factory=FlowConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
