"""Options: what a user can ask of a picture; the command line and the interactive session both read this list."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from flux2_trt.errors import UsageError
from flux2_trt.lora.request import LoraRequest

if TYPE_CHECKING:
    from flux2_trt.runtime.engine import Backend

DEFAULT_MODEL = "tiny"
SHOWN_CHARACTERS = 60  # of a value that is refused
MetadataLevel = Literal["full", "minimal", "none"]
UPSAMPLERS = ("none", "local", "openrouter")
PIXELS = "a whole number of pixels, for example 256"


@dataclass(frozen=True)
class Option:
    """What the user interfaces need to know of a field of `RunOptions`.

    `parse` takes one text and raises ValueError or UsageError; `allowed` completes the sentence "give ...". A repeated
    option takes several values: a flag given several times, or values with commas between them. A switch is on where
    its flag is given.
    """

    help: str
    allowed: str
    parse: Callable[[str], Any]
    repeated: bool = False
    short: str | None = None
    switch: bool = False


def _option(
    help: str,
    allowed: str,
    parse: Callable[[str], Any],
    repeated: bool = False,
    short: str | None = None,
    switch: bool = False,
) -> dict[str, Option]:
    return {"option": Option(help, allowed, parse, repeated, short, switch)}


def _text(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text)).expanduser()


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(text)
    return int(text)


def _positive(text: str) -> int:
    if (value := _whole(text)) < 1:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or "_" in text:
        raise ValueError(text)
    return value


def _guidance(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value <= 100.0:
        raise ValueError(text)
    return value


def _steps(text: str) -> int:
    from flux2_trt.schedule import sigmas

    sigmas(value := _whole(text), num_tokens=1)  # knows the range; numpy is loaded only where it is asked
    return value


def _sigmas(text: str) -> tuple[float, ...]:
    from flux2_trt.schedule import sigmas

    levels = tuple(_number(level) for level in text.split(","))
    sigmas(len(levels), num_tokens=1, custom=levels)
    return levels


def _quality(text: str) -> int:
    if not 1 <= (value := _whole(text)) <= 100:
        raise ValueError(text)
    return value


def _metadata(text: str) -> str:
    if text not in get_args(MetadataLevel):
        raise ValueError(text)
    return text


def _watermark(text: str) -> str:
    if text not in ("on", "off"):
        from flux2_trt.watermark import parse_message

        parse_message(text)
    return text


def _seed(text: str) -> int:
    from flux2_trt.noise import picture_seeds

    return picture_seeds(_whole(text), count=1)[0]


def _upsample(text: str) -> str:
    if text in UPSAMPLERS:
        return text
    if "://" not in text:
        raise ValueError(text)
    return _address(text)


def _address(text: str) -> str:
    from flux2_trt.endpoint import checked_url

    return checked_url(text)


def _sampling(text: str) -> str:
    from flux2_trt.sampling import Sampling

    Sampling.from_text(text)
    return text


def _seconds(text: str) -> float:
    if not 0.0 < (value := _number(text)) <= 3600.0:
        raise ValueError(text)
    return value


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


def _on_off(text: str) -> str:
    return "on" if _switch(text) else "off"


def _backend(text: str) -> str:
    from flux2_trt.runtime.engine import BACKENDS

    if text not in BACKENDS:
        raise ValueError(text)
    return text


@dataclass(frozen=True)
class RunOptions:
    """One request for pictures. None is the default of the model; `match_image` counts from 1."""

    prompt: str | None = field(default=None, metadata=_option("What to draw.", 'a text, for example "a red cube"', str))
    model: str | None = field(
        default=None,
        metadata=_option(
            f"Model, by name; its newest bundle is used (default: {DEFAULT_MODEL}).",
            "the name of a model that was built; see: flux2-trt bundles list",
            _text,
        ),
    )
    bundle: Path | None = field(
        default=None,
        metadata=_option("Bundle folder, in place of a model.", "a folder that flux2-trt build printed", _path),
    )
    lora: tuple[LoraRequest, ...] = field(
        default=(),
        metadata=_option(
            "LoRA to add to the model, FILE or FILE:STRENGTH; several add up.",
            "a .safetensors file, or one with its strength: style.safetensors:0.8",
            LoraRequest.parse,
            True,
        ),
    )
    backend: Backend = field(
        default="plans",
        metadata=_option(
            "What runs it: plans, or to compare with, torch or torch-compile (default: plans).",
            "plans, torch or torch-compile",
            _backend,
        ),
    )
    image: tuple[Path, ...] = field(
        default=(),
        metadata=_option("Reference picture; several are taken in order.", "a PNG, JPEG or WEBP file", _path, True),
    )
    width: int | None = field(
        default=None,
        metadata=_option("Width (default: first reference, else the model's).", PIXELS, _positive),
    )
    height: int | None = field(
        default=None,
        metadata=_option("Height (default: first reference, else the model's).", PIXELS, _positive),
    )
    match_image: int | None = field(
        default=None,
        metadata=_option("Take the size of this reference; 1 is the first.", "a reference's number, from 1", _positive),
    )
    steps: int | None = field(
        default=None, metadata=_option("Denoising steps (default: the model's).", "a whole number like 8", _steps)
    )
    guidance: float | None = field(
        default=None,
        metadata=_option("Guidance scale (default: the model's).", "a number from 0 to 100", _guidance),
    )
    sigmas: tuple[float, ...] | None = field(
        default=None,
        metadata=_option("Noise levels, one per step, from high to low.", "numbers like 1,0.75,0.5,0.25", _sigmas),
    )
    seed: int | None = field(
        default=None,
        metadata=_option(
            "Seed, with torch's noise of an H100; picture i has seed + i (default: drawn and shown).",
            "a whole number from 0 to 2**64 - 1",
            _seed,
        ),
    )
    num_images: int = field(
        default=1, metadata=_option("How many pictures (default: 1).", "a whole number from 1", _positive)
    )
    batch: int = field(
        default=1,
        metadata=_option(
            "How many of them are denoised together (default: 1); see flux2-trt plan for when that is faster.",
            "a whole number from 1",
            _positive,
        ),
    )
    output: Path | None = field(
        default=None,
        metadata=_option(
            "A .png, .jpg or .webp name, or a folder (default: a free name in this folder).",
            "the name of a .png, .jpg or .webp file, or a folder",
            _path,
            short="-o",
        ),
    )
    quality: int | None = field(
        default=None,
        metadata=_option(
            "Quality of a JPEG (default: 95) or WebP (default: lossless).", "a whole number from 1 to 100", _quality
        ),
    )
    metadata: MetadataLevel = field(
        default="full",
        metadata=_option(
            "What the file says: full, minimal (that it is generated), or none.", "full, minimal or none", _metadata
        ),
    )
    watermark: str | None = field(
        default=None,
        metadata=_option(
            f"on, off, or the bits to embed (default: on, for {DEFAULT_MODEL} off).", "on, off, or bits", _watermark
        ),
    )
    c2pa_cert: Path | None = field(
        default=None,
        metadata=_option("Sign content credentials with this certificate chain.", "a PEM file", _path),
    )
    c2pa_key: Path | None = field(
        default=None, metadata=_option("The private key of that certificate.", "a PEM file", _path)
    )
    like: Path | None = field(
        default=None,
        metadata=_option("Make this picture again; other options change it.", "a picture that flux2-trt wrote", _path),
    )
    upsample: str = field(
        default="none",
        metadata=_option(
            "Who rewrites the prompt: none, local, openrouter, or the URL of a chat endpoint (default: none).",
            "none, local, openrouter, or an address like http://127.0.0.1:8000/v1",
            _upsample,
        ),
    )
    upsample_model: str | None = field(
        default=None,
        metadata=_option(
            "The model that rewrites: its name at the endpoint, or for local a folder or a Hugging Face name.",
            "the name of a model",
            _text,
        ),
    )
    upsample_params: str | None = field(
        default=None,
        metadata=_option(
            "Its sampling parameters (default: temperature=0.15,max_tokens=512).",
            "key=value pairs with commas, or JSON",
            _sampling,
        ),
    )
    upsample_strict: bool = field(
        default=False,
        metadata=_option("Fail where the prompt cannot be rewritten.", "on or off", _switch, switch=True),
    )
    text_encoder: str | None = field(
        default=None,
        metadata=_option(
            "URL of a text encoder elsewhere; the prompt is sent there (default: here).",
            "an address like https://HOST/predict",
            _address,
        ),
    )
    prompt_embeds: Path | None = field(
        default=None,
        metadata=_option(
            "Draw prompts that flux2-trt encode encoded: all in the file, or the prompt that is given.",
            "a .safetensors file that flux2-trt encode wrote",
            _path,
        ),
    )
    endpoint_timeout: float = field(
        default=120.0,
        metadata=_option(
            "Seconds to wait for an answer of an endpoint (default: 120).", "a number up to 3600", _seconds
        ),
    )
    safety: str | None = field(
        default=None,
        metadata=_option(f"Content checks, on or off (default: on, for {DEFAULT_MODEL} off).", "on or off", _on_off),
    )
    safety_model: str | None = field(
        default=None,
        metadata=_option(
            "The language model that the checks ask (default: the reference's, Mistral Small 3.2).",
            "a folder, or a Hugging Face name",
            _text,
        ),
    )

    @property
    def asks(self) -> bool:
        """Whether this says what to draw."""
        return self.prompt is not None or self.like is not None or self.prompt_embeds is not None


OPTIONS: Mapping[str, Option] = {field.name: field.metadata["option"] for field in fields(RunOptions)}
_FIELDS: Mapping[str, Field[Any]] = {field.name: field for field in fields(RunOptions)}


def flag_name(name: str) -> str:
    """`match_image` as `--match-image`."""
    return "--" + name.replace("_", "-")


def default_of(name: str) -> Any:
    value = _FIELDS[name].default
    assert value is not MISSING
    return value


def options_from_texts(texts: Mapping[str, str | bool | Iterable[str] | None]) -> RunOptions:
    """The options of a command line: every value as it was typed, None for what was not given. Raises UsageError."""
    values: dict[str, Any] = {}
    for name, given in texts.items():
        if isinstance(given, bool):
            values[name] = given
        elif isinstance(given, str):
            values[name] = _parsed(name, given)
        elif given is not None:
            values[name] = tuple(_parsed(name, text) for text in given)
    return RunOptions(**values)


def parse_assignment(text: str, options: RunOptions) -> RunOptions:
    """`options` with one of them set by `key=value`; `key=` goes back to the default. Raises UsageError."""
    key, separator, value = text.partition("=")
    name = key.strip().replace("-", "_")
    if not separator:
        raise UsageError(f"{_shown(text)} is no key=value; write for example width=512")
    if name not in OPTIONS:
        raise UsageError(f"unknown option {_shown(key)}; known are {', '.join(OPTIONS)}")
    parsed: Any = default_of(name)
    if value:
        repeated = OPTIONS[name].repeated
        parsed = tuple(_parsed(name, part) for part in value.split(",")) if repeated else _parsed(name, value)
    changed: dict[str, Any] = {name: parsed}
    return replace(options, **changed)


def as_text(name: str, options: RunOptions) -> str:
    """The value of an option as it can be typed; empty where it is the model's default."""
    value = getattr(options, name)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parsed(name: str, text: str) -> Any:
    try:
        return OPTIONS[name].parse(text)
    except UsageError:
        raise
    except ValueError:
        raise UsageError(
            f"{name.replace('_', ' ')} {_shown(text)} is not allowed; give {OPTIONS[name].allowed}"
        ) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")
