"""The TensorRT compilers: a graph and its profiles to a plan.

`tensorrt` 10.x and 11.x and `tensorrt_rtx` share the API that is used here. TensorRT-RTX compiles ahead of time for a
compute capability and needs no GPU; TensorRT compiles for the GPU that it runs on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engines.layers import LayerReport, report_from_log
from engines.shapes import Profile, shape_of
from engines.targets import Target
from engines.timing_cache import TimingCache
from export.graph import Graph
from flux2_trt.errors import Flux2Error, Interrupted
from flux2_trt.spec import Component

PACKAGES = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
"""Module of each compiler and the extra of this package that installs it."""

DECOMPOSABLE: tuple[Component, ...] = ("vae_encoder", "vae_decoder")
"""Components whose attention has one head of 512 channels, for which no fused kernel exists; the others' must fuse."""

OnPhase = Callable[[str, int, int], bool]
"""Called with a phase of the build, its steps that are done and all of them; False cancels the build."""


@dataclass(frozen=True)
class Compiled:
    """A plan and what is in it."""

    plan: Any
    report: LayerReport


def load_compiler(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises Flux2Error that says how to install it."""
    advice = f"pip install 'flux2-trt[{PACKAGES[name]}]'"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Flux2Error(
            f"this target needs {name}, which cannot be imported ({error}); install it: {advice}"
        ) from error
    except OSError as error:  # the bindings are there, the libraries are not
        raise Flux2Error(f"the libraries of {name} cannot be loaded ({error}); install them: {advice}") from error


def compile_plan(
    graph: Graph,
    profiles: Sequence[Profile],
    target: Target,
    on_phase: OnPhase = lambda *_: True,
    model_file: Path | None = None,
    timing_cache: TimingCache | None = None,
) -> Compiled:
    """Compile `graph` for `target`; its weights and scales are inputs of the plan.

    `model_file`: the same graph with its weights and scales as constants, to embed them in the plan.

    Raises Flux2Error with the compiler's own words where it refuses, Interrupted where `on_phase` cancelled.
    """
    trt = load_compiler(target.compiler)
    log = _log_of(target.compiler)
    log.begin()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    read = parser.parse_from_file(str(model_file)) if model_file else parser.parse(graph.model.SerializeToString())
    if not read:
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise Flux2Error(f"{target.compiler} cannot read the graph of {graph.component}: {reasons}")
    if graph.component in DECOMPOSABLE:
        _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    monitor = _progress_monitor(trt, log, on_phase)
    config.progress_monitor = monitor
    if target.ahead_of_time and target.compute_capability:
        capability = f"SM{target.compute_capability.replace('.', '')}"
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(builder, graph, profile))
    if timing_cache:
        timing_cache.load(config)
    plan = builder.build_serialized_network(network, config)
    if log.stopped:
        raise log.stopped
    if plan is None:
        if monitor.cancelled:
            raise Interrupted(f"the build of {graph.component} was cancelled")
        raise Flux2Error(f"{target.compiler} cannot compile {graph.component} for {target.name}: {log.last_error}")
    if timing_cache:
        timing_cache.save(config)
    return Compiled(plan, report_from_log(log.messages))


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # the bindings give the base class
            layer.attention.decomposable = True


def _optimization_profile(builder: Any, graph: Graph, profile: Profile) -> Any:
    optimization = builder.create_optimization_profile()
    inputs = {value.name for value in graph.model.graph.input}
    for name, shape in graph.shapes().items():
        if name in inputs and any(isinstance(side, str) for side in shape["shape"]):
            optimization.set_shape(name, *shape_of(shape["shape"], profile))
    return optimization


@cache
def _log_of(compiler: str) -> Any:
    """The one log of a process: the library keeps the first that it is given."""
    return _new_log(load_compiler(compiler))


def _new_log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps every message of a build.

        A signal of the user's can arrive while the library calls us, and an exception must not pass through its frames:
        `stopped` keeps it until the build has returned.
        """

        def __init__(self) -> None:
            super().__init__()
            self.begin()

        def begin(self) -> None:
            self.messages: list[str] = []
            self.last_error = "it gave no reason"
            self.stopped: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                self.messages.append(message)
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    self.last_error = message
            except BaseException as error:  # noqa: BLE001 (raised again by `compile_plan`)
                self.stopped = error

    return Log()


def _progress_monitor(trt: Any, log: Any, on_phase: OnPhase) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells how far each phase of a build is, and stops the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self.cancelled |= not on_phase(phase_name, step + 1, self.steps.get(phase_name, step + 1))
            except BaseException as error:  # noqa: BLE001 (raised again by `compile_plan`)
                log.stopped = error
            return not self.cancelled and log.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
