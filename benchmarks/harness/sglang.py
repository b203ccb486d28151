"""SGLang's diffusion engine as a system, where it is installed: written to its `DiffGenerator`, and never run here.

It reads the prompt itself and draws its own noise, so its pictures are no measure of quality beside ours.
(sgl-project/sglang, python/sglang/multimodal_gen/runtime/entrypoints/diffusion_generator.py, at 03b8c17)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness.system import Drawn, Job, Setup
from flux2_trt.errors import Flux2Error
from flux2_trt.models import FAMILY, published_spec


class SglangSystem:
    def __init__(self, generator: Any, version: str) -> None:
        self._generator, self._version = generator, version

    @staticmethod
    def load(setup: Setup) -> SglangSystem:
        import sglang
        from sglang.multimodal_gen import DiffGenerator

        source = published_spec(setup.model).source if setup.model in FAMILY else None
        path = source.transformer_repo if source else setup.model
        if not path or setup.model == "tiny" or setup.checkpoint:
            raise Flux2Error("SGLang loads published models and diffusers folders only")
        return SglangSystem(DiffGenerator.from_pretrained(model_path=path, num_gpus=1), sglang.__version__)

    def draw(self, job: Job, watched: bool) -> Drawn:
        case = job.case
        if case.references:
            raise Flux2Error("references are not given to SGLang by this adapter")
        wanted = {
            "prompt": job.prompt,
            "width": case.width,
            "height": case.height,
            "num_inference_steps": case.steps,
            "num_outputs_per_prompt": case.batch,
            "seed": job.seed,
            "save_output": False,
        }
        result = self._generator.generate(sampling_params_kwargs=wanted)
        if result is None:
            raise Flux2Error("SGLang made no picture; its log says why")
        results = result if isinstance(result, list) else [result]
        frames = [np.asarray(each["frames"][0], np.uint8) for each in results]
        stages = {
            f"sglang {name}": float(value) / 1000.0
            for name, value in results[0]["timings"].get("stages", {}).items()
            if isinstance(value, (int, float))
        }
        return Drawn(np.stack(frames), stages)

    def facts(self) -> Mapping[str, Any]:
        return {"precision": "bf16", "compilers": [f"sglang {self._version}"]}
