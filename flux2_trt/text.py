"""Text: prompts to token ids, in the prompt format that each text encoder of the family was trained with.

Reference: diffusers 0.42 `pipelines/flux2/pipeline_flux2.py` (`format_input`, `_get_mistral_3_small_prompt_embeds`),
`pipeline_flux2_klein.py` (`_get_qwen3_prompt_embeds`), and the chat templates of Mistral Small 3.1 and Qwen3, which
for one user message reduce to the constants below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from flux2_trt.errors import BundleError, UsageError
from flux2_trt.spec import ChatTemplate, PromptSpec

MAX_PROMPT_CHARACTERS = 20_000
BUILD_AGAIN = "build the model again: flux2-trt build MODEL --target auto"

# black-forest-labs/flux2 `src/flux2/system_messages.py`, verbatim with its line break: the model saw no other.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)

_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class PromptFormat:
    """What stands around a prompt, and the tokens without which a tokenizer is another model's."""

    before: str = ""
    after: str = ""
    removed: str = ""
    tokens: tuple[str, ...] = ()
    post_process: bool = True
    """Whether the tokenizer's own post-processor runs; not where `before` spells the first token out."""

    def render(self, prompt: str) -> str:
        """The text that is tokenized."""
        if self.removed:
            prompt = prompt.replace(self.removed, "")
        return f"{self.before}{prompt}{self.after}"


FORMATS: Mapping[ChatTemplate, PromptFormat] = {
    "mistral": PromptFormat(
        before=f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]",
        after="[/INST]",
        removed="[IMG]",
        tokens=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
        post_process=False,
    ),
    "qwen3": PromptFormat(
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "plain": PromptFormat(),
}


@dataclass(frozen=True, eq=False)
class TokenizedPrompts:
    """Token ids and mask (1 = token, 0 = padding), both int64 `[B, T]`, and which prompts lost their end."""

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    truncated: tuple[bool, ...]


class PromptTokenizer:
    """Prompts to token ids `[B, max_length]`, equal to what transformers' tokenizers give the diffusers pipelines.

    Special tokens that a user types ("<|im_end|>", "[INST]") become special tokens, as they do there: every id is one
    that the text encoder knows, and no other text is affected. "[IMG]" is taken out of a Mistral prompt, as there.
    Takes `tokenizer` over: its padding and truncation are set here.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: PromptSpec) -> None:
        self.prompt = prompt
        self._format = FORMATS[prompt.template]
        self._tokenizer = tokenizer
        # With padding on the left too the end of a prompt is what is cut (transformers' `truncation_side`).
        tokenizer.enable_truncation(prompt.max_length, direction="right")
        tokenizer.enable_padding(direction=prompt.padding_side, pad_id=prompt.pad_token_id, length=prompt.max_length)

    @classmethod
    def from_file(cls, tokenizer_json: Path, prompt: PromptSpec) -> PromptTokenizer:
        """Reads a `tokenizer.json`. Raises BundleError where it is missing, unreadable or of another model."""
        try:
            text = Path(tokenizer_json).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BundleError(f"{tokenizer_json} is missing; {BUILD_AGAIN}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{tokenizer_json} cannot be read: {error}; {BUILD_AGAIN}") from error
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{tokenizer_json} is not a tokenizer: {error}; {BUILD_AGAIN}") from error
        missing = [token for token in FORMATS[prompt.template].tokens if tokenizer.token_to_id(token) is None]
        if tokenizer.id_to_token(prompt.pad_token_id) is None:
            missing.append(f"padding token {prompt.pad_token_id}")
        if missing:
            raise BundleError(
                f"{tokenizer_json} is the tokenizer of another model: {prompt.template!r} prompts need "
                f"{', '.join(missing)}; {BUILD_AGAIN}"
            )
        return cls(tokenizer, prompt)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows that the text encoder's embedding must at least have."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def __call__(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Tokenizes, truncates and pads; an empty prompt is the unconditional one.

        Raises UsageError for a prompt that is no text or has more than `MAX_PROMPT_CHARACTERS` characters.
        """
        if isinstance(prompts, str) or not prompts:
            raise UsageError(f"prompts are given as a list of at least one text, not {prompts!r:.40}")
        for index, prompt in enumerate(prompts):
            check_prompt(prompt, "the prompt" if len(prompts) == 1 else f"prompt {index + 1} of {len(prompts)}")
        encodings = [self._encode(prompt) for prompt in prompts]
        return TokenizedPrompts(
            input_ids=np.array([encoding.ids for encoding in encodings], np.int64),
            attention_mask=np.array([encoding.attention_mask for encoding in encodings], np.int64),
            truncated=tuple(bool(encoding.overflowing) for encoding in encodings),
        )

    def _encode(self, prompt: str) -> Encoding:
        return self._tokenizer.encode(self._format.render(prompt), add_special_tokens=self._format.post_process)


def check_prompt(prompt: object, name: str) -> None:
    if not isinstance(prompt, str):
        raise UsageError(f"{name} is of type {type(prompt).__name__}; give a text (str)")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            f"{name} has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are allowed, shorten it"
        )
    found = _NOT_TEXT.search(prompt)
    if found:
        raise UsageError(
            f"{name} has U+{ord(found[0]):04X} at character {found.start() + 1}, which is not text; remove it"
        )
