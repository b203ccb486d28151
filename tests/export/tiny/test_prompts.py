"""Prompts: they say what is stated, name things unambiguously and stay within the vocabulary."""

from dataclasses import replace

import numpy as np
import pytest

from export.tiny import prompts
from export.tiny.dataset import Kind, sample, vocabulary
from export.tiny.scenes import Scene, Thing
from export.tiny.tokenizer import build_tokenizer

RED, BLUE = Thing("circle", "red", 0.12, 0.26, 0.5), Thing("square", "blue", 0.2, 0.74, 0.5)
PAIR = Scene("gray", (RED, BLUE))


def drawn(scene: Scene, *stated: str) -> set[str]:
    rng = np.random.default_rng(0)
    return {prompts.describe(rng, scene, frozenset(stated)) for _ in range(500)}


@pytest.mark.parametrize("kind", ["text", "edit", "combine"])
def test_prompts_are_short_and_every_word_is_known(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    texts = [sample(rng, kind=kind).prompt for _ in range(1000)]
    tokenizer = build_tokenizer(vocabulary())
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert "[UNK]" not in encoding.tokens, text
        assert encoding.tokens[1:-1] == prompts.tokens(text)
        assert len(encoding.tokens) - 2 <= prompts.MAX_WORDS
        assert text == " ".join(text.split()).lower() and not set("{}") & set(text)


def test_words_are_those_that_are_said() -> None:
    rng = np.random.default_rng(0)
    said = {word for _ in range(8000) for word in prompts.tokens(sample(rng).prompt)}
    assert said == set(prompts.WORDS)


def test_wording_varies() -> None:
    assert len(drawn(PAIR, "background", "relation", "size 1", "size 2")) > 200


def test_what_is_not_stated_is_not_said() -> None:
    words = {word for text in drawn(PAIR) for word in prompts.tokens(text)}
    assert {"red", "circle", "blue", "square"} <= words
    assert not words & {"background", "gray", "grey", "left", "small", "large", "above"}


@pytest.mark.parametrize(
    ("fact", "sayings"),
    [
        ("background", {"gray", "grey"}),
        ("relation", {"left"}),
        ("size 1", {"small", "little", "tiny"}),
        ("size 2", {"large", "big"}),
    ],
)
def test_a_stated_fact_is_always_said(fact: str, sayings: set[str]) -> None:
    for text in drawn(PAIR, fact):
        assert sayings & set(prompts.tokens(text)), text


def test_a_stated_position_is_always_said() -> None:
    corner = Scene("white", (replace(RED, center_x=0.74, center_y=0.26),))
    assert all("top right" in text for text in drawn(corner, "position"))


def test_articles_agree() -> None:
    texts = drawn(Scene("orange", (RED,)), "background") | drawn(Scene("white", (replace(RED, color="orange"),)))
    assert any("an orange" in text for text in texts)
    assert not any(" a orange" in f" {text}" or " an red" in f" {text}" for text in texts)


def test_things_of_one_shape_are_named_with_their_colour() -> None:
    rng = np.random.default_rng(0)
    twins = Scene("white", (RED, replace(BLUE, shape="circle")))
    for _ in range(200):
        assert "blue" in prompts.remove(rng, twins, 1)
    assert any("red" not in prompts.remove(rng, PAIR, 0) for _ in range(50))
