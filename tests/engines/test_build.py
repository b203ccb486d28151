"""Requests that cannot be met, and builds that are stopped. Builds themselves: tests/test_parity.py."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from traces import traced_once

import export.tracing
from engines.build import BuildRequest, build
from engines.sources import resolve_source
from export.conversion import Converter
from export.graph import Graph
from export.recipes import QUANTIZED_LINEARS
from flux2_trt.bundle import Bundle
from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.models import TINY_ASSETS, published_spec
from flux2_trt.store import Store


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            BuildRequest("tiny", target="tpu"),
            r"unknown target 'tpu'; this version builds for cpu, gb300, .*, h100, rtx4090, l40s",
        ),
        (BuildRequest("tiny", precision="int2"), r"target cpu does not run precision 'int2'; it runs fp32, fp8, fp8-a"),
        (
            BuildRequest("tiny", target="a100", precision="fp8"),
            r"target a100 does not run precision 'fp8'; it runs bf1",
        ),
        (
            BuildRequest("tiny", target="rtx4090", sizes=("8mp",)),
            r"unknown size class '8mp'; known are any, 512",
        ),
        (BuildRequest("tiny", "a100", "int4", "bound"), r"target a100 takes embedded weights in int4, not bound"),
        (
            BuildRequest("tiny", "a100", "int4", plans="blocks"),
            r"--plans blocks needs bound weights, .* embedded for a100",
        ),
        (BuildRequest("tiny", plans="blocks"), r"--plans blocks needs bound weights, .* external for cpu"),
        (BuildRequest("tiny", "rtx4090", plans="all"), r"unknown --plans all; known are whole, blocks"),
        (BuildRequest("tiny", "h100", "nvfp4"), r"target h100 does not run precision 'nvfp4'; it runs fp8, "),
        (BuildRequest("tiny", weights="bound"), r"target cpu takes external weights in fp32, not bound"),
        (BuildRequest("tiny", components=("unet",)), r"tiny has no component 'unet'; it has text_encoder, "),
        (BuildRequest("tiny", components=()), r"tiny cannot be built without components"),
        (BuildRequest("flux3"), r"flux3 is no model; give tiny, dev, .*a diffusers folder, or a \.safetensors file"),
        (BuildRequest("tiny", checkpoint="random:x"), r"random:x has no seed; write for example random:0"),
        (BuildRequest("dev", checkpoint="/no/such/folder"), r"/no/such/folder does not exist"),
    ],
)
def test_bad_requests_give_one_line_and_make_nothing(tmp_path, request_, message):
    store = tmp_path / "store"
    values = {name: getattr(request_, name) for name in request_.__dataclass_fields__} | {"output": store}
    with pytest.raises(UsageError, match=message) as caught:
        build(BuildRequest(**values), lambda message: None)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not store.exists()


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        resolve_source(str(tmp_path), None)


def test_synthetic_weights_have_no_files_and_say_so():
    source = resolve_source("klein-4b", "random:7")
    assert source.identity() == {"random": 7} and not source.paths


LINEAR_SCALE, INPUT_SCALE = 0.0078125, 0.03125


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory) -> Path:
    """`tiny` as a diffusers folder would hold it, its linears in FP8 with scales, as BFL's files have them."""
    folder = tmp_path_factory.mktemp("fp8")
    for family, name in (("transformer", "transformer"), ("text_encoder", "text_encoder"), ("autoencoder", "vae")):
        tensors = load_file(TINY_ASSETS / f"{family}.safetensors")
        for weight in [name for name in tensors if any(re.fullmatch(p, name) for p in QUANTIZED_LINEARS.values())]:
            module = weight.removesuffix(".weight")
            codes = (tensors[weight].float() / LINEAR_SCALE).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors |= {
                weight: codes,
                f"{module}.weight_scale": torch.tensor(LINEAR_SCALE),
                f"{module}.input_scale": torch.tensor(INPUT_SCALE),
            }
        (folder / name).mkdir()
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    (folder / "tokenizer").mkdir()
    shutil.copy(TINY_ASSETS / "tokenizer.json", folder / "tokenizer")
    return folder


