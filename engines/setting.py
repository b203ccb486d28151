"""Setting: all that a forecast depends on but the pictures: model, recipe, device, and what a bundle recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from engines.footprint import buffer_bytes, scratch_bytes, weight_bytes
from engines.hardware import CONTEXT_BYTES, GIGA, HARDWARE, Hardware, hardware_of
from engines.residency import Blocks
from engines.targets import AUTO, Target, resolve_precision, resolve_target
from export.recipes import RECIPES, Recipe
from flux2_trt.bundle import read_manifest
from flux2_trt.doctor import find_gpus
from flux2_trt.drawing import Drawing
from flux2_trt.errors import UsageError
from flux2_trt.manifest import MANIFEST_FILE, PART_NAMES, Manifest
from flux2_trt.models import FAMILY, published_spec, spec_from_diffusers
from flux2_trt.spec import Component, ModelSpec

TextEncoderPlace = Literal["local", "remote"]


@dataclass(frozen=True)
class Recorded:
    """What a bundle says of itself, by component: bytes of weight files, and scratch of plans as they were compiled.

    `streams`: its transformer is compiled block by block. `max_batch`: the most pictures at once that it is for; None
    where any number goes.
    """

    weights: Mapping[Component, int] = field(default_factory=dict)
    scratch: Mapping[Component, int] = field(default_factory=dict)
    streams: bool = False
    max_batch: int | None = None

    @staticmethod
    def of(manifest: Manifest) -> Recorded:
        weights: dict[Component, int] = {}
        scratch: dict[Component, int] = {}
        for record in manifest.components:
            component: Component = record.name.split(".")[0]  # type: ignore[assignment]
            if record.weights:
                weights[component] = record.weights.bytes
            scratch[component] = max(scratch.get(component, 0), int(record.layers.get("scratch_bytes", 0)))
        streams = bool(PART_NAMES & {record.name for record in manifest.components})
        rows = [each["batch"][2] for record in manifest.components for each in record.profiles if "tokens" in each]
        per_picture = 2 if manifest.model.sampling.guidance_kind == "classifier_free" else 1
        max_batch = min(rows) // per_picture if rows else None
        return Recorded(weights, {name: size for name, size in scratch.items() if size}, streams, max_batch)


@dataclass(frozen=True)
class Setting:
    """`memory_bytes`: free on the device before there is a context, which then takes `context_bytes`.

    `text_encoder`: "remote" where prompt embeds come from elsewhere. `measured`: bytes of scratch that plans were asked
    for at the sizes of a drawing.
    """

    target: str
    spec: ModelSpec
    recipe: Recipe
    hardware: Hardware
    memory_bytes: int
    text_encoder: TextEncoderPlace = "local"
    recorded: Recorded | None = None
    context_bytes: int = CONTEXT_BYTES
    measured: Mapping[Component, int] = field(default_factory=dict)

    @property
    def can_stream(self) -> bool:
        """Plans of the transformer's parts are there, or can be built."""
        return self.recorded.streams if self.recorded else "bound" in self.recipe.placements

    def components(self, drawing: Drawing) -> tuple[Component, ...]:
        """Those that run on the device."""
        absent: set[Component] = set() if drawing.references else {"vae_encoder"}
        absent |= {"text_encoder"} if self.text_encoder == "remote" else set()
        return tuple(component for component in self.spec.components if component not in absent)

    def all_weights(self, drawing: Drawing) -> dict[Component, int]:
        """Bytes of weights by component."""
        recorded = self.recorded.weights if self.recorded else {}
        return {
            component: recorded.get(component) or weight_bytes(component, self.spec, self.recipe)
            for component in self.components(drawing)
        }

    def scratch(self, component: Component, drawing: Drawing) -> int:
        """Bytes: as measured; else the estimate, or what the compiler said where that is more, since plans allow larger
        pictures."""
        if component in self.measured:
            return self.measured[component]
        recorded = self.recorded.scratch.get(component, 0) if self.recorded else 0
        return max(scratch_bytes(component, self.spec, drawing), recorded)

    def shared_scratch(self, drawing: Drawing) -> int:
        """Bytes that are enough for each component in its turn."""
        return max(self.scratch(component, drawing) for component in self.components(drawing))

    def buffers(self, drawing: Drawing, streams: bool = False) -> int:
        """Bytes of what components read and write; `streams`: blocks of the transformer."""
        in_blocks = streams or bool(self.recorded and self.recorded.streams)
        return buffer_bytes(self.spec, drawing, self.recipe.dtype, in_blocks)

    @cached_property
    def blocks(self) -> Blocks:
        size = self.spec.transformer
        double, single = (
            weight_bytes("transformer", self.spec, self.recipe, rf"{kind}_blocks\.0\..+")
            for kind in ("double", "single")
        )
        return Blocks(size.num_double_blocks, double, size.num_single_blocks, single)


def resolve_setting(
    model: str,
    target: str = AUTO,
    precision: str | None = None,
    memory_gigabytes: float | None = None,
    text_encoder: str = "local",
) -> Setting:
    """The setting of a published model, a diffusers folder or a bundle's folder; None takes the device's default.

    `target`: `auto` is the GPU of this machine. Raises UsageError for what does not exist or does not go together.
    """
    if text_encoder not in get_args(TextEncoderPlace):
        raise UsageError(f"unknown --text-encoder {text_encoder}; known are {', '.join(get_args(TextEncoderPlace))}")
    if memory_gigabytes is not None and not 0 < memory_gigabytes < float("inf"):
        raise UsageError(f"--memory is {memory_gigabytes:g}; give gigabytes above 0, for example 24")
    folder, recorded = Path(model), None
    if (folder / MANIFEST_FILE).is_file():
        manifest = read_manifest(folder)
        for flag, asked, built in (("target", target, manifest.target), ("precision", precision, manifest.recipe)):
            if asked not in (None, AUTO, built):
                raise UsageError(f"{folder} was built for {flag} {built}, not {asked}; leave --{flag} out")
        spec, target, precision, recorded = manifest.model, manifest.target, manifest.recipe, Recorded.of(manifest)
    elif model not in FAMILY and folder.is_dir():
        spec = spec_from_diffusers(folder)
    else:
        spec = _published(model)
    memory_bytes = None if memory_gigabytes is None else int(memory_gigabytes * GIGA)
    if target == AUTO:
        found, there = _own_gpu()
        memory_bytes = there if memory_bytes is None else memory_bytes
    else:
        found = resolve_target(target)
    hardware = hardware_of(found.name)
    recipe = RECIPES[resolve_precision(found, precision)]
    recipe = replace(recipe, fp8_layout=found.fp8_layout)
    place: TextEncoderPlace = "remote" if text_encoder == "remote" else "local"
    return Setting(found.name, spec, recipe, hardware, memory_bytes or hardware.memory_bytes, place, recorded)


def _published(model: str) -> ModelSpec:
    if model not in FAMILY:
        raise UsageError(f"unknown model {model!r}; known are {', '.join(FAMILY)}, a diffusers folder, a bundle")
    return published_spec(model)


def _own_gpu() -> tuple[Target, int]:
    """The target of the first GPU here, and its bytes of memory."""
    gpus, source = find_gpus()
    for gpu in gpus:
        name = _letters(gpu.name)
        if alike := [target for target in HARDWARE if _letters(target) in name]:
            return resolve_target(max(alike, key=len)), gpu.memory_bytes
    there = f"none of {', '.join(gpu.name for gpu in gpus)} is a target" if gpus else f"there is no GPU here ({source})"
    raise UsageError(f"{there}; give --target {', '.join(HARDWARE)}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
