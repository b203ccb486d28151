"""Build: from a model and a target to a published bundle."""

from __future__ import annotations

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from engines.sources import ModelSource, resolve_source
from engines.targets import AUTO, Target, resolve_precision, resolve_target
from export.trace import OPSET, trace
from export.weights import FAMILY_OF, TensorSource, place_external, write_weights
from flux2_trt.bundle import Bundle
from flux2_trt.draft import Draft
from flux2_trt.errors import UsageError
from flux2_trt.manifest import ComponentRecord, content_key
from flux2_trt.naming import Family
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.spec import Component
from flux2_trt.store import Store

EXPORT = Path(__file__).parents[1] / "export"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class BuildRequest:
    """What to build; None takes the default of the model or the target.

    `weights`: how the plan gets them ("external": beside it, as data); `output`: another store than the user's.
    """

    model: str
    target: str = AUTO
    precision: str | None = None
    weights: str | None = None
    components: tuple[str, ...] | None = None
    checkpoint: str | None = None
    output: Path | None = None


@dataclass(frozen=True)
class ComponentReport:
    """One compiled component; `seconds` is None where the bundle was there already."""

    name: str
    plan: str
    plan_bytes: int
    seconds: float | None
    layers: dict[str, Any]


@dataclass(frozen=True)
class BuildReport:
    """What was built, how long it took, and the peak memory of this process."""

    bundle: str
    target: str
    model: str
    precision: str
    reused: bool
    components: tuple[ComponentReport, ...]
    weights_bytes: int
    seconds: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(request: BuildRequest, on_progress: Callable[[str], None]) -> BuildReport:
    """Trace, fill and compile every component that was asked for, and publish the bundle.

    A bundle made from the same code, packages, weights and request is found and not made again. Raises UsageError
    for a request that cannot be met, CheckpointError for weights that do not fit.
    """
    started = time.monotonic()
    target = resolve_target(request.target)
    precision = resolve_precision(target, request.precision)
    if request.weights not in (None, target.weight_placement):
        raise UsageError(
            f"target {target.name} takes {target.weight_placement} weights, not {request.weights}; leave --weights out"
        )
    source = resolve_source(request.model, request.checkpoint)
    components = _components(source, request.components)
    identity = source.identity()
    key = content_key(
        {
            "export": _code_digest(),
            "packages": {name: version(name) for name in PACKAGES},
            "opset": OPSET,
            "model": source.spec.to_dict(),
            "weights": identity,
            "components": list(components),
            "target": asdict(target) | {"precisions": precision},
        }
    )
    store = Store() if request.output is None else Store(request.output)
    seconds: dict[str, float] = {}
    with store.publish(key, model=source.spec, recipe=precision, target=target.name, on_wait=on_progress) as draft:
        reused = draft.done
        if not reused:
            _make(draft, source, components, target, identity, seconds, on_progress)
    return _report(draft.bundle, reused, seconds, time.monotonic() - started)


def _components(source: ModelSource, asked: tuple[str, ...] | None) -> tuple[Component, ...]:
    there = source.spec.components
    if asked is None:
        return there
    unknown = [name for name in asked if name not in get_args(Component) or name not in there]
    if unknown or not asked:
        wrong = f"has no component {', '.join(map(repr, unknown))}" if unknown else "cannot be built without components"
        raise UsageError(f"{source.spec.name} {wrong}; it has {', '.join(there)}")
    return tuple(name for name in there if name in asked)


def _make(
    draft: Draft,
    source: ModelSource,
    components: tuple[Component, ...],
    target: Target,
    identity: dict[str, Any],
    seconds: dict[str, float],
    on_progress: Callable[[str], None],
) -> None:
    opened: dict[Family, TensorSource] = {}
    for family in dict.fromkeys(FAMILY_OF[component] for component in components):
        opened[family] = source.open(family)
    records = []
    for component in components:
        started = time.monotonic()
        on_progress(f"tracing {component}")
        graph = trace(component, source.spec)
        on_progress(f"writing the weights of {component}")
        weights = draft.weights_path(component)
        spans = write_weights(graph, opened[FAMILY_OF[component]], weights)
        on_progress(f"compiling {component}")
        model = place_external(graph, spans, weights.name)
        plan = draft.plan_path(component, ".onnx")
        plan.write_bytes(model.SerializeToString(deterministic=True))
        OnnxRuntimeEngine(plan, weights)
        records.append(
            ComponentRecord(
                name=component,
                plan=draft.record(plan),
                graph_sha256=hashlib.sha256(graph.model.SerializeToString(deterministic=True)).hexdigest(),
                compiler=target.compiler,
                compiler_version=version(target.compiler),
                weights=draft.record(weights),
                weight_placement=target.weight_placement,
                shapes=graph.shapes(),  # type: ignore[arg-type]
                layers={"operators": dict(Counter(node.op_type for node in graph.model.graph.node))},
            )
        )
        seconds[component] = round(time.monotonic() - started, 2)
    assets = []
    if source.tokenizer and "text_encoder" in components:
        asset = draft.asset_path(source.tokenizer.name)
        asset.write_bytes(source.tokenizer.read_bytes())
        assets.append(draft.record(asset))
    draft.finish(records, assets, source=identity)


def _report(bundle: Bundle, reused: bool, seconds: dict[str, float], total: float) -> BuildReport:
    manifest = bundle.manifest
    return BuildReport(
        bundle=str(bundle.path),
        target=manifest.target,
        model=manifest.model.name,
        precision=manifest.recipe,
        reused=reused,
        components=tuple(
            ComponentReport(record.name, record.plan.file, record.plan.bytes, seconds.get(record.name), record.layers)
            for record in manifest.components
        ),
        weights_bytes=sum(record.weights.bytes for record in manifest.components if record.weights),
        seconds=round(total, 2),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _code_digest() -> str:
    """Digest of the code that makes graphs and weight files: a change there makes another bundle."""
    digest = hashlib.sha256()
    for file in sorted([*EXPORT.glob("*.py"), *EXPORT.glob("modules/*.py")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
