"""Placement: where a bundle's weights go on the GPU of this machine, decided before any memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from flux2_trt.bundle import Bundle
from flux2_trt.errors import DeviceError, DeviceMemoryError
from flux2_trt.manifest import SYNTHETIC
from flux2_trt.runtime.cuda import CudaDevice
from flux2_trt.runtime.device import Device
from flux2_trt.runtime.engine import PLANS, Backend
from flux2_trt.runtime.gpu import BESIDE, GpuRuntime, LoadPlan, MakeWeights, Residency


def runtime_on_this_machine(
    bundle: Bundle,
    backend: Backend = PLANS,
    open_device: Callable[[int], Device] = CudaDevice,
    kernels: Path | None = None,
) -> GpuRuntime:
    """On the first GPU that the bundle's plans are for, with its memory divided as `flux2-trt plan` says.

    `kernels`: the folder where those are kept that a compiler makes on this machine.

    Raises DeviceError where there is none, DeviceMemoryError where the model does not fit the memory that is free.
    """
    device, index = _device_of(bundle, open_device)
    residency, overlaps = residency_on(bundle, device.free_bytes())
    load_plan: LoadPlan | None = None
    if backend != PLANS:
        from flux2_trt.runtime.torch_plan import TorchPlans

        load_plan = TorchPlans(index, compiled=backend == "torch-compile")
    weights: MakeWeights | None = None
    if SYNTHETIC in bundle.manifest.source and not bundle.manifest.is_compiled:
        from flux2_trt.runtime.synthetic import synthetic_weights

        weights = partial(synthetic_weights, bundle)
    return GpuRuntime(
        bundle, device, residency=residency, overlaps=overlaps, load_plan=load_plan, weights=weights, kernels=kernels
    )


def residency_on(bundle: Bundle, free_bytes: int) -> tuple[Residency, bool]:
    """For pictures of the model's default size, and whether a lane beside the loop's fits, with scratch of its own.

    Raises DeviceMemoryError with what is needed and what to type.
    """
    from engines.advice import preflight
    from engines.drawing import Drawing
    from engines.setting import resolve_setting

    setting = replace(resolve_setting(str(bundle.path)), memory_bytes=free_bytes, context_bytes=0)
    made = preflight(setting, Drawing.of(bundle.manifest.model))
    placements = made.residency.placements
    streamed = placements["transformer"].streamed
    swapped = frozenset(name for name, placement in placements.items() if placement.kind == "swapped")
    left = free_bytes - made.device_bytes
    beside = [name for name in BESIDE if name in placements]
    return (
        Residency(swapped, (streamed.doubles, streamed.singles) if streamed else (0, 0)),
        left >= max(setting.scratch(name, made.drawing) for name in beside),
    )


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
