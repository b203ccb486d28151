"""Published: speeds that others state for FLUX.2, each with its source. None of them was measured by this project.

Only figures that name device, size, steps and precision, and that the roofline allows.
"""

from __future__ import annotations

from dataclasses import dataclass

_SGLANG = "https://github.com/sgl-project/sglang"
_PERF = f"{_SGLANG}/tree/03dbd7a/python/sglang/multimodal_gen/test/server/perf_baselines"
_MODEL_CONNECT = "https://github.com/NVIDIA/TensorRT-Model-Connect"


@dataclass(frozen=True)
class Published:
    """`step_seconds`, `seconds`: of a step and of a picture; None where the source does not say."""

    model: str
    target: str
    system: str
    precision: str
    width: int
    height: int
    steps: int
    step_seconds: float | None
    seconds: float | None
    source: str
    references: int = 0


PUBLISHED = (
    Published("dev", "h100", "SGLang", "bf16", 1024, 1024, 50, 0.44586, 23.14, f"{_PERF}/h100.json"),
    Published("dev", "gb300", "torch eager", "bf16", 1024, 1024, 28, 0.264, None, _MODEL_CONNECT),
    Published("dev", "gb300", "torch.compile", "bf16", 1024, 1024, 28, 0.185, 5.2, _MODEL_CONNECT),
    Published("dev", "gb300", "TensorRT (NVIDIA)", "bf16", 1024, 1024, 28, 0.185, None, _MODEL_CONNECT),
    Published("dev", "gb300", "TensorRT (NVIDIA)", "fp8", 1024, 1024, 28, 0.117, 3.3, _MODEL_CONNECT),
    Published("dev", "gb300", "TensorRT (NVIDIA), C++", "fp8", 1024, 1024, 28, 0.133, 3.7, _MODEL_CONNECT),
    Published("klein-4b", "h100", "SGLang", "bf16", 1024, 1024, 4, 0.05923, 0.3996, f"{_PERF}/h100.json"),
    Published("klein-4b", "h200", "SGLang", "bf16", 1024, 1024, 4, 0.05758, 0.375, f"{_SGLANG}/pull/36470"),
    Published("klein-base-4b", "h100", "SGLang", "bf16", 1024, 1024, 50, 0.1173, None, f"{_PERF}/h100.json"),
    Published("klein-base-4b", "rtx5090", "SGLang", "bf16", 1024, 1024, 50, 0.34595, 18.26, f"{_PERF}/5090.json"),
)
