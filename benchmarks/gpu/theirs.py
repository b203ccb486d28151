"""A step of diffusers' transformer on the same GPU: eager, and with its repeated blocks compiled."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines import diffusers_transformer
from benchmarks.gpu.loops import Case, trajectory
from benchmarks.gpu.rates import device_seconds
from flux2_trt.spec import ModelSpec

WARM, TIMED = 3, 5
WAYS = ("eager", "compiled", "compiled-cudnn")
"""As it comes; its repeated blocks compiled for each size; the same with cuDNN's attention."""


@dataclass(frozen=True)
class StepTimes:
    """`step_ms`: the median of a forward pass on the device, one after the other; random weights in bf16."""

    case: Case
    way: str
    step_ms: float
    first_seconds: float
    peak_bytes: int


def measure(spec: ModelSpec, cases: list[Case], ways: tuple[str, ...] = WAYS) -> Iterator[StepTimes]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), torch.no_grad():
            model = diffusers_transformer(spec.transformer).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    for way in ways:
        if way != "eager":
            model.set_attention_backend("_native_cudnn" if way == "compiled-cudnn" else "native")
            torch._dynamo.reset()
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        for case in cases if way != "compiled-cudnn" else cases[:1]:
            yield _measure(spec, model, case, way)
    del model
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def _measure(spec: ModelSpec, model: Any, case: Case, way: str) -> StepTimes:
    made = trajectory(spec, case, 2)
    places = torch.from_numpy(case.positions(spec)).cuda().float()
    length = made.prompt_embeds.shape[1]
    asked = {
        "hidden_states": torch.from_numpy(made.tokens).cuda().bfloat16(),
        "encoder_hidden_states": torch.from_numpy(made.prompt_embeds).cuda().bfloat16(),
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "txt_ids": places[None, :length],
        "img_ids": places[None, length:],
        "guidance": None if made.guidance is None else torch.tensor([4.0], device="cuda", dtype=torch.bfloat16),
        "return_dict": False,
    }
    torch.cuda.reset_peak_memory_stats()
    seconds = [device_seconds(lambda: model(**asked)) for _ in range(WARM + TIMED)]
    return StepTimes(case, way, statistics.median(seconds[WARM:]) * 1e3, seconds[0], torch.cuda.max_memory_reserved())
