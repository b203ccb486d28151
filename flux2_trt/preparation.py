"""Preparation: what becomes of a request before a picture is drawn: it is checked, rewritten, and encoded elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_trt.console import Console
from flux2_trt.embeds import PromptEmbeds, encoder_identity, read_embeds
from flux2_trt.endpoint import Endpoint, key_from
from flux2_trt.errors import UsageError
from flux2_trt.manifest import Manifest
from flux2_trt.options import RunOptions
from flux2_trt.sampling import Sampling
from flux2_trt.spec import ModelSpec
from flux2_trt.upsampling import Rewriter, Upsampled, upsample

if TYPE_CHECKING:
    from PIL import Image

    from flux2_trt.safety import ContentChecks

GUIDED = "classifier_free"
UNCHECKED = "give the folder of one by --safety-model, or --safety off"


@dataclass(frozen=True)
class Wording:
    """The prompts to draw, how the only one came about, and their embeds where those are from elsewhere."""

    prompts: tuple[str, ...]
    upsampled: Upsampled
    embeds: PromptEmbeds | None = None


class Preparation:
    """The services that one request asks for. Made before anything is loaded, so that what is missing is said first."""

    def __init__(self, console: Console, options: RunOptions, spec: ModelSpec) -> None:
        """Raises UsageError for options that exclude each other or lack a key, Flux2Error for a missing package."""
        self._console, self._options, self._spec = console, options, spec
        self._given = None if options.prompt_embeds is None else _given(options.prompt_embeds, options)
        self._rewriter = None if options.upsample == "none" else _rewriter(options, spec)

    @property
    def num_prompts(self) -> int:
        return len(self._given.embeds) if self._given else 1

    def word(self, manifest: Manifest, references: Sequence[Image.Image], checks: ContentChecks | None) -> Wording:
        """What to draw by the bundle of `manifest`. Raises Flux2Error; a prompt is checked before it goes anywhere."""
        if self._given is not None:
            made = self._given.checked(self._spec, encoder_identity(manifest), str(self._options.prompt_embeds))
            if checks:
                for prompt in made.prompts or ():
                    checks.require_prompt(prompt)
            return Wording(made.prompts or ("",), Upsampled(""), made)
        assert self._options.prompt is not None
        prompt = self._options.prompt
        elsewhere = self._rewriter is not None or self._options.text_encoder is not None
        if checks and elsewhere:
            checks.require_prompt(prompt)
            checks.require_references(references)
        upsampled = self._upsampled(prompt, references)
        embeds = None
        if self._options.text_encoder is not None:
            if checks and upsampled.original is not None:
                checks.require_prompt(upsampled.prompt, "the rewritten prompt")
            embeds = encoded_at(self._options, manifest, [upsampled.prompt])
        return Wording((upsampled.prompt,), upsampled, embeds)

    def _upsampled(self, prompt: str, references: Sequence[Image.Image]) -> Upsampled:
        if self._rewriter is None:
            return Upsampled(prompt)
        from flux2_trt.inspection import printable

        try:
            with self._console.clean_results():
                upsampled = upsample(prompt, references, self._rewriter, self._options.upsample_strict)
        finally:
            if release := getattr(self._rewriter, "release", None):
                release()
        for problem in upsampled.problems:
            self._console.warn(problem)
        if upsampled.original is not None:
            self._console.note(f"rewritten by {upsampled.by}: {printable(upsampled.prompt)}")
        return upsampled


def encoded_at(options: RunOptions, manifest: Manifest, prompts: Sequence[str]) -> PromptEmbeds:
    """Embeds of `prompts` from `options.text_encoder`, an address; the empty prompt's too where guidance takes them."""
    import numpy as np

    from flux2_trt.remote_encoder import RemoteTextEncoder, text_encoder_at

    assert options.text_encoder is not None
    spec, identity = manifest.model, encoder_identity(manifest)
    encoder = RemoteTextEncoder(text_encoder_at(options.text_encoder, options.endpoint_timeout), spec, identity)
    found = [encoder.encode(prompt) for prompt in prompts]
    negative = found[0].negative
    if negative is None and spec.sampling.guidance_kind == GUIDED:
        negative = encoder.encode("").embeds
    claimed = {made.text_encoder for made in found}
    return PromptEmbeds(
        np.concatenate([made.embeds for made in found]),
        negative,
        tuple(prompts),
        claimed.pop() if len(claimed) == 1 else None,
        spec.name,
    )


def content_checks(options: RunOptions, manifest: Manifest, tested: bool) -> ContentChecks | None:
    """The published checks, None where they are off; `tested`: whether they are on where nothing was said of it."""
    if (options.safety or ("on" if tested else "off")) == "off":
        return None
    from flux2_trt.language_model import LanguageModel, place_of
    from flux2_trt.safety import JUDGE, published_checks

    spec = manifest.model
    is_own = spec.source is not None and spec.source.text_encoder_repo == JUDGE.model  # and may lie in a folder
    place = place_of(spec, options.safety_model, otherwise=UNCHECKED) if options.safety_model or is_own else JUDGE
    return published_checks(LanguageModel(place, otherwise=UNCHECKED))


def _given(path: Path, options: RunOptions) -> PromptEmbeds:
    for name in ("upsample", "text_encoder"):
        if getattr(options, name) not in (None, "none"):
            raise UsageError(f"{path} holds prompts that are encoded already; leave --{name.replace('_', '-')} out")
    made = read_embeds(path)
    if made.prompts is None and len(made.embeds) > 1:
        raise UsageError(f"{path} has embeds of {len(made.embeds)} prompts and does not name them; give one each")
    return made if options.prompt is None else made.of(options.prompt)


def _rewriter(options: RunOptions, spec: ModelSpec) -> Rewriter:
    sampling = Sampling() if options.upsample_params is None else Sampling.from_text(options.upsample_params)
    if options.upsample == "local":
        from flux2_trt.language_model import LanguageModel, place_of

        return LanguageModel(place_of(spec, options.upsample_model), sampling)
    from flux2_trt.chat import OPENROUTER, OPENROUTER_KEY, OPENROUTER_MODEL, OTHER_KEY, ChatEndpoint

    if options.upsample != "openrouter":
        endpoint = Endpoint(options.upsample, key_from(OTHER_KEY), options.endpoint_timeout)
        return ChatEndpoint(endpoint, options.upsample_model, sampling)
    key = key_from(OPENROUTER_KEY)
    if key is None:
        raise UsageError(f"OpenRouter needs a key; set {OPENROUTER_KEY}, or give the address of another endpoint")
    endpoint = Endpoint(OPENROUTER, key, options.endpoint_timeout)
    return ChatEndpoint(endpoint, options.upsample_model or OPENROUTER_MODEL, sampling, at="openrouter")


def carried(upsampled: Upsampled, original: str | None, by: str | None) -> Upsampled:
    """A prompt that is drawn again keeps the story of how it was made."""
    return upsampled if upsampled.original is not None else replace(upsampled, original=original, by=by)
