"""What this GPU and its bus reach: copies, and matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

GIGA, TERA = 1e9, 1e12
SIDE = 8192
COPIED = 2**30


def rates() -> dict[str, float]:
    """Gigabytes a second of copies of 1 GiB, one way; TFLOP/s of square products of random numbers."""
    device = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device="cuda")
    other, host = torch.empty_like(device), torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    found = {
        "host_to_device_gb_per_s": COPIED / _seconds(lambda: other.copy_(host, non_blocking=True)) / GIGA,
        "device_to_host_gb_per_s": COPIED / _seconds(lambda: host.copy_(device, non_blocking=True)) / GIGA,
        "device_to_device_gb_per_s": 2 * COPIED / _seconds(lambda: other.copy_(device)) / GIGA,
    }
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * SIDE**3
    found["bf16_tflops"] = operations / _seconds(lambda: torch.mm(a, b)) / TERA
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones(1, device="cuda")
        x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        for fast in (True, False):

            def multiply(fast: bool = fast) -> Any:
                return torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

            found[f"fp8_tflops{'' if fast else '_promoted'}"] = operations / _seconds(multiply) / TERA
    return {name: round(value, 1) for name, value in found.items()}


def device_seconds(work: Callable[[], Any]) -> float:
    """What the device takes for `work`, which is done when this returns."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 1e3


def _seconds(work: Callable[[], Any]) -> float:
    return statistics.median([device_seconds(work) for _ in range(12)][2:])
