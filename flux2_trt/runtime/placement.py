"""Placement: where a bundle's weights go on the GPU of this machine, decided before any memory is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_trt.bundle import Bundle
from flux2_trt.drawing import MAX_STEPS, Drawing
from flux2_trt.errors import DeviceError, DeviceMemoryError
from flux2_trt.manifest import SYNTHETIC
from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.denoiser import Denoiser
from flux2_trt.runtime.device import Device
from flux2_trt.runtime.engine import PLANS, Backend, Engine
from flux2_trt.runtime.gpu import BESIDE, GpuRuntime, MakeWeights, Residency
from flux2_trt.runtime.plan import Sizes
from flux2_trt.spec import Component

if TYPE_CHECKING:
    from engines.forecast import Forecast
    from engines.setting import Setting
    from flux2_trt.runtime.torch_plan import TorchPlans

DRAWINGS_KEPT = 256
"""Whose scratch is remembered."""
RESERVED_BYTES = 2**29
"""Of free memory, for what no plan asks for: kernels, graphs, and what allocators round up. An assumption."""


@dataclass(frozen=True)
class Division:
    """What `flux2-trt plan` says of a drawing. `left_bytes`: that are free then; `beside_bytes`: of scratch that a lane
    beside the loop's wants for its own, 0 where there is none."""

    forecast: Forecast
    left_bytes: int
    beside_bytes: int

    @property
    def overlaps(self) -> bool:
        return self.beside_bytes > 0

    @property
    def components(self) -> Collection[Component]:
        """That the pictures need."""
        return self.forecast.residency.placements.keys()

    @property
    def needed_bytes(self) -> int:
        return self.forecast.device_bytes + self.beside_bytes

    @property
    def residency(self) -> Residency:
        streamed = self.forecast.residency.streamed
        return Residency(self.forecast.residency.moved, (streamed.doubles, streamed.singles) if streamed else (0, 0))


class PlacedRuntime:
    """The `Runtime` of a bundle on a GPU, whose memory is divided anew where other pictures need it.

    Until pictures are asked for, what is used is loaded whole: a text encoder alone, where prompts are to be encoded.
    """

    computes_on_host = False

    def __init__(self, runtime: GpuRuntime, measures: bool, held_by_plans: Callable[[], int] = lambda: 0) -> None:
        """`measures`: its plans say how much scratch they want. `held_by_plans`: bytes that they take by themselves."""
        self._runtime, self._measures, self._held_by_plans = runtime, measures, held_by_plans
        self._division: Division | None = None
        self._asked: tuple[Drawing, bool] | None = None
        self._scratch_of = lru_cache(DRAWINGS_KEPT)(self._measured)

    @property
    def device(self) -> Device:
        return self._runtime.device

    @property
    def overlaps(self) -> bool:
        return self._runtime.overlaps

    @property
    def streamed_bytes(self) -> int:
        """That come from the host in every step, once a picture was made."""
        return self._runtime.streamed_bytes

    def arrange(self, drawing: Drawing, encodes: bool = True) -> None:
        """Weights stay as they are while that is as good; buffers of other sizes stay while there is room.

        Raises DeviceMemoryError with what is needed and what to type, and UsageError for sizes that the plans were not
        built for: nothing has changed then.
        """
        device, runtime, before = self.device, self._runtime, self._division
        device.use_in_this_thread()
        free = device.free_bytes() + device.held_bytes + self._held_by_plans() - RESERVED_BYTES
        if before and self._asked == (drawing, encodes) and before.needed_bytes <= free:
            return
        division = divide(self._setting(drawing, encodes, free), drawing, before)
        if before is None or (division.residency, division.overlaps) != (before.residency, before.overlaps):
            self._division = None
            runtime.place(division.residency, division.overlaps)
        unused = runtime.weights_of(set(runtime.bundle.manifest.model.components) - set(division.components))
        kept = sum(weights.layout.bytes for weights in unused if weights.loaded)
        if division.left_bytes - division.beside_bytes < runtime.bytes_of_sizes + kept:
            runtime.forget_sizes()
            for weights in unused:
                weights.unload()
        self._division, self._asked = division, (drawing, encodes)

    def engine(self, component: Component) -> Engine:
        return self._runtime.engine(component)

    def denoiser(self) -> Denoiser:
        return self._runtime.denoiser()

    def close(self) -> None:
        self._runtime.close()

    def _setting(self, drawing: Drawing, encodes: bool, free_bytes: int) -> Setting:
        from engines.setting import resolve_setting

        bundle, place = self._runtime.bundle, "local" if encodes else "remote"
        setting = replace(resolve_setting(str(bundle.path), text_encoder=place), memory_bytes=max(free_bytes, 0))
        asked = setting.components(drawing) if self._measures else ()
        measured = {name: self._scratch_of(name, drawing) for name in asked}
        return replace(setting, context_bytes=0, measured=measured)

    def _measured(self, component: Component, drawing: Drawing) -> int:
        return self._runtime.scratch_of(component, sizes_of(component, drawing))


