"""Build: from a model and a target to a published bundle."""

from __future__ import annotations

import hashlib
import resource
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from engines.calibration import scales_of
from engines.components import Compiler, Effort, Job, compiler_version, make
from engines.prepared import DeviceMissing, compile_prepared
from engines.shapes import DEFAULT_SIZES, ShapeRequest
from engines.sources import ModelSource, resolve_source, with_loras
from engines.targets import AUTO, resolve_layout, resolve_placement, resolve_precision, resolve_target
from engines.tensorrt import OnPhase
from export.conversion import Scales
from export.recipes import RECIPES
from export.trace import OPSET
from flux2_trt.bundle import Bundle
from flux2_trt.errors import UsageError
from flux2_trt.lora.request import LoraRequest
from flux2_trt.manifest import BASE, MANIFEST_FILE, REQUEST, content_key
from flux2_trt.models import FAMILY
from flux2_trt.spec import Component
from flux2_trt.store import Store

ENGINES = Path(__file__).parent
EXPORT = ENGINES.parent / "export"
PACKAGE = ENGINES.parent / "flux2_trt"
PACKAGES = ("torch", "onnx", "onnxscript")
TIMING = "timing"


@dataclass(frozen=True)
class BuildRequest:
    """What to build; None takes the default of the model or the target. `model` may be a prepared bundle to compile.

    `weights`: how the plan gets them ("external": as constants in a file beside it; "bound": as inputs; "embedded": as
    constants in it); `sizes`, `max_batch`, `max_references`: see `engines.shapes.ShapeRequest`; `plans`: see
    `engines.targets.PlanLayout`; `prepare`: stop at graphs and weights; `loras`: added to the transformer's weights;
    `output`: another store than the user's.
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
    plans: str = "whole"
    prepare: bool = False
    loras: tuple[LoraRequest, ...] = ()
    output: Path | None = None

    def recorded(self) -> dict[str, Any]:
        """All but the LoRAs and the store, as JSON values with absolute paths: what builds the same with LoRAs."""
        values = {name: value for name, value in vars(self).items() if name not in ("loras", "output")}
        for name in ("model", "checkpoint", "calibration"):
            values[name] = values[name] and _absolute(str(values[name]))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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
    """What was built, how long it took, and the peak memory of this process and those that traced beside it, added up.

    `left`: what has to be done on another machine, in words; None for a bundle that is complete.
    """

    bundle: str
    target: str
    model: str
    precision: str
    reused: bool
    components: tuple[ComponentReport, ...]
    weights_bytes: int
    seconds: float
    peak_rss_bytes: int
    left: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(
    request: BuildRequest, on_progress: Callable[[str], None], on_phase: OnPhase = lambda *_: True
) -> BuildReport:
    """Trace, fill and compile every component that was asked for, and publish the bundle.

    On request, or where plans have to be compiled on a device that is not here, graphs and weights are published as a
    prepared bundle, and `BuildReport.left` says what is left; a request whose model is the folder of a prepared bundle
    does that.

    `on_progress` is told in words what is done, `on_phase` how far the compiler is, which it can stop.
    A bundle made from the same code, packages, weights and request is found and not made again. Raises UsageError
    for a request that cannot be met, CheckpointError for weights that do not fit.
    """
    started = time.monotonic()
    store = Store() if request.output is None else Store(request.output)
    effort = Effort()
    asked_to_compile = (Path(request.model) / MANIFEST_FILE).is_file()
    if asked_to_compile:
        bundle, reused = _prepared(request), False
    else:
        bundle, reused = _made(request, store, effort, on_progress, on_phase)
    left = None
    if request.prepare:
        left = f"graphs and weights are done; the plans: flux2-trt build {shlex.quote(str(bundle.path))}"
    elif not bundle.manifest.is_compiled:
        target, recipe = resolve_target(bundle.manifest.target), RECIPES[bundle.manifest.recipe]
        compiler = Compiler(target, recipe, store.root / TIMING, on_progress, on_phase)
        try:
            bundle, reused = compile_prepared(bundle, store, compiler, effort.seconds)
        except DeviceMissing as error:
            if asked_to_compile:
                raise
            left = str(error)
    return _report(bundle, reused, effort, time.monotonic() - started, left)


def _made(
    request: BuildRequest,
    store: Store,
    effort: Effort,
    on_progress: Callable[[str], None],
    on_phase: OnPhase,
) -> tuple[Bundle, bool]:
    """The bundle of a request, and whether it was there; a prepared one where the target has to be at hand."""
    target = resolve_target(request.target)
    if request.prepare and not target.compute_capability:
        raise UsageError(f"there is nothing to prepare for {target.name}, whose plans are graphs; leave --prepare out")
    precision = resolve_precision(target, request.precision)
    shapes = ShapeRequest(request.sizes, request.max_batch, request.max_references)
    source = with_loras(resolve_source(request.model, request.checkpoint), request.loras)
    components = _components(source, request.components)
    recipe = RECIPES[precision]
    recipe = replace(recipe, dtype=target.dtype or recipe.dtype, fp8_layout=target.fp8_layout)
    placement = resolve_placement(target, recipe, request.weights)
    layout = resolve_layout(target, placement, request.plans)
    base_scales = scales_of(source, recipe, request.calibration)
    scales = base_scales.without_weights(source.touched)

    prepares = request.prepare or target.needs_device

    def key_of(identity: dict[str, Any], scales: Scales) -> str:
        return content_key(
            {
                "export": _code_digest(),
                "packages": {name: version(name) for name in PACKAGES},
                "compiler": None if prepares else compiler_version(target),
                "opset": OPSET,
                "model": source.spec.to_dict(),
                "weights": identity,
                "scales": asdict(scales),
                "components": list(components),
                "target": asdict(target) | {"precisions": precision, "weights": placement, "plans": layout},
                "shapes": asdict(shapes) if target.compute_capability else None,
            }
        )

    identity = source.identity()
    key = key_of(identity, scales)
    job = Job(source, components, target, recipe, placement, layout, shapes, scales, prepares)
    with store.publish(key, model=source.spec, recipe=precision, target=target.name, on_wait=on_progress) as draft:
        reused = draft.done
        if draft.resumed:
            on_progress("going on with the weights of a build that was interrupted")
        if not reused:
            compiler = Compiler(target, recipe, store.root / TIMING, on_progress, on_phase)
            base_key = key_of(source.base_identity(), base_scales) if source.loras else None
            base = store.get(draft.name_of(base_key)) if base_key else None
            records = make(draft, job, compiler, effort, base)
            assets = []
            if source.tokenizer and "text_encoder" in components:
                asset = draft.asset_path(source.tokenizer.name)
                asset.write_bytes(source.tokenizer.read_bytes())
                assets.append(draft.record(asset))
            made_from = {REQUEST: request.recorded()} | ({BASE: base_key} if base_key else {})
            draft.finish(records, assets, source=identity | made_from)
    return draft.bundle, reused


def _prepared(request: BuildRequest) -> Bundle:
    """The prepared bundle that the request names. Raises UsageError for options that were settled when it was made."""
    bundle = Bundle.open(request.model)
    manifest = bundle.manifest
    if manifest.is_compiled:
        raise UsageError(f"{bundle.path} is compiled already; give a model to build another bundle")
    settled = BuildRequest(request.model, output=request.output)
    if request not in (settled, replace(settled, target=manifest.target)):
        raise UsageError(
            f"{bundle.path} was prepared for {manifest.target} in {manifest.recipe}; leave all options but --output out"
        )
    return bundle


def _components(source: ModelSource, asked: tuple[str, ...] | None) -> tuple[Component, ...]:
    there = source.spec.components
    if asked is None:
        return there
    unknown = [name for name in asked if name not in get_args(Component) or name not in there]
    if unknown or not asked:
        wrong = f"has no component {', '.join(map(repr, unknown))}" if unknown else "cannot be built without components"
        raise UsageError(f"{source.spec.name} {wrong}; it has {', '.join(there)}")
    return tuple(name for name in there if name in asked)


def _absolute(text: str) -> str:
    return str(Path(text).absolute()) if text not in FAMILY and Path(text).exists() else text


def _report(bundle: Bundle, reused: bool, effort: Effort, total: float, left: str | None) -> BuildReport:
    manifest = bundle.manifest
    return BuildReport(
        bundle=str(bundle.path),
        target=manifest.target,
        model=manifest.model.name,
        precision=manifest.recipe,
        reused=reused,
        components=tuple(
            ComponentReport(
                record.name, record.plan.file, record.plan.bytes, effort.seconds.get(record.name), record.layers
            )
            for record in manifest.components
        ),
        weights_bytes=sum(record.weights.bytes for record in manifest.components if record.weights),
        seconds=round(total, 2),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + effort.helpers_peak_rss_bytes,
        left=left,
    )


def _code_digest() -> str:
    """Digest of the code that makes graphs, weight files and plans: a change there makes another bundle."""
    digest = hashlib.sha256()
    compiling = [ENGINES / name for name in ("components.py", "shapes.py", "tensorrt.py")]
    reading = [PACKAGE / f"{name}.py" for name in ("checkpoint", "naming", "quantized", "tensor_file")]
    reading += [PACKAGE / "lora" / f"{name}.py" for name in ("file", "folding", "keys")]
    for file in sorted([*EXPORT.glob("*.py"), *EXPORT.glob("modules/*.py"), *compiling, *reading]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
