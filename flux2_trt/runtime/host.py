"""HostRuntime: the components of a bundle by ONNX Runtime, or by torch to compare with, called one by one."""

from __future__ import annotations

from flux2_trt.bundle import Bundle
from flux2_trt.drawing import Drawing
from flux2_trt.errors import BundleError, Flux2Error
from flux2_trt.runtime.denoiser import Denoiser, HostLoop
from flux2_trt.runtime.engine import PLANS, Backend, Engine
from flux2_trt.spec import Component


class HostRuntime:
    """Engines load when they are first needed and stay."""

    overlaps = False
    computes_on_host = True

    def __init__(self, bundle: Bundle, backend: Backend = PLANS) -> None:
        self.bundle, self.backend = bundle, backend
        self._engines: dict[Component, Engine] = {}

    def arrange(self, drawing: Drawing, encodes: bool) -> None:
        """The operating system finds room."""

    def engine(self, component: Component) -> Engine:
        """Raises BundleError for a component that the bundle lacks, or that this backend does not run."""
        if component not in self._engines:
            load = self._plan_engine if self.backend == PLANS else self._torch_engine
            self._engines[component] = load(component)
        return self._engines[component]

    def denoiser(self) -> Denoiser:
        return HostLoop(self.engine("conditioning"), self.engine("transformer"))

    def close(self) -> None:
        self._engines.clear()

    def _plan_engine(self, component: Component) -> Engine:
        from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine

        weights = self.bundle.weights_path(component)
        if weights is None:
            raise BundleError(
                f"{self.bundle.path} has no weights of {component}; rebuild it: {self.bundle.build_command}"
            )
        return OnnxRuntimeEngine(self.bundle.plan_path(component), weights)

    def _torch_engine(self, component: Component) -> Engine:
        try:
            from flux2_trt.runtime.torch import TorchEngine
        except ModuleNotFoundError as error:
            raise Flux2Error(
                f"backend {self.backend} needs the package {error.name!r}, which is not installed; pip install torch, "
                "or leave the backend out"
            ) from error
        return TorchEngine.from_bundle(self.bundle, component, compiled=self.backend == "torch-compile")
