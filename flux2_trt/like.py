"""Like: what to ask for, to make a picture again from what its file says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux2_trt.bundle import file_sha256
from flux2_trt.errors import UsageError
from flux2_trt.lora.request import LoraRequest
from flux2_trt.options import RunOptions, options_from_texts
from flux2_trt.provenance import Parameters, Reference
from flux2_trt.runtime.choice import runnable_targets
from flux2_trt.store import Store


def made_again(made: Parameters, options: RunOptions) -> RunOptions:
    """`options` with all that they leave open taken from what the picture `options.like` says.

    The bundle that made it is asked for if it is here and no LoRA is given, else its model with its LoRAs. Their files
    and references are looked for beside the picture, and in this folder. Raises UsageError where one is missing, or for
    a value that no option allows.
    """
    assert options.like is not None
    folders = (options.like.parent, Path())
    if made.references and not options.image:
        options = replace(options, image=find_references(made.references, folders))
    encoded_anew = options.text_encoder is not None or options.upsample != "none"
    if made.prompt_embeds and options.prompt_embeds is None and options.prompt in (None, made.prompt):
        if not encoded_anew:
            options = replace(options, prompt_embeds=_embeds_of(made.prompt_embeds, folders))
    found = options_like(made, options)
    if options.model is None and options.bundle is None and not options.lora:
        for bundle in Store().list():
            if bundle.ok and bundle.key == made.model_key and bundle.target in runnable_targets():
                return replace(found, model=None, bundle=bundle.path)
    if made.loras and not options.lora and options.bundle is None and options.model in (None, made.model):
        files = [_find(lora.name, lora.sha256, folders, "LoRA", "all LoRAs with --lora") for lora in made.loras]
        used = zip(files, made.loras, strict=True)
        return replace(found, lora=tuple(LoraRequest(file, lora.strength) for file, lora in used))
    return found


def options_like(made: Parameters, options: RunOptions) -> RunOptions:
    """`options` with what they leave open taken from `made`, its references excepted.

    Another model, or a bundle that was asked for, keeps its own steps, sigmas and guidance. Raises UsageError for
    values that no option allows.
    """
    prompt = made.prompt
    if options.upsample != "none" and made.original_prompt is not None:
        prompt = made.original_prompt  # to be rewritten anew
    texts = {"seed": str(made.seed), "watermark": made.watermark or "off"}
    if prompt or made.prompt_embeds is None:  # of embeds from elsewhere, the prompt can be unknown
        texts["prompt"] = prompt
    if options.bundle is None:
        texts["model"] = made.model
    if options.match_image is None:
        texts |= {"width": str(made.width), "height": str(made.height)}
    if options.bundle is None and options.model in (None, made.model):
        texts["guidance"] = repr(made.guidance_scale)
        if made.sigmas is not None and options.steps is None:
            texts["sigmas"] = ",".join(map(repr, made.sigmas))
        elif options.sigmas is None:
            texts["steps"] = str(made.num_inference_steps)
    taken = {name: text for name, text in texts.items() if getattr(options, name) is None}
    checked = options_from_texts(taken)  # a file may say anything
    values: dict[str, Any] = {name: getattr(checked, name) for name in taken}
    return replace(options, **values)


def find_references(references: Sequence[Reference], folders: Sequence[Path]) -> tuple[Path, ...]:
    """The files of `references`, by name and content, each from the first folder that has it. Raises UsageError."""
    advice = "every reference with --image, in order"
    return tuple(_find(each.name, each.sha256, folders, "reference", advice) for each in references)


def _embeds_of(embeds: Reference, folders: Sequence[Path]) -> Path:
    return _find(embeds.name, embeds.sha256, folders, "file of prompt embeds", "it with --prompt-embeds")


def _find(name: str, sha256: str, folders: Sequence[Path], what: str, advice: str) -> Path:
    for folder in folders:
        path = folder / Path(name).name  # a file from elsewhere may say anything
        with suppress(OSError):  # a file that cannot be read is not the one
            if os.path.isfile(path) and file_sha256(path) == sha256:
                return path
    raise UsageError(
        f"the {what} {name!r} (SHA-256 {sha256[:12]}…) is neither beside the picture nor in this folder; give {advice}"
    )
