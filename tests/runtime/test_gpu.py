"""Whole pictures through the GPU runtime on the stand-in device, beside the same model on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers_models import relative_error
from runtime.conftest import load_on
from runtime.standin import StandIn

from flux2_trt.bundle import Bundle
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.runtime.gpu import GpuRuntime, Residency

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
