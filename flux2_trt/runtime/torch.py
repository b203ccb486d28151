"""The torch engine: the modules that plans are traced from, run by torch itself.

Something to compare a plan with, that no tracer, no compiler and no runtime of ours has touched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray

from export.examples import TORCH_DTYPES
from export.modules import build_module, load_module
from export.recipes import RECIPES
from export.tensor_source import RandomSource, TensorSource, WeightFile
from flux2_trt.bundle import Bundle
from flux2_trt.errors import BundleError, Flux2Error
from flux2_trt.inventory import expected_tensors
from flux2_trt.manifest import SYNTHETIC, build_command
from flux2_trt.naming import FAMILY_OF
from flux2_trt.runtime.engine import Arrays
from flux2_trt.spec import Component, ModelSpec

OUTPUTS: Mapping[Component, tuple[str, ...]] = {
    "text_encoder": ("prompt_embeds",),
    "conditioning": ("modulation", "text_tokens"),
    "transformer": ("updated_latents", "next_step"),
    "vae_encoder": ("latents",),
    "vae_decoder": ("image",),
}
IN_COMPUTE_DTYPE = frozenset(OUTPUTS["conditioning"])
"""What one component hands to another in the dtype of their weights; all else is fp32, or whole numbers."""

_log = logging.getLogger(__name__)


@cache
def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    _log.warning("torch runs on cuda, where this backend was never tried: there was no GPU where it was written")
    return "cuda"


class TorchEngine:
    """A component with weights of `source` in `dtype`, on a CUDA device where there is one, else on the CPU.

    `compiled`: by `torch.compile`, when it is first run. Outputs in bf16 are given as fp32.
    """

    def __init__(
        self,
        component: Component,
        spec: ModelSpec,
        source: TensorSource,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.component: Component = component
        self.dtype = dtype
        self.device = _device()
        module = load_module(lambda: build_module(component, spec), source, self.device, dtype)
        self.compute: Any = torch.compile(module) if compiled else module

    @staticmethod
    def from_bundle(bundle: Bundle, component: Component, compiled: bool = False) -> TorchEngine:
        """With the weights of a bundle for any target, in its precision.

        Raises BundleError for one that is quantized, was built without the component, or keeps its weights in plans.
        """
        manifest = bundle.manifest
        recipe = RECIPES[manifest.recipe]
        if recipe.linears or recipe.attention:
            raise BundleError(
                f"{bundle.path} is in {recipe.name}, and torch runs fp32 and bf16; build one in these, for example: "
                f"{build_command(manifest.model.name, 'cpu')} --precision fp32"
            )
        parts = [record.name for record in manifest.components if record.name.partition(".")[0] == component]
        weights = bundle.weights_path(parts[0] if parts else component)
        source: TensorSource
        if weights is not None:
            source = WeightFile(weights)
        elif SYNTHETIC in manifest.source:
            tensors = expected_tensors(manifest.model, FAMILY_OF[component])
            source = RandomSource(manifest.source[SYNTHETIC], tensors)
        else:
            raise BundleError(
                f"{bundle.path} keeps the weights of {component} in its plan; build it with --weights bound"
            )
        return TorchEngine(component, manifest.model, source, TORCH_DTYPES[recipe.dtype], compiled)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Raises Flux2Error where `torch.compile` fails, as it does without a C++ compiler."""
        tensors = {name: self._tensor(name, values) for name, values in inputs.items()}
        try:
            results = self.compute(**tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
            raise Flux2Error(f"torch.compile fails on {self.component}: {reason}; use backend torch") from error
        results = results if isinstance(results, tuple) else (results,)
        return {
            name: (result.float() if result.dtype == torch.bfloat16 else result).cpu().numpy()
            for name, result in zip(OUTPUTS[self.component], results, strict=True)
        }

    def _tensor(self, name: str, values: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values).to(self.device)
        return tensor.to(self.dtype) if name in IN_COMPUTE_DTYPE else tensor
