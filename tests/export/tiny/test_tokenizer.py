"""The built-in model's tokenizer: what a user's sentence becomes."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from export.tiny.tokenizer import build_tokenizer, save
from flux2_trt.errors import UsageError
from flux2_trt.models import published_spec
from flux2_trt.spec import PromptSpec
from flux2_trt.text import PromptTokenizer

WORDS = ["a", "red", "circle", "on", "the", "left", ",", "'", "s", "1", "2", "café"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(WORDS)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ""),
        (" \n\t", ""),
        ("A RED  circle,on\nthe left", "a red circle , on the left"),
        ("circle's 12", "circle ' s 1 2"),
        ("ｒｅｄ ２ cafe\u0301", "red 2 café"),
        ("red2circle", "red 2 circle"),
        ("a zebra!", "a [UNK] [UNK]"),
        ("[PAD][EOS]", "[UNK] [UNK] [UNK] [UNK] [UNK] [UNK]"),
    ],
)
def test_words_between_bos_and_eos(tokenizer: Tokenizer, text: str, tokens: str) -> None:
    assert tokenizer.encode(text).tokens == ["[BOS]", *tokens.split(), "[EOS]"]


def test_ids_are_the_special_tokens_then_the_vocabulary(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS]
    prompt = published_spec("tiny").prompt
    assert prompt is not None and prompt.pad_token_id == vocabulary["[PAD]"]


def test_truncated_prompt_keeps_its_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tokenizer, tmp_path / "tokenizer.json")
    prompt = PromptSpec("plain", max_length=5, padding_side="right", pad_token_id=0)
    tokenized = PromptTokenizer.from_file(tmp_path / "tokenizer.json", prompt)(["a red circle on the left", "red"])
    assert tokenized.input_ids.tolist() == [[2, 4, 5, 6, 3], [2, 5, 3, 0, 0]]
    assert tokenized.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert tokenized.truncated == (True, False)


def test_same_ids_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save(tokenizer, tmp_path / "tokenizer.json")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    texts = ["A red circle, on the LEFT", "", "zebra 12", "red " * 50]
    prompt = PromptSpec("plain", max_length=32, padding_side="right", pad_token_id=0)
    expected = reference(texts, padding="max_length", truncation=True, max_length=32)
    ours = PromptTokenizer.from_file(tmp_path / "tokenizer.json", prompt)(texts)
    assert ours.input_ids.tolist() == expected["input_ids"]
    assert ours.attention_mask.tolist() == expected["attention_mask"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["red", "blue", "red"], "repeats red"),
        (["Red"], "'Red'"),
        (["top left"], "'top left'"),
        (["top-left"], "'top-left'"),
        (["12"], "'12'"),
        ([""], "''"),
        (["[PAD]"], r"'\[PAD\]'"),
    ],
)
def test_words_that_no_text_can_give_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_tokenizer(words)


def test_save_replaces_the_file_and_leaves_nothing_beside_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    save(tokenizer, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.from_file(str(path)).get_vocab() == tokenizer.get_vocab()


def test_same_words_give_the_same_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save(build_tokenizer(WORDS), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