def sizes_of(component: Component, drawing: Drawing) -> Sizes:
    """The dynamic sides of a component's plans; of references the largest, as a square."""
    text, unit = drawing.text_tokens, drawing.pixels_per_token
    match component:
        case "text_encoder":
            return {"batch": 1, "text_tokens": text}
        case "conditioning" | "transformer":
            tokens = {"tokens": drawing.latent_tokens, "text_tokens": text, "all_tokens": drawing.all_tokens}
            return {"batch": drawing.sequences, "steps": MAX_STEPS, **tokens}
    width, height = drawing.width, drawing.height
    if component == "vae_encoder":
        width = height = math.ceil(math.sqrt(max(drawing.references)) / unit) * unit
    latents = {"latent_height": height // unit, "latent_width": width // unit}
    return {"batch": 1, "height": height, "width": width, **latents}


def divide(setting: Setting, drawing: Drawing, before: Division | None = None) -> Division:
    """As it was `before` where that is as good.

    Raises DeviceMemoryError with what is needed and what to type.
    """
    from engines.advice import preflight
    from engines.forecast import kept

    made = preflight(setting, drawing)
    if before:
        made = kept(made, before.forecast.residency) or made
    left = setting.memory_bytes - made.device_bytes
    beside = max(setting.scratch(name, drawing) for name in BESIDE if name in made.residency.placements)
    return Division(made, left, 0 if made.residency.moved or left < beside else beside)


def runtime_on_this_machine(
    bundle: Bundle,
    backend: Backend = PLANS,
    open_device: Callable[[int], Device] | None = None,
    kernels: Path | None = None,
) -> PlacedRuntime:
    """On the first GPU that the bundle's plans are for.

    `open_device`: in place of CUDA's. `kernels`: the folder where those are kept that a compiler makes on this machine.
    Raises DeviceError where there is no such GPU.
    """
    device, index = _device_of(bundle, open_device or CudaDevice)
    load_plan: TorchPlans | None = None
    if backend != PLANS:
        from flux2_trt.runtime.torch_plan import TorchPlans

        load_plan = TorchPlans(index, compiled=backend == "torch-compile")
    weights: MakeWeights | None = None
    if SYNTHETIC in bundle.manifest.source and not bundle.manifest.is_compiled:
        from flux2_trt.runtime.synthetic import synthetic_weights

        weights = partial(synthetic_weights, bundle)
    runtime = GpuRuntime(bundle, device, overlaps=False, load_plan=load_plan, weights=weights, kernels=kernels)
    return PlacedRuntime(runtime, load_plan is None, load_plan.held_bytes if load_plan else lambda: 0)


def _device_of(bundle: Bundle, open_device: Callable[[int], Device]) -> tuple[Device, int]:
    from engines.targets import TARGETS

    target = TARGETS[bundle.manifest.target]
    others: list[str] = []
    index = 0
    while True:
        try:
            device = open_device(index)
        except DeviceMemoryError:
            raise
        except DeviceError:
            if not others:
                raise
            break
        if device.compute_capability == target.compute_capability:
            return device, index
        others.append(f"{device.name} ({device.compute_capability})")
        index += 1
    raise DeviceError(
        f"{bundle.path} is for {target.name}, of compute capability {target.compute_capability}; here is "
        f"{', '.join(others)}: build it for that: flux2-trt build {bundle.manifest.model.name} --target auto"
    )
