"""The tokenizer of the built-in model: one token per known word, digit or punctuation mark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Digits, Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from flux2_trt.errors import UsageError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")


def build_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """A tokenizer that gives `[BOS] words [EOS]`; ids are the special tokens' 0 to 3, then the vocabulary's order.

    Text is NFKC-normalised and lower-cased, then split at whitespace and around every punctuation mark and digit; what
    is not in `vocabulary` is [UNK]. "[PAD]" typed in a prompt is text like any other: no special token can be typed.
    Raises UsageError for a vocabulary with repeats or with words that no text can give.
    """
    ids = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocabulary))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = Normalizers([NFKC(), Lowercase()])
    tokenizer.pre_tokenizer = PreTokenizers(
        [WhitespaceSplit(), Punctuation("isolated"), Digits(individual_digits=True)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[(token, ids[token]) for token in ("[BOS]", "[EOS]")]
    )
    repeated = sorted({word for word in vocabulary if vocabulary.count(word) > 1})
    if repeated:
        raise UsageError(f"the vocabulary repeats {', '.join(repeated)}; give each word once")
    unreachable = [word for word in vocabulary if tokenizer.encode(word, add_special_tokens=False).tokens != [word]]
    if unreachable:
        raise UsageError(
            f"the vocabulary has {', '.join(map(repr, unreachable))}; allowed are single lower-case words, digits and "
            "punctuation marks"
        )
    return tokenizer


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `tokenizer.json`; a reader finds the file as it was before or whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
