"""Encoding: prompts to a file of embeds, by the text encoder of a bundle or by one elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux2_trt.console import Console
from flux2_trt.embeds import PromptEmbeds, distinct, encoder_identity, to_bytes
from flux2_trt.errors import UsageError
from flux2_trt.options import RunOptions
from flux2_trt.outputs import write_file
from flux2_trt.preparation import GUIDED, encoded_at
from flux2_trt.runner import Runner

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class EncodingReport:
    """What was written: `shape` [B, T, context_dim], the identity of the text encoder, whose ends were cut off."""

    embeds: str
    prompts: tuple[str, ...]
    shape: tuple[int, ...]
    model: str
    text_encoder: str | None
    truncated: tuple[bool, ...]


def encode_file(
    console: Console, prompts: Sequence[str], output: Path, options: RunOptions, overwrite: bool = False
) -> EncodingReport:
    """Write the embeds of `prompts`, and of the empty one where guidance takes it. Raises Flux2Error."""
    if output.suffix != SUFFIX:
        raise UsageError(f"{str(output)!r} is no {SUFFIX} name; give for example {str(output.with_suffix(SUFFIX))!r}")
    if not overwrite and output.exists():
        raise UsageError(f"{str(output)!r} exists and is kept; choose another name, or add --overwrite")
    texts = distinct(prompts)
    pipeline = Runner(console).open(options)
    manifest, truncated = pipeline.bundle.manifest, (False,) * len(texts)
    if options.text_encoder is not None:
        made = encoded_at(options, manifest, texts)
    else:
        with console.clean_results():
            embeds, truncated = pipeline.encode_prompt(texts)
            guided = manifest.model.sampling.guidance_kind == GUIDED
            negative = pipeline.encode_prompt([""])[0] if guided else None
        made = PromptEmbeds(embeds, negative, texts, encoder_identity(manifest), manifest.model.name)
    write_file(output, to_bytes(made), overwrite)
    for text, cut in zip(texts, truncated, strict=True):
        if cut:
            console.warn(f"{text[:40]!r}… is longer than {manifest.model.name} reads; its end was cut off")
    return EncodingReport(str(output), texts, made.embeds.shape, manifest.model.name, made.text_encoder, truncated)
