"""What a forecast is asked of: names, devices and bundles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import engines.setting
from engines.setting import resolve_setting
from flux2_trt.doctor import Gpu
from flux2_trt.errors import UsageError
from flux2_trt.manifest import ComponentRecord, FileRecord, Manifest
from flux2_trt.models import published_spec

SHA = "0" * 64


def record(name: str, plan: str, scratch: int, weights: int | None) -> ComponentRecord:
    file = None if weights is None else FileRecord(f"weights/{name.split('.')[0]}.safetensors", weights, SHA)
    return ComponentRecord(
        name=name,
        plan=FileRecord(f"plans/{plan}.plan", 1000, SHA),
        graph_sha256=SHA,
        compiler="tensorrt_rtx",
        compiler_version="1.7",
        weights=file,
        weight_placement="bound",
        shapes={},
        layers={"scratch_bytes": scratch} if scratch else {},
    )


def bundle(folder: Path, *records: ComponentRecord) -> str:
    manifest = Manifest(
        key=SHA,
        model=published_spec("klein-4b"),
        recipe="fp8-attention",
        target="rtx4090",
        source={"random": 0},
        components=records,
        assets=(),
        created="2026-01-01T00:00:00+00:00",
        flux2_trt_version="0",
    )
    (folder / "bundle.json").write_text(manifest.to_json())
    return str(folder)


def test_defaults_are_those_of_the_device() -> None:
    made = resolve_setting("dev", "h100")
    assert (made.target, made.recipe.name, made.memory_bytes, made.recorded) == ("h100", "fp8", 80 * 10**9, None)
    assert resolve_setting("dev", "a100").recipe.name == "bf16"
    assert resolve_setting("dev", "h100", memory_gigabytes=79.5).memory_bytes == 79_500_000_000


def test_a_bundle_names_its_model_its_target_and_its_precision(tmp_path: Path) -> None:
    parts = [
        record("transformer.double_block", "double", 700, 5_000),
        record("transformer.single_block", "single", 900, 5_000),
        record("vae_decoder", "decoder", 0, None),
    ]
    made = resolve_setting(bundle(tmp_path, *parts))
    assert (made.target, made.recipe.name, made.spec.name) == ("rtx4090", "fp8-attention", "klein-4b")
    assert made.recorded is not None
    assert made.recorded.streams
    assert made.recorded.scratch == {"transformer": 900}
    assert made.recorded.weights == {"transformer": 5_000}
    assert resolve_setting(str(tmp_path), "rtx4090", "fp8-attention") == made
    for flags, message in (
        ({"target": "h100"}, "was built for target rtx4090, not h100; leave --target out"),
        ({"precision": "fp8"}, "was built for precision fp8-attention, not fp8; leave --precision out"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_setting(str(tmp_path), **flags)


def test_whole_plans_are_not_streamed(tmp_path: Path) -> None:
    made = resolve_setting(bundle(tmp_path, record("transformer", "transformer", 5, 6)))
    assert not made.can_stream
    assert resolve_setting("klein-4b", "rtx4090").can_stream
    assert not resolve_setting("klein-4b", "rtx4090", "int4").can_stream  # its weights are in the plan


@pytest.mark.parametrize(
    ("names", "target"),
    [
        (["NVIDIA GeForce RTX 4090"], "rtx4090"),
        (["NVIDIA RTX PRO 6000 Blackwell Workstation Edition"], "rtx-pro-6000"),
        (["NVIDIA GB200"], "gb200"),
        (["NVIDIA B200"], "b200"),
        (["NVIDIA H100 80GB HBM3"], "h100"),
        (["NVIDIA L40S"], "l40s"),
        (["NVIDIA A100-SXM4-80GB"], "a100"),
        (["Quadro T400", "NVIDIA H200"], "h200"),
    ],
)
def test_auto_is_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch, names: list[str], target: str) -> None:
    gpus = tuple(Gpu(name, 123_456_789_000 + index, "590", "9.0") for index, name in enumerate(names))
    monkeypatch.setattr(engines.setting, "find_gpus", lambda: (gpus, "NVML"))
    made = resolve_setting("klein-4b")
    assert made.target == target
    assert made.memory_bytes == 123_456_789_000 + len(names) - 1
    assert resolve_setting("klein-4b", memory_gigabytes=10).memory_bytes == 10 * 10**9


def test_auto_without_a_gpu_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.setting, "find_gpus", lambda: ((), "no NVIDIA driver"))
    with pytest.raises(UsageError, match=r"there is no GPU here \(no NVIDIA driver\); give --target gb300, "):
        resolve_setting("dev")
    monkeypatch.setattr(engines.setting, "find_gpus", lambda: ((Gpu("Tesla T4", 16, "590", "7.5"),), "NVML"))
    with pytest.raises(UsageError, match="none of Tesla T4 is a target; give --target gb300, "):
        resolve_setting("dev")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "deb"}, r"unknown model 'deb'; known are tiny, dev, .*a diffusers folder, a bundle"),
        ({"target": "tpu"}, r"unknown target 'tpu'; this version builds for cpu, gb300"),
        ({"target": "cpu"}, r"no peak rates of target cpu; give --target gb300"),
        ({"target": "rtx3090", "precision": "fp8"}, r"target rtx3090 does not run precision 'fp8'; it runs bf16, int4"),
        ({"memory_gigabytes": 0.0}, r"--memory is 0; give gigabytes above 0, for example 24"),
        ({"memory_gigabytes": -1.0}, r"--memory is -1"),
        ({"memory_gigabytes": float("nan")}, r"--memory is nan"),
        ({"memory_gigabytes": float("inf")}, r"--memory is inf"),
        ({"text_encoder": "cloud"}, r"unknown --text-encoder cloud; known are local, remote"),
    ],
)
def test_what_does_not_exist(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_setting(**{"model": "dev", "target": "h100", **values})


def test_a_serving_image_without_torch_can_plan() -> None:
    code = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnxruntime"):
    sys.modules[name] = None
from engines.advice import preflight
from flux2_trt.drawing import Drawing
from engines.report import lines_of, values_of
from engines.setting import resolve_setting
made = resolve_setting("dev", "rtx4090")
found = preflight(made, Drawing.of(made.spec))
print(len([*lines_of(found)]), values_of(found)["copies_hide"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "True"
