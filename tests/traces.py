"""Graphs that are traced once for all tests of a run: tracing takes up to 15 s, however small the model is."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from export.graph import Graph
from export.parts import assemble
from export.recipes import Dtype
from export.trace import trace_parts
from flux2_trt.spec import Component, ModelSpec

_parts: dict[str, dict[str, Graph]] = {}
_folder: Path | None = None


def share_traces(folder: Path) -> None:
    """Let the processes that name the same folder trace for each other."""
    global _folder
    _folder = folder
    folder.mkdir(exist_ok=True)


def traced_once(component: Component, spec: ModelSpec, dtype: Dtype = "fp32") -> Graph:
    """`trace`, once for all models that differ in nothing that the traced parts depend on."""
    return assemble(component, spec, dtype, parts_traced_once(component, spec, dtype))


def parts_traced_once(component: Component, spec: ModelSpec, dtype: Dtype = "fp32") -> dict[str, Graph]:
    """`trace_parts`, as `traced_once`."""
    key = hashlib.sha256(repr((component, _what_matters(component, spec), dtype)).encode()).hexdigest()
    if key not in _parts:
        _parts[key] = _shared(key, component, spec, dtype) if _folder else trace_parts(component, spec, dtype)
    return _parts[key]


def _what_matters(component: Component, spec: ModelSpec) -> Any:
    match component:
        case "text_encoder":
            assert spec.text_encoder
            return replace(spec.text_encoder, hidden_states=(1,))
        case "conditioning":
            return spec.transformer
        case "transformer":
            size = spec.transformer
            blocks = {name: min(1, getattr(size, name)) for name in ("num_double_blocks", "num_single_blocks")}
            return replace(size, guidance_embeds=False, **blocks), spec.sampling.guidance_kind == "classifier_free"
    return spec.autoencoder


def _shared(key: str, component: Component, spec: ModelSpec, dtype: Dtype) -> dict[str, Graph]:
    assert _folder
    folder = _folder / key
    with FileLock(_folder / f"{key}.lock"):
        if not folder.exists():
            parts = trace_parts(component, spec, dtype)
            unfinished = folder.with_suffix(".tmp")
            unfinished.mkdir()
            for index, (name, graph) in enumerate(parts.items()):
                (unfinished / f"{index}-{name}").write_bytes(graph.to_bytes())
            unfinished.rename(folder)
            return parts
    files = sorted(folder.iterdir())
    return {file.name.partition("-")[2]: Graph.from_bytes(file.read_bytes()) for file in files}
