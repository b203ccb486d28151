"""The runtime on a real GPU: memory, streams and graphs by CUDA, the work of a plan by torch."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import relative_error

from flux2_trt.bundle import Bundle
from flux2_trt.errors import DeviceError, DeviceMemoryError, Interrupted
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.device import Address, Scope, host_bytes
from flux2_trt.runtime.gpu import GpuRuntime, Residency
from flux2_trt.runtime.torch_plan import TorchPlans
from flux2_trt.runtime.weights import WeightStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch without CUDA"),
]

PROMPT = "a large red circle on a blue background"
FP32 = 2e-4  # sums in other orders, through all steps
SIZE = 2**24


class CountingDevice(CudaDevice):
    """Knows what of its memory was not freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()

    def allocate(self, size: int) -> Address:
        address = super().allocate(size)
        self.live.add(address)
        return address

    def free(self, address: Address) -> None:
        super().free(address)
        self.live.remove(address)

    def allocate_pinned(self, size: int) -> Address:
        address = super().allocate_pinned(size)
        self.live.add(address)
        return address

    def free_pinned(self, address: Address) -> None:
        super().free_pinned(address)
        self.live.remove(address)


@pytest.fixture(scope="module")
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch multiplies fp32 in convolutions with fewer bits by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.empty_cache()


def pipeline_on(device: CudaDevice, bundle: Bundle, compiled: bool = False, **options: Any) -> Flux2Pipeline:
    runtime = GpuRuntime(bundle, device, load_plan=TorchPlans(compiled=compiled), **options)
    return Flux2Pipeline(bundle, runtime=runtime)


def test_copies_in_a_graph_bring_the_bytes_there_and_back(device: CudaDevice) -> None:
    with Scope(device) as scope:
        there, back, on_device = scope.pinned(SIZE), scope.pinned(SIZE), scope.buffer(SIZE)
        stream = scope.stream()
        device.begin_capture(stream)
        device.copy(on_device, there, SIZE, stream)
        device.copy(back, on_device, SIZE, stream)
        graph = device.end_capture(stream)
        scope.callback(device.destroy_graph, graph)
        for seed in range(2):
            host_bytes(there, SIZE)[:] = np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)
            device.launch(graph, stream)
            device.synchronize(stream)
            np.testing.assert_array_equal(host_bytes(there, SIZE), host_bytes(back, SIZE))


def test_memory_that_is_not_there_is_told_and_nothing_is_lost(device: CudaDevice) -> None:
    free = device.free_bytes()
    with pytest.raises(DeviceMemoryError) as refused:
        device.allocate(free + 2**30)
    assert refused.value.needed_bytes == free + 2**30
    assert abs(device.free_bytes() - free) < 2**28  # but for what others take or free meanwhile
    with Scope(device) as scope:
        scope.buffer(SIZE)  # the error does not stay


def test_a_refused_capture_ends_and_the_stream_goes_on(device: CudaDevice) -> None:
    with Scope(device) as scope:
        stream = scope.stream()
        device.begin_capture(stream)
        with pytest.raises(DeviceError, match="capturing"):
            device.synchronize(stream)
        device.abandon_capture(stream)
        device.synchronize(stream)


def in_a_fork(device: CudaDevice, said: Any) -> None:
    try:
        device.free_bytes()
        said.put("nothing")
    except DeviceError as error:
        said.put(str(error))


def test_a_fork_is_told_that_it_cannot_use_the_gpu(device: CudaDevice) -> None:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    child = context.Process(target=in_a_fork, args=(device, said))
    child.start()
    assert "is a fork" in said.get(timeout=30)
    child.join()


@pytest.mark.parametrize(
    ("plans", "residency", "graphs", "compiled"),
    [
        ("whole", Residency(), True, False),
        ("whole", Residency(), False, False),
        ("whole", Residency(swapped=frozenset({"text_encoder", "transformer"})), True, False),
        ("blocks", Residency(), True, True),
        ("blocks", Residency(streamed=(1, 3)), True, False),
        ("blocks", Residency(streamed=(2, 5)), True, False),
        ("blocks", Residency(streamed=(2, 5)), False, False),
    ],
)
def test_pictures_are_those_of_the_cpu(
    built: dict[str, Bundle], device: CountingDevice, plans: str, residency: Residency, graphs: bool, compiled: bool
) -> None:
    before = torch.cuda.memory_allocated()
    ours = pipeline_on(device, built[plans], compiled, residency=residency, graphs=graphs)
    theirs = Flux2Pipeline(built["cpu"])
    drawn = theirs(PROMPT, seed=3).images[0]
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 3},
        {"prompt": "make the circle green", "image": drawn, "seed": 4},
        {"prompt": [PROMPT, "a green star"], "seed": 5, "width": 128, "height": 144},
        {"prompt": PROMPT, "seed": 3, "num_images_per_prompt": 3, "batch_size": 3},
        {"prompt": PROMPT, "seed": 3},
    ]
    for call in calls:
        found = ours(**call, output_type="latent").images
        assert relative_error(found, theirs(**call, output_type="latent").images) < FP32
    pictures = ours(calls[2]["prompt"], seed=5, num_images_per_prompt=2).images
    for one, other in zip(pictures, theirs(calls[2]["prompt"], seed=5, num_images_per_prompt=2).images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2
    ours.close()
    del ours
    gc.collect()
    assert device.live == set()
    assert torch.cuda.memory_allocated() == before


def test_a_loop_that_is_stopped_leaves_the_next_picture_whole(built: dict[str, Bundle], device: CudaDevice) -> None:
    pipeline = pipeline_on(device, built["blocks"], residency=Residency(streamed=(1, 2)))
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "output_type": "latent"}
    expected = pipeline(**asked).images

    def stop(pipeline: Flux2Pipeline, step: int, *_: Any) -> None:
        if step == 1:
            pipeline.interrupt()

    with pytest.raises(Interrupted, match="stopped after 2 of 8 steps"):
        pipeline(**asked, callback_on_step_end=stop)
    np.testing.assert_array_equal(pipeline(**asked).images, expected)
    huge = np.full((1, 32, 16, 16), 3e38, np.float32)
    with pytest.raises(DeviceError, match=r"not finite after step \d of 2"):
        pipeline(PROMPT, latents=huge, num_inference_steps=2)
    np.testing.assert_array_equal(pipeline(**asked).images, expected)
    pipeline.close()


def test_two_pipelines_share_the_weights_of_a_device(built: dict[str, Bundle], device: CudaDevice) -> None:
    store = WeightStore(device)
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "output_type": "latent"}
    first, second = (pipeline_on(device, built["whole"], store=store) for _ in range(2))
    expected = first(**asked).images
    np.testing.assert_array_equal(second(**asked).images, expected)
    first.close()
    np.testing.assert_array_equal(second(**asked).images, expected)
    second.close()
