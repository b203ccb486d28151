"""What a prompt says, and a text encoder that learns to say it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.tiny.config import TextConfig
from export.tiny.dataset import Sample, sample, vocabulary
from export.tiny.reading import FACTS, facts, train_text_encoder
from export.tiny.scenes import Scene, Thing
from export.tiny.tokenizer import build_tokenizer, save
from flux2_trt.models import published_spec
from flux2_trt.text import PromptTokenizer

CIRCLE = Thing("circle", "red", 0.20, 0.26, 0.5)
SQUARE = Thing("square", "blue", 0.12, 0.74, 0.5)
PAIR = Scene("white", (CIRCLE, SQUARE))


def edit(prompt, target, operation, source=PAIR):
    return Sample("edit", prompt, (source,), target, frozenset(("background", operation)))


CASES = {
    "text": (
        Sample("text", "a big red circle and a blue square", (), PAIR, frozenset(("size 1",))),
        {
            "operation": "text",
            "background": "white",
            "shape 1": "circle",
            "color 1": "red",
            "size 1": "large",
            "position 1": "left",
            "shape 2": "square",
            "color 2": "blue",
            "size 2": "small",
            "position 2": "right",
        },
    ),
    "recolor": (
        edit("make the box green", replace(PAIR, things=(CIRCLE, replace(SQUARE, color="green"))), "recolor"),
        {"operation": "recolor", "shape 1": "square", "color 2": "green"},
    ),
    "reshape": (
        edit(
            "turn the red circle into a pink star",
            replace(PAIR, things=(replace(CIRCLE, shape="star", color="pink"), SQUARE)),
            "reshape",
        ),
        {"operation": "reshape", "shape 1": "circle", "color 1": "red", "shape 2": "star", "color 2": "pink"},
    ),
    "remove": (
        edit("delete the disc", replace(PAIR, things=(SQUARE,)), "remove"),
        {"operation": "remove", "shape 1": "circle"},
    ),
    "move": (
        edit(
            "put it on the right",
            Scene("white", (replace(CIRCLE, center_x=0.74),)),
            "move",
            source=Scene("white", (CIRCLE,)),
        ),
        {"operation": "move", "position 2": "right"},
    ),
    "backdrop": (
        edit("on a black background", replace(PAIR, background="black"), "backdrop"),
        {"operation": "backdrop", "background": "black"},
    ),
    "color from": (
        Sample(
            "combine",
            "the shape of image 2 in the color of image 1",
            (Scene("black", (replace(SQUARE, color="pink"),)), Scene("white", (CIRCLE,))),
            Scene("white", (replace(CIRCLE, color="pink"),)),
            frozenset(("color from",)),
        ),
        {"operation": "color from", "image": "second"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_facts_are_what_the_prompt_says_and_nothing_that_only_the_references_show(case):
    drawn, expected = case
    assert facts(drawn) == expected


def test_every_fact_of_every_sample_has_a_label():
    rng = np.random.default_rng(0)
    seen: dict[str, set[str]] = {name: set() for name in FACTS}
    for _ in range(3000):
        for name, value in facts(sample(rng)).items():
            seen[name].add(value)
    assert {name: set(values) for name, values in FACTS.items()} == seen


def test_a_text_encoder_learns_to_read(tmp_path):
    spec = published_spec("tiny")
    file = tmp_path / "tokenizer.json"
    save(build_tokenizer(vocabulary()), file)
    messages: list[str] = []
    config = TextConfig(steps=40, batch=32, warmup_steps=5, held_out=20)
    tokenizer = PromptTokenizer.from_file(file, spec.prompt)
    train_text_encoder(spec.text_encoder, config, 0, tokenizer, messages.append, torch.device("cpu"))
    assert "of held-out prompts right" in messages[-1]
    untrained = sum(np.log(1 + len(values)) for values in FACTS.values())
    assert float(messages[-2].split()[-1]) < 0.6 * untrained
