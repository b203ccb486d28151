"""A LoRA as it is asked for: a file and how strong. Nothing is read here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from flux2_trt.errors import UsageError

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call the one file of a LoRA's folder."""
PEFT_FILE, PEFT_CONFIG = FILE_NAMES[1], "adapter_config.json"


@dataclass(frozen=True)
class LoraRequest:
    """`path`: a .safetensors file, or the folder that diffusers or peft saved. `strength` 0 changes nothing."""

    path: Path
    strength: float = 1.0

    @staticmethod
    def parse(text: str) -> LoraRequest:
        """Of FILE or FILE:STRENGTH; what follows the last colon is a strength if it is a number. Raises UsageError."""
        path, colon, end = text.rpartition(":")
        strength = _number(end) if colon else None
        if strength is None:
            path, strength = text, 1.0
        if not path or not math.isfinite(strength):
            raise UsageError(
                f"--lora {text!r:.80} is no FILE or FILE:STRENGTH; write for example style.safetensors:0.8"
            )
        return LoraRequest(Path(path).expanduser(), strength)

    def __str__(self) -> str:
        return str(self.path) if self.strength == 1.0 else f"{self.path}:{self.strength!r}"

    @property
    def file(self) -> Path:
        """The .safetensors file, in the folder if `path` is one."""
        there = [self.path / name for name in FILE_NAMES if (self.path / name).is_file()]
        return there[0] if there else self.path

    @property
    def config(self) -> Path | None:
        """peft's configuration, which says alpha; None where the file is not one that peft saved."""
        beside = self.file.with_name(PEFT_CONFIG)
        return beside if self.file.name == PEFT_FILE and beside.is_file() else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
