"""System: one way of making pictures, under test. Data of what goes in and out, and the systems that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.case import Case
from flux2_trt.errors import Flux2Error, UsageError

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]
Track = Literal["exact", "approximate"]
"""Exact: the model's own arithmetic in the reference's number format, so that only rounding differs. Approximate:
quantized, or with steps or computations left out. The two are never ranked against each other."""

PLANS = "plans"
CONTROL = "control"


@dataclass(frozen=True)
class Job:
    """What a system draws: the same for all. `embeds` [B, T, D] and `noise` [B, C, h, w] fp32, `references` uint8
    [H, W, 3] each, shared by all pictures; `unconditional` [1, T, D] where guidance mixes in the empty prompt.

    `prompt`: the text, for systems that read it themselves where `reads_prompt`.
    """

    case: Case
    embeds: Floats
    noise: Floats
    references: tuple[Pictures, ...] = ()
    unconditional: Floats | None = None
    prompt: str = ""
    seed: int = 0
    reads_prompt: bool = False


@dataclass(frozen=True)
class Drawn:
    """`pictures` uint8 [B, H, W, 3]; seconds of stages by name; with a watched call seconds of each step, of the host
    gap in it, and the latents after every step, fp32 [C, h, w] each."""

    pictures: Pictures
    stages: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    latents: tuple[Floats, ...] = ()


class System(Protocol):
    def draw(self, job: Job, watched: bool) -> Drawn:
        """The pictures of a job. A `watched` call is told from the timed ones: it may be slower."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What identifies it: packages, hashes, threads. JSON values."""
        ...


@dataclass(frozen=True)
class Setup:
    """What a system loads. `bundle`: ours, in the system's precision; `model`: where the weights are from."""

    name: str
    model: str
    checkpoint: str | None
    bundle: str | None


@dataclass(frozen=True)
class Kind:
    """`needs`: the package that it runs by; `install`: what to type for it. `same_latents`: it takes the noise that it
    is given, so that its pictures can be compared."""

    title: str
    track: Track
    needs: str | None
    install: str
    load: Callable[[Setup], System]
    same_latents: bool = True


def _plans(setup: Setup) -> System:
    from benchmarks.harness.ours import PipelineSystem

    return PipelineSystem.load(setup, "plans")


def _torch(setup: Setup) -> System:
    from benchmarks.harness.ours import PipelineSystem

    return PipelineSystem.load(setup, "torch-compile" if setup.name == "torch-compile" else "torch")


def _diffusers(setup: Setup) -> System:
    from benchmarks.harness.theirs import DiffusersSystem

    return DiffusersSystem.load(setup, compiled=setup.name == "diffusers-compile", wide=setup.name == "diffusers-fp32")


def _sglang(setup: Setup) -> System:
    from benchmarks.harness.sglang import SglangSystem

    return SglangSystem.load(setup)


BENCHMARK_EXTRA, TORCH = "pip install 'flux2-trt[benchmark]'", "pip install torch"
KINDS: Mapping[str, Kind] = {
    "torch": Kind("our modules by torch", "exact", "torch", TORCH, _torch),
    "torch-compile": Kind("our modules by torch.compile", "exact", "torch", TORCH, _torch),
    "diffusers": Kind("diffusers eager", "exact", "diffusers", BENCHMARK_EXTRA, _diffusers),
    "diffusers-compile": Kind("diffusers torch.compile", "exact", "diffusers", BENCHMARK_EXTRA, _diffusers),
    "diffusers-fp32": Kind("diffusers eager in fp32", "exact", "diffusers", BENCHMARK_EXTRA, _diffusers),
    "sglang": Kind(
        "SGLang diffusion", "exact", "sglang", "pip install 'sglang[diffusion]'", _sglang, same_latents=False
    ),
}
"""All but our plans, of which there is one for each precision: `plans:fp32`, `plans:fp8`, ..."""


def kind_of(name: str) -> Kind:
    """Of a system's name. Raises UsageError for one that is not known."""
    base = name.removesuffix(f"+{CONTROL}")
    if base in KINDS:
        return KINDS[base]
    prefix, _, precision = base.partition(":")
    if prefix == PLANS and precision:
        track: Track = "exact" if precision in ("fp32", "bf16") else "approximate"
        return Kind(f"flux2-trt {precision}", track, "onnxruntime", "pip install onnxruntime", _plans)
    raise UsageError(f"unknown system {name!r}; known are plans:PRECISION, {', '.join(KINDS)}")


def title_of(name: str) -> str:
    kind = kind_of(name)
    return f"{kind.title}, again (control)" if name.endswith(f"+{CONTROL}") else kind.title


def why_missing(name: str) -> str | None:
    """Why a system cannot run here; None where its package is installed."""
    kind = kind_of(name)
    if kind.needs is None or find_spec(kind.needs) is not None:
        return None
    return f"the package {kind.needs} is not installed: {kind.install}"


def load(setup: Setup) -> System:
    """Raises Flux2Error for what cannot be loaded."""
    name = setup.name.removesuffix(f"+{CONTROL}")
    if reason := why_missing(name):
        raise Flux2Error(f"{name}: {reason}")
    return kind_of(name).load(Setup(name, setup.model, setup.checkpoint, setup.bundle))
