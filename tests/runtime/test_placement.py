"""Which GPU a bundle runs on, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers_models import relative_error
from runtime.conftest import RESERVED, load_on
from runtime.standin import StandIn

from engines.calibration import SYNTHETIC_INPUT_SCALE
from export.graph import Graph, ScaleSlot, WeightSlot
from export.quantize import FP8_DTYPE, FP8_MAX
from flux2_trt.bundle import Bundle
from flux2_trt.errors import BundleError, DeviceError, DeviceMemoryError, UsageError
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.gpu import GpuRuntime, Residency
from flux2_trt.runtime.placement import PlacedRuntime, runtime_on_this_machine
from flux2_trt.runtime.synthetic import WIDEST, SyntheticWeights, synthetic_weights

FP32 = 1e-4  # the same kernels on one graph and on its parts
pytestmark = pytest.mark.usefixtures("known")


PROMPT = "a large red circle on a blue background"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlacedRuntime]:
    """A bundle on the first fitting device, as if TensorRT loaded graphs."""

    def put(bundle: Bundle, *devices: StandIn) -> PlacedRuntime:
        monkeypatch.setattr("flux2_trt.runtime.gpu._tensorrt_plan", lambda _, *plan: load_on(devices[-1])(*plan))
        return runtime_on_this_machine(bundle, open_device=machine(*devices))

    return put


def machine(*devices: StandIn) -> Callable[[int], Any]:
    def open_device(index: int) -> StandIn:
        if index >= len(devices):
            raise DeviceError(f"there is no GPU {index}")
        devices[index].use_in_this_thread()
        return devices[index]

    return open_device


def test_the_first_gpu_of_the_targets_capability_is_taken(built: dict[str, Bundle], place: Any) -> None:
    old, fitting = StandIn(compute_capability="8.6"), StandIn(compute_capability="8.9")
    runtime = place(built["whole"], old, fitting)
    assert runtime.device is fitting
    runtime.close()
    assert old.live == fitting.live == {}


def test_the_wrong_gpu_and_none_are_named(built: dict[str, Bundle]) -> None:
    with pytest.raises(DeviceError, match=r"is for stand-in, of compute capability 8\.9; here is a stand-in \(9\.0\)"):
        runtime_on_this_machine(built["whole"], open_device=machine(StandIn(compute_capability="9.0")))
    with pytest.raises(DeviceError, match="there is no GPU 0"):
        runtime_on_this_machine(built["whole"], open_device=machine())


SMALL: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "width": 128, "height": 128, "num_inference_steps": 2}
CALLS: list[dict[str, Any]] = [
    SMALL,
    {"prompt": [PROMPT, "a green star"], "seed": 5, "width": 256, "height": 192, "num_inference_steps": 1},
    {"prompt": "make it green", "image": True, "seed": 4, "num_inference_steps": 1},
    {**SMALL, "num_images_per_prompt": 3, "batch_size": 3},
    SMALL,
]


@pytest.fixture(scope="module")
def theirs(built: dict[str, Bundle]) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Calls, and the latents that the CPU gives."""
    pipeline, found = Flux2Pipeline(built["cpu"]), []
    [drawn] = pipeline(**CALLS[0]).images
    for call in CALLS:
        asked = {**call, "image": drawn} if "image" in call else call
        found.append((asked, pipeline(**asked, output_type="latent").images))
    return found


def least(pipeline: Flux2Pipeline, calls: Iterable[dict[str, Any]]) -> int:
    """Bytes that are enough for each of the calls, by what a device without memory is told."""
    needed = 0
    for call in calls:
        with pytest.raises(DeviceMemoryError) as refused:
            pipeline(**call)
        needed = max(needed, refused.value.needed_bytes)
    return needed + RESERVED


@pytest.mark.parametrize("plans", ["whole", "blocks"])
def test_a_device_of_any_size_draws_what_the_planner_says_that_it_can(
    built: dict[str, Bundle], place: Any, theirs: list[tuple[dict[str, Any], np.ndarray]], plans: str
) -> None:
    """From the least memory to enough for everything: what is planned is kept to, and a byte less is refused before
    anything is allocated."""
    empty = StandIn(memory=RESERVED)
    pipeline = Flux2Pipeline(built[plans], runtime=place(built[plans], empty))
    needed = least(pipeline, [call for call, _ in theirs])
    assert "allocate" not in empty.trace
    pipeline.close()

    seen: set[tuple[frozenset[str], bool, bool]] = set()
    weights = sum({each.weights.bytes for each in built[plans].manifest.components if each.weights})
    for part in (0.0, 0.3, 0.6, 1.0, 1.6):
        device = StandIn(memory=int(needed + part * weights))
        runtime = place(built[plans], device)
        pipeline = Flux2Pipeline(built[plans], runtime=runtime)
        for call, latents in theirs:
            found = pipeline(**call, output_type="latent").images
            assert relative_error(found, latents) < FP32
            pipeline(**{**call, "num_inference_steps": 1})
            residency = runtime._division.residency
            seen.add((residency.swapped, residency.streamed != (0, 0), runtime.overlaps))
        assert device.peak <= device.memory - RESERVED // 2
        pipeline.close()
        assert device.live == {}
    assert (frozenset(), False, True) in seen
    everything = frozenset(built[plans].manifest.model.components)
    assert any(swapped >= everything - {"vae_encoder"} for swapped, *_ in seen)
    assert any(streams for _, streams, _ in seen) == (plans == "blocks")

    tight = StandIn(memory=needed - 1)
    pipeline = Flux2Pipeline(built[plans], runtime=place(built[plans], tight))
    with pytest.raises(DeviceMemoryError, match="needs at least"):
        for call, _ in theirs:
            pipeline(**call)
    pipeline.close()
    assert tight.live == {}


