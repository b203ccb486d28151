"""A prompt is rewritten, or comes back as it was with the reason; nothing else that an answer holds is let through."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from PIL import Image

from flux2_trt.upsampling import EDITING, GENERATION, Answer, Upsampled, UpsamplingError, prompt_of, upsample


@dataclass
class Writer:
    answer: Answer | Exception
    sees: bool = True
    name: str = "local writer"
    asked: list = field(default_factory=list)

    def rewrite(self, instructions, prompt, picture):
        self.asked.append((instructions, prompt, picture))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_prompt_is_rewritten_and_the_original_kept():
    writer = Writer(Answer(" a large red cube\n"))
    assert upsample("a cube", [], writer) == Upsampled("a large red cube", "a cube", "local writer")
    assert writer.asked == [(GENERATION, "a cube", None)]


def test_an_edit_has_other_instructions_and_one_small_picture_of_all_references():
    writer = Writer(Answer("make it red"))
    references = [Image.new("RGB", (3000, 2000), "red"), Image.new("RGB", (1000, 1000), "blue")]
    upsample("red", references, writer)
    [(instructions, _, picture)] = writer.asked
    assert instructions == EDITING and picture.width * picture.height <= 768**2
    assert picture.getpixel((5, 5)) == (255, 0, 0)
    assert picture.getpixel((picture.width - 5, picture.height // 2)) == (0, 0, 255)


def test_who_cannot_see_is_not_shown_anything_and_that_is_said():
    writer = Writer(Answer("make it red"), sees=False)
    found = upsample("red", [Image.new("RGB", (64, 64))], writer)
    assert writer.asked == [(EDITING, "red", None)] and found.prompt == "make it red"
    assert "cannot see" in found.problems[0]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(""),
        Answer(" \n"),
        Answer("<think>long"),
        Answer("I'm sorry, but I can't help with that."),
        Answer("x\0y"),
        Answer("x" * 20_001),
        UpsamplingError("no answer within 3 s"),
    ],
)
def test_what_goes_wrong_leaves_the_prompt_as_it_was_and_is_said(answer):
    found = upsample("a cube", [], Writer(answer))
    assert (found.prompt, found.original, found.by) == ("a cube", None, None)
    assert found.problems[0].startswith("the prompt is used as it is: ")
    with pytest.raises(UpsamplingError, match="was not rewritten"):
        upsample("a cube", [], Writer(answer), strict=True)


def test_an_answer_that_was_cut_is_used_and_said():
    found = upsample("a cube", [], Writer(Answer("a large red", complete=False)))
    assert found.prompt == "a large red" and "max_tokens" in found.problems[0]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a cube", "a cube"),
        ("<think>\nwell\n</think>\n\na cube", "a cube"),
        ("```text\na cube\non a table\n```", "a cube\non a table"),
        ('"a cube"', "a cube"),
        ("“a cube”", "a cube"),
        ('"HELLO" on a sign, and "BYE"', '"HELLO" on a sign, and "BYE"'),
        ('{"subject": "a cube"}', '{"subject": "a cube"}'),
        ("ein Würfel 日本 🎲\tund mehr", "ein Würfel 日本 🎲\tund mehr"),
        ("a sorry sight", "a sorry sight"),
        ("I can see a cube from here", "I can see a cube from here"),
        ("I can't believe my eyes, says the cube", "I can't believe my eyes, says the cube"),
    ],
)
def test_what_stands_around_a_prompt_is_taken_off(text, prompt):
    assert prompt_of(Answer(text)) == prompt


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, I can't create that.",
        "Sorry, no.",
        "I cannot assist with this request.",
        "I am unable to help.",
        "I won’t provide that.",
        "As an AI language model, I do not draw.",
        "I apologize, but no.",
    ],
)
def test_refusals_are_not_drawn(text):
    with pytest.raises(UpsamplingError, match="refused"):
        prompt_of(Answer(text))


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\x9bb", "a\ud800b", "a\x07b", "a\rb"])
def test_what_steers_a_terminal_is_no_prompt(text):
    with pytest.raises(UpsamplingError, match="no text"):
        prompt_of(Answer(text))
