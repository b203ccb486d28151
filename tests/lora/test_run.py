"""`flux2-trt build --lora` and `flux2-trt run --lora`, with real bundles of a small model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diffusers import Flux2KleinPipeline
from diffusers_models import (
    QWEN_VOCABULARY,
    flow_scheduler,
    small_autoencoder,
    small_language_model,
    small_tokenizer,
    small_transformer,
)
from PIL import Image
from test_cli import flux2
from test_pictures import write_loras

from flux2_trt.metadata import read_parameters
from flux2_trt.store import Store

DRAW = ("--model", "small", "--width", "64", "--height", "64", "--steps", "2", "--seed", "3", "--watermark", "off")
DRAW += ("--safety", "off")  # its models are not here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a small model, whose bundle is in a store."""
    folder = tmp_path_factory.mktemp("run")
    Flux2KleinPipeline(
        flow_scheduler(),
        small_autoencoder(5),
        small_language_model("qwen3", 6, vocab_size=QWEN_VOCABULARY),
        small_tokenizer(),
        small_transformer(7),
    ).save_pretrained(folder / "Small")
    write_loras(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX2_TRT_HOME", str(folder / "home"))
        assert flux2("build", str(folder / "Small"), "--target", "cpu").exit_code == 0
        yield folder


@pytest.fixture
def store(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Its own, with the bundle of the model; what is drawn goes to an empty folder."""
    shutil.copytree(model / "home", tmp_path / "home")
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Store()


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def test_run_builds_once_what_it_then_finds(model: Path, store: Store) -> None:
    style = model / "kohya.safetensors"
    assert flux2("run", "a cube", *DRAW, "-o", "base.png").exit_code == 0
    first = flux2("run", "a cube", *DRAW, "--lora", f"{style}:0.5", "-o", "first.png")
    assert first.exit_code == 0 and f"building small with {style}:0.5, once" in first.stderr
    assert "tracing" not in first.stderr
    shutil.copy(style, "renamed.safetensors")
    again = flux2("run", "a cube", *DRAW, "--lora", "renamed.safetensors:0.5", "-o", "again.png")
    assert again.exit_code == 0 and "building" not in again.stderr
    assert (pixels("first.png") == pixels("again.png")).all()
    assert np.abs(pixels("first.png") - pixels("base.png")).mean() > 1
    assert len(store.list()) == 2
    [used] = read_parameters("again.png").loras
    assert (used.name, used.strength) == ("kohya.safetensors", 0.5)
    assert 'LoRA: "kohya.safetensors:0.5"' in flux2("inspect", "again.png").stdout
    assert flux2("run", "a cube", *DRAW, "-o", "alone.png").exit_code == 0  # though a newer bundle is there
    assert (pixels("alone.png") == pixels("base.png")).all()
    assert any("ok, with kohya.safetensors:0.5" in line for line in flux2("bundles", "list").stdout.splitlines())


def test_build_makes_what_run_finds(model: Path, store: Store) -> None:
    """Several, in their order; other strengths are another bundle."""
    loras = ["--lora", f"{model}/kohya.safetensors:0.5", "--lora", f"{model}/diffusers.safetensors"]
    built = flux2("build", str(model / "Small"), *loras, "--target", "cpu", "--json")
    assert built.exit_code == 0
    found = flux2("run", "a cube", *DRAW, *loras, "--json")
    assert json.loads(found.stdout)["bundle"] == json.loads(built.stdout)["bundle"]
    loras[1] = loras[1].replace("0.5", "0.25")
    other = flux2("run", "a cube", *DRAW, *loras, "--json")
    assert json.loads(other.stdout)["bundle"] != json.loads(built.stdout)["bundle"]


def test_a_bundle_takes_loras_too_but_not_twice(model: Path, store: Store) -> None:
    [base] = store.list()
    style = f"{model}/kohya.safetensors"
    flags = [*DRAW[2:], "--lora", style]
    drawn = flux2("run", "a cube", "--bundle", str(base.path), *flags, "--json")
    assert drawn.exit_code == 0
    bundle = json.loads(drawn.stdout)["bundle"]
    twice = flux2("run", "a cube", "--bundle", bundle, *flags)
    assert twice.exit_code == 2 and "has LoRAs in it; give the model, or its bundle without them" in twice.stderr


def test_strength_0_is_the_model_itself(model: Path, store: Store) -> None:
    flux2("run", "a cube", *DRAW, "-o", "base.png")
    result = flux2("run", "a cube", *DRAW, "--lora", f"{model}/kohya.safetensors:0", "-o", "zero.png")
    assert result.exit_code == 0 and len(store.list()) == 1
    assert (pixels("base.png") == pixels("zero.png")).all()


def test_a_picture_is_made_again_with_its_loras(model: Path, store: Store) -> None:
    """From its bundle; where that is gone, from the LoRA beside the picture."""
    flux2("run", "a cube", *DRAW, "--lora", f"{model}/kohya.safetensors:0.5", "-o", "first.png")
    assert flux2("run", "--like", "first.png", "--safety", "off", "-o", "second.png").exit_code == 0
    [bundle] = [bundle for bundle in store.list() if bundle.loras]
    store.remove(bundle.path.name)
    gone = flux2("run", "--like", "first.png", "--safety", "off")
    assert gone.exit_code == 2 and "the LoRA 'kohya.safetensors'" in gone.stderr and "with --lora" in gone.stderr
    shutil.copy(model / "kohya.safetensors", ".")
    third = flux2("run", "--like", "first.png", "--safety", "off", "-o", "third.png")
    assert third.exit_code == 0 and "the picture can differ" not in third.stderr
    for name in ("second.png", "third.png"):
        assert (pixels(name) == pixels("first.png")).all()


def test_weights_that_changed_since_are_found_out(model: Path, store: Store, tmp_path: Path) -> None:
    """A bundle is built from what its base was built from, not from what lies there now."""
    folder = tmp_path / "Small"
    shutil.copytree(model / "Small", folder)
    for bundle in store.list():
        store.remove(bundle.path.name)
    assert flux2("build", str(folder), "--target", "cpu").exit_code == 0
    small_transformer(8).save_pretrained(folder / "transformer")
    result = flux2("run", "a cube", *DRAW, "--lora", f"{model}/kohya.safetensors")
    assert result.exit_code == 3 and "are not those that" in result.stderr
    assert not list(Path().iterdir())


def test_what_is_wrong_is_said_and_nothing_is_left(model: Path, store: Store) -> None:
    for flags, code, words in (
        (["--lora", "none.safetensors:0.5"], 1, "the LoRA none.safetensors is missing"),
        (["--lora", ":0.5"], 2, "is no FILE or FILE:STRENGTH"),
        (["--lora", f"{model}/kohya.safetensors:high"], 1, "is missing; give FILE or FILE:STRENGTH"),
        (
            ["--lora", f"{model}/Small/transformer/diffusion_pytorch_model.safetensors"],
            1,
            "not known: context_embedder",
        ),
    ):
        result = flux2("run", "a cube", *DRAW, *flags)
        assert result.exit_code == code and words in result.stderr
    assert not list(Path().iterdir()) and len(store.list()) == 1 and not store.unfinished()
