"""Builds for GPUs that have to be there: prepared without one, finished with one.

TensorRT itself cannot be installed here. In its place stands TensorRT-RTX, which has the same API, told to compile for
the compute capability of an RTX 4090 whatever the target.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from engines import prepared, tensorrt
from engines.build import BuildReport, BuildRequest, build
from engines.layers import LayerReport
from flux2_trt.bundle import Bundle
from flux2_trt.doctor import Gpu
from flux2_trt.errors import BundleError, Flux2Error, UsageError
from flux2_trt.models import TINY_ASSETS
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.store import Store

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.filterwarnings("ignore:Use .* instead:DeprecationWarning")  # of calls that do nothing there

REQUEST = BuildRequest("tiny", "h100", "fp8", components=("conditioning", "text_encoder"))
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, "590.12", "9.0")


class AheadOfTimeBuilder(trt.Builder):
    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        return config


@pytest.fixture
def with_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    standing_in = SimpleNamespace(**{name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")})
    standing_in.__version__, standing_in.Builder = "11.4.0", AheadOfTimeBuilder
    monkeypatch.setitem(sys.modules, "tensorrt", standing_in)
    monkeypatch.setattr(prepared, "find_gpus", lambda: ((H100,), "NVML"))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuildReport]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)
        patch.setattr(prepared, "find_gpus", lambda: ((), "no NVIDIA driver"))
        yield build(replace(REQUEST, output=tmp_path_factory.mktemp("laptop")), lambda message: None)


def test_without_the_gpu_graphs_and_weights_are_made_and_the_rest_is_said(halves: BuildReport) -> None:
    assert halves.left is not None and "\n" not in halves.left
    for words in (
        "compiling 2 plans",
        "a GPU of target h100 (compute capability 9.0; here: no NVIDIA driver)",
        "pip install 'flux2-trt[tensorrt]'",
        f"flux2-trt build {halves.bundle}",
    ):
        assert words in halves.left
    bundle = Bundle.open(halves.bundle)
    bundle.verify()
    assert not bundle.manifest.is_compiled and not bundle.manifest.makes_pictures
    files = {record.file for record in bundle.manifest.files}
    assert {"plans/conditioning.onnx", "weights/text_encoder.fp8.safetensors", "assets/tokenizer.json"} <= files
    (line,) = Store(bundle.path.parents[1]).list()
    assert line.ok and not line.compiled


def test_on_request_it_stops_at_graphs_which_are_compiled_later_without_a_gpu(tmp_path: Path) -> None:
    parts = ("text_encoder", "conditioning")
    asked = BuildRequest("tiny", "rtx4090", "bf16", components=parts, prepare=True, output=tmp_path)
    report = build(asked, lambda message: None)
    assert report.left == f"graphs and weights are done; the plans: flux2-trt build {report.bundle}"
    assert not Bundle.open(report.bundle).manifest.is_compiled
    built = Bundle.open(build(BuildRequest(report.bundle, output=tmp_path), lambda message: None).bundle)
    assert {record.compiler for record in built.manifest.components} == {"tensorrt_rtx"}
    with pytest.raises(UsageError, match="nothing to prepare for cpu"):
        build(replace(asked, target="cpu", precision="fp32"), lambda message: None)


def test_weights_lie_as_hopper_reads_them(halves: BuildReport) -> None:
    """[N, K], as in the checkpoint."""
    stored = load_file(Bundle.open(halves.bundle).weights_path("text_encoder"))
    given = load_file(TINY_ASSETS / "text_encoder.safetensors")
    name = "layers.0.mlp.gate_proj.weight"
    assert stored[name].shape == given[name].shape and stored[name].shape[0] != stored[name].shape[1]


def test_a_prepared_bundle_draws_nothing_and_says_why(halves: BuildReport) -> None:
    with pytest.raises(BundleError, match=r"is not compiled yet; on .* GPU of target h100: flux2-trt build /"):
        Flux2Pipeline.from_bundle(halves.bundle).engine("conditioning")


def test_the_folder_is_finished_where_the_gpu_is(halves: BuildReport, tmp_path: Path, with_h100: None) -> None:
    folder = shutil.copytree(halves.bundle, tmp_path / "copied" / Path(halves.bundle).name)
    request = BuildRequest(str(folder), output=tmp_path / "server")
    report = build(request, lambda message: None)
    assert report.left is None and not report.reused and report.target == "h100"
    bundle = Bundle.open(report.bundle)
    bundle.verify()
    text_encoder = bundle.component("text_encoder")
    assert text_encoder.compiler == "tensorrt" and text_encoder.compiler_version == "11.4.0"
    assert text_encoder.layers["profiles"][0]["gemms"] == {"FP8": 7 * bundle.manifest.model.text_encoder.num_layers}
    assert text_encoder.weights == Bundle.open(halves.bundle).component("text_encoder").weights
    assert bundle.asset_path("tokenizer.json").read_bytes() == (TINY_ASSETS / "tokenizer.json").read_bytes()
    assert [path.name for path in (tmp_path / "server" / "timing").glob("*.cache")] == ["tensorrt-11.4.0-h100.cache"]
    again = build(request, lambda message: None)
    assert again.reused and again.bundle == report.bundle


def test_with_the_gpu_one_command_does_both_and_shares_the_weights(tmp_path: Path, with_h100: None) -> None:
    report = build(replace(REQUEST, components=("conditioning",), output=tmp_path), lambda message: None)
    assert report.left is None
    names = [line.compiled for line in Store(tmp_path).list()]
    assert sorted(names) == [False, True]
    weights = Bundle.open(report.bundle).weights_path("conditioning")
    assert weights and weights.stat().st_nlink == 2


def test_embedded_weights_come_from_the_prepared_file(tmp_path: Path, with_h100: None) -> None:
    request = BuildRequest("tiny", "h100", "bf16", "embedded", ("conditioning",), output=tmp_path)
    bundle = Bundle.open(build(request, lambda message: None).bundle)
    (record,) = bundle.manifest.components
    assert record.weights is None and record.plan.bytes > 10**6
    files = sorted(path.name for path in bundle.path.rglob("*") if path.is_file())
    assert files == ["bundle.json", "conditioning.plan"]


def test_a_compiler_that_lists_no_kernels_is_told_of(
    tmp_path: Path, with_h100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log was never seen: hours of compiling are not thrown away for what may be another way of writing."""
    monkeypatch.setattr(tensorrt, "report_from_log", lambda messages: LayerReport((), 0))
    messages: list[str] = []
    report = build(replace(REQUEST, components=("conditioning",), output=tmp_path), messages.append)
    assert "conditioning: tensorrt listed no kernels, so their formats are not checked" in messages
    assert Bundle.open(report.bundle).component("conditioning").layers["profiles"] == []


def test_what_cannot_be_finished_here_is_an_error(halves: BuildReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "find_gpus", lambda: ((replace(H100, name="NVIDIA H200"),), "NVML"))
    with pytest.raises(Flux2Error, match=r"h100 \(compute capability 9\.0; here: NVIDIA H200 \(9\.0\)\)"):
        build(BuildRequest(halves.bundle), lambda message: None)
    with pytest.raises(UsageError, match=r"was prepared for h100 in fp8; leave all options but --output out"):
        build(BuildRequest(halves.bundle, precision="bf16"), lambda message: None)


def test_a_compiled_bundle_is_not_compiled_again(tmp_path: Path) -> None:
    report = build(BuildRequest("tiny", "cpu", components=("conditioning",), output=tmp_path), lambda message: None)
    with pytest.raises(UsageError, match="is compiled already"):
        build(BuildRequest(report.bundle), lambda message: None)
