"""The bundle of a model with LoRAs: found by what is in it, or how it is built from what the model was built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2_trt.bundle import read_manifest
from flux2_trt.errors import UsageError
from flux2_trt.lora.request import LoraRequest
from flux2_trt.manifest import LORAS, REQUEST, Manifest
from flux2_trt.models import FAMILY
from flux2_trt.store import Store

WEIGHTS = "weights_sha256"


def find_bundle(store: Store, base: Manifest, loras: Sequence[Mapping[str, Any]]) -> Path | None:
    """The newest sound bundle that is `base` with these LoRAs (`lora_identity`); None where there is none."""
    for bundle in store.list():
        if bundle.ok and bundle.compiled and bundle.loras:
            manifest = read_manifest(bundle.path)
            same = (manifest.model, manifest.recipe, manifest.target) == (base.model, base.recipe, base.target)
            parts = {record.name for record in manifest.components} >= {record.name for record in base.components}
            if same and parts and is_of(manifest, base) and _essence(manifest.source[LORAS]) == _essence(loras):
                return bundle.path
    return None


def is_of(manifest: Manifest, base: Manifest) -> bool:
    """Whether it was made from the files that `base` was made from, LoRAs aside."""
    return _digests(manifest) == _digests(base)


def build_arguments(base: Manifest, folder: Path, loras: Sequence[LoraRequest]) -> dict[str, Any]:
    """What `BuildRequest` takes to make `base` with LoRAs. Raises UsageError where that cannot be told."""
    if base.loras:
        raise UsageError(f"{folder} has LoRAs in it; give the model, or its bundle without them, and all LoRAs")
    if WEIGHTS not in base.source:
        raise UsageError(f"{folder} has made-up weights, which take no LoRA")
    called = base.source.get(REQUEST)
    if called is None and base.model.name not in FAMILY:
        raise UsageError(f"{folder} does not say what it was built from; flux2-trt build FOLDER --lora {loras[0]}")
    arguments = {"model": base.model.name} if called is None else dict(called)
    arguments |= {name: tuple(value) for name, value in arguments.items() if isinstance(value, list)}
    if arguments.get("calibration"):
        arguments["calibration"] = Path(arguments["calibration"])
    return {**arguments, "target": base.target, "precision": base.recipe, "loras": tuple(loras)}


def _essence(loras: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without the names of files, which a copy may change."""
    return [{name: value for name, value in lora.items() if name != "file"} for lora in loras]


def _digests(manifest: Manifest) -> dict[str, list[str]]:
    return {family: sorted(files.values()) for family, files in manifest.source.get(WEIGHTS, {}).items()}
