"""Bundles with LoRAs against diffusers' pipelines with the same LoRAs: latents, pictures, and what is shared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers_models import flow_scheduler, relative_error, small_autoencoder, small_transformer
from lora_files import bfl_linears, kohya_keys, linears, named, peft_keys, random_layers, write
from safetensors.torch import load_file
from test_parity import Pair, normal, picture

import export.tracing
from engines.build import BuildReport, BuildRequest, build
from flux2_trt.bundle import Bundle
from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.lora.request import LoraRequest
from flux2_trt.pipeline import Flux2Pipeline as OurPipeline
from flux2_trt.store import Store

LATENTS = 1e-3
STRENGTHS = {"diffusers": 0.8, "kohya": -0.6, "ai-toolkit": 1.2}


def write_loras(folder: Path) -> dict[str, Path]:
    """Of three formats; the guidance embedder is left as it is, which kohya's keys cannot name in diffusers."""
    model = small_transformer(0)
    bfl = bfl_linears(model)
    plain = {name: shape for name, shape in bfl.items() if "modulation" not in name}
    tensors = {
        "diffusers": named(random_layers(linears(model), 1), peft_keys("transformer.")),
        "kohya": named(random_layers(plain, 2), kohya_keys, alpha=3.0),
        "ai-toolkit": named(random_layers(bfl, 3, rank=2), peft_keys("diffusion_model.")),
    }
    return {name: write(folder / f"{name}.safetensors", values) for name, values in tensors.items()}


