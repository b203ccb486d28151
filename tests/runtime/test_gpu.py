"""Whole pictures through the GPU runtime on the stand-in device, beside the same model on the CPU."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers_models import relative_error
from runtime.conftest import load_on
from runtime.standin import StandIn

from flux2_trt.bundle import Bundle
from flux2_trt.errors import BundleError, DeviceError, Interrupted
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.gpu import GpuRuntime, Residency
from flux2_trt.runtime.weights import MappedFile, WeightStore

PROMPT = "a large red circle on a blue background"
FP32 = 1e-4  # the same kernels with weights as inputs, which ONNX Runtime lays out otherwise; through eight steps


def pipeline_on(device: StandIn, bundle: Bundle, **options: Any) -> Flux2Pipeline:
    return Flux2Pipeline(bundle, runtime=GpuRuntime(bundle, device, load_plan=load_on(device), **options))


@pytest.mark.parametrize(
    ("plans", "residency"),
    [
        ("whole", Residency()),
        ("whole", Residency(swapped=frozenset({"text_encoder", "transformer"}))),
        ("blocks", Residency()),
        ("blocks", Residency(streamed=(1, 3))),
        ("blocks", Residency(streamed=(2, 5))),
        ("blocks", Residency(frozenset({"text_encoder", "transformer"}), streamed=(0, 1))),
    ],
)
@pytest.mark.parametrize("graphs", [True, False])
def test_pictures_are_those_of_the_cpu(
    built: dict[str, Bundle], plans: str, residency: Residency, graphs: bool
) -> None:
    device = StandIn()
    ours = pipeline_on(device, built[plans], residency=residency, graphs=graphs)
    theirs = Flux2Pipeline(built["cpu"])
    drawn = theirs(PROMPT, seed=3, num_inference_steps=3).images[0]
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 3, "num_inference_steps": 3},
        {"prompt": "make the circle green", "image": drawn, "seed": 4, "num_inference_steps": 2},
        {"prompt": [PROMPT, "a green star"], "seed": 5, "width": 128, "height": 144, "num_inference_steps": 1},
        {"prompt": PROMPT, "seed": 3, "num_inference_steps": 3},
    ]
    for call in calls:
        found = ours(**call, output_type="latent").images
        assert relative_error(found, theirs(**call, output_type="latent").images) < FP32
    [picture] = ours(**calls[0]).images
    assert np.abs(np.asarray(picture, int) - np.asarray(drawn, int)).max() <= 1
    ours.close()
    assert device.live == {}


# But for `synchronize`: a device that cannot be waited for is lost, and so is what lies on it.
CALLS = ("allocate", "allocate_pinned", "stream", "event", "copy", "record", "wait", "wait_on_host")
CALLS += ("begin_capture", "end_capture", "launch", "execution", "bind", "enqueue")


@pytest.mark.parametrize("call", CALLS)
def test_a_failure_at_any_call_leaves_nothing_behind(built: dict[str, Bundle], call: str) -> None:
    """Then the same runtime, or another one on the same device, draws as if nothing had been."""
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "output_type": "latent"}
    residency = Residency(streamed=(1, 2))
    counting = StandIn()
    pipeline = pipeline_on(counting, built["blocks"], residency=residency)
    expected = pipeline(**asked).images
    pipeline.close()
    total = counting.trace.count(call)
    assert total
    failed = 0
    for nth in sorted({1, 2, total // 2, total} - {0}):
        device = StandIn(fail=(call, nth))
        try:
            pipeline = pipeline_on(device, built["blocks"], residency=residency)
        except DeviceError:
            assert device.live == {}
            failed += 1
            continue
        try:
            found = pipeline(**asked).images
        except DeviceError:
            failed += 1
            found = pipeline(**asked).images
        assert relative_error(found, expected) < FP32
        with suppress(DeviceError):  # the last of a call can be one of closing
            pipeline.close()
        assert device.live == {}
    assert failed or call in ("begin_capture", "end_capture")  # refused captures are no failures


def test_a_refused_capture_is_said_once_and_changes_nothing(
    built: dict[str, Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "output_type": "latent"}
    expected = pipeline_on(StandIn(), built["whole"])(**asked).images
    device = StandIn(refuses_capture=True)
    pipeline = pipeline_on(device, built["whole"])
    found = pipeline(**asked).images
    np.testing.assert_array_equal(found, expected)
    assert "a CUDA graph was refused" in caplog.text
    assert "launch" not in device.trace
    pipeline.close()
    assert device.live == {}


def test_a_loop_is_launches_and_nothing_else(built: dict[str, Bundle]) -> None:
    device = StandIn()
    pipeline = pipeline_on(device, built["whole"])
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 6, "output_type": "latent"}
    pipeline(**asked)
    device.trace.clear()
    pipeline(**asked)
    launches = [index for index, call in enumerate(device.trace) if call == "launch"][-6:]
    between = device.trace[launches[0] : launches[-1] + 1]
    assert {call for call in between if call != "transformer"} == {"launch", "record", "wait_on_host"}
    waits = [index for index, call in enumerate(between) if call == "wait_on_host"]
    # one step is always in the stream while the host waits for the one before it
    assert all(between[:wait].count("launch") == number + 2 for number, wait in enumerate(waits))
    assert not {"allocate", "synchronize"} & set(between)
    pipeline.close()


def test_latents_that_are_not_finite_are_told_with_their_step(built: dict[str, Bundle]) -> None:
    pipeline = pipeline_on(StandIn(), built["whole"])

    def spoil(pipeline: Flux2Pipeline, step: int, timestep: float, tensors: Any) -> Any:
        return {"latents": np.full_like(tensors["latents"], np.nan)} if step == 1 else None

    with pytest.raises(DeviceError, match="does not compute reliably"):  # the second time nothing spoils them
        pipeline(PROMPT, seed=3, num_inference_steps=4, callback_on_step_end=spoil)
    huge = np.full((1, 32, 16, 16), 3e38, np.float32)
    with pytest.raises(DeviceError, match=r"not finite after step \d of 2"):
        pipeline(PROMPT, latents=huge, num_inference_steps=2)
    pipeline.close()


def test_an_interrupt_ends_the_loop_and_the_next_picture_is_whole(built: dict[str, Bundle]) -> None:
    device = StandIn()
    pipeline = pipeline_on(device, built["blocks"], residency=Residency(streamed=(1, 2)))
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "output_type": "latent"}
    expected = pipeline(**asked).images

    def stop(pipeline: Flux2Pipeline, step: int, *_: Any) -> None:
        if step == 1:
            pipeline.interrupt()

    with pytest.raises(Interrupted, match="stopped after 2 of 4 steps"):
        pipeline(**asked, callback_on_step_end=stop)
    np.testing.assert_array_equal(pipeline(**asked).images, expected)
    pipeline.close()
    assert device.live == {}


def test_two_pipelines_share_the_weights_of_a_device(built: dict[str, Bundle]) -> None:
    device = StandIn()
    store = WeightStore(device)
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 1, "output_type": "latent"}
    first, second = (pipeline_on(device, built["whole"], store=store) for _ in range(2))
    expected, alone = first(**asked).images, device.used
    np.testing.assert_array_equal(second(**asked).images, expected)
    weights = sum(record.weights.bytes for record in built["whole"].manifest.components if record.weights)
    assert device.used - alone < weights / 10
    first.close()
    np.testing.assert_array_equal(second(**asked).images, expected)
    second.close()
    assert device.live == {}


def test_a_weight_file_that_changes_while_it_is_read_is_refused(built: dict[str, Bundle], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    source = built["whole"].weights_path("conditioning")
    assert source
    shutil.copy(source, path)
    mapped, device = MappedFile(path), StandIn()
    os.utime(path, ns=(1, 1))
    with pytest.raises(BundleError, match="was changed while it was read"):
        WeightStore(device).get("digest", mapped).acquire()
    assert device.live == {}
