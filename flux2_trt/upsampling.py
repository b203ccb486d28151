"""Upsampling: a language model rewrites what the user asked for into what the model was trained to read.

It helps with text in pictures, diagrams and everything that takes reasoning. Whatever goes wrong, the prompt as typed
is a prompt too: it is used, and the user is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.text import check_prompt

if TYPE_CHECKING:
    from PIL import Image

# In our own words, after what the reference asks of a model (flux2 `system_messages.py`).
GENERATION = """\
You prepare prompts for FLUX.2, a model that draws pictures from text. The user sends a prompt. Answer with a better \
prompt for the same picture.

- Keep the subject, the intention, the style and the language of the user. Add nothing that would change what the \
picture is about.
- Where the user left things open, decide them: how things look and what they are made of, how large they are and \
where they stand, where the light comes from and what colour it has, what is behind them.
- If the picture shows writing, spell it out between double quotes, in the language that belongs there. Writing \
that is not spelled out comes out as scribble.
- If the request takes knowledge or reasoning (a diagram, a calculation, a joke), work the answer out and describe \
what is to be seen.
- If the prompt is structured, such as JSON or a list of fields, keep the structure and improve the values. Otherwise \
write flowing text.

Answer with the prompt alone: no introduction, no explanation, no quotes around it."""
EDITING = """\
You prepare instructions for FLUX.2, a model that edits pictures. The user sends one or more pictures, side by side as \
one and numbered from left to right, and says what is wanted. Answer with one instruction for the same edit.

- Say what is to change, naming what is really in the pictures, and what is to stay as it is: faces, light, composition.
- Follow what is written or drawn into a picture where the user refers to it.
- Be concrete: instead of "modern", say which shapes, materials and colours.
- Say what is wanted, not what is to be avoided: "keep the sky" and not "do not change the sky".
- Use plain words and 50 to 80 of them, fewer for a small change. Keep it fit for all ages.

Answer with the instruction alone: no introduction, no explanation, no quotes around it."""

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)
_REFUSAL = re.compile(
    r"(sorry,|as an ai\b|i apologi[sz]e"
    r"|i(['’]?m| am) ((very |so )?sorry|unable to|not able to)"
    r"|i (can ?not|can['’]t|won['’]t|will not) (assist|help|comply|create|fulfil|do|provide|generate|rewrite)\b)",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class UpsamplingError(Flux2Error):
    """A prompt that could not be rewritten. Exit code 1."""


@dataclass(frozen=True)
class Answer:
    """What a language model said, and whether it had come to its end."""

    text: str
    complete: bool = True


class Rewriter(Protocol):
    """A language model, wherever it is."""

    @property
    def name(self) -> str:
        """Which one it is, for the metadata of a picture: no address, no folder, no key."""

    @property
    def sees(self) -> bool:
        """Whether it can be shown pictures."""

    def rewrite(self, instructions: str, prompt: str, picture: Image.Image | None) -> Answer:
        """Raises UpsamplingError where there is no answer."""


@dataclass(frozen=True)
class Upsampled:
    """The prompt to use. `original` and `by` are None where it is the one that was typed, `problems` then say why."""

    prompt: str
    original: str | None = None
    by: str | None = None
    problems: tuple[str, ...] = ()


def upsample(prompt: str, references: Sequence[Image.Image], rewriter: Rewriter, strict: bool = False) -> Upsampled:
    """`prompt`, rewritten by `rewriter`, who sees the references as one picture of at most 768**2 pixels.

    Raises UpsamplingError with `strict` where that fails; without, the prompt comes back as it was, with the problem.
    """
    from flux2_trt.collage import side_by_side

    picture = side_by_side(references) if references and rewriter.sees else None
    problems = []
    if references and picture is None:
        problems.append(f"{rewriter.name} cannot see: it rewrites the prompt without the references")
    try:
        answer = rewriter.rewrite(EDITING if references else GENERATION, prompt, picture)
        rewritten = prompt_of(answer)
    except UpsamplingError as error:
        if strict:
            raise UpsamplingError(f"the prompt was not rewritten: {error}") from None
        return Upsampled(prompt, problems=(*problems, f"the prompt is used as it is: {error}"))
    if not answer.complete:
        problems.append("the rewritten prompt was cut at its largest length (max_tokens)")
    return Upsampled(rewritten, prompt, rewriter.name, tuple(problems))


def prompt_of(answer: Answer) -> str:
    """The prompt in an answer, without thoughts, fences and quotes around it. Raises UpsamplingError for no prompt."""
    text = _THOUGHT.sub("", answer.text).replace("\r\n", "\n").strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and not set('"“”') & set(text[1:-1]):
        text = text[1:-1].strip()
    if not text:
        raise UpsamplingError("the answer is empty" if answer.complete else "the answer was cut before it began")
    if _REFUSAL.match(text):
        raise UpsamplingError("the language model refused")
    if _CONTROL.search(text):
        raise UpsamplingError("the answer is no text")
    try:
        check_prompt(text, "the answer")
    except UsageError as error:
        raise UpsamplingError(str(error)) from None
    return text
