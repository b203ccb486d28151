"""Provenance: what made a picture, as readers of other programs know it and as what makes it again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import numpy as np


@dataclass(frozen=True)
class Reference:
    """A reference picture: its file name without folders, and the SHA-256 (hex) of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True)
class UsedLora:
    """A LoRA in the model's weights: its file's name without folders, the SHA-256 (hex) of its bytes, its strength."""

    name: str
    sha256: str
    strength: float


@dataclass(frozen=True)
class Parameters:
    """Everything that is needed to make one picture again.

    `seed` is the picture's own (`latents.picture_seeds`): the same seed makes it again by itself. `image_index` says
    which picture of its run it was, so the run's base seed is seed - image_index modulo 2**64. `sigmas` are the custom
    levels as given, None for the default schedule. `model_key` is the bundle's key. `watermark` are the bits that were
    put into the pixels, as zeros and ones. `prompt` is what was drawn; where it was rewritten, `original_prompt` is
    what was typed and `upsampled_by` who rewrote it. `prompt_embeds` is the file that its embeds were taken from.
    """

    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    model: str
    model_key: str
    version: str
    sigmas: tuple[float, ...] | None = None
    references: tuple[Reference, ...] = ()
    image_index: int = 0
    watermark: str | None = None
    original_prompt: str | None = None
    upsampled_by: str | None = None
    prompt_embeds: Reference | None = None
    loras: tuple[UsedLora, ...] = ()

    def to_text(self) -> str:
        """The form that AUTOMATIC1111's web UI writes: the prompt, then one line of settings."""
        settings = {
            "Steps": self.num_inference_steps,
            "Sampler": "Euler",
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            # Quoted like there where a comma, colon or line break would end the value.
            "Model": json.dumps(self.model, ensure_ascii=False) if set(self.model) & set(",:\n") else self.model,
            "Version": f"flux2-trt {self.version}",
        }
        if self.original_prompt is not None:  # always quoted: it may end in what looks like settings
            settings["Original prompt"] = json.dumps(self.original_prompt, ensure_ascii=False)
        if self.loras:
            used = ", ".join(f"{lora.name}:{lora.strength:g}" for lora in self.loras)
            settings["LoRA"] = json.dumps(used, ensure_ascii=False)
        return f"{self.prompt}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())

    def to_json(self) -> str:
        """Every field, losslessly, in ASCII; `from_json` gives the same parameters back."""
        return json.dumps(asdict(self), default=np.generic.item)

    @staticmethod
    def from_json(text: str) -> Parameters:
        """Raises ValueError, TypeError or OverflowError where a key is missing or unknown, a value of another type."""
        values: dict[str, Any] = dict(json.loads(text, parse_float=_finite, parse_constant=_finite))
        for name in ("watermark", "original_prompt", "upsampled_by"):
            if not isinstance(values.get(name), str | None):
                raise TypeError(f"{name} is no text")
        if values.get("prompt_embeds") is not None:
            values["prompt_embeds"] = _checked(Reference, values["prompt_embeds"])
        if values.get("sigmas") is not None:
            values["sigmas"] = tuple(float(sigma) for sigma in values["sigmas"])
        values["references"] = tuple(_checked(Reference, reference) for reference in values.get("references", ()))
        values["loras"] = tuple(_checked(UsedLora, lora) for lora in values.get("loras", ()))
        return _checked(Parameters, values)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _checked(cls: type, values: dict[str, Any]) -> Any:
    for name, kind in get_type_hints(cls).items():
        found = type(values[name]) if name in values else kind
        if kind in (str, int, float) and found is not kind and (kind, found) != (float, int):
            raise TypeError(f"{name} is a {found.__name__}, not a {kind.__name__}")
    return cls(**values)
