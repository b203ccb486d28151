"""Which GPU a bundle runs on, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from runtime.standin import StandIn

from flux2_trt.bundle import Bundle
from flux2_trt.errors import DeviceError, DeviceMemoryError
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.placement import residency_on, runtime_on_this_machine


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