def test_a_text_encoder_needs_no_room_for_the_rest(built: dict[str, Bundle], place: Any) -> None:
    """A bundle with only that is enough to encode prompts, on a card that is too small for pictures."""
    device = StandIn(memory=2**23)
    pipeline = Flux2Pipeline(built["whole"], runtime=place(built["whole"], device))
    embeds, _ = pipeline.encode_prompt([PROMPT])
    assert relative_error(embeds, Flux2Pipeline(built["cpu"]).encode_prompt([PROMPT])[0]) < FP32
    with pytest.raises(DeviceMemoryError):
        pipeline(**SMALL)
    pipeline.close()
    assert device.live == {}


def test_weights_are_loaded_again_only_where_other_pictures_need_their_room(
    built: dict[str, Bundle], place: Any, theirs: list[tuple[dict[str, Any], np.ndarray]]
) -> None:
    small, large = theirs[0], theirs[1]
    roomy = place(built["blocks"], StandIn())
    pipeline = Flux2Pipeline(built["blocks"], runtime=roomy)
    pipeline(**small[0])
    pipeline.close()
    device = StandIn(memory=roomy._division.forecast.device_bytes + RESERVED)  # all stays for the small one
    runtime = place(built["blocks"], device)
    pipeline = Flux2Pipeline(built["blocks"], runtime=runtime)
    moved: list[Residency] = []
    for call, latents in (small, small, large, large, small):
        device.trace.clear()
        assert relative_error(pipeline(**call, output_type="latent").images, latents) < FP32
        moved.append(runtime._division.residency)
        if len(moved) in (2, 4):
            assert "allocate" not in device.trace
    assert moved[0] == moved[1] == moved[4] == Residency()
    assert moved[2] == moved[3] != Residency()
    pipeline.close()
    assert device.live == {}


def test_memory_that_another_process_takes_is_told_and_the_next_picture_goes_around_it(
    built: dict[str, Bundle], place: Any, theirs: list[tuple[dict[str, Any], np.ndarray]]
) -> None:
    call, latents = theirs[0]
    empty = StandIn(memory=RESERVED)
    pipeline = Flux2Pipeline(built["blocks"], runtime=place(built["blocks"], empty))
    needed = least(pipeline, [call])
    pipeline.close()
    device = StandIn(memory=2**30)
    runtime = place(built["blocks"], device)
    pipeline = Flux2Pipeline(built["blocks"], runtime=runtime)
    arrange = runtime.arrange

    def arrange_and_lose(*asked: Any, **more: Any) -> None:
        arrange(*asked, **more)
        device.memory = needed

    runtime.arrange = arrange_and_lose
    with pytest.raises(DeviceMemoryError):
        pipeline(**call)
    runtime.arrange = arrange
    assert relative_error(pipeline(**call, output_type="latent").images, latents) < FP32
    assert runtime._division.residency != Residency()
    pipeline.close()
    assert device.live == {}


def test_synthetic_weights_are_made_up_from_the_seed(built: dict[str, Bundle]) -> None:
    """The same in one graph and in blocks, resident and streamed."""
    found: list[np.ndarray] = []
    for name, streamed in (("synthetic", (0, 0)), ("synthetic blocks", (0, 0)), ("synthetic blocks", (1, 3))):
        device = StandIn()
        runtime = GpuRuntime(
            built[name], device, residency=Residency(streamed=streamed), load_plan=load_on(device),
            weights=partial(synthetic_weights, built[name]),
        )  # fmt: skip
        pipeline = Flux2Pipeline(built[name], runtime=runtime)
        found.append(pipeline("a cube", seed=3, num_inference_steps=2, output_type="latent").images)
        assert bool(runtime.streamed_bytes) == (streamed != (0, 0))
        assert pipeline("a cube", seed=3, num_inference_steps=1).images[0].size == (256, 256)
        pipeline.close()
        assert device.live == {}
    assert max(relative_error(latents, found[0]) for latents in found) < FP32


def test_a_plan_without_its_graph_says_where_synthetic_weights_are_made_up(
    built: dict[str, Bundle], place: Any
) -> None:
    manifest = built["synthetic"].manifest
    compiled = tuple(replace(each, compiler="tensorrt", compiler_version="1") for each in manifest.components)
    bundle = replace(built["synthetic"], manifest=replace(manifest, components=compiled))
    pipeline = Flux2Pipeline(bundle, runtime=place(bundle, StandIn()))
    with pytest.raises(BundleError, match=r"made up from a seed.*--backend torch"):
        pipeline("a cube")
    pipeline.close()


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


def test_without_a_driver_the_error_says_so(built: dict[str, Bundle]) -> None:
    try:
        CudaDevice()
    except DeviceError as error:
        assert "NVIDIA driver" in str(error) or "bindings" in str(error)
    else:
        pytest.skip("there is a GPU")
    manifest = built["whole"].manifest
    compiled = tuple(replace(each, compiler="tensorrt_rtx") for each in manifest.components)
    pipeline = Flux2Pipeline(replace(built["whole"], manifest=replace(manifest, components=compiled)))
    with pytest.raises(DeviceError):
        pipeline("a red circle")
