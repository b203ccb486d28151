"""The calls that TensorRT gets, by bindings that keep the rules of its documentation: no plan is run here."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers_models import relative_error
from PIL import Image
from runtime.conftest import RESERVED
from runtime.standin import StandIn
from runtime.standin_tensorrt import StandInTensorRT
from typer.testing import CliRunner

from flux2_trt.bundle import Bundle
from flux2_trt.cli import app
from flux2_trt.errors import BundleError, DeviceError
from flux2_trt.manifest import MANIFEST_FILE
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime import placement, tensorrt
from flux2_trt.runtime.gpu import GpuRuntime, Residency

PROMPT = "a large red circle on a blue background"
ASKED: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "output_type": "latent"}
FP32 = 1e-4  # the same kernels with weights as inputs, which ONNX Runtime lays out otherwise

Install = Callable[..., StandInTensorRT]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """The bindings of a compiler in place of the real ones, and of a process that has no log yet."""

    def put(bundle: Bundle, compiler: str = "tensorrt_rtx", **options: Any) -> StandInTensorRT:
        bindings = StandInTensorRT(StandIn(), compiled(bundle, compiler), compiler == "tensorrt_rtx", **options)
        monkeypatch.setitem(sys.modules, compiler, bindings.module())
        tensorrt._log_of.cache_clear()
        return bindings

    yield put
    tensorrt._log_of.cache_clear()


def compiled(bundle: Bundle, compiler: str) -> Bundle:
    """As if the compiler had made plans of the graphs."""
    records = tuple(replace(each, compiler=compiler, compiler_version="1.7") for each in bundle.manifest.components)
    return replace(bundle, manifest=replace(bundle.manifest, components=records))


def pipeline_of(bindings: StandInTensorRT, **options: Any) -> Flux2Pipeline:
    return Flux2Pipeline(bindings.bundle, runtime=GpuRuntime(bindings.bundle, bindings.device, **options))


@pytest.mark.parametrize("compiler", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize(
    ("plans", "residency"),
    [
        ("whole", Residency()),
        ("whole", Residency(swapped=frozenset({"text_encoder", "transformer"}))),
        ("blocks", Residency(streamed=(1, 3))),
    ],
)
def test_pictures_are_those_of_the_cpu(
    built: dict[str, Bundle], install: Install, compiler: str, plans: str, residency: Residency
) -> None:
    bindings = install(built[plans], compiler)
    pipeline, theirs = pipeline_of(bindings, residency=residency), Flux2Pipeline(built["cpu"])
    [drawn] = theirs(PROMPT, seed=3, num_inference_steps=2).images
    for call in (ASKED, {**ASKED, "prompt": "make it green", "image": drawn}, {**ASKED, "width": 128, "height": 144}):
        assert relative_error(pipeline(**call).images, theirs(**call).images) < FP32
    assert "launch" in bindings.device.trace  # what was captured was not refused
    pipeline.close()
    assert bindings.device.live == {}


def test_kernels_are_made_once_and_kept(built: dict[str, Bundle], install: Install, tmp_path: Path) -> None:
    made: list[int] = []
    for _ in range(2):
        bindings = install(built["whole"])
        pipeline = pipeline_of(bindings, kernels=tmp_path / "kernels")
        pipeline(**ASKED)
        pipeline(**ASKED)
        pipeline.close()
        made.append(len(bindings.made))
    assert made == [3, 0]  # of the text encoder, the conditioning and the transformer
    files = sorted((tmp_path / "kernels").iterdir())
    assert len(files) == 3 and all(file.stat().st_mode & 0o777 == 0o600 for file in files)

    files[0].write_bytes(b"of another version")
    bindings = install(built["whole"])
    pipeline = pipeline_of(bindings, kernels=tmp_path / "kernels")
    pipeline(**ASKED)
    pipeline.close()
    assert len(bindings.made) == 1  # and is whole again
    assert files[0].read_bytes() != b"of another version"


def test_kernels_that_others_could_have_written_are_not_loaded(
    built: dict[str, Bundle], install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        bindings = install(built["whole"])
        pipeline = pipeline_of(bindings, kernels=tmp_path)
        pipeline(**ASKED)
        pipeline.close()
        for file in tmp_path.iterdir():
            file.chmod(0o666)
    assert len(bindings.made) == 3
    assert "can be written by others" in caplog.text


def test_kernels_that_cannot_be_kept_cost_no_picture(
    built: dict[str, Bundle], install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels").write_text("a file where the folder would be")
    bindings = install(built["whole"])
    pipeline = pipeline_of(bindings, kernels=tmp_path / "kernels")
    assert np.isfinite(pipeline(**ASKED).images).all()
    pipeline.close()
    assert "kernels are not kept" in caplog.text
    assert bindings.device.live == {}


@pytest.mark.parametrize(
    ("refuses", "kind", "words"),
    [
        ("deserialize", BundleError, r"tensorrt_rtx 1\.7 refuses the plan of \w+: no deserialize today; build it with"),
        ("context", DeviceError, "no context today; see what fits: flux2-trt plan"),
        ("profile", DeviceError, "has no profile 0: no profile today"),
        ("shape", DeviceError, r"does not take .+ \[.+\]: no shape today"),
        ("address", DeviceError, "does not take an address for .+: no address today"),
        ("launch", DeviceError, "cannot be launched: no launch today"),
    ],
)
def test_what_tensorrt_refuses_is_told_in_its_words(
    built: dict[str, Bundle], install: Install, refuses: str, kind: type[Exception], words: str
) -> None:
    """And nothing is left; once it refuses no more, the same pipeline draws."""
    bindings = install(built["blocks"], refuses=refuses)
    pipeline = pipeline_of(bindings, residency=Residency(streamed=(1, 2)))
    with pytest.raises(kind, match=words):
        pipeline(**ASKED)
    bindings.refuses = None
    assert np.isfinite(pipeline(**ASKED).images).all()
    pipeline.close()
    assert bindings.device.live == {}


def test_a_pipeline_that_nobody_holds_frees_its_device(
    built: dict[str, Bundle], install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its process does at its end: kernels are kept then too. A fork of it frees nothing."""
    bindings = install(built["whole"])
    monkeypatch.setattr(
        Flux2Pipeline, "_made_runtime", lambda self: GpuRuntime(self.bundle, bindings.device, kernels=tmp_path)
    )
    pipeline = Flux2Pipeline(bindings.bundle)
    pipeline(**ASKED)
    assert bindings.device.live
    if (child := os.fork()) == 0:
        before = dict(bindings.device.live)
        pipeline._at_the_end()
        os._exit(0 if bindings.device.live == before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del pipeline
    assert bindings.device.live == {}
    assert len(list(tmp_path.iterdir())) == 3


def test_the_command_line_draws_by_plans(
    built: dict[str, Bundle], known: None, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a bundle on disk to files, on a GPU where not all weights find room; kernels are in the store afterwards."""
    bindings = install(built["blocks"])
    folder = tmp_path / "bundle"
    shutil.copytree(built["blocks"].path, folder, copy_function=os.link)
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).write_text(bindings.bundle.manifest.to_json())
    weights = {each.weights for each in bindings.bundle.manifest.components if each.weights}
    bindings.device.memory = sum(file.bytes for file in weights)  # no room for anything else

    def open_device(index: int) -> StandIn:
        if index:
            raise DeviceError(f"there is no GPU {index}")
        return bindings.device

    monkeypatch.setattr(placement, "CudaDevice", open_device)
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    asked = ["--steps", "2", "--width", "128", "--height", "128", "--num-images", "3", "--batch", "2", "--seed", "3"]
    done = CliRunner().invoke(app, ["run", PROMPT, "--bundle", str(folder), *asked, "-o", f"{tmp_path}/a.png"])
    assert done.exit_code == 0, done.output
    paths = done.stdout.splitlines()
    assert paths == [f"{tmp_path}/a-000{number}.png" for number in (1, 2, 3)]
    expected = Flux2Pipeline(built["cpu"])(
        PROMPT, seed=3, num_inference_steps=2, width=128, height=128, num_images_per_prompt=3
    ).images
    for path, image in zip(paths, expected, strict=True):
        assert np.abs(np.asarray(Image.open(path), int) - np.asarray(image, int)).max() <= 1
    gc.collect()
    assert bindings.device.live == {}
    assert len(list((tmp_path / "store" / "kernels").iterdir())) == 7  # four parts, conditioning, prompts, pictures

    too_large = CliRunner().invoke(app, ["run", PROMPT, "--bundle", str(folder), "--batch", "8", "--num-images", "8"])
    assert too_large.exit_code == 2 and "was not built for batch 8 (1 to 6)" in too_large.stderr
    bindings.device.memory = RESERVED
    too_small = CliRunner().invoke(app, ["run", PROMPT, "--bundle", str(folder)])
    assert too_small.exit_code == 1 and "needs at least" in too_small.stderr and "are free" in too_small.stderr
    gc.collect()
    assert bindings.device.live == {}
