"""Which GPU a bundle runs on, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers_models import relative_error
from runtime.conftest import load_on
from runtime.standin import StandIn

from engines.calibration import SYNTHETIC_INPUT_SCALE
from export.graph import Graph, ScaleSlot, WeightSlot
from export.quantize import FP8_DTYPE, FP8_MAX
from flux2_trt.bundle import Bundle
from flux2_trt.errors import BundleError, DeviceError, DeviceMemoryError, UsageError
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.gpu import Residency
from flux2_trt.runtime.placement import residency_on, runtime_on_this_machine
from flux2_trt.runtime.synthetic import WIDEST, SyntheticWeights

FP32 = 1e-4  # the same kernels on one graph and on its parts


@pytest.fixture
def for_4090(built: dict[str, Bundle]) -> Bundle:
    bundle = built["whole"]
    manifest = replace(bundle.manifest, target="rtx4090", recipe="bf16")
    return replace(bundle, manifest=manifest)


def machine(*devices: StandIn) -> Callable[[int], Any]:
    def open_device(index: int) -> StandIn:
        if index >= len(devices):
            raise DeviceError(f"there is no GPU {index}")
        return devices[index]

    return open_device


def test_the_first_gpu_of_the_targets_capability_is_taken(for_4090: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    place_at_will(monkeypatch, for_4090)
    old, fitting = StandIn(compute_capability="8.6"), StandIn(compute_capability="8.9")
    runtime = runtime_on_this_machine(for_4090, open_device=machine(old, fitting))
    assert runtime.device is fitting
    runtime.close()
    assert old.live == fitting.live == {}


def test_the_wrong_gpu_and_none_are_named(for_4090: Bundle) -> None:
    with pytest.raises(DeviceError, match=r"is for rtx4090, of compute capability 8\.9; here is a stand-in \(9\.0\)"):
        runtime_on_this_machine(for_4090, open_device=machine(StandIn(compute_capability="9.0")))
    with pytest.raises(DeviceError, match="there is no GPU 0"):
        runtime_on_this_machine(for_4090, open_device=machine())


def test_too_little_memory_is_said_before_any_is_taken(for_4090: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    place_at_will(monkeypatch, for_4090)
    with pytest.raises(DeviceMemoryError) as refused:
        residency_on(for_4090, 10**6)
    needed = refused.value.needed_bytes
    assert residency_on(for_4090, needed)
    device = StandIn(memory=needed - 1)
    with pytest.raises(DeviceMemoryError, match="needs at least"):
        runtime_on_this_machine(for_4090, open_device=machine(device))
    assert "allocate" not in device.trace and device.live == {}


def place_at_will(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    """The file says another target than the bundle in memory: what is in memory counts."""
    monkeypatch.setattr("engines.setting.read_manifest", lambda _: bundle.manifest)


def test_synthetic_weights_are_made_up_from_the_seed(built: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in one graph and in blocks, resident and streamed."""
    found: list[np.ndarray] = []
    for name, streamed in (("synthetic", (0, 0)), ("synthetic blocks", (0, 0)), ("synthetic blocks", (1, 3))):
        device = StandIn()
        place(monkeypatch, device, Residency(streamed=streamed))
        runtime = runtime_on_this_machine(built[name], open_device=machine(device))
        pipeline = Flux2Pipeline(built[name], runtime=runtime)
        found.append(pipeline("a cube", seed=3, num_inference_steps=2, output_type="latent").images)
        assert bool(runtime.streamed_bytes) == (streamed != (0, 0))
        assert pipeline("a cube", seed=3, num_inference_steps=1).images[0].size == (256, 256)
        pipeline.close()
        assert device.live == {}
    assert max(relative_error(latents, found[0]) for latents in found) < FP32


def test_a_plan_without_its_graph_says_where_synthetic_weights_are_made_up(
    built: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, device = built["synthetic"].manifest, StandIn()
    compiled = tuple(replace(each, compiler="tensorrt", compiler_version="1") for each in manifest.components)
    bundle = replace(built["synthetic"], manifest=replace(manifest, components=compiled))
    place(monkeypatch, device, Residency())
    runtime = runtime_on_this_machine(bundle, open_device=machine(device))
    with pytest.raises(BundleError, match=r"made up from a seed.*--backend torch"):
        Flux2Pipeline(bundle, runtime=runtime)("a cube")
    runtime.close()


def place(monkeypatch: pytest.MonkeyPatch, device: StandIn, residency: Residency) -> None:
    """As if the planner said so, and TensorRT loaded graphs."""
    monkeypatch.setattr("flux2_trt.runtime.placement.residency_on", lambda *_: (residency, True))
    monkeypatch.setattr("flux2_trt.runtime.gpu._tensorrt_plan", lambda _, *plan: load_on(device)(*plan))


@pytest.mark.parametrize("dtype", ["float", "bfloat16", FP8_DTYPE])
def test_synthetic_weights_keep_activations_at_their_size(dtype: str) -> None:
    slots = {
        "wide": WeightSlot((1024, 4096), dtype, transposed=False),
        "turned": WeightSlot((256, 512), dtype, transposed=True),
        "norm": WeightSlot((64,), "float", transposed=False),
        "linear.bias": WeightSlot((64,), "float", transposed=False),
    }
    scale = ScaleSlot("dequantize", ("wide",))
    graph = Graph("transformer", onnx.ModelProto(), slots, scales={"wide.scale": scale})
    first, again, other = (SyntheticWeights([graph], None, seed) for seed in (1, 1, 2))

    def values(name: str) -> np.ndarray:
        kinds = {"float": torch.float32, "bfloat16": torch.bfloat16, FP8_DTYPE: torch.float8_e4m3fn}
        stored = torch.from_numpy(first.read(name).copy()).view(kinds[slots[name].dtype])
        return stored.float().numpy().reshape(slots[name].shape)

    def factor(inputs: int) -> float:
        return inputs**-0.5 * WIDEST / FP8_MAX if dtype == FP8_DTYPE else 1.0

    for name, inputs in (("wide", 4096), ("turned", 256)):
        assert values(name).std() * factor(inputs) == pytest.approx(inputs**-0.5, rel=0.02)  # 131,072 draws
    assert (values("norm") == 1).all() and not values("linear.bias").any()
    if dtype == FP8_DTYPE:
        [dequantize] = first.read("wide.scale").view(np.float32)
        assert dequantize == pytest.approx(SYNTHETIC_INPUT_SCALE * factor(4096))
    for name in slots:
        assert (first.read(name) == again.read(name)).all()
    assert (first.read("wide") != other.read("wide")).any()
    with pytest.raises(UsageError, match="no weights in uint4"):
        SyntheticWeights([replace(graph, weights={"x": WeightSlot((4, 4), "uint4", False)}, scales={})], None, 0)


def test_without_a_driver_the_error_says_so(for_4090: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        CudaDevice()
    except DeviceError as error:
        assert "NVIDIA driver" in str(error) or "bindings" in str(error)
    else:
        pytest.skip("there is a GPU")
    compiled = replace(
        for_4090.manifest,
        components=tuple(replace(each, compiler="tensorrt_rtx") for each in for_4090.manifest.components),
    )
    pipeline = Flux2Pipeline(replace(for_4090, manifest=compiled))
    with pytest.raises(DeviceError):
        pipeline("a red circle")
