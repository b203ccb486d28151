"""Engine: a compiled component that can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from flux2_trt.spec import Component

if TYPE_CHECKING:
    from flux2_trt.drawing import Drawing
    from flux2_trt.runtime.denoiser import Denoiser

CPU = "cpu"
"""The target of plans that ONNX Runtime runs; all others are for GPUs."""

Backend = Literal["plans", "torch", "torch-compile"]
"""What runs a bundle: its plans, or the modules that they are traced from, by torch, eager or compiled."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PLANS: Backend = "plans"

Arrays = dict[str, NDArray[Any]]


class Runtime(Protocol):
    """The components of a bundle, ready to run.

    `overlaps`: prompts can be encoded and pictures decoded, in another thread, while a picture is denoised.
    `computes_on_host`: what the host does beside takes time from it.
    """

    @property
    def overlaps(self) -> bool: ...

    @property
    def computes_on_host(self) -> bool: ...

    def arrange(self, drawing: Drawing, encodes: bool) -> None:
        """Before pictures are made; `encodes`: from prompts. Raises DeviceMemoryError where they do not fit."""
        ...

    def engine(self, component: Component) -> Engine: ...

    def denoiser(self) -> Denoiser: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """One component's plan with its weights, loaded and ready. Names and shapes are in the bundle's manifest."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Inputs by name to outputs by name; the outputs are the caller's to keep."""
        ...
