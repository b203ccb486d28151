"""Components: from a model and a target to graphs, weight files and plans in a draft."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engines.audit import lost_formats
from engines.inheritance import inherit
from engines.shapes import Profile, Range, ShapeRequest, profiles
from engines.sources import ModelSource
from engines.targets import PlanLayout, Target
from engines.tensorrt import OnPhase, compile_plan, load_compiler
from engines.timing_cache import TimingCache
from export.conversion import Scales
from export.graph import Graph
from export.host import for_onnx_runtime
from export.parts import assemble
from export.quantize import quantize
from export.recipes import Recipe
from export.simulation import simulate_nvfp4
from export.tensor_source import TensorSource
from export.tracing import Tracing
from export.weights import place_external, read_spans, write_weights
from flux2_trt.bundle import Bundle
from flux2_trt.draft import Draft
from flux2_trt.errors import Flux2Error
from flux2_trt.manifest import UNCOMPILED, ComponentRecord, FileRecord, WeightPlacement
from flux2_trt.naming import FAMILY_OF, Family
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.spec import TRANSFORMER_PARTS, Component


@dataclass(frozen=True)
class Job:
    """A request with everything resolved. `prepares`: graphs stay graphs, to be compiled later."""

    source: ModelSource
    components: tuple[Component, ...]
    target: Target
    recipe: Recipe
    placement: WeightPlacement
    layout: PlanLayout
    shapes: ShapeRequest
    scales: Scales
    prepares: bool

    @property
    def writes_weights(self) -> bool:
        """Made-up weights that are bound are made again by whoever needs them."""
        return self.source.seed is None or self.placement != "bound"


@dataclass
class Effort:
    """What a build took: seconds of each plan, of which the first of a component has its graph and weights in it; peak
    memory of the processes that traced beside this one."""

    seconds: dict[str, float] = field(default_factory=dict)
    helpers_peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Piece:
    """A graph that becomes a plan: a component, or a part of one. `weights`: the file with what it takes."""

    name: str
    graph: Graph
    profiles: Sequence[Profile]
    placement: WeightPlacement
    weights: FileRecord | None

    def record(self, plan: FileRecord, compiler: str, compiler_version: str, layers: dict[str, Any]) -> ComponentRecord:
        return ComponentRecord(
            name=self.name,
            plan=plan,
            graph_sha256=hashlib.sha256(self.graph.model.SerializeToString(deterministic=True)).hexdigest(),
            compiler=compiler,
            compiler_version=compiler_version,
            weights=None if self.placement == "embedded" and compiler != UNCOMPILED else self.weights,
            weight_placement=self.placement,
            shapes=self.graph.shapes(),  # type: ignore[arg-type]
            layers=layers,
            profiles=[{side: [*astuple(values)] for side, values in profile.items()} for profile in self.profiles],
        )

    @staticmethod
    def of(record: ComponentRecord, graph: Graph) -> Piece:
        """The piece of a record that was made without a compiler."""
        ranges = [{side: Range(*values) for side, values in profile.items()} for profile in record.profiles]
        return Piece(record.name, graph, ranges, record.weight_placement, record.weights)


@dataclass(frozen=True)
class Compiler:
    """How pieces become plans.

    `timing`: the folder of timing caches. `on_progress` is told what is done, `on_phase` how far it is, which can stop
    it.
    """

    target: Target
    recipe: Recipe
    timing: Path
    on_progress: Callable[[str], None]
    on_phase: OnPhase

    @property
    def version(self) -> str:
        return compiler_version(self.target)

    @property
    def timing_cache(self) -> TimingCache | None:
        """Of this target and version; None where kernels are not timed."""
        if not self.target.needs_device:
            return None
        return TimingCache(self.timing / f"{self.target.compiler}-{self.version}-{self.target.name}.cache")

    def compile(self, draft: Draft, piece: Piece) -> ComponentRecord:
        """Write the plan of `piece` to `draft`, where its weight file is already.

        Raises Flux2Error where the kernels of the plan are not what the recipe says.
        """
        self.on_progress(f"compiling {piece.name}")
        make_plan = self._external if self.target.compiler == "onnxruntime" else self._tensorrt
        plan, layers = make_plan(draft, piece)
        return piece.record(plan, self.target.compiler, self.version, layers)

    def _external(self, draft: Draft, piece: Piece) -> tuple[FileRecord, dict[str, Any]]:
        """The graph for ONNX Runtime, loaded once to see that it does."""
        graph, weights = piece.graph, draft.weights_path(piece.graph.component)
        plan = draft.plan_path(piece.name, ".onnx")
        placed = simulate_nvfp4(place_external(graph, read_spans(weights), weights.name))
        model = for_onnx_runtime(placed, draft.model.transformer.num_heads)
        plan.write_bytes(model.SerializeToString(deterministic=True))
        OnnxRuntimeEngine(plan, weights)
        return draft.record(plan), {"operators": dict(Counter(node.op_type for node in model.graph.node))}

    def _tensorrt(self, draft: Draft, piece: Piece) -> tuple[FileRecord, dict[str, Any]]:
        with ExitStack() as stack:
            embedded = piece.placement == "embedded"
            model_file = stack.enter_context(_constants(draft, piece.graph)) if embedded else None
            compiled = compile_plan(
                piece.graph, piece.profiles, self.target, self.on_phase, model_file, self.timing_cache
            )
        if self.target.needs_device and not compiled.report.profiles:
            self.on_progress(
                f"{piece.name}: {self.target.compiler} listed no kernels, so their formats are not checked"
            )
        elif lost := lost_formats(piece.graph, self.recipe, compiled.report):
            raise Flux2Error(
                f"{self.target.compiler} {self.version} compiled {piece.name} for {self.target.name} not as precision "
                f"{self.recipe.name} says: {lost}; build with another --precision, and report this"
            )
        plan = draft.plan_path(piece.name, ".plan")
        plan.write_bytes(compiled.plan)
        return draft.record(plan), compiled.report.to_dict()


def make(
    draft: Draft, job: Job, compiler: Compiler, effort: Effort, base: Bundle | None = None
) -> list[ComponentRecord]:
    """Trace, fill and compile every component into `draft`.

    `effort` is added to. `base`: the bundle of the same job without LoRAs, whose files are taken over where they are
    the same.
    """
    opened: dict[Family, TensorSource] = {}
    if job.writes_weights:
        for family in dict.fromkeys(FAMILY_OF[component] for component in job.components):
            opened[family] = job.source.open(family)
    records: list[ComponentRecord] = []
    helpers = 0 if base else None  # with a base, most is taken over
    with Tracing(job.source.spec, job.recipe.dtype, job.components, helpers) as tracing:
        for component in job.components:
            started, source = time.monotonic(), opened.get(FAMILY_OF[component])
            inherited = None
            if base and source:
                inherited = inherit(
                    draft, base, component, job.source.touched, source, job.scales, compiler.on_progress
                )
            if inherited is None:
                records += _made(draft, job, compiler, component, source, tracing, effort.seconds)
            else:
                records += inherited
                effort.seconds[inherited[0].name] = round(time.monotonic() - started, 2)
        effort.helpers_peak_rss_bytes = tracing.helpers_peak_rss_bytes
    return records


def _made(
    draft: Draft,
    job: Job,
    compiler: Compiler,
    component: Component,
    source: TensorSource | None,
    tracing: Tracing,
    seconds: dict[str, float],
) -> Iterator[ComponentRecord]:
    started = time.monotonic()
    compiler.on_progress(f"tracing {component}")
    whole, plans = _graphs(job, component, tracing.parts(component))
    weights = None
    if source:
        compiler.on_progress(f"writing the weights of {component}")
        path = draft.weights_path(component)
        write_weights(whole, source, path, job.scales, draft.journal_path(component))
        if job.placement != "embedded" or job.prepares:
            weights = draft.record(path)
    ranges = profiles(component, job.source.spec, job.shapes) if job.target.compute_capability else ()
    for name, graph in plans.items():
        piece = Piece(name, graph, ranges, job.placement, weights)
        yield _keep(draft, piece) if job.prepares else compiler.compile(draft, piece)
        seconds[name] = round(time.monotonic() - started, 2)
        started = time.monotonic()


def _graphs(job: Job, component: Component, parts: Mapping[str, Graph]) -> tuple[Graph, dict[str, Graph]]:
    """The graph of a component, quantized, and those that are compiled, by the names of their records."""
    whole = quantize(assemble(component, job.source.spec, job.recipe.dtype, parts), job.recipe)
    if component != "transformer" or job.layout == "whole":
        return whole, {component: whole}
    return whole, {
        f"{component}.{name}": quantize(parts[name], job.recipe) for name in TRANSFORMER_PARTS if name in parts
    }


def _keep(draft: Draft, piece: Piece) -> ComponentRecord:
    path = draft.plan_path(piece.name, ".onnx")
    path.write_bytes(piece.graph.to_bytes())
    return piece.record(draft.record(path), UNCOMPILED, "-", {})


@contextmanager
def _constants(draft: Draft, graph: Graph) -> Iterator[Path]:
    """A file of the graph with its weights as constants beside it; both go, and the plan keeps what was in them.

    Where there is no plan, the weights stay for another try.
    """
    weights = draft.weights_path(graph.component)
    model_file = weights.with_suffix(".onnx")
    model_file.write_bytes(place_external(graph, read_spans(weights), weights.name).SerializeToString())
    try:
        yield model_file
    finally:
        model_file.unlink()
    weights.unlink()


def compiler_version(target: Target) -> str:
    """The version of a target's compiler. Raises Flux2Error where it is not installed."""
    if target.compiler == "onnxruntime":
        return version(target.compiler)
    return str(load_compiler(target.compiler).__version__)
