"""Embeds: what a text encoder made of prompts, carried between machines, with the name of the text encoder on it.

The file is a .safetensors file with `prompt_embeds` F32 [B, T, context_dim] and, for models that use classifier-free
guidance, `negative_prompt_embeds` F32 [1, T, context_dim] of the empty prompt. Its metadata are `format` (this one's
name), `text_encoder` (`encoder_identity`), `model` and `prompts` (a JSON list).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.manifest import SYNTHETIC, Manifest
from flux2_trt.spec import ModelSpec
from flux2_trt.tensor_file import READABLE, TensorFile
from flux2_trt.text import check_prompt

FORMAT = "flux2-trt prompt embeds 1"
EMBEDS, NEGATIVE = "prompt_embeds", "negative_prompt_embeds"
MAX_PROMPTS = 1024
SHOWN_PROMPTS = 5

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Embeds [B, T, context_dim] of `prompts`, None where they are not known; those of the empty prompt [1, T, ...].

    `text_encoder` is the identity of what made them, None where it did not say.
    """

    embeds: Floats
    negative: Floats | None = None
    prompts: tuple[str, ...] | None = None
    text_encoder: str | None = None
    model: str = ""

    def checked(self, spec: ModelSpec, identity: str | None, where: str) -> PromptEmbeds:
        """Themselves. Raises UsageError where `spec`, or the text encoder of `identity`, has not made them."""
        if None not in (identity, self.text_encoder) and identity != self.text_encoder:
            raise UsageError(
                f"{where} is of another text encoder: {self.text_encoder[:12]}… ({self.model or '?'}), and that of "  # type: ignore[index]
                f"{spec.name} is {identity[:12]}…; encode the prompts with this one: flux2-trt encode"  # type: ignore[index]
            )
        for values in (self.embeds, *([] if self.negative is None else [self.negative])):
            _check_values(values, spec, where)
        if self.negative is not None and self.negative.shape != (1, *self.embeds.shape[1:]):
            raise UsageError(
                f"{where}: the embeds of the empty prompt {list(self.negative.shape)} do not fit the others"
            )
        return self

    def of(self, prompt: str) -> PromptEmbeds:
        """Those of one prompt. Raises UsageError where it is not among `prompts`."""
        if self.prompts is None or prompt not in self.prompts:
            known = self.prompts or ()
            there = ", ".join(f"{each[:40]!r}" for each in known[:SHOWN_PROMPTS]) + (
                " and more" if len(known) > SHOWN_PROMPTS else ""
            )
            raise UsageError(f"there are no embeds of the prompt {prompt[:60]!r}, only of {there or 'unknown ones'}")
        row = self.prompts.index(prompt)
        return replace(self, embeds=self.embeds[row : row + 1], prompts=(prompt,))


def encoder_identity(manifest: Manifest) -> str | None:
    """Hex sha256 over what decides the embeds: sizes, prompt format, tokenizer, and the digests of the checkpoint.

    Bundles of every precision and target that were made from the same checkpoint have the same one. None where a model
    has no text encoder.
    """
    spec, source = manifest.model, manifest.source
    if spec.text_encoder is None or spec.prompt is None:
        return None
    files = source.get("weights_sha256", {}).get("text_encoder", {})
    parts = {
        "text_encoder": asdict(spec.text_encoder),
        "prompt": asdict(spec.prompt),
        "weights": sorted(files.values()) if isinstance(files, dict) else [],
        "tokenizer": source.get("tokenizer_sha256"),
        "seed": source.get(SYNTHETIC),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()


def to_bytes(made: PromptEmbeds) -> bytes:
    """The file of `made`."""
    from safetensors.numpy import save

    tensors = {EMBEDS: np.ascontiguousarray(made.embeds, np.float32)}
    if made.negative is not None:
        tensors[NEGATIVE] = np.ascontiguousarray(made.negative, np.float32)
    metadata = {"format": FORMAT, "model": made.model}
    if made.prompts is not None:
        metadata["prompts"] = json.dumps(made.prompts)
    if made.text_encoder is not None:
        metadata["text_encoder"] = made.text_encoder
    return save(tensors, metadata)


def read_embeds(path: Path) -> PromptEmbeds:
    """The embeds in a file, not yet checked against a model. Raises UsageError for anything else than such a file."""
    try:
        return _embeds(TensorFile(path))
    except CheckpointError as error:
        raise UsageError(f"{str(error).partition(';')[0]}; make one with: flux2-trt encode PROMPT -o FILE") from None


def from_bytes(data: bytes, name: str) -> PromptEmbeds:
    """As `read_embeds`; `name` is what messages call the bytes."""
    try:
        return _embeds(TensorFile(Path(name), data))
    except CheckpointError as error:
        raise UsageError(str(error).partition(";")[0]) from None


def _embeds(file: TensorFile) -> PromptEmbeds:
    metadata, tensors, path = file.metadata, file.tensors, file.path
    if EMBEDS not in tensors or set(tensors) - {EMBEDS, NEGATIVE}:
        raise UsageError(f"{path} holds no prompt embeds; make them with: flux2-trt encode PROMPT -o FILE")
    for name, tensor in tensors.items():
        if tensor.dtype not in READABLE or len(tensor.shape) != 3 or 0 in tensor.shape:
            raise UsageError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected F32 [B, T, context_dim]")
    embeds = tensors[EMBEDS].float32()
    negative = tensors[NEGATIVE].float32() if NEGATIVE in tensors else None
    prompts = _prompts(metadata["prompts"], len(embeds), path) if "prompts" in metadata else None
    return PromptEmbeds(embeds, negative, prompts, metadata.get("text_encoder"), metadata.get("model", "")[:60])


def _prompts(text: str, count: int, path: Path) -> tuple[str, ...]:
    try:
        prompts = tuple(json.loads(text))
        for prompt in prompts:
            check_prompt(prompt, "a prompt")
    except (ValueError, TypeError, RecursionError, UsageError) as error:
        raise UsageError(f"{path}: its prompts cannot be read ({error}); encode them again") from None
    if len(prompts) != count or count > MAX_PROMPTS:
        raise UsageError(f"{path} has {count} embeds and {len(prompts)} prompts; encode them again")
    return prompts


def _check_values(values: Floats, spec: ModelSpec, where: str) -> None:
    width = spec.transformer.context_dim
    length = spec.prompt.max_length if spec.prompt else None
    right = values.ndim == 3 and values.shape[2] == width and length in (None, values.shape[1])
    if not right:
        raise UsageError(
            f"{where}: the embeds have shape {list(values.shape)}; {spec.name} takes [B, {length or 'T'}, {width}]"
        )
    if not np.isfinite(values).all():
        raise UsageError(f"{where}: the embeds hold numbers that are not finite; encode the prompts again")


def distinct(prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts, each once. Raises UsageError for one that is empty or no text."""
    for prompt in prompts:
        check_prompt(prompt, "a prompt")
        if not prompt.strip():
            raise UsageError('a prompt is empty; give for example: flux2-trt encode "a red cube" -o cube.safetensors')
    if len(prompts) > MAX_PROMPTS:
        raise UsageError(f"{len(prompts)} prompts are too many; give at most {MAX_PROMPTS} for one file")
    return tuple(dict.fromkeys(prompts))
