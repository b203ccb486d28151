"""Plans of TensorRT and TensorRT-RTX on a GPU: the part of the API that `tensorrt` 10.x, 11.x and `tensorrt_rtx` share.

Compiled against both bindings, never run: TensorRT-RTX refuses Hopper, and no other GPU was at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from flux2_trt.errors import BundleError, DeviceError
from flux2_trt.manifest import build_command
from flux2_trt.runtime.device import Address, Stream
from flux2_trt.runtime.kernels import KernelFile
from flux2_trt.runtime.plan import Shape

EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}


class TensorRTPlan:
    """A plan that the GPU of this process has accepted.

    `data`: the plan, whose digest was checked: it is executable content. `kernels`: where TensorRT-RTX keeps those that
    it makes on this machine, so that they are made once. Raises BundleError with the compiler's own words where it
    is refused, DeviceError where the package is missing.
    """

    def __init__(self, compiler: str, data: bytes, name: str, kernels: KernelFile | None = None) -> None:
        self._trt, self.name = _module(compiler), name
        self._log = _log_of(compiler)
        runtime = self._trt.Runtime(self._log)  # host code in plans stays forbidden, which is its default
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(
                f"{compiler} {self._trt.__version__} refuses the plan of {name}: {self._log.last_error}; build it with "
                f"this version for this GPU: {build_command()}"
            )
        self._runtime, self._engine = runtime, engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {each: engine.get_tensor_mode(each) for each in names}
        self.inputs = frozenset(each for each, mode in modes.items() if mode == self._trt.TensorIOMode.INPUT)
        self._strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._kernels = kernels
        self._configured = self._config() if hasattr(self._trt, "IRuntimeCache") else None

    def execution(self, shapes: Mapping[str, Shape], profile: int, stream: Stream) -> TensorRTExecution:
        """Raises DeviceError where no context can be made, or the shapes are not those of the profile."""
        engine = self._engine
        context = engine.create_execution_context(self._configured[0] if self._configured else self._strategy)
        if context is None:
            raise DeviceError(f"{self.name}: {self._log.last_error}; see what fits: flux2-trt plan")
        if not context.set_optimization_profile_async(profile, stream):
            raise DeviceError(f"{self.name} has no profile {profile}: {self._log.last_error}")
        of_weights = {name: tuple(engine.get_tensor_shape(name)) for name in self.inputs - set(shapes)}
        for name, shape in {**of_weights, **shapes}.items():
            if not context.set_input_shape(name, shape):
                raise DeviceError(f"{self.name} does not take {name} {list(shape)}: {self._log.last_error}")
        return TensorRTExecution(self.name, context, self._log)

    def close(self) -> None:
        """Saves what TensorRT-RTX compiled here; executions are closed before."""
        if self._configured and self._kernels:
            _, cache = self._configured
            made = bytes(cache.serialize())
            if made != self._kept:
                self._kernels.write(made)
        self._configured = self._engine = self._runtime = None

    def _config(self) -> tuple[Any, Any]:
        """TensorRT-RTX makes kernels for the shapes at hand when they first come, before the plan is captured."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._strategy)
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        self._kept = self._kernels.read() if self._kernels else b""
        if self._kept:
            cache.deserialize(self._kept)  # those of another GPU or driver are passed over
        config.set_runtime_cache(cache)
        return config, cache


class TensorRTExecution:
    """An `Execution`: a context of TensorRT whose shapes are set."""

    def __init__(self, name: str, context: Any, log: Any) -> None:
        self.name, self._context, self._log = name, context, log
        unset = context.infer_shapes()
        if unset:
            raise DeviceError(f"{name} wants shapes of {', '.join(unset)}")
        self.scratch_bytes = int(context.update_device_memory_size_for_shapes())

    def use_scratch(self, address: Address, size: int) -> None:
        self._context.set_device_memory(address, size)

    def bind(self, addresses: Mapping[str, Address]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise DeviceError(f"{self.name} does not take an address for {name}: {self._log.last_error}")

    def enqueue(self, stream: Stream) -> None:
        if not self._context.execute_async_v3(stream):
            raise DeviceError(f"{self.name} cannot be launched: {self._log.last_error}")

    def close(self) -> None:
        self._context = None


def _module(compiler: str) -> Any:
    advice = f"install it: pip install 'flux2-trt[{EXTRAS[compiler]}]'"
    try:
        return importlib.import_module(compiler)
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the libraries are not
        raise DeviceError(f"{compiler} cannot be loaded ({error}); {advice}") from error


@cache
def _log_of(compiler: str) -> Any:
    """The one log of a process: the library keeps the first that it is given."""
    trt: Any = _module(compiler)

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error; an exception must not pass through the library's frames."""

        def __init__(self) -> None:
            super().__init__()
            self.last_error = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = message

    return Log()
