"""Our pipeline as a system: its plans, or its modules by torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness.clock import Clock, CudaClock, HostClock, Timeline
from benchmarks.harness.system import Drawn, Job, Setup
from flux2_trt.bundle import Bundle
from flux2_trt.drawing import Drawing
from flux2_trt.errors import Flux2Error
from flux2_trt.imprint import Imprint, imprint
from flux2_trt.pipeline import Flux2Pipeline
from flux2_trt.provenance import Parameters
from flux2_trt.runtime.denoiser import Denoiser, HostLoop
from flux2_trt.runtime.engine import Arrays, Backend, Engine, Runtime
from flux2_trt.runtime.host import HostRuntime
from flux2_trt.spec import Component
from flux2_trt.version import own_version
from flux2_trt.watermark import MESSAGE, MIN_PIXELS, embed

STAGES = {
    "text_encoder": "text",
    "conditioning": "conditioning",
    "vae_encoder": "encode",
    "denoise": "denoise",
    "vae_decoder": "decode",
}
"""The pipeline's names of stages, and those of results."""


class WatchedRuntime:
    """A runtime that notes when the transformer runs while it has a timeline: in a loop on the host. A loop on a device
    is left as it is, and tells of its steps alone."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.timeline: Timeline | None = None

    @property
    def overlaps(self) -> bool:
        return self._runtime.overlaps

    @property
    def computes_on_host(self) -> bool:
        return self._runtime.computes_on_host

    def arrange(self, drawing: Drawing, encodes: bool) -> None:
        self._runtime.arrange(drawing, encodes)

    def engine(self, component: Component) -> Engine:
        engine = self._runtime.engine(component)
        if component == "transformer" and self.timeline is not None:
            return _WatchedEngine(engine, self.timeline)
        return engine

    def denoiser(self) -> Denoiser:
        if self.timeline is None or not isinstance(self._runtime, HostRuntime):
            return self._runtime.denoiser()
        return HostLoop(self.engine("conditioning"), self.engine("transformer"))

    def close(self) -> None:
        self._runtime.close()


class _WatchedEngine:
    def __init__(self, engine: Engine, timeline: Timeline) -> None:
        self._engine, self._timeline = engine, timeline

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        with self._timeline.run():
            return self._engine.run(inputs)


class PipelineSystem:
    """A bundle, opened, by its plans or by torch. `runtime`: in place of the one that `backend` names."""

    def __init__(self, bundle: Bundle, backend: Backend = "plans", runtime: Runtime | None = None) -> None:
        self._watched = WatchedRuntime(runtime or Flux2Pipeline(bundle, backend).runtime)
        self.pipeline = Flux2Pipeline(bundle, backend, self._watched)
        self._clock = clock_of(backend)

    @staticmethod
    def load(setup: Setup, backend: Backend) -> PipelineSystem:
        if setup.bundle is None:
            raise Flux2Error(f"{setup.name} has no bundle to load")
        system = PipelineSystem(Bundle.open(setup.bundle), backend)
        for component in system.pipeline.spec.components:
            system.pipeline.engine(component)
        return system

    def draw(self, job: Job, watched: bool) -> Drawn:
        return self._watch(job) if watched else self._draw(job)

    def _draw(self, job: Job) -> Drawn:
        output = self.pipeline(**self._arguments(job))
        pictures = np.stack([np.asarray(image) for image in output.images])
        return Drawn(pictures, _stages(output.timings, job))

    def _watch(self, job: Job) -> Drawn:
        """With what a picture needs before and after the pipeline: its text, watermark and file."""
        timeline, latents = Timeline(self._clock), []

        def at_end(_: object, step: int, level: float, tensors: Mapping[str, Any]) -> None:
            found = tensors["latents"]  # waits for a device: the step is over then
            with timeline.end_of_step():
                latents.append(np.array(found[0], np.float32))

        self._watched.timeline = timeline
        try:
            drawn = self._with_steps(job, timeline, at_end)
        finally:
            self._watched.timeline = None
        return replace(drawn, latents=tuple(latents))

    def _with_steps(self, job: Job, timeline: Timeline, at_end: Any) -> Drawn:
        output = self.pipeline(**self._arguments(job), callback_on_step_end=at_end)
        pictures = np.stack([np.asarray(image) for image in output.images])
        around = Timeline(HostClock())
        if job.prompt and self.pipeline.spec.text_encoder is not None:
            with around.stage("text"):
                self.pipeline.encode_prompt([job.prompt])
        marked = pictures[0]
        if marked.shape[0] * marked.shape[1] >= MIN_PIXELS:
            with around.stage("watermark"):
                marked = embed(marked, MESSAGE)
        with around.stage("png"):
            imprint(marked, "PNG", self._parameters(job), Imprint())
        self._clock.settle()
        steps, gaps = timeline.steps(len(pictures))
        seconds = _stages(output.timings, job)
        return Drawn(pictures, seconds | around.stage_seconds(), tuple(steps), tuple(gaps))

    def _arguments(self, job: Job) -> dict[str, Any]:
        case = job.case
        text: dict[str, Any] = {"prompt_embeds": job.embeds}
        if job.reads_prompt:
            text = {"prompt": [job.prompt] * case.batch}
        return {
            **text,
            "image": [Image.fromarray(pixels) for pixels in job.references] or None,
            "width": case.width,
            "height": case.height,
            "num_inference_steps": case.steps,
            "latents": job.noise,
            "seed": job.seed,
        }

    def _parameters(self, job: Job) -> Parameters:
        spec = self.pipeline.spec
        return Parameters(
            prompt=job.prompt,
            seed=job.seed,
            width=job.case.width,
            height=job.case.height,
            num_inference_steps=job.case.steps,
            guidance_scale=spec.sampling.guidance_scale,
            model=spec.name,
            model_key=self.pipeline.bundle.manifest.key,
            version=own_version(),
        )

    def facts(self) -> Mapping[str, Any]:
        manifest = self.pipeline.bundle.manifest
        weights = {record.weights.file: record.weights for record in manifest.components if record.weights}
        return {
            "bundle": manifest.key,
            "target": manifest.target,
            "precision": manifest.recipe,
            "compilers": sorted({f"{each.compiler} {each.compiler_version}" for each in manifest.components}),
            "plans": {record.name: record.plan.sha256 for record in manifest.components},
            "weights": {path: record.sha256 for path, record in weights.items()},
            "weights_bytes": sum(record.bytes for record in weights.values()),
            "plan_bytes": sum(record.plan.bytes for record in manifest.components),
        }


def _stages(timings: Mapping[str, float], job: Job) -> dict[str, float]:
    """Seconds of those stages that there was something to do in."""
    idle = set() if job.reads_prompt else {"text"}
    idle |= set() if job.references else {"encode"}
    return {STAGES[name]: value for name, value in timings.items() if name in STAGES and STAGES[name] not in idle}


def clock_of(backend: Backend) -> Clock:
    """Torch's work on a GPU is timed by events; of plans on one, the host waits for every step that is watched."""
    if backend == "plans":
        return HostClock()
    import torch

    return CudaClock() if torch.cuda.is_available() else HostClock()
