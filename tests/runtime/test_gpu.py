"""Whole pictures through the GPU runtime on the stand-in device, beside the same model on the CPU."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers_models import relative_error
from PIL import Image
from runtime.conftest import load_on
from runtime.standin import StandIn

from flux2_trt import writing
from flux2_trt.bundle import Bundle
from flux2_trt.console import Console
from flux2_trt.errors import BundleError, DeviceError, Interrupted
from flux2_trt.finishing import PictureSettings
from flux2_trt.options import RunOptions
from flux2_trt.pipeline import Flux2Pipeline, OutputType
from flux2_trt.runner import Runner
from flux2_trt.runtime.blocks import StreamedBlocks
from flux2_trt.runtime.denoiser import Trajectory
from flux2_trt.runtime.gpu import GpuRuntime, Residency
from flux2_trt.runtime.loop import DeviceLoop
from flux2_trt.runtime.weights import MappedFile, WeightStore
from flux2_trt.safety import ContentChecks

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


@pytest.mark.parametrize("interrupted", [False, True], ids=["failure", "Ctrl-C"])
@pytest.mark.parametrize("call", CALLS)
def test_a_failure_at_any_call_leaves_nothing_behind(built: dict[str, Bundle], call: str, interrupted: bool) -> None:
    """Then the same runtime, or another one on the same device, draws as if nothing had been."""
    stops = KeyboardInterrupt if interrupted else DeviceError
    asked: dict[str, Any] = {
        "prompt": PROMPT, "seed": 3, "width": 128, "height": 128, "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip
    residency = Residency(streamed=(1, 2))
    counting = StandIn()
    pipeline = pipeline_on(counting, built["blocks"], residency=residency)
    expected = pipeline(**asked).images
    pipeline.close()
    total = counting.trace.count(call)
    assert total
    failed = 0
    for nth in sorted({1, 2, total // 2, total} - {0}):
        device = StandIn(fail=(call, nth), interrupted=interrupted)
        try:
            pipeline = pipeline_on(device, built["blocks"], residency=residency)
        except stops:
            assert device.live == {}
            failed += 1
            continue
        try:
            found = pipeline(**asked).images
        except stops:
            failed += 1
            found = pipeline(**asked).images
        assert relative_error(found, expected) < FP32
        with suppress(stops):  # the last of a call can be one of closing
            pipeline.close()
        assert device.live == {}
    assert failed or (call in ("begin_capture", "end_capture") and not interrupted)  # refused captures are no failures


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


@pytest.mark.parametrize("streamed", [(1, 3), (2, 5)])
def test_blocks_come_through_the_bus_while_others_are_computed(
    built: dict[str, Bundle], streamed: tuple[int, int]
) -> None:
    """By the order of a captured step: a copy waits for the block that used its slot, and for none after that, and who
    waits for the copy comes later; the first blocks of the next step are copied before this one ends."""
    device = StandIn()
    pipeline = pipeline_on(device, built["blocks"], residency=Residency(streamed=streamed))
    pipeline(PROMPT, seed=3, width=128, height=128, num_inference_steps=2)
    recorded = max(device._graphs.values(), key=len)
    pipeline.close()
    compute, blocks, copies = recorded[0].stream, 0, []
    behind: dict[int, int] = {}  # events of the compute stream: blocks before them
    brought: dict[int, int] = {}  # events of the copy stream: copies before them
    waits, needed, computed = 0, 0, []
    for step in recorded:
        if step.kind == "record":
            behind[step.event], brought[step.event] = (blocks, 0) if step.stream == compute else (0, len(copies))
        elif step.kind == "wait" and step.stream != compute:
            waits = max(waits, behind[step.event])
        elif step.kind == "wait":
            needed = max(needed, brought[step.event])
        elif step.stream != compute:
            copies.append(waits)
        elif step.work and step.work.what.endswith("_block"):
            blocks += 1
            computed.append(needed)
    assert blocks == 7 and len(copies) == sum(streamed)
    slots = 2
    for number, after in enumerate(copies[:-slots]):
        user = next(place for place, there in enumerate(computed, 1) if there > number)
        assert after < user - 1, "nothing is computed while it is copied"
    assert copies[-1] <= blocks and needed == len(copies)


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


@pytest.fixture(params=["cpu", "one lane", "overlapping"])
def drawing(request: pytest.FixtureRequest, built: dict[str, Bundle]) -> Iterator[Flux2Pipeline]:
    if request.param == "cpu":
        pipeline = Flux2Pipeline(built["cpu"])
    else:
        pipeline = pipeline_on(StandIn(), built["whole"], overlaps=request.param == "overlapping")
    yield pipeline
    pipeline.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("finish")]


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_every_picture_is_handed_on_once_and_in_order(drawing: Flux2Pipeline, output_type: OutputType) -> None:
    handed: list[tuple[PictureSettings, Any, str | None]] = []
    threads: set[int] = set()

    def keep(settings: PictureSettings, picture: Any, refused: str | None) -> None:
        handed.append((settings, picture.copy(), refused))
        threads.add(threading.get_ident())
        if output_type != "pil":
            picture[:] = 0  # it is the caller's

    output = drawing(
        [PROMPT, "a green star"], seed=3, num_inference_steps=2, num_images_per_prompt=2, output_type=output_type,
        width=128, height=144, callback_on_picture=keep,
    )  # fmt: skip
    assert [settings for settings, *_ in handed] == [
        PictureSettings(index, 3 + index, 128, 144, 2, output.guidance_scale) for index in range(4)
    ]
    for (_, picture, refused), expected in zip(handed, output.images, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
        assert refused is None
    assert (threads == {threading.get_ident()}) != drawing.runtime.overlaps


def test_a_refused_picture_is_handed_on_black_with_the_reason(drawing: Flux2Pipeline) -> None:
    looked: list[Any] = []

    def look(picture: Any) -> str | None:
        looked.append(picture)
        return "no second one" if len(looked) == 2 else None

    drawing.content_checks = ContentChecks(picture=look)
    handed: list[tuple[Any, str | None]] = []
    output = drawing(
        PROMPT, seed=3, num_inference_steps=1, num_images_per_prompt=3, output_type="np",
        callback_on_picture=lambda settings, picture, refused: handed.append((picture, refused)),
    )  # fmt: skip
    assert tuple(refused for _, refused in handed) == output.refused == (None, "no second one", None)
    assert [picture.any() for picture, _ in handed] == [True, False, True]


def test_what_takes_pictures_can_end_the_call(drawing: Flux2Pipeline) -> None:
    """By raising, or by an interrupt: then no step too many is made, and no other picture comes."""
    steps: list[int] = []
    failed = threading.Event()

    def on_step_end(pipeline: Flux2Pipeline, step: int, *_: Any) -> None:
        steps.append(step)
        if len(steps) == 5:  # the first of the second picture
            assert failed.wait(60)

    def fail(settings: PictureSettings, *_: Any) -> None:
        handed.append(settings.index)
        failed.set()
        raise ZeroDivisionError("no room")

    def interrupt(settings: PictureSettings, *_: Any) -> None:
        handed.append(settings.index)
        drawing.interrupt()
        failed.set()

    for take, error in ((fail, ZeroDivisionError), (interrupt, Interrupted)):
        handed: list[int] = []
        with pytest.raises(error):
            drawing(
                PROMPT, seed=3, num_inference_steps=4, num_images_per_prompt=3,
                callback_on_step_end=on_step_end, callback_on_picture=take,
            )  # fmt: skip
        assert handed == [0] and 4 <= len(steps) < 12
        steps.clear()
        failed.clear()
    assert len(drawing(PROMPT, seed=3, num_inference_steps=1, num_images_per_prompt=2).images) == 2


def test_an_interrupt_after_the_last_step_is_no_picture_less_than_was_handed_on(drawing: Flux2Pipeline) -> None:
    """Whoever takes pictures one by one gets all of them, or is told."""
    handed: list[int] = []
    with pytest.raises(Interrupted, match="before picture 1 of 1 was handed on"):
        drawing(
            PROMPT, seed=3, num_inference_steps=2,
            callback_on_step_end=lambda pipeline, step, *_: pipeline.interrupt() if step == 1 else None,
            callback_on_picture=lambda settings, *_: handed.append(settings.index),
        )  # fmt: skip
    assert not handed


def test_a_prompt_is_encoded_while_the_picture_before_it_is_denoised(
    drawing: Flux2Pipeline, built: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the runtime overlaps; else all are encoded first. A prompt that fails ends the call."""
    engine, steps, begun = drawing.engine("text_encoder"), [0], []
    run, encoded, failing = engine.run, [threading.Event() for _ in range(3)], threading.Event()

    def encode(inputs: Any) -> Any:
        begun.append(steps[0])
        if failing.is_set() and len(begun) == 2:
            raise ZeroDivisionError("no text")
        found = run(inputs)
        encoded[len(begun) - 1].set()
        return found

    def on_step_end(pipeline: Flux2Pipeline, step: int, *_: Any) -> None:
        steps[0] += 1
        prompts, rest = divmod(steps[0], 4)
        if rest == 0 and prompts < 3 and not failing.is_set():
            assert encoded[prompts].wait(60), "the next prompt was not encoded before the picture was done"

    monkeypatch.setattr(engine, "run", encode)
    asked: dict[str, Any] = {
        "prompt": [PROMPT, "a green star", "a blue square"], "seed": 3, "num_inference_steps": 2,
        "num_images_per_prompt": 2, "width": 128, "height": 128,
    }  # fmt: skip
    pictures = drawing(**asked, callback_on_step_end=on_step_end).images
    first, second, third = begun
    assert first == 0 and steps == [12]
    assert second <= 4 and third <= 8 and (third >= 4) == drawing.runtime.overlaps

    expected = Flux2Pipeline(built["cpu"])(**asked).images
    for picture, other in zip(pictures, expected, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1
    failing.set()
    begun.clear()
    with pytest.raises(ZeroDivisionError):
        drawing(**asked, callback_on_step_end=on_step_end)
    monkeypatch.undo()
    assert len(drawing(**asked).images) == 6


def test_a_picture_is_written_while_the_last_one_is_denoised(
    built: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, written, loops = StandIn(), threading.Event(), [0]
    pipeline = pipeline_on(device, built["whole"])
    monkeypatch.setattr(Flux2Pipeline, "from_bundle", lambda path, backend: pipeline)
    run, write = DeviceLoop.run, writing.write_file

    def run_and_wait(loop: DeviceLoop, trajectory: Trajectory, on_step: Any, stage: Any) -> Any:
        loops[0] += 1
        tokens = run(loop, trajectory, on_step, stage)
        assert loops[0] < 3 or written.wait(60), "nothing was written before the last picture was denoised"
        return tokens

    def write_and_say(path: Path, data: bytes, overwrite: bool) -> None:
        assert threading.current_thread() is not threading.main_thread()
        write(path, data, overwrite)
        written.set()

    monkeypatch.setattr(DeviceLoop, "run", run_and_wait)
    monkeypatch.setattr(writing, "write_file", write_and_say)
    told: list[Path] = []
    options = RunOptions(prompt=PROMPT, bundle=built["whole"].path, num_images=3, steps=2, seed=3, output=tmp_path)
    report = Runner(Console(quiet=True)).run(options, told.append)
    assert [str(path) for path in told] == report.images and report.seeds == [3, 4, 5]
    expected = pipeline(PROMPT, seed=3, num_inference_steps=2, num_images_per_prompt=3).images
    for path, image in zip(told, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))
    pipeline.close()
    assert device.live == {}


def test_two_pipelines_share_the_weights_of_a_device(built: dict[str, Bundle]) -> None:
    device = StandIn()
    store = WeightStore(device)
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 1, "output_type": "latent"}
    first, second = (pipeline_on(device, built["whole"], store=store) for _ in range(2))
    expected, alone = first(**asked).images, device.held_bytes
    np.testing.assert_array_equal(second(**asked).images, expected)
    weights = sum(record.weights.bytes for record in built["whole"].manifest.components if record.weights)
    assert device.held_bytes - alone < weights / 2  # its buffers and scratch
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
    with pytest.raises(BundleError, match="was changed while it was read"):
        StreamedBlocks(device, mapped, {("single", 0): tuple(mapped.sizes)}, [("single", 0)])
    assert device.live == {}
