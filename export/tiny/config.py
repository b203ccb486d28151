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
        AutoencoderPhase(steps=1500, side=32, batch=32),
        AutoencoderPhase(steps=1500, side=64, batch=16),
        AutoencoderPhase(steps=1500, side=128, batch=16),
        AutoencoderPhase(steps=500, side=256, batch=8),
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
    statistics_side: int = 256


@dataclass(frozen=True)
class TextConfig:
    """Reading the facts of prompts."""

    steps: int = 1500
    batch: int = 256
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.5
    held_out: int = 1000
    """Held-out prompts that are read at the end."""


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching of conditioning and transformer together."""

    steps: int = 12000
    batch: Mapping[Kind, int] = field(default_factory=lambda: {"text": 20, "edit": 36, "combine": 8})
    """Samples of each kind in a step at the default size; at others so many that they have as many tokens."""
    size: tuple[int, int] = (256, 256)
    """The default size."""
    other_sizes: tuple[tuple[int, int], ...] = (
        *((128, 128), (160, 160), (192, 192), (224, 224), (320, 320), (384, 384), (448, 448), (512, 512)),
        *((320, 192), (192, 320), (384, 256), (256, 384), (512, 256), (256, 512), (512, 384), (384, 512)),
    )
    default_share: float = 0.4
    """Share of batches at the default size; the others are drawn evenly from `other_sizes`."""
    default_reference_share: float = 0.2
    """Share of batches whose references have the default size, whatever size the target has."""
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 200
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
    ema_decay: float = 0.999


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts that the judge scores."""

    count: int = 100
    """Samples of every kind."""
    batch: int = 10
    other_count: int = 40
    """The same at each of some other sizes."""
    size: tuple[int, int] = (256, 256)
    other_sizes: tuple[tuple[int, int], ...] = ((128, 128), (320, 192), (192, 320), (384, 384), (512, 512))
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
