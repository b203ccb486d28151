"""Sampling: how a language model picks the words of a rewritten prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flux2_trt.errors import UsageError

# Which say what is asked, not how it is answered: they are ours to set.
OWN = ("model", "messages", "stream", "stream_options", "n", "tools", "tool_choice", "functions", "modalities", "audio")
EXAMPLE = "top_p=0.9,seed=7 or '{\"top_p\": 0.9}'"


@dataclass(frozen=True)
class Sampling:
    """Defaults of the reference (flux2 `text_encoder.py`); `others` are passed on as they are."""

    temperature: float = 0.15
    max_tokens: int = 512
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not 0.0 <= self.temperature <= 2.0:
            raise UsageError(f"temperature {self.temperature!r:.40} is not allowed; give a number from 0 to 2")
        if type(self.max_tokens) is not int or not 1 <= self.max_tokens <= 8192:
            raise UsageError(f"max_tokens {self.max_tokens!r:.40} is not allowed; give a whole number from 1 to 8192")
        if own := sorted(set(self.others) & set(OWN)):
            raise UsageError(f"{', '.join(own)} cannot be set as a sampling parameter; give for example {EXAMPLE}")

    @staticmethod
    def from_text(text: str) -> Sampling:
        """A JSON object, or key=value with commas or spaces between them. Raises UsageError."""
        values = _from_json(text) if text.lstrip().startswith("{") else dict(map(_pair, text.replace(",", " ").split()))
        if not values:
            raise UsageError(f"there are no sampling parameters in {text[:60]!r}; give for example {EXAMPLE}")
        own: dict[str, Any] = {name: values.pop(name) for name in ("temperature", "max_tokens") if name in values}
        return Sampling(**own, others=values)

    def to_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, **self.others}


def _from_json(text: str) -> dict[str, Any]:
    try:
        return dict(_json(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the sampling parameters are no JSON object ({error}); give for example {EXAMPLE}") from error


def _pair(word: str) -> tuple[str, Any]:
    name, separator, text = word.partition("=")
    if not separator or not name.isidentifier() or not text:
        raise UsageError(f"{word[:60]!r} is no key=value; give for example {EXAMPLE}")
    try:
        return name, _json(text)
    except (ValueError, RecursionError):
        return name, text


def _json(text: str) -> Any:
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value
