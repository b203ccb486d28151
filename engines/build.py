"""Build: from a model and a target to a published bundle."""

from __future__ import annotations

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from engines.audit import lost_formats
from engines.calibration import scales_of
from engines.shapes import DEFAULT_SIZES, ShapeRequest, profiles
from engines.sources import ModelSource, resolve_source
from engines.targets import AUTO, Target, resolve_placement, resolve_precision, resolve_target
from engines.tensorrt import OnPhase, compile_plan, load_compiler
from export.quantize import quantize
from export.recipes import RECIPES, Recipe
from export.simulation import simulate_nvfp4
from export.trace import OPSET, Graph, trace
from export.weights import FAMILY_OF, Scales, TensorSource, place_external, write_weights
from flux2_trt.bundle import Bundle
from flux2_trt.draft import Draft
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.manifest import ComponentRecord, FileRecord, WeightPlacement, content_key
from flux2_trt.naming import Family
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.spec import Component
from flux2_trt.store import Store

ENGINES = Path(__file__).parent
EXPORT = ENGINES.parent / "export"
PACKAGES = ("torch", "onnx", "onnxscript")


@dataclass(frozen=True)
class BuildRequest:
    """What to build; None takes the default of the model or the target.

    `weights`: how the plan gets them ("external": as constants in a file beside it; "bound": as inputs; "embedded": as
    constants in it); `sizes`, `max_batch`, `max_references`: see `engines.shapes.ShapeRequest`; `output`: another store
    than the user's.
    """

    model: str
    target: str = AUTO
    precision: str | None = None
    weights: str | None = None
    components: tuple[str, ...] | None = None
    checkpoint: str | None = None
    calibration: Path | None = None
    sizes: tuple[str, ...] = DEFAULT_SIZES
    max_batch: int = 1
    max_references: int = 1
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


def build(
    request: BuildRequest, on_progress: Callable[[str], None], on_phase: OnPhase = lambda *_: True
) -> BuildReport:
    """Trace, fill and compile every component that was asked for, and publish the bundle.

    `on_progress` is told in words what is done, `on_phase` how far the compiler is, which it can stop.
    A bundle made from the same code, packages, weights and request is found and not made again. Raises UsageError
    for a request that cannot be met, CheckpointError for weights that do not fit.
    """
    started = time.monotonic()
    target = resolve_target(request.target)
    precision = resolve_precision(target, request.precision)
    shapes = ShapeRequest(request.sizes, request.max_batch, request.max_references)
    source = resolve_source(request.model, request.checkpoint)
    components = _components(source, request.components)
    recipe = RECIPES[precision]
    recipe = replace(recipe, dtype=target.dtype or recipe.dtype)
    placement = resolve_placement(target, recipe, request.weights)
    scales = scales_of(source, recipe, request.calibration)
    identity = source.identity()
    job = _Job(source, components, target, recipe, placement, shapes, scales)
    key = content_key(
        {
            "export": _code_digest(),
            "packages": {name: version(name) for name in PACKAGES},
            "compiler": compiler_version(target),
            "opset": OPSET,
            "model": source.spec.to_dict(),
            "weights": identity,
            "scales": asdict(scales),
            "components": list(components),
            "target": asdict(target) | {"precisions": precision, "weights": placement},
            "shapes": asdict(shapes) if target.ahead_of_time else None,
        }
    )
    store = Store() if request.output is None else Store(request.output)
    seconds: dict[str, float] = {}
    with store.publish(key, model=source.spec, recipe=precision, target=target.name, on_wait=on_progress) as draft:
        reused = draft.done
        if not reused:
            _make(draft, job, identity, seconds, on_progress, on_phase)
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


@dataclass(frozen=True)
class _Job:
    """A request with everything resolved."""

    source: ModelSource
    components: tuple[Component, ...]
    target: Target
    recipe: Recipe
    placement: WeightPlacement
    shapes: ShapeRequest
    scales: Scales

    @property
    def writes_weights(self) -> bool:
        """Made-up weights that are bound are made again by whoever needs them."""
        return self.source.seed is None or self.placement != "bound"


