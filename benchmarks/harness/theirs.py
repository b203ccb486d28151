"""diffusers' pipeline as a system, eager or compiled, with the weights that our bundle was built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.baselines import diffusers_pipeline
from benchmarks.harness.clock import Clock, CudaClock, HostClock, Timeline
from benchmarks.harness.system import Drawn, Job, Setup
from engines.sources import resolve_source
from flux2_trt.latents import unpack
from flux2_trt.spec import ModelSpec


class DiffusersSystem:
    """Timed where its pipeline calls the transformer and the autoencoder, which costs microseconds.

    In bf16 on a GPU, as its users run it, unless it is to be `wide`; in fp32 on a CPU.
    """

    def __init__(self, pipeline: Any, spec: ModelSpec, clock: Clock, compiled: bool) -> None:
        self._pipeline, self._spec, self._clock, self._compiled = pipeline, spec, clock, compiled
        self._dtype: torch.dtype = pipeline.transformer.dtype
        self._timeline = Timeline(clock)
        pipeline.transformer.forward = self._timed(pipeline.transformer.forward, lambda: self._timeline.run())
        pipeline.vae.decode = self._timed(pipeline.vae.decode, lambda: self._timeline.stage("decode"))
        pipeline.vae.encode = self._timed(pipeline.vae.encode, lambda: self._timeline.stage("encode"))

    @staticmethod
    def load(setup: Setup, compiled: bool = False, wide: bool = False) -> DiffusersSystem:
        source = resolve_source(setup.model, setup.checkpoint)
        pipeline = diffusers_pipeline(source.spec, source.open)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            pipeline.to("cuda", torch.float32 if wide else torch.bfloat16)
        if compiled:
            pipeline.transformer = torch.compile(pipeline.transformer)
            pipeline.vae.decode = torch.compile(pipeline.vae.decode)
            pipeline.vae.encode = torch.compile(pipeline.vae.encode)
        return DiffusersSystem(pipeline, source.spec, CudaClock() if on_gpu else HostClock(), compiled)

    @staticmethod
    def _timed(call: Callable[..., Any], during: Callable[[], Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            with during():
                return call(*arguments, **named)

        return timed

    @torch.inference_mode()
    def draw(self, job: Job, watched: bool) -> Drawn:
        self._timeline = timeline = Timeline(self._clock)
        latents: list[Any] = []

        def at_end(_: object, step: int, level: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            with timeline.end_of_step():
                latents.append(tensors["latents"][:1].float().cpu().numpy())
            return {}

        images = self._pipeline(**self._arguments(job), **({"callback_on_step_end": at_end} if watched else {})).images
        pictures = np.stack([np.asarray(image) for image in images])
        self._clock.settle()
        seconds = timeline.stage_seconds()
        if timeline.runs and "decode" in timeline.stages:
            seconds["denoise"] = self._clock.seconds(timeline.runs[0][0], timeline.stages["decode"][0][0])
        steps, gaps = timeline.steps() if watched else ([], [])
        height, width = job.noise.shape[2:]
        found = tuple(unpack(tokens, height, width)[0] for tokens in latents)
        return Drawn(pictures, seconds, tuple(steps), tuple(gaps), found)

    def _arguments(self, job: Job) -> dict[str, Any]:
        case, sampling = job.case, self._spec.sampling
        arguments: dict[str, Any] = {
            "prompt_embeds": torch.from_numpy(job.embeds),
            "latents": torch.from_numpy(job.noise),
            "num_inference_steps": case.steps,
            "guidance_scale": sampling.guidance_scale,
            "width": case.width,
            "height": case.height,
        }
        if job.unconditional is not None:
            arguments["negative_prompt_embeds"] = torch.from_numpy(job.unconditional).repeat(case.batch, 1, 1)
        if job.references:
            arguments["image"] = [Image.fromarray(pixels) for pixels in job.references]
        place = {"device": self._pipeline.device, "dtype": self._dtype}
        return {name: value.to(**place) if torch.is_tensor(value) else value for name, value in arguments.items()}

    def facts(self) -> Mapping[str, Any]:
        return {
            "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._dtype],
            "compilers": [f"torch {torch.__version__}" + (" inductor" if self._compiled else " eager")],
            "device": str(self._pipeline.device),
            "torch_threads": torch.get_num_threads(),
            "weights_bytes": sum(
                each.numel() * each.element_size()
                for part in (self._pipeline.transformer, self._pipeline.vae)
                for each in part.parameters()
            ),
        }
