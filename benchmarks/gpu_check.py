"""What has to be seen on a real GPU: `python -m benchmarks.gpu_check`.

Runs the tests that need one, draws `tiny`'s pictures on it beside the CPU's, and measures the denoising loop of real
sizes with random weights, beside diffusers on the same GPU. What the machine cannot do is left out, and said. Writes
`results/GPU-DATE.json` after every part, so that nothing is lost.

Plans are compiled where the compiler for this GPU is installed; else their graphs run by torch, as `--backend torch`
does.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu.device import TimedDevice
from benchmarks.gpu.loops import Case, measure
from benchmarks.harness.identity import identity
from benchmarks.harness.monitor import Monitor
from engines.build import BuildRequest, build
from engines.targets import TARGETS, Target
from engines.tensorrt import load_compiler
from flux2_trt.bundle import Bundle
from flux2_trt.errors import Flux2Error
from flux2_trt.manifest import SYNTHETIC
from flux2_trt.models import published_spec
from flux2_trt.outputs import write_file
from flux2_trt.runtime.gpu import GpuRuntime, LoadPlan, MakeWeights, Residency
from flux2_trt.runtime.torch_plan import TorchPlans
from flux2_trt.runtime.weights import Weights

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
SIZES = (Case(1024, 1024), Case(512, 512), Case(1024, 1024, 1), Case(1024, 1024, 2), Case(2048, 2048))
BATCHES = (Case(512, 512), Case(512, 512, batch=4))
OVERLAPPING_SIDES = (512, 1024)
OF_A_LOOP: dict[str, Any] = {
    "checkpoint": "random:0",
    "components": ("conditioning", "transformer"),
    "max_references": max(case.references for case in SIZES),
    "max_batch": max(case.batch for case in BATCHES),
}
PARTS = ("rates", "uploads", "loops", "theirs", "pictures", "tests", "overlap")


def main(
    parts: Annotated[str, typer.Option(help=f"Of {','.join(PARTS)}.")] = ",".join(PARTS),
    models: Annotated[
        str,
        typer.Option(
            help="MODEL:PRECISION[:half|:streamed][:embedded][:eager][:batches][:CASES], with commas between them."
        ),
    ] = (
        "dev:fp8,dev:fp8:half:1,dev:fp8:streamed:1,klein-4b:bf16:eager:1,klein-4b:fp8,dev:bf16:1,"
        "klein-4b:fp8:embedded:1,dev:fp8:streamed:batches"
    ),
    overlapping: Annotated[str, typer.Option(help="MODEL:PRECISION, with commas between them.")] = "klein-4b:fp8",
    sizes: Annotated[int, typer.Option(help="How many of the sizes.")] = len(SIZES),
    seconds: Annotated[float, typer.Option(help="No part begins after so many seconds.")] = 540.0,
    store: Annotated[Path | None, typer.Option(help="Bundles from here, and to here.")] = None,
    output: Annotated[Path | None, typer.Option(help="The result (default: results/GPU-DATE.json).")] = None,
) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(store or Path(folder), output, begun + seconds)
        for name in parts.split(","):
            asked = {"models": models.split(","), "sizes": SIZES[:sizes], "overlapping": overlapping.split(",")}
            check.part(name, asked)
        print(f"{check.path}, {time.monotonic() - begun:.0f} s")


class Check:
    def __init__(self, store: Path, output: Path | None, deadline: float) -> None:
        self.device, self.store, self.deadline = TimedDevice(), store, deadline
        self.target = next(
            (t.name for t in TARGETS.values() if t.compute_capability and t.device([self.device])), "h100"
        )
        self.compiler = _compiler_of(TARGETS[self.target])
        name = re.sub(r"[^a-z0-9]+", "-", self.device.name.lower()).strip("-")
        self.path = output or RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
        self.free = self.device.free_bytes()
        self.result: dict[str, Any] = {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "identity": identity(Monitor.find()),
            "gpu": {
                "name": self.device.name,
                "compute_capability": self.device.compute_capability,
                "multiprocessors": self.device.multiprocessors,
                "free_bytes": self.free,
            },
            "target": self.target,
            "plans_by": self.compiler or "torch",
            "left_out": [],
        }

    def part(self, name: str, asked: dict[str, Any]) -> None:
        rows: Generator[Any] = getattr(self, f"_{name}")(asked)
        while True:
            if time.monotonic() > self.deadline:
                rows.close()
                self._leave_out(f"{name}: no time was left for more")
                return
            try:
                row = next(rows)
            except StopIteration:
                return
            except (Flux2Error, RuntimeError, ImportError) as error:
                traceback.print_exc()
                self._leave_out(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                return
            print(name, json.dumps(row), flush=True)
            self.result.setdefault(name, []).append(row)
            self._write()

    def _leave_out(self, why: str) -> None:
        print("left out:", why, flush=True)
        self.result["left_out"].append(why)
        self._write()

    def _write(self) -> None:
        write_file(self.path, json.dumps(self.result, indent=1).encode(), overwrite=True)

    def _rates(self, _: dict[str, Any]) -> Iterator[Any]:
        from benchmarks.gpu.rates import rates

        yield rates()

    def _uploads(self, asked: dict[str, Any]) -> Iterator[Any]:
        from flux2_trt.runtime.synthetic import synthetic_weights

        model, precision, *_ = asked["models"][0].split(":")
        bundle = self._synthetic(model, precision)
        source = synthetic_weights(bundle, bundle.component("transformer.prologue"))
        blocks = [name for name in source.sizes if name.startswith("double_blocks.")]
        weights = Weights(self.device, source, blocks)
        for _ in range(2):  # the first makes the numbers up
            begun = time.perf_counter()
            weights.acquire()
            seconds = time.perf_counter() - begun
            weights.release()
            weights.unload()
        size = sum(source.sizes[name] for name in blocks)
        yield {"model": model, "precision": precision, "bytes": size, "gb_per_s": size / seconds / 1e9}

    def _tests(self, _: dict[str, Any]) -> Iterator[Any]:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n0", "-p", "no:cacheprovider", "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if re.search(r"^FAILED|^ERROR| in \d", line)]
        yield {"exit": done.returncode, "lines": lines[-20:], "errors": done.stderr.splitlines()[-3:]}

    def _pictures(self, _: dict[str, Any]) -> Iterator[Any]:
        from benchmarks.gpu.pictures import compare, draw, likeness
        from flux2_trt.pipeline import Flux2Pipeline

        def on_cpu(precision: str) -> Any:
            pipeline = Flux2Pipeline(self._bundle("tiny", "cpu", precision))
            drawn.setdefault(precision, draw(pipeline, drawn["fp32"][0][1][0] if drawn else None))
            return drawn[precision]

        drawn: dict[str, Any] = {}
        reference = on_cpu("fp32")
        whole, all_streamed = Residency(), Residency(streamed=(2, 5))
        ways: list[tuple[str, str, Residency, bool, bool]] = [
            ("bf16", "whole", whole, True, False),
            ("bf16", "whole", whole, False, False),
            ("bf16", "whole", Residency(frozenset({"text_encoder", "transformer"})), True, False),
            ("bf16", "blocks", Residency(streamed=(1, 3)), True, False),
            ("bf16", "blocks", all_streamed, True, True),
            ("fp8", "whole", whole, True, False),
            ("fp8", "blocks", Residency(streamed=(1, 3)), True, True),
            ("fp8-attention", "whole", whole, True, False),
        ]
        for precision, plans, residency, graphs, compiled in ways:
            load = self._loader(compiled)
            bundle = self._bundle("tiny", self.target, precision, plans=plans, prepare=not self.compiler)
            runtime = GpuRuntime(bundle, self.device, residency=residency, graphs=graphs, load_plan=load)
            started = time.perf_counter()
            found = likeness(runtime, reference)
            took = time.perf_counter() - started
            runtime.close()
            row = {"precision": precision, "plans": plans, "swapped": sorted(residency.swapped),
                   "streamed": residency.streamed, "graphs": graphs, "compiled": compiled, "seconds": took}  # fmt: skip
            row["from_cpu_fp32"] = asdict(found)
            if precision != "bf16":
                row["cpu_same_precision_from_cpu_fp32"] = asdict(compare(on_cpu(precision), reference))
            row["bytes_left_on_device"] = self.free - self.device.free_bytes()
            yield row

    def _loops(self, asked: dict[str, Any]) -> Iterator[Any]:
        for words in asked["models"]:
            try:
                yield from self._loops_of(words, asked["sizes"])
            except (Flux2Error, RuntimeError) as error:
                self._leave_out(f"loops of {words}: {error}")

    def _loops_of(self, words: str, cases: Sequence[Case]) -> Iterator[Any]:
        model, precision, *more = words.split(":")
        placement = "embedded" if "embedded" in more else "bound"
        if placement == "embedded" and not self.compiler:
            raise Flux2Error("weights are embedded in compiled plans, and no compiler for this GPU is here")
        bundle, weights = self._loop_bundle(model, precision, placement)
        spec, part = bundle.manifest.model.transformer, {"streamed": 1, "half": 2}
        count = next((int(word) for word in more if word.isdecimal()), None)
        cases = BATCHES if "batches" in more else cases[:count]
        divisor = next((part[word] for word in more if word in part), 0)
        blocks = (spec.num_double_blocks, spec.num_single_blocks)
        streamed = (blocks[0] // divisor, blocks[1] // divisor) if divisor else (0, 0)
        ways = [(True, True), (False, True), (False, False)] if "eager" in more else [(True, True)]
        if self.compiler:
            ways = [way for way in ways if way != (False, True)]
        for compiled, graphs in ways:
            runtime = GpuRuntime(
                bundle, self.device, residency=Residency(streamed=streamed), graphs=graphs,
                load_plan=self._loader(compiled), weights=weights,
            )  # fmt: skip
            try:
                for case in cases:
                    times = measure(runtime, self.device, case, self.target, graphs, self.free)
                    yield {"model": model, "precision": precision, "weights": placement, "streamed": streamed,
                           "graphs": graphs, "compiled": compiled, **asdict(times),
                           "fraction_of_floor": times.fraction_of_floor, "streamed_bytes": runtime.streamed_bytes,
                           }  # fmt: skip
            finally:
                runtime.close()
                del runtime
                gc.collect()
                torch.cuda.empty_cache()

    def _overlap(self, asked: dict[str, Any]) -> Iterator[Any]:
        from benchmarks.gpu.overlap import measure as measure_overlap

        for words in asked["overlapping"]:
            model, precision = words.split(":")
            bundle, weights = self._with_made_up_weights(model, precision, checkpoint="random:0")

            def make(overlaps: bool, bundle: Bundle = bundle, weights: MakeWeights = weights) -> GpuRuntime:
                load = self._loader(compiled=True)
                return GpuRuntime(bundle, self.device, overlaps=overlaps, load_plan=load, weights=weights)

            for pace in measure_overlap(make, OVERLAPPING_SIDES):
                yield {"model": model, "precision": precision, **asdict(pace)}

    def _theirs(self, asked: dict[str, Any]) -> Iterator[Any]:
        from benchmarks.gpu.theirs import measure as measure_theirs

        for model in dict.fromkeys(words.split(":")[0] for words in asked["models"]):
            for times in measure_theirs(published_spec(model), list(asked["sizes"][:3])):
                yield {"model": model, "precision": "bf16", **asdict(times)}

    def _loader(self, compiled: bool) -> LoadPlan | None:
        """None is the compiler's own."""
        return None if self.compiler else TorchPlans(compiled=compiled)

    def _synthetic(self, model: str, precision: str) -> Bundle:
        return self._bundle(model, self.target, precision, prepare=True, plans="blocks", **OF_A_LOOP)

    def _loop_bundle(self, model: str, precision: str, placement: str) -> tuple[Bundle, MakeWeights | None]:
        if placement == "embedded":
            return self._bundle(model, self.target, precision, weights="embedded", **OF_A_LOOP), None
        return self._with_made_up_weights(model, precision, plans="blocks", **OF_A_LOOP)

    def _with_made_up_weights(self, model: str, precision: str, **request: Any) -> tuple[Bundle, MakeWeights]:
        """Compiled where that can be done here; the graphs say what weights there are."""
        from flux2_trt.runtime.synthetic import synthetic_weights

        prepared = self._bundle(model, self.target, precision, prepare=True, **request)
        bundle = prepared
        if self.compiler:
            bundle = Bundle.open(build(BuildRequest(str(prepared.path), output=self.store), lambda _: None).bundle)
        return bundle, partial(synthetic_weights, prepared)

    def _bundle(self, model: str, target: str, precision: str, **request: Any) -> Bundle:
        """Built, or one of the store that is like it, whatever packages made that."""
        wanted = BuildRequest(model, target, precision=precision, output=self.store, **request)
        for path in sorted(self.store.glob(f"bundles/{model}-{precision}-{target}-*")):
            if _is_like(bundle := Bundle.open(path), wanted):
                return bundle
        return Bundle.open(build(wanted, lambda _: None).bundle)


def _is_like(bundle: Bundle, wanted: BuildRequest) -> bool:
    manifest = bundle.manifest
    components = {record.name.partition(".")[0]: record for record in manifest.components}
    placements = {record.weight_placement for record in components.values()}
    return (
        set(components) == set(wanted.components or manifest.model.components)
        and (len(components) < len(manifest.components)) == (wanted.plans == "blocks")
        and manifest.is_compiled != wanted.prepare
        and (SYNTHETIC in manifest.source) == (wanted.checkpoint is not None)
        and placements <= {wanted.weights or "bound", "external"}
    )


def _compiler_of(target: Target) -> str | None:
    """None where it cannot be loaded here."""
    try:
        load_compiler(target.compiler)
    except Flux2Error:
        return None
    return target.compiler


if __name__ == "__main__":
    typer.run(main)
