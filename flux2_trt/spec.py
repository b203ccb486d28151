"""ModelSpec: every size and default of a FLUX.2 model as plain data.

The published models and the reader of diffusers folders are in `flux2_trt.models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from flux2_trt.errors import UsageError

GuidanceKind = Literal["embedded", "classifier_free", "none"]
ChatTemplate = Literal["mistral", "qwen3", "plain"]
COMPONENTS = ("text_encoder", "conditioning", "transformer", "vae_encoder", "vae_decoder")
TRANSFORMER_PARTS = ("prologue", "double_block", "single_block", "epilogue")
"""The plans of a transformer that is compiled block by block; the two in the middle serve every block of their kind."""
Component = Literal["text_encoder", "conditioning", "transformer", "vae_encoder", "vae_decoder"]


@dataclass(frozen=True)
class TransformerSpec:
    """Sizes of the flow-matching transformer (flux2 `Flux2Params`)."""

    num_heads: int
    num_double_blocks: int
    num_single_blocks: int
    context_dim: int
    guidance_embeds: bool
    head_dim: int = 128
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)
    in_channels: int = 128
    theta: float = 2000.0
    mlp_ratio: float = 3.0
    timestep_channels: int = 256
    eps: float = 1e-6

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def modulation_size(self) -> int:
        """Width of a conditioning row: shift, scale and gate for every modulated sub-layer.

        Two sets of three for the image and the text stream of the double blocks, one set for the single blocks, shift
        and scale of the final layer.
        """
        return (6 + 6 + 3 + 2) * self.hidden_size


@dataclass(frozen=True)
class AutoencoderSpec:
    """Sizes of the autoencoder (flux2 `AutoEncoderParams`, diffusers `AutoencoderKLFlux2`)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    patch_size: int = 2
    quant_conv: bool = True
    post_quant_conv: bool = True
    mid_block_attention: bool = True
    batch_norm_eps: float = 1e-4

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of the square that one latent token stands for (16 for the family)."""
        return 2 ** (len(self.block_out_channels) - 1) * self.patch_size

    @property
    def token_channels(self) -> int:
        return self.latent_channels * self.patch_size**2


@dataclass(frozen=True)
class TextEncoderSpec:
    """Sizes of the language model that encodes the prompt; `hidden_states` are 0 = embeddings, k = after layer k."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_states: tuple[int, ...]
    rope_theta: float
    rms_norm_eps: float
    qk_norm: bool

    @property
    def num_layers(self) -> int:
        """Layers that have to run: those up to the last hidden state that is used."""
        return max(self.hidden_states)

    @property
    def context_dim(self) -> int:
        return len(self.hidden_states) * self.hidden_size


@dataclass(frozen=True)
class PromptSpec:
    """How a prompt becomes token ids."""

    template: ChatTemplate
    max_length: int
    padding_side: Literal["left", "right"]
    pad_token_id: int


@dataclass(frozen=True)
class SamplingSpec:
    """Published sampling defaults and limits, in pixels.

    `fixed_guidance`: the distilled model takes no other value. `max_reference_area`: a limit of the model's own below
    those of the reference implementation; where there is one, a reference has no side longer than `max_side` either.
    """

    guidance_kind: GuidanceKind
    num_inference_steps: int
    guidance_scale: float
    fixed_guidance: bool = False
    width: int = 1360
    height: int = 768
    min_side: int = 64
    max_side: int = 4096
    max_reference_area: int | None = None

    @property
    def max_reference_side(self) -> int | None:
        """Of a reference, in pixels; None where only its area is limited."""
        return self.max_side if self.max_reference_area else None


@dataclass(frozen=True)
class SourceSpec:
    """Where the published weights live on the Hugging Face hub; a revision pins every file."""

    transformer_repo: str
    transformer_file: str
    autoencoder_repo: str = "black-forest-labs/FLUX.2-dev"
    autoencoder_file: str = "ae.safetensors"
    text_encoder_repo: str = ""
    tokenizer_repo: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """One model of the family: sizes, prompt format, sampling defaults and where its weights come from."""

    name: str
    transformer: TransformerSpec
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec | None
    prompt: PromptSpec | None
    sampling: SamplingSpec
    source: SourceSpec | None = None
    license: str = ""

    def __post_init__(self) -> None:
        transformer, autoencoder = self.transformer, self.autoencoder
        if sum(transformer.axes_dim) != transformer.head_dim or any(axis % 2 for axis in transformer.axes_dim):
            raise UsageError(
                f"{self.name}: rotary axes {transformer.axes_dim} must be even with sum {transformer.head_dim}"
            )
        if transformer.in_channels != autoencoder.token_channels:
            raise UsageError(
                f"{self.name}: the transformer takes {transformer.in_channels} channels a token, the autoencoder gives "
                f"{autoencoder.token_channels} ({autoencoder.latent_channels} latent channels, patch "
                f"{autoencoder.patch_size})"
            )
        if self.text_encoder and self.text_encoder.context_dim != transformer.context_dim:
            raise UsageError(
                f"{self.name}: the transformer takes prompt embeds of width {transformer.context_dim}, its text "
                f"encoder gives {self.text_encoder.context_dim} ({len(self.text_encoder.hidden_states)} hidden states "
                f"of {self.text_encoder.hidden_size})"
            )
        if bool(self.text_encoder) != bool(self.prompt):
            raise UsageError(f"{self.name}: a text encoder and its prompt format come together")

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that this model has; without a text encoder the pipeline wants prompt embeds."""
        return tuple(c for c in get_args(Component) if c != "text_encoder" or self.text_encoder)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `ModelSpec.from_dict` gives the same spec back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelSpec:
        """Raises UsageError where a key is missing or unknown."""
        return _dataclass_from_dict(ModelSpec, values, "model")


def _dataclass_from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise UsageError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(hints)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        nested = [t for t in (hints[name], *get_args(hints[name])) if is_dataclass(t)]
        if nested and value is not None:
            value = _dataclass_from_dict(nested[0], value, f"{where}.{name}")  # type: ignore[arg-type]
        arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from error
