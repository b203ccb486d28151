"""Ranges that are measured a block at a time are those of the whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engines.calibration import calibrate, check_weights, folder_samples, scene_samples
from engines.sources import resolve_source
from export.calibrate import LEVELS_A_SAMPLE, Calibration, input_scales
from export.modules import build_module
from export.recipes import QUANTIZED_LINEARS
from flux2_trt.console import Console
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.latents import position_ids, rotary_tables
from flux2_trt.models import published_spec
from flux2_trt.runner import calibrate_model
from flux2_trt.schedule import sigmas
from flux2_trt.spec import Component
from flux2_trt.text import PromptTokenizer

TINY = resolve_source("tiny", None)
FEW_STEPS = replace(TINY.spec, sampling=replace(TINY.spec.sampling, num_inference_steps=4))
SAMPLES = scene_samples(TINY.spec, 3)  # one of every kind, so with no, one and two references


def module_of(component: Component) -> nn.Module:
    module, source = build_module(component, TINY.spec), TINY.open("transformer")
    if component in ("text_encoder", "vae_encoder"):
        source = TINY.open("text_encoder" if component == "text_encoder" else "autoencoder")
    module.load_state_dict({name: torch.from_numpy(source.read(name)) for name in module.state_dict()})
    return module.eval()


def watched(module: nn.Module, seen: dict[str, float]) -> nn.Module:
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(
                lambda _, inputs, weight=f"{name}.weight": seen.update(
                    {weight: max(seen.get(weight, 0.0), float(inputs[0].abs().max()))}
                )
            )
    return module


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_blocks_one_by_one_see_what_the_whole_model_sees(guidance: float) -> None:
    tokenizer = PromptTokenizer.from_file(TINY.tokenizer, TINY.spec.prompt)
    sampling = replace(FEW_STEPS.sampling, guidance_kind="classifier_free", guidance_scale=guidance)
    scales = input_scales(replace(FEW_STEPS, sampling=sampling), TINY.open, tokenizer, SAMPLES, trajectories=2)

    seen: dict[str, float] = {}
    text_encoder, transformer = (watched(module_of(name), seen) for name in ("text_encoder", "transformer"))
    conditioning, encoder = module_of("conditioning"), module_of("vae_encoder")
    spec, steps = TINY.spec.transformer, sampling.num_inference_steps
    generator = torch.Generator().manual_seed(0)
    trajectories = []

    def embeds_of(prompt: str) -> torch.Tensor:
        tokens = tokenizer([prompt])
        return text_encoder(torch.from_numpy(tokens.input_ids), torch.from_numpy(tokens.attention_mask))

    with torch.no_grad():
        for number, each in enumerate(SAMPLES):
            embeds = embeds_of(each.prompt)
            pictures = [encoder(torch.from_numpy(pixels[None])) for pixels in (each.picture, *each.references)]
            grids = [tuple(picture.shape[1:3]) for picture in pictures]
            ids = position_ids(embeds.shape[1], *grids[0], grids[1:])
            cos, sin = map(torch.from_numpy, rotary_tables(ids, spec.axes_dim, spec.theta))
            target, *references = (picture.flatten(1, 2) for picture in pictures)
            levels = sigmas(steps, target.shape[1])[:-1]
            for part in range(LEVELS_A_SAMPLE):
                sigma = float(levels[(number + part * steps // LEVELS_A_SAMPLE) % steps])
                noise = torch.randn(target.shape, generator=generator)
                noisy = torch.cat([(1 - sigma) * target + sigma * noise, *references], dim=1)
                modulation, text = conditioning(torch.tensor([sigma]), embeds)
                transformer.velocity(noisy, modulation, text, cos, sin)
            trajectories.append((embeds, references, target.shape, levels, cos, sin))
        for embeds, references, shape, levels, cos, sin in trajectories[:2]:
            latents = torch.randn(shape, generator=generator)
            table, text = conditioning(torch.from_numpy(levels).float(), embeds)
            if guidance > 1:
                text = torch.cat((text, conditioning(torch.zeros(1), embeds_of(""))[1]))
            mix = torch.tensor([[guidance, 1 - guidance]] * 2) if guidance > 1 else None
            tokens = torch.cat([latents, *references], dim=1).repeat(len(text), 1, 1)
            dt = torch.zeros(len(table), tokens.shape[1])
            dt[:, : shape[1]] = torch.from_numpy(np.diff(levels, append=0))[:, None]
            step = torch.zeros(1, dtype=torch.int32)
            for _ in table:
                tokens, step = transformer(tokens, table, text, cos, sin, dt, step, mix)
    quantized = {name for name in seen if "blocks." in name or "layers." in name}
    assert set(scales) == quantized
    for name in quantized:
        assert scales[name] * 448 == pytest.approx(seen[name], rel=1e-4), name


def test_trajectories_only_widen_ranges() -> None:
    tokenizer = PromptTokenizer.from_file(TINY.tokenizer, TINY.spec.prompt)
    mixed, both = (input_scales(FEW_STEPS, TINY.open, tokenizer, SAMPLES[:1], trajectories=n) for n in (0, 1))
    assert all(both[name] >= scale for name, scale in mixed.items())
    assert any(both[name] > scale for name, scale in mixed.items())


def test_every_linear_of_a_recipe_has_a_scale() -> None:
    calibration = calibrate("tiny", None, None, 1, trajectories=3, device="cpu", on_progress=lambda message: None)
    spec = published_spec("tiny")
    blocks = 8 * spec.transformer.num_double_blocks + 2 * spec.transformer.num_single_blocks
    assert len(calibration.input_scales) == blocks + 7 * spec.text_encoder.num_layers
    assert all(value > 0 for value in calibration.input_scales.values())
    assert (calibration.samples, calibration.trajectories) == (1, 1)
    assert set(QUANTIZED_LINEARS) == {"transformer", "text_encoder"}


def test_the_command_writes_a_file_that_a_build_takes(tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    report = calibrate_model(Console(quiet=True), path, "tiny", None, None, 2, 0, "cpu")
    assert report == {"calibration": str(path), "model": "tiny", "samples": 2, "trajectories": 0, "linears": 47}
    check_weights(Calibration.read(path), TINY.identity(), path)
    with pytest.raises(UsageError, match="is no folder; give a file in one that exists"):
        calibrate_model(Console(quiet=True), tmp_path / "no" / "scales.json", "tiny", None, None, 2, 0, "cpu")


@pytest.fixture
def calibration() -> Calibration:
    return Calibration("tiny", TINY.identity(), 3, {"a.weight": 0.25}, trajectories=2)


def test_a_calibration_survives_its_file(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    calibration.write(path)
    assert Calibration.read(path) == calibration
    assert [file.name for file in tmp_path.iterdir()] == ["scales.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["input_scales"].clear(),
        lambda values: values["input_scales"].update({"b.weight": 0.0}),
        lambda values: values["input_scales"].update({"b.weight": float("nan")}),
        lambda values: values["input_scales"].update({"b.weight": "1"}),
        lambda values: values.update({"schema_version": 2}),
        lambda values: values.update({"extra": 1}),
        lambda values: values.pop("weights"),
    ],
)
def test_a_file_that_is_none_is_refused(calibration: Calibration, tmp_path: Path, change) -> None:
    path = tmp_path / "scales.json"
    calibration.write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(Flux2Error, match=r"is no calibration.*flux2-trt calibrate"):
        Calibration.read(path)


def test_other_weights_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    check_weights(calibration, TINY.identity(), tmp_path)
    other = {"weights_sha256": {"transformer": {"transformer.safetensors": "0" * 64}}}
    with pytest.raises(UsageError, match="measured with other weights of tiny"):
        check_weights(calibration, other, tmp_path)
    renamed = {
        "weights_sha256": {
            family: {f"other-{name}": digest for name, digest in files.items()}
            for family, files in TINY.identity()["weights_sha256"].items()
        }
    }
    check_weights(calibration, renamed, tmp_path)


def test_samples_of_a_folder(tmp_path: Path) -> None:
    spec = replace(TINY.spec, sampling=replace(TINY.spec.sampling, max_reference_area=128 * 128))
    for index, side in enumerate((64, 256, 96)):
        Image.fromarray(np.full((side, side, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "alone.png")
    samples = folder_samples(tmp_path, spec, count=5)
    assert [each.prompt for each in samples] == ["picture 0", "picture 1", "picture 2"]
    assert [each.picture.shape for each in samples] == [(64, 64, 3), (128, 128, 3), (96, 96, 3)]
    assert [len(each.references) for each in samples] == [0, 1, 0]
    assert len(folder_samples(tmp_path, spec, count=2)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("klein-4b", "random:0", None, 1, 0, "cpu"), r"random:0 has no ranges to measure"),
        (("tiny", None, None, 0, 0, "cpu"), r"--samples is 0; it is at least 1"),
        (("tiny", None, None, 1, -1, "cpu"), r"--trajectories is -1; it is at least 0"),
        (("tiny", None, Path("/no/such"), 1, 0, "cpu"), r"/no/such is no folder; give one with pictures"),
        (("tiny", None, Path(__file__).parent, 1, 0, "cpu"), r"has no picture with a prompt beside it"),
    ],
)
def test_bad_requests(arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(*arguments, on_progress=lambda message: None)
