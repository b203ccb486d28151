"""The local language model, on small models: it writes and judges as transformers' own `generate` does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from language_models import save_reader, save_seer
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from flux2_trt.errors import CheckpointError, Flux2Error, UsageError
from flux2_trt.language_model import LanguageModel, ModelPlace, _inputs, place_of
from flux2_trt.models import published_spec
from flux2_trt.sampling import Sampling
from flux2_trt.upsampling import UpsamplingError, upsample

RED = Image.new("RGB", (100, 60), "red")


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seer(tmp_path_factory.mktemp("models") / "seer")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reader(tmp_path_factory.mktemp("models") / "reader")


def model(folder: Path, **sampling: object) -> LanguageModel:
    values = {"temperature": 0, "max_tokens": 12, **sampling}
    return LanguageModel(ModelPlace(str(folder), str(folder)), Sampling(**values))  # type: ignore[arg-type]


def by_hand(folder: Path, text: str, picture: Image.Image | None, **how: object) -> torch.Tensor:
    """The new tokens of transformers' greedy `generate` after `text`."""
    theirs, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=text, images=picture, return_tensors="pt")
    return theirs.generate(**inputs, do_sample=False, **how)[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("picture", [None, RED])
def test_it_writes_what_transformers_writes(seer: Path, picture: Image.Image | None) -> None:
    shown = "<image>" if picture else ""
    expected = by_hand(seer, f"system:improve\nuser:{shown}a cube\nanswer:", picture, max_new_tokens=12)
    text = AutoTokenizer.from_pretrained(seer).decode(expected, skip_special_tokens=True)
    ours = model(seer)
    assert ours.sees and ours.name == "local seer" and text
    assert ours.rewrite("improve", "a cube", picture).text == text
    # A token that stands for a picture is no way to show one: the reference takes it out too.
    assert ours.rewrite("improve", "a[IMG] cube", picture).text == text


def test_an_answer_at_the_limit_is_not_complete(seer: Path) -> None:
    assert not model(seer, max_tokens=1).rewrite("improve", "a cube", None).complete


@pytest.mark.parametrize("seed", range(4))
def test_it_judges_as_a_constrained_generate_does(tmp_path: Path, seed: int) -> None:
    folder = save_seer(tmp_path / "seer", seed)
    words = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["yes", "no"])
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (100, 60), colour)
        only = {"max_new_tokens": 1, "prefix_allowed_tokens_fn": lambda *_: words}
        [token] = by_hand(folder, "system:check\nuser:look<image>well?\nanswer:", picture, **only)
        assert model(folder).says_yes("check", ["look", picture, "well?"]) == (token == words[0])


def test_qwen_is_asked_in_its_format_and_without_thinking(reader: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reader)
    inputs = _inputs(tokenizer, "improve", ["a cube", "now"], pictures=False)
    text = (
        "<|im_start|>system\nimprove<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert inputs["input_ids"][0].tolist() == tokenizer(text.format("a cube\n\nnow"))["input_ids"]
    asked = tokenizer(text.format("a cube"), return_tensors="pt")
    theirs = AutoModelForCausalLM.from_pretrained(reader)
    words = [tokenizer.encode(word)[0] for word in ("yes", "no")]
    said = theirs.generate(**asked, do_sample=False, max_new_tokens=1, prefix_allowed_tokens_fn=lambda *_: words)
    ours = model(reader)
    assert not ours.sees and ours.says_yes("improve", ["a cube"]) == (said[0, -1] == words[0])


def test_an_edit_by_a_model_that_cannot_see_says_so(reader: Path) -> None:
    found = upsample("make it red", [RED], model(reader))
    assert "local reader cannot see" in found.problems[0]


def test_it_loads_when_asked_and_again_after_it_was_released(seer: Path) -> None:
    ours = model(seer)
    assert ours._loaded is None
    first = ours.rewrite("improve", "a cube", None)
    assert ours._loaded is not None
    ours.release()
    assert ours._loaded is None and ours.rewrite("improve", "a cube", None) == first


def test_no_memory_left_is_a_prompt_that_was_not_rewritten(seer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model(seer)
    ours.rewrite("improve", "a cube", None)

    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ours._loaded[0], "generate", full)  # type: ignore[index]
    with pytest.raises(UpsamplingError, match="out of memory"):
        ours.rewrite("improve", "a cube", None)


def test_a_judge_that_knows_neither_word_is_an_error_and_no_answer(seer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model(seer)
    ours.says_yes("check", ["a cube"])
    with torch.no_grad():
        for parameter in ours._loaded[0].parameters():  # type: ignore[index]
            parameter.fill_(float("nan"))
    with pytest.raises(Flux2Error, match="does not tell yes from no"):
        ours.says_yes("check", ["a cube"])


def test_models_that_cannot_be_had_are_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for place in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"cannot be loaded.*--upsample-model") as caught:
            LanguageModel(ModelPlace(place, place)).rewrite("improve", "a cube", None)
        assert "\n" not in str(caught.value)


def test_a_model_with_code_of_its_own_is_not_run(seer: Path, tmp_path: Path) -> None:
    code = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    (tmp_path / "configuration_x.py").write_text(code)
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}')
    with pytest.raises(CheckpointError):
        LanguageModel(ModelPlace(str(tmp_path), str(tmp_path))).rewrite("improve", "a cube", None)
    assert not (tmp_path / "ran").exists()


def test_where_the_model_is_found(seer: Path, tmp_path: Path) -> None:
    dev, klein, tiny = map(published_spec, ("dev", "klein-4b", "tiny"))
    assert place_of(klein, None, {}) == ModelPlace("Qwen/Qwen3-4B", "Qwen/Qwen3-4B")
    assert place_of(dev, None, {}).processor.endswith("3.1-24B-Instruct-2503")
    assert place_of(tiny, str(seer), {}) == place_of(dev, None, {"TEXT_ENCODER_PATH": str(seer)})
    assert place_of(dev, "somebody/model", {}) == ModelPlace("somebody/model", "somebody/model")
    (tmp_path / "tokenizer").mkdir()
    save_reader(tmp_path / "text_encoder")
    assert place_of(dev, str(tmp_path), {}).processor == str(tmp_path / "tokenizer")
    (tmp_path / "one.safetensors").touch()
    for spec, environment in (
        (tiny, {}),
        (dev, {"TEXT_ENCODER_PATH": str(tmp_path / "one.safetensors")}),
        (dev, {"TEXT_ENCODER_PATH": str(tmp_path / "tokenizer")}),
    ):
        with pytest.raises(UsageError):
            place_of(spec, None, environment)


def test_parameters_that_a_local_model_does_not_have_are_refused(seer: Path) -> None:
    with pytest.raises(UsageError, match="frequency_penalty"):
        model(seer, others={"frequency_penalty": 1})


def test_without_transformers_the_extra_is_named_and_what_else_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    asked = LanguageModel(ModelPlace("a/b", "a/b"), otherwise="do without")
    with pytest.raises(Flux2Error, match=r"transformers.*'flux2-trt\[language\]', or do without"):
        asked.says_yes("check", ["a cube"])
