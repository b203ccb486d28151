"""From a prompt to a file with the built-in model: rewritten and encoded at endpoints, checked, signed, made again."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_endpoint import Handler, answering, bytes_of, completion, json_of
from language_models import save_classifier, save_seer
from PIL import Image
from typer.testing import CliRunner, Result

from engines.build import BuildRequest, build
from flux2_trt.cli import app
from flux2_trt.console import Console
from flux2_trt.embeds import read_embeds, to_bytes
from flux2_trt.language_model import LanguageModel, ModelPlace
from flux2_trt.metadata import read_parameters
from flux2_trt.options import RunOptions
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runner import Runner
from flux2_trt.safety import ABOUT_PROMPT, INSTRUCTIONS, Classifier, ContentChecks, ContentError, published_checks

KEY = "sk-or-0123456789abcdef"
CIRCLE = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with tiny in it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX2_TRT_HOME", str(home))
        build(BuildRequest("tiny", "cpu"), lambda message: None)
        yield home


@pytest.fixture(autouse=True)
def work(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUX2_TRT_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flux2(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def drawn(*arguments: str) -> None:
    result = flux2("run", *arguments)
    assert result.exit_code == 0, result.stderr


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name))


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_an_edit_of_two_references_rewritten_marked_signed_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSAMPLE_API_KEY", KEY)
    pytest.importorskip("c2pa")
    drawn("a red circle", "--seed", "1", "-o", "a.png")
    drawn("a blue square", "--seed", "2", "-o", "b.png")
    signing = json.loads(flux2("dev-certificate", "--json").stdout)
    with answering(completion("the shape of image 1 in the colour of image 2")) as endpoint:
        result = flux2(
            "run", "mix them", "--image", "a.png", "--image", "b.png", "--upsample", endpoint.url,
            "--upsample-model", "m", "--watermark", "on", "--seed", "3", "-o", "c.png",
            "--c2pa-cert", signing["certificate"], "--c2pa-key", signing["key"],
        )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "c.png\n")
    [asked] = endpoint.asked
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    shown = asked.body["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2]
    joined = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
    np.testing.assert_array_equal(joined, np.concatenate([pixels("a.png"), pixels("b.png")], axis=1))

    [found] = json.loads(flux2("inspect", "c.png", "--trust", signing["root"], "--json").stdout)["pictures"]
    said = found["parameters"]
    assert said["prompt"] == "the shape of image 1 in the colour of image 2" and said["original_prompt"] == "mix them"
    assert said["upsampled_by"] == "endpoint m" and [each["name"] for each in said["references"]] == ["a.png", "b.png"]
    assert found["watermark"]["matches"] == 46 and found["credentials"]["state"] == "Trusted"
    assert found["credentials"]["ingredients"] == ["a.png", "b.png"]
    for secret in (KEY, endpoint.url.split("/")[2]):
        assert secret.encode() not in Path("c.png").read_bytes() and secret not in result.stderr + result.stdout

    drawn("--like", "c.png", "-o", "again.png")  # without the endpoint, which is gone
    np.testing.assert_array_equal(pixels("again.png"), pixels("c.png"))
    assert read_parameters("again.png") == read_parameters("c.png")


def test_a_key_that_a_server_sends_back_is_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("UPSAMPLE_API_KEY", KEY)
    for answer in (json_of({"error": {"message": f"wrong key {KEY}"}}, 401), completion(f"a cube, {KEY}")):
        with answering(answer) as endpoint:
            flags = ["--upsample", endpoint.url, "--upsample-model", "m", "--overwrite"]
            result = flux2("run", CIRCLE, "-o", "a.png", *flags)
            failed = flux2("run", CIRCLE, "-o", "a.png", *flags, "--upsample-strict", "--json")
        assert (result.exit_code, failed.exit_code) == (0, 1)
        assert KEY not in result.output + failed.output + caplog.text
        assert KEY.encode() not in Path("a.png").read_bytes()


def test_embeds_carried_in_a_file_draw_the_same_pictures() -> None:
    ball = "a small green star"
    result = flux2("encode", CIRCLE, ball, "-o", "e.safetensors")
    assert (result.exit_code, result.stdout) == (0, "e.safetensors\n")
    drawn("--prompt-embeds", "e.safetensors", "--seed", "5", "--num-images", "2", "-o", "all.png")
    for number, prompt in enumerate((CIRCLE, CIRCLE, ball, ball)):
        drawn(prompt, "--seed", str(5 + number), "-o", f"plain-{number}.png")
        made = f"all-{number + 1:04d}.png"
        np.testing.assert_array_equal(pixels(made), pixels(f"plain-{number}.png"))
        parameters = read_parameters(made)
        assert parameters.prompt == prompt and parameters.prompt_embeds is not None
        assert parameters.prompt_embeds.name == "e.safetensors" and parameters.seed == 5 + number
    drawn("--like", "all-0003.png", "-o", "again.png")
    np.testing.assert_array_equal(pixels("again.png"), pixels("all-0003.png"))
    drawn(ball, "--prompt-embeds", "e.safetensors", "--seed", "7", "-o", "picked.png")
    np.testing.assert_array_equal(pixels("picked.png"), pixels("all-0003.png"))
    Path("e.safetensors").unlink()
    assert "--prompt-embeds" in flux2("run", "--like", "all-0003.png").stderr


def test_embeds_that_do_not_belong_here_are_refused() -> None:
    flux2("encode", CIRCLE, "-o", "e.safetensors")
    made = read_embeds(Path("e.safetensors"))
    broken = made.embeds.copy()
    broken[0, 0, 0] = np.nan
    wrong = {
        "another text encoder": to_bytes(replace(made, text_encoder="b" * 64)),
        "have shape": to_bytes(replace(made, embeds=made.embeds[:, :, :-1])),
        "not finite": to_bytes(replace(made, embeds=broken)),
        "not a .safetensors file": pickle.dumps(made.embeds),
    }
    before = files()
    for word, data in wrong.items():
        Path("e.safetensors").write_bytes(data)
        result = flux2("run", "--prompt-embeds", "e.safetensors")
        assert (result.exit_code, result.stdout) == (2, "") and word in result.stderr.splitlines()[-1]
        assert files() == before
    for arguments in (
        ["encode", "x", "-o", "x.png"],
        ["encode", "x", "-o", "e.safetensors"],
        ["encode", " ", "-o", "x"],
    ):
        assert flux2(*arguments).exit_code == 2
    assert (
        flux2("run", CIRCLE, "--prompt-embeds", "e.safetensors", "--text-encoder", "http://127.0.0.1:1/").exit_code == 2
    )


def test_a_text_encoder_elsewhere_draws_the_same_picture_and_a_hostile_one_draws_nothing(
    home: Path, work: Path
) -> None:
    encoder = Flux2Pipeline.from_pretrained("tiny")

    def public_protocol(handler: Handler) -> None:
        prompt = handler.endpoint.asked[-1].body["prompt"]
        file = io.BytesIO()
        torch.save(torch.from_numpy(encoder.encode_prompt([prompt])[0]), file)
        bytes_of(file.getvalue())(handler)

    with answering(public_protocol) as endpoint:
        drawn(CIRCLE, "--text-encoder", endpoint.url, "--seed", "5", "-o", "there.png")
        assert flux2("encode", CIRCLE, "--text-encoder", endpoint.url, "-o", "e.safetensors").exit_code == 0
    drawn(CIRCLE, "--seed", "5", "-o", "here.png")
    np.testing.assert_array_equal(pixels("there.png"), pixels("here.png"))
    np.testing.assert_array_equal(read_embeds(Path("e.safetensors")).embeds, encoder.encode_prompt([CIRCLE])[0])

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {work / 'was-here'}",)

    file, before = io.BytesIO(), files()
    torch.save(Evil(), file)
    with answering(bytes_of(file.getvalue())) as endpoint:
        result = flux2("run", CIRCLE, "--text-encoder", endpoint.url)
    assert (result.exit_code, result.stdout) == (1, "") and "holds no embeds" in result.stderr.splitlines()[-1]
    assert files() == before


def test_what_the_checks_refuse_is_not_sent_not_drawn_and_not_written(work: Path) -> None:
    looked: list[Image.Image] = []

    def picture(shown: Image.Image) -> str | None:
        looked.append(shown)
        return "too blue" if len(looked) == 2 else None

    written: list[Path] = []
    own = ContentChecks(lambda prompt: "no squares" if "square" in prompt else None, picture)
    runner = Runner(Console(quiet=True), checks=own)
    with answering(completion("a blue square")) as endpoint:
        sent = RunOptions(prompt="a square", upsample=endpoint.url, upsample_model="m")
        with pytest.raises(ContentError, match="the prompt was refused: no squares"):
            runner.run(sent, written.append)
        assert not endpoint.asked
        with pytest.raises(ContentError, match="no squares"):  # what it was rewritten to
            runner.run(replace(sent, prompt="a thing"), written.append)
    assert not written and not files()
    report = runner.run(RunOptions(prompt=CIRCLE, seed=5, num_images=3), written.append)
    assert [each.number for each in report.refused] == [2] and report.seeds == [5, 7] and len(written) == 2
    assert files() == sorted(path.name for path in written)
    np.testing.assert_array_equal(np.asarray(looked[0]), pixels(str(written[0])))
    runner.run(RunOptions(prompt="a square", safety="off"), written.append)


def test_the_published_checks_look_at_prompts_references_and_results(tmp_path_factory: Any) -> None:
    """With small models in the place of the published ones: bright pictures are unsafe, the judge says yes or no."""
    models = tmp_path_factory.mktemp("models")
    judge = LanguageModel(ModelPlace(*[str(save_seer(models / "seer"))] * 2))
    classifier = Classifier(str(save_classifier(models / "classifier")))
    pipe = Flux2Pipeline.from_pretrained("tiny")
    pipe.content_checks = ContentChecks(picture=classifier)
    with pytest.raises(ContentError, match="reference 2 was refused: it may not be safe for work"):
        pipe("x", image=[Image.new("RGB", (64, 64), colour) for colour in ("black", "white")])
    pipe.content_checks = published_checks(judge, classifier)
    refuses = judge.says_yes(INSTRUCTIONS, [ABOUT_PROMPT % CIRCLE])
    with pytest.raises(ContentError, match="the prompt was refused") if refuses else nullcontext():
        pipe(CIRCLE)


def test_a_refused_picture_is_black_in_python() -> None:
    pipe = Flux2Pipeline.from_pretrained("tiny")
    plain = pipe(CIRCLE, seed=5, output_type="np")
    assert plain.refused == (None,) and plain.images.any()
    pipe.content_checks = ContentChecks(picture=lambda picture: "no")
    assert not pipe(CIRCLE, seed=5, output_type="np").images.any()
    assert pipe(CIRCLE, seed=5, num_images_per_prompt=2).refused == ("no", "no")
    assert pipe(CIRCLE, seed=5, output_type="latent").refused == (None,)  # there is no picture yet