def make(theirs: Any, folder: Path) -> Path:
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "Small")
    write_loras(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    theirs = Flux2Pipeline(
        flow_scheduler(), small_autoencoder(1), None, None, small_transformer(2, guidance_embeds=True)
    )
    return make(theirs, tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer = small_transformer(4)
    theirs = Flux2KleinPipeline(flow_scheduler(), small_autoencoder(3), None, None, transformer, is_distilled=True)
    return make(theirs, tmp_path_factory.mktemp("klein"))


@pytest.fixture(params=["dev", "klein"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def built(
    folder: Path, *loras: LoraRequest, store: str = "store", told: list[str] | None = None, **more: Any
) -> BuildReport:
    request = BuildRequest(model=str(folder / "Small"), loras=loras, output=folder / store, **more)
    return build(request, (told if told is not None else []).append)


def pipelines(folder: Path, strengths: dict[str, float]) -> Pair:
    """diffusers' with the LoRAs as its adapters, not merged; ours from the bundle."""
    kind = Flux2Pipeline if folder.name.startswith("dev") else Flux2KleinPipeline
    theirs = kind.from_pretrained(folder / "Small", text_encoder=None, tokenizer=None)
    theirs.set_progress_bar_config(disable=True)
    for name in strengths:
        theirs.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(list(strengths), list(strengths.values()))
    report = built(folder, *requests(folder, strengths))
    return Pair(theirs, OurPipeline.from_bundle(report.bundle), ())


def requests(folder: Path, strengths: dict[str, float]) -> list[LoraRequest]:
    return [LoraRequest(folder / f"{name}.safetensors", strength) for name, strength in strengths.items()]


@pytest.mark.parametrize(
    "strengths", [{name: 1.0} for name in STRENGTHS] + [STRENGTHS], ids=[*STRENGTHS, "all with strengths"]
)
def test_latents_are_those_of_diffusers(folder: Path, strengths: dict[str, float]) -> None:
    """With a reference, over several steps; and far from those of the model alone."""
    pair = pipelines(folder, strengths)
    arguments: dict[str, Any] = {
        "prompt_embeds": normal(1, 40, 24, seed=1),
        "height": 80,
        "width": 64,
        "latents": normal(1, 16, 5, 4),
        "num_inference_steps": 4,
    }
    arguments |= {} if pair.ours.spec.sampling.fixed_guidance else {"guidance_scale": 2.5}
    ours = pair.ours(output_type="latent", image=picture(96, 64), **arguments).images
    assert relative_error(ours, pair.expected(image=[picture(96, 64)], **arguments)) < LATENTS
    alone = OurPipeline.from_bundle(built(folder).bundle)(
        output_type="latent", image=picture(96, 64), **arguments
    ).images
    assert relative_error(ours, alone) > 0.1


def test_pictures_are_those_of_diffusers(folder: Path) -> None:
    pair = pipelines(folder, STRENGTHS)
    arguments: dict[str, Any] = {"height": 80, "width": 64, "num_inference_steps": 2}
    noise, embeds = normal(1, 16, 5, 4), normal(1, 40, 24, seed=1)
    [ours] = pair.ours(latents=noise, prompt_embeds=embeds, **arguments).images
    with torch.no_grad():
        [theirs] = pair.theirs(
            latents=torch.from_numpy(noise), prompt_embeds=torch.from_numpy(embeds), **arguments
        ).images
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2


def files(bundle: str) -> dict[str, tuple[int, str]]:
    """Inode and digest of every file."""
    path = Path(bundle)
    manifest = Bundle.open(path).manifest
    return {record.file: (os.stat(path / record.file).st_ino, record.sha256) for record in manifest.files}


def test_plans_and_untouched_files_are_those_of_the_base(klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is traced or compiled; the bytes are those of a build that has nothing to share with."""
    loras = requests(klein, {"kohya": 0.5})
    alone = built(klein, *loras, store="alone")
    base = built(klein)
    told: list[str] = []
    monkeypatch.setattr(export.tracing, "trace_parts", None)
    report = built(klein, *loras, told=told)
    assert not any("tracing" in text or "compiling" in text for text in told)
    assert any("writing the weights of transformer: 12 that LoRAs change" in text for text in told)
    ours, theirs, from_nothing = files(report.bundle), files(base.bundle), files(alone.bundle)
    assert {name: digest for name, (_, digest) in ours.items()} == {
        n: digest for n, (_, digest) in from_nothing.items()
    }
    other = {name for name in ours if ours[name] != theirs[name]}
    assert other == {"weights/conditioning.fp32.safetensors", "weights/transformer.fp32.safetensors"}
    assert Path(report.bundle).name == Path(alone.bundle).name != Path(base.bundle).name
    assert built(klein, *loras).reused


def test_a_damaged_base_is_not_shared(klein: Path) -> None:
    base = built(klein, store="damaged")
    weights = Bundle.open(base.bundle).weights_path("transformer")
    assert weights
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(data)
    loras = requests(klein, {"kohya": 0.25})
    assert {n: d for n, (_, d) in files(built(klein, *loras, store="damaged").bundle).items()} == {
        n: d for n, (_, d) in files(built(klein, *loras, store="sound").bundle).items()
    }


def test_strength_0_is_the_base_itself(klein: Path) -> None:
    """Yet the file is checked."""
    base = built(klein)
    same = built(klein, *requests(klein, {"kohya": 0.0, "diffusers": 0.0}))
    assert same.bundle == base.bundle and same.reused
    write(klein / "wrong.safetensors", {"x.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(CheckpointError, match=r"not known: x\.lora_A\.weight"):
        built(klein, LoraRequest(klein / "wrong.safetensors", 0.0))


def test_a_wrong_lora_leaves_nothing_behind(klein: Path) -> None:
    path = write(
        klein / "nan.safetensors", {k: v * torch.nan for k, v in load_file(klein / "kohya.safetensors").items()}
    )
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        built(klein, LoraRequest(path), store="nothing")
    assert not (klein / "nothing").exists()


def test_the_manifest_and_the_listing_say_which(klein: Path) -> None:
    """Order counts for the key, since sums round."""
    both = requests(klein, {"kohya": 0.5, "diffusers": 1.0})
    first, second = built(klein, *both), built(klein, *reversed(both))
    manifest = Bundle.open(first.bundle).manifest
    assert [(lora["file"], lora["strength"]) for lora in manifest.loras] == [
        ("kohya.safetensors", 0.5),
        ("diffusers.safetensors", 1.0),
    ]
    assert manifest.source["base"] == Bundle.open(built(klein).bundle).manifest.key
    assert first.bundle != second.bundle
    store = Store(klein / "store")
    listed = {str(bundle.path): bundle.loras for bundle in store.list()}
    assert listed[first.bundle] == ("kohya.safetensors:0.5", "diffusers.safetensors:1")
    assert str(store.find("small", "cpu")) == built(klein).bundle  # newer ones have LoRAs


def test_what_takes_no_lora(klein: Path) -> None:
    lora = LoraRequest(klein / "kohya.safetensors")
    with pytest.raises(UsageError, match="random:0 are made up"):
        build(BuildRequest("klein-4b", checkpoint="random:0", loras=(lora,), output=klein / "none"), lambda text: None)
    with pytest.raises(CheckpointError, match=r"the LoRA .*none\.safetensors is missing"):
        built(klein, LoraRequest(klein / "none.safetensors"))
