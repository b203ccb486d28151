"""Prepared bundles: graphs and weights that wait for a compiler, and most for the device that it compiles on.

A prepared bundle is published like any other, with graphs where plans will be. The folder may be copied; where the
device is, `flux2-trt build FOLDER` compiles it into a bundle of its own that shares the weight files.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import replace

from engines.components import Compiler, Piece
from engines.targets import Device, Target
from engines.tensorrt import load_compiler
from export.graph import Graph
from flux2_trt.bundle import Bundle
from flux2_trt.doctor import find_gpus
from flux2_trt.errors import Flux2Error
from flux2_trt.manifest import BASE, content_key
from flux2_trt.store import Store


class DeviceMissing(Flux2Error):
    """A prepared bundle cannot be compiled here; the text says what is left, what that needs, and the command."""


def compile_prepared(
    prepared: Bundle, store: Store, compiler: Compiler, seconds: dict[str, float]
) -> tuple[Bundle, bool]:
    """The bundle with the plans of a prepared one, and whether it was there; `seconds` gets how long each plan took.

    Its key has the compiler's version and the device, if its kernels are timed. With LoRAs, plans that take weights as
    inputs are those of the bundle without, if that was compiled here. Raises DeviceMissing where this machine
    lacks one of them.
    """
    manifest, device = prepared.manifest, _device(prepared, compiler.target)

    def key_of(prepared_key: str) -> str:
        name = device.name if device else None
        return content_key({"prepared": prepared_key, "compiler": compiler.version, "device": name})

    key = key_of(manifest.key)
    with store.publish(
        key, model=manifest.model, recipe=manifest.recipe, target=manifest.target, on_wait=compiler.on_progress
    ) as draft:
        reused = draft.done
        if not reused:
            records = []
            base = store.get(draft.name_of(key_of(manifest.source[BASE]))) if manifest.loras else None
            for record in manifest.components:
                started = time.monotonic()
                graph = Graph.from_bytes(prepared.plan_path(record.name).read_bytes())
                if record.weights:
                    weights = prepared.weights_path(record.name)
                    assert weights
                    draft.adopt(record.weights, weights)
                if base and record.weight_placement == "bound":  # LoRAs change no plan that takes weights as inputs
                    compiled = base.component(record.name)
                    draft.adopt(compiled.plan, base.plan_path(record.name))
                    records.append(replace(compiled, weights=record.weights))
                else:
                    records.append(compiler.compile(draft, Piece.of(record, graph)))
                seconds[record.name] = round(time.monotonic() - started, 2)
            assets = [draft.adopt(asset, prepared.path / asset.file) for asset in manifest.assets]
            draft.finish(records, assets, source=manifest.source)
    return draft.bundle, reused


def _device(prepared: Bundle, target: Target) -> Device | None:
    """None where the compiler needs none. Raises DeviceMissing where this machine lacks it, or the compiler."""
    gpus, source = find_gpus() if target.needs_device else ((), "")
    device, lacks = target.device(gpus), []
    if device is None and target.needs_device:
        there = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus) or source
        lacks.append(f"a GPU of target {target.name} (compute capability {target.compute_capability}; here: {there})")
    try:
        load_compiler(target.compiler)
    except Flux2Error as error:
        lacks.append(str(error))
    if lacks:
        raise DeviceMissing(
            f"graphs and weights are done; what is left is compiling {len(prepared.manifest.components)} plans, which "
            f"needs {'; and '.join(lacks)}. There: flux2-trt build {shlex.quote(str(prepared.path))}"
        )
    return device
