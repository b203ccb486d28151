"""Token ids against transformers' tokenizers and the prompt functions of the diffusers pipelines."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flux2_trt.errors import BundleError, UsageError
from flux2_trt.models import MISTRAL_PROMPT, QWEN3_PROMPT
from flux2_trt.spec import PromptSpec
from flux2_trt.text import MAX_PROMPT_CHARACTERS, SYSTEM_MESSAGE, PromptTokenizer, TokenizedPrompts

MAX_LENGTH = 192
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    SYSTEM_MESSAGE,
    "user\n\n\nassistant\n\n\n",
    "a red circle on the left of a blue square, on a white background",
    "photo of a cat that sleeps in the sun; cinematic light, 35mm, f/2.8",
    "Ein Café an der Straße, nachts. 東京の夜景",
]
# Mistral's ids 0 to 18, so that [IMG], <pad> and the brackets stand where the published model has them.
MISTRAL_TOKENS = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
]
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The branches of the published templates that a system and a user message take, in our words.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set name = '[SYSTEM_PROMPT]' if m.role == 'system' else '[INST]' %}"
    "{{ name }}{% for block in m.content %}{{ block.text }}{% endfor %}{{ name.replace('[', '[/') }}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)

PROMPTS = [
    "a red circle on the left of a blue square",
    "",
    "   \n",
    "\n\nstarts with line breaks, which the template's own line break may join",
    "ends with a line break\n",
    " spaces  around ",
    "Cafe\u0301 \u212b ﬁne ２０ 東京の夜景 🦊👩‍🚀 \u202eabc\u202c \ufeff\u200b\x07",
    "braces {} {0} {prompt} %s ${x} {{ jinja }} {% raw %}",
    "<think> in words </think> <s> </s> <pad>",
    "ends early<|im_end|>\n<|im_start|>system\nor [/INST] or </s> or [SYSTEM_PROMPT]",
    "<|endoftext|> as text",
    "[IMG] a cat [IMG]like this",
    "many words, " * 400,
    "x" * 3000,
]


def byte_level(special: list[str], initial: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        special_tokens=initial,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture(scope="module")
def qwen_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level(special=list(QWEN_TOKENS), initial=[])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def mistral_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level(special=[], initial=MISTRAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("mistral") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def qwen_prompt(qwen_json: Path) -> PromptSpec:
    pad = Tokenizer.from_file(str(qwen_json)).get_vocab()["<|endoftext|>"]
    return replace(QWEN3_PROMPT, max_length=MAX_LENGTH, pad_token_id=pad)


@pytest.fixture(scope="module")
def mistral_prompt() -> PromptSpec:
    return replace(MISTRAL_PROMPT, max_length=MAX_LENGTH)


def hugging_face(path: Path, **arguments: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **arguments)


def qwen_reference(path: Path) -> Any:
    return hugging_face(path, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=QWEN_TEMPLATE)


def mistral_reference(path: Path) -> Any:
    """The processor of FLUX.2 [dev] without the image half, which wants torchvision and sees no picture here.

    PixtralProcessor inherits `__call__` and `apply_chat_template` from ProcessorMixin as they are.
    """
    tokenizer = hugging_face(path, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    tokenizer.padding_side = "left"

    class TextProcessor(pytest.importorskip("transformers").ProcessorMixin):  # type: ignore[misc]
        def __init__(self, tokenizer, chat_template):
            super().__init__(tokenizer, chat_template=chat_template)

    return TextProcessor(tokenizer, MISTRAL_TEMPLATE)


def recording_text_encoder() -> Any:
    """Takes the place of the language model: keeps what it was called with."""
    torch: Any = pytest.importorskip("torch")

    class Recorder(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        seen: TokenizedPrompts

        def forward(self, input_ids, attention_mask, **_):
            self.seen = TokenizedPrompts(input_ids.numpy(), attention_mask.numpy(), ())
            return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 2)] * 40)

    return Recorder()


def assert_same(ours: TokenizedPrompts, reference: TokenizedPrompts, prompts: list[str]) -> None:
    for index, prompt in enumerate(prompts):
        assert ours.input_ids[index].tolist() == reference.input_ids[index].tolist(), repr(prompt[:80])
        assert ours.attention_mask[index].tolist() == reference.attention_mask[index].tolist(), repr(prompt[:80])


def random_prompts(count: int) -> list[str]:
    rng = random.Random(5)
    pieces = [*"aeiou \n\t.,!?'\"<>|[]{}/\\", *QWEN_TOKENS, "[INST]", "the", "cat", "é", "e\u0301", "東", "🦊", "\r\n"]
    return ["".join(rng.choices(pieces, k=rng.randrange(60))) for _ in range(count)]


def test_klein_prompts_are_those_of_diffusers(qwen_json: Path, qwen_prompt: PromptSpec) -> None:
    pipeline = pytest.importorskip("diffusers").Flux2KleinPipeline
    prompts = [*PROMPTS, *random_prompts(200)]
    text_encoder = recording_text_encoder()
    pipeline._get_qwen3_prompt_embeds(
        text_encoder, qwen_reference(qwen_json), prompts, max_sequence_length=qwen_prompt.max_length
    )
    assert_same(PromptTokenizer.from_file(qwen_json, qwen_prompt)(prompts), text_encoder.seen, prompts)


def test_dev_prompts_are_those_of_diffusers(mistral_json: Path, mistral_prompt: PromptSpec) -> None:
    pipeline = pytest.importorskip("diffusers").Flux2Pipeline
    prompts = [*PROMPTS, *random_prompts(200)]
    text_encoder = recording_text_encoder()
    pipeline._get_mistral_3_small_prompt_embeds(
        text_encoder, mistral_reference(mistral_json), prompts, max_sequence_length=mistral_prompt.max_length
    )
    ours = PromptTokenizer.from_file(mistral_json, mistral_prompt)(prompts)
    assert_same(ours, text_encoder.seen, prompts)
    assert (ours.input_ids[1] == 1).sum() == 1  # one <s>, though the post-processor would add another


def test_system_message_is_that_of_diffusers() -> None:
    system_messages = pytest.importorskip("diffusers.pipelines.flux2.system_messages")
    assert SYSTEM_MESSAGE == system_messages.SYSTEM_MESSAGE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [2, 3, 16, 40])
def test_plain_prompts_are_padded_and_truncated_as_transformers_does(
    mistral_json: Path, side: str, max_length: int
) -> None:
    tokenizer = Tokenizer.from_file(str(mistral_json))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(7)  # settings in the file give way to the prompt's
    path = mistral_json.with_name(f"plain-{side}-{max_length}.json")
    tokenizer.save(str(path))
    reference = hugging_face(path, pad_token="<pad>", padding_side=side)(
        PROMPTS, padding="max_length", truncation=True, max_length=max_length, return_tensors="np"
    )
    prompt = PromptSpec("plain", max_length, "left" if side == "left" else "right", pad_token_id=11)
    ours = PromptTokenizer.from_file(path, prompt)(PROMPTS)
    assert_same(ours, TokenizedPrompts(reference["input_ids"], reference["attention_mask"], ()), PROMPTS)


def test_arrays_are_int64_of_the_prompt_length(qwen_json: Path, qwen_prompt: PromptSpec) -> None:
    tokenized = PromptTokenizer.from_file(qwen_json, qwen_prompt)(["a cat", ""])
    for array in (tokenized.input_ids, tokenized.attention_mask):
        assert array.dtype == np.int64
        assert array.shape == (2, MAX_LENGTH)
        assert array.flags.writeable and array.flags.c_contiguous
    assert (tokenized.input_ids[tokenized.attention_mask == 0] == qwen_prompt.pad_token_id).all()


def test_truncation_is_reported_from_the_first_lost_token(qwen_json: Path, qwen_prompt: PromptSpec) -> None:
    prompt = "a red circle on a white background"
    tokens = int(PromptTokenizer.from_file(qwen_json, qwen_prompt)([prompt]).attention_mask.sum())
    fits = PromptTokenizer.from_file(qwen_json, replace(qwen_prompt, max_length=tokens))([prompt, ""])
    cut = PromptTokenizer.from_file(qwen_json, replace(qwen_prompt, max_length=tokens - 1))([prompt, ""])
    assert fits.truncated == (False, False)
    assert cut.truncated == (True, False)
    assert cut.input_ids[0].tolist() == fits.input_ids[0, :-1].tolist()


def test_vocab_size_covers_every_id(mistral_json: Path, mistral_prompt: PromptSpec) -> None:
    tokenizer = PromptTokenizer.from_file(mistral_json, mistral_prompt)
    assert tokenizer.vocab_size == Tokenizer.from_file(str(mistral_json)).get_vocab_size()
    assert tokenizer(PROMPTS).input_ids.max() < tokenizer.vocab_size


def test_longest_allowed_prompt_is_taken(qwen_json: Path, qwen_prompt: PromptSpec) -> None:
    assert PromptTokenizer.from_file(qwen_json, qwen_prompt)(["a" * MAX_PROMPT_CHARACTERS]).truncated == (True,)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a" * (MAX_PROMPT_CHARACTERS + 1)], "the prompt has 20,001 characters; at most 20,000"),
        (["fine", b"bytes"], "prompt 2 of 2 is of type bytes"),
        ([None], "the prompt is of type NoneType"),
        (["a\x00b"], r"the prompt has U\+0000 at character 2"),
        (["fine", "\ud83d half an emoji"], r"prompt 2 of 2 has U\+D83D at character 1"),
        ([], "at least one text"),
        ("a cat", "as a list of at least one text, not 'a cat'"),
    ],
)
def test_what_is_no_prompt_is_refused(
    qwen_json: Path, qwen_prompt: PromptSpec, prompts: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        PromptTokenizer.from_file(qwen_json, qwen_prompt)(prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{}", b"\xff\xfe\x00", b"[" * 10_000, b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["missing", "empty", "no model", "not UTF-8", "nested", "git-lfs"],
)
def test_missing_or_damaged_file_names_the_file_and_the_command(
    tmp_path: Path, qwen_prompt: PromptSpec, content: bytes | None
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        PromptTokenizer.from_file(path, qwen_prompt)
    assert str(path) in str(caught.value)
    assert "flux2-trt build" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_file_is_refused(tmp_path: Path, qwen_json: Path, qwen_prompt: PromptSpec) -> None:
    whole = qwen_json.read_bytes()
    path = tmp_path / "tokenizer.json"
    for share in (0.1, 0.5, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer: .*flux2-trt build"):
            PromptTokenizer.from_file(path, qwen_prompt)


def test_tokenizer_of_another_model_is_refused(mistral_json: Path, qwen_prompt: PromptSpec) -> None:
    with pytest.raises(BundleError, match=r"another model: 'qwen3' prompts need <\|im_start\|>, <\|im_end\|>"):
        PromptTokenizer.from_file(mistral_json, replace(qwen_prompt, pad_token_id=11))
    with pytest.raises(BundleError, match="padding token 151643"):
        PromptTokenizer.from_file(mistral_json, PromptSpec("plain", 8, "right", pad_token_id=151643))


def test_import_needs_neither_torch_nor_transformers() -> None:
    check = "import sys, flux2_trt.text; print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check], check=False, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "[]", done.stderr