def _make(
    draft: Draft,
    job: _Job,
    identity: dict[str, Any],
    seconds: dict[str, float],
    on_progress: Callable[[str], None],
    on_phase: OnPhase,
) -> None:
    opened: dict[Family, TensorSource] = {}
    if job.writes_weights:
        for family in dict.fromkeys(FAMILY_OF[component] for component in job.components):
            opened[family] = job.source.open(family)
    records = []
    for component in job.components:
        started = time.monotonic()
        on_progress(f"tracing {component}")
        graph = quantize(trace(component, job.source.spec, job.recipe.dtype), job.recipe)
        weights, spans = None, {}
        if job.writes_weights:
            on_progress(f"writing the weights of {component}")
            path = draft.weights_path(component)
            spans = write_weights(graph, opened[FAMILY_OF[component]], path, job.scales)
            weights = draft.record(path) if job.placement != "embedded" else None
        on_progress(f"compiling {component}")
        if job.target.compiler == "onnxruntime":
            plan, layers = _compile_external(draft, graph, spans)
        else:
            plan, layers = _compile_plan(draft, graph, job, spans, on_phase)
        records.append(
            ComponentRecord(
                name=component,
                plan=plan,
                graph_sha256=hashlib.sha256(graph.model.SerializeToString(deterministic=True)).hexdigest(),
                compiler=job.target.compiler,
                compiler_version=compiler_version(job.target),
                weights=weights,
                weight_placement=job.placement,
                shapes=graph.shapes(),  # type: ignore[arg-type]
                layers=layers,
            )
        )
        seconds[component] = round(time.monotonic() - started, 2)
    assets = []
    if job.source.tokenizer and "text_encoder" in job.components:
        asset = draft.asset_path(job.source.tokenizer.name)
        asset.write_bytes(job.source.tokenizer.read_bytes())
        assets.append(draft.record(asset))
    draft.finish(records, assets, source=identity)


def _compile_external(
    draft: Draft, graph: Graph, spans: Mapping[str, tuple[int, int]]
) -> tuple[FileRecord, dict[str, Any]]:
    """The graph for ONNX Runtime, loaded once to see that it does."""
    weights = draft.weights_path(graph.component)
    plan = draft.plan_path(graph.component, ".onnx")
    model = simulate_nvfp4(place_external(graph, spans, weights.name))
    plan.write_bytes(model.SerializeToString(deterministic=True))
    OnnxRuntimeEngine(plan, weights)
    return draft.record(plan), {"operators": dict(Counter(node.op_type for node in graph.model.graph.node))}


def _compile_plan(
    draft: Draft, graph: Graph, job: _Job, spans: Mapping[str, tuple[int, int]], on_phase: OnPhase
) -> tuple[FileRecord, dict[str, Any]]:
    """A TensorRT plan, and what its kernels are. Raises Flux2Error where they are not what the recipe says."""
    ranges = profiles(graph.component, job.source.spec, job.shapes)
    if job.placement == "embedded":
        with _constants(draft, graph, spans) as model_file:
            compiled = compile_plan(graph, ranges, job.target, on_phase, model_file)
    else:
        compiled = compile_plan(graph, ranges, job.target, on_phase)
    if lost := lost_formats(graph, job.recipe, compiled.report):
        raise Flux2Error(
            f"{job.target.compiler} {compiler_version(job.target)} compiled {graph.component} for {job.target.name} "
            f"not as precision {job.recipe.name} says: {lost}; build with another --precision, and report this"
        )
    plan = draft.plan_path(graph.component, ".plan")
    plan.write_bytes(compiled.plan)
    return draft.record(plan), compiled.report.to_dict()


@contextmanager
def _constants(draft: Draft, graph: Graph, spans: Mapping[str, tuple[int, int]]) -> Iterator[Path]:
    """A file of the graph with its weights as constants beside it; both go, and the plan keeps what was in them."""
    weights = draft.weights_path(graph.component)
    model_file = weights.with_suffix(".onnx")
    model_file.write_bytes(place_external(graph, spans, weights.name).SerializeToString())
    try:
        yield model_file
    finally:
        weights.unlink()
        model_file.unlink()


def compiler_version(target: Target) -> str:
    """The version of a target's compiler. Raises Flux2Error where it is not installed."""
    if target.compiler == "onnxruntime":
        return version(target.compiler)
    return str(load_compiler(target.compiler).__version__)


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
    """Digest of the code that makes graphs, weight files and plans: a change there makes another bundle."""
    digest = hashlib.sha256()
    compiling = [ENGINES / "shapes.py", ENGINES / "tensorrt.py"]
    for file in sorted([*EXPORT.glob("*.py"), *EXPORT.glob("modules/*.py"), *compiling]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
