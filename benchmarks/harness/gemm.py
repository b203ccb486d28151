"""Gemm: how fast matrices are multiplied here, measured on the spot; what the loop's speed is held against."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.harness.record import from_json
from benchmarks.harness.threads import pin, thread_environment
from engines.hardware import TERA, Rates
from flux2_trt.drawing import Drawing
from flux2_trt.errors import Flux2Error
from flux2_trt.spec import ModelSpec

Shape = tuple[int, int, int]
SECONDS = 0.5  # for each product
SQUARE = 2048


@dataclass(frozen=True)
class GemmRate:
    """The best of several libraries and shapes. `shape`: M, K, N of [M, K] x [K, N]."""

    flops_per_second: float
    library: str
    number_format: str
    shape: Shape

    @property
    def rates(self) -> Rates:
        """As the roofline takes them, where it is of a format that the roofline knows."""
        known = {"bf16": Rates(self.flops_per_second), "fp8": Rates(None, self.flops_per_second)}
        return known.get(self.number_format, Rates(None))

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.flops_per_second / TERA:.3f} TFLOP/s in {self.number_format} ({self.library}, {size})"


def shapes_of(spec: ModelSpec, drawing: Drawing) -> tuple[Shape, ...]:
    """A linear of the model's blocks as a step runs it, and a large square, where libraries are fastest."""
    width, mlp = spec.transformer.hidden_size, spec.transformer.mlp_hidden_size
    return (drawing.sequences * drawing.all_tokens, width, 3 * width + 2 * mlp), (SQUARE, SQUARE, SQUARE)


def measure_gemm(shapes: Sequence[Shape], threads: int) -> GemmRate:
    """In a process of its own, with as many cores as systems get."""
    request = json.dumps({"shapes": shapes, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.harness.gemm", request]
    done = subprocess.run(command, env=thread_environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise Flux2Error(f"measuring the rate of matrix products failed: {done.stderr.strip().splitlines()[-1:]}")
    return from_json(GemmRate, json.loads(done.stdout.splitlines()[-1]))


def best_rate(shapes: Sequence[Shape]) -> GemmRate:
    """On a GPU that torch has, products in bf16; else in fp32 on the CPU, by numpy, and torch where there is one."""
    torch = importlib.import_module("torch") if find_spec("torch") else None
    found = []
    for shape in shapes:
        if torch is not None and torch.cuda.is_available():
            found.append(_rate(_on_cuda(torch, shape), shape, f"torch {torch.__version__}", "bf16"))
            continue
        found.append(_rate(_by_numpy(shape), shape, f"numpy {np.__version__}", "fp32"))
        if torch is not None:
            found.append(_rate(_by_torch(torch, shape), shape, f"torch {torch.__version__}", "fp32"))
    return max(found, key=lambda rate: rate.flops_per_second)


def _rate(multiply: Callable[[], Any], shape: Shape, library: str, number_format: str) -> GemmRate:
    """The median of repeated products: a burst is not what a loop gets."""
    multiply()
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < 5 or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    rows, inner, columns = shape
    return GemmRate(2.0 * rows * inner * columns / statistics.median(seconds), library, number_format, shape)


def _by_numpy(shape: Shape) -> Callable[[], Any]:
    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rows, inner), np.float32), rng.standard_normal((inner, columns), np.float32)
    out = np.empty((rows, columns), np.float32)
    return lambda: np.matmul(a, b, out=out)


def _by_torch(torch: Any, shape: Shape) -> Callable[[], Any]:
    rows, inner, columns = shape
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return lambda: torch.mm(a, b, out=out)


def _on_cuda(torch: Any, shape: Shape) -> Callable[[], Any]:
    rows, inner, columns = shape
    a, b = (torch.randn(*each, device="cuda", dtype=torch.bfloat16) for each in ((rows, inner), (inner, columns)))

    def multiply() -> None:
        torch.mm(a, b)
        torch.cuda.synchronize()

    return multiply


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    pin(asked["threads"])
    print(json.dumps(asdict(best_rate([tuple(shape) for shape in asked["shapes"]]))))