def test_an_fp8_checkpoint_needs_no_calibration_and_keeps_its_codes(fp8_folder, tmp_path):
    request = BuildRequest(
        "tiny", "cpu", "fp8", components=("text_encoder",), checkpoint=str(fp8_folder), output=tmp_path
    )
    report = build(request, lambda message: None)
    stored = load_file(Bundle.open(report.bundle).weights_path("text_encoder"))
    given = load_file(fp8_folder / "text_encoder" / "diffusion_pytorch_model.safetensors")
    name = "layers.1.mlp.down_proj"
    codes = given[f"{name}.weight"].view(torch.uint8)
    assert torch.equal(stored[f"{name}.weight"].view(torch.uint8).T, codes)
    assert stored[f"{name}.quantize"].tolist() == [1 / INPUT_SCALE]
    assert stored[f"{name}.dequantize"].tolist() == [INPUT_SCALE * LINEAR_SCALE]


def test_a_linear_without_an_input_scale_needs_a_calibration(fp8_folder, tmp_path):
    path = fp8_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    folder = tmp_path / "model"
    shutil.copytree(fp8_folder, folder)
    tensors = load_file(path)
    del tensors["single_blocks.0.linear1.input_scale"]
    save_file(tensors, folder / "transformer" / path.name)
    request = BuildRequest("tiny", "cpu", "fp8", checkpoint=str(folder), output=tmp_path / "store")
    with pytest.raises(UsageError, match=r"1 of 47 linears have no input scale \(first single_blocks\.0\.linear1\.w"):
        build(request, lambda message: None)


def test_a_calibration_goes_with_a_precision_that_quantizes(tmp_path):
    request = BuildRequest("tiny", "cpu", "fp32", calibration=tmp_path / "scales.json")
    with pytest.raises(UsageError, match="precision fp32 quantizes nothing; leave --calibration out"):
        build(request, lambda message: None)


SPAWN = multiprocessing.get_context("spawn")
HANG_SECONDS = 600


def build_until_killed(request: BuildRequest, graph: Graph) -> None:
    """Ends the process at the last weight, once another one is in the journal."""
    export.tracing.trace_parts = lambda *_: {"conditioning": graph}  # as long as all else here, and tested elsewhere
    convert = Converter.convert

    def convert_or_die(self: Converter, name: str) -> dict[str, torch.Tensor]:
        if name == list(graph.weights)[-1]:
            while not any(journal.stat().st_size for journal in request.output.rglob("journals/*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return convert(self, name)

    Converter.convert = convert_or_die
    build(request, lambda message: None)


def test_after_a_kill_the_same_build_goes_on(tmp_path, monkeypatch):
    graph = traced_once("conditioning", published_spec("tiny"))
    monkeypatch.setattr(export.tracing, "trace_parts", lambda *_: {"conditioning": graph})
    request = BuildRequest("tiny", "cpu", "fp32", components=("conditioning",), output=tmp_path / "store")
    process = SPAWN.Process(target=build_until_killed, args=(request, graph))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert [bundle.bytes > 0 for bundle in Store(request.output).unfinished()] == [True]

    converted, messages = [], []
    convert = Converter.convert
    monkeypatch.setattr(Converter, "convert", lambda self, name: converted.append(name) or convert(self, name))
    report = build(request, messages.append)
    assert 0 < len(converted) < len(graph.weights)
    assert "going on with the weights of a build that was interrupted" in messages
    assert Store(request.output).unfinished() == []
    whole = build(replace(request, output=tmp_path / "other"), lambda message: None)
    assert len(converted) > len(graph.weights)
    assert Bundle.open(report.bundle).manifest.files == Bundle.open(whole.bundle).manifest.files
