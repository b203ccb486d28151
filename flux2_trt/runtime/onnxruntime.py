"""The ONNX Runtime engine: the same graphs on any CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from flux2_trt.cores import usable_cores
from flux2_trt.errors import BundleError
from flux2_trt.runtime.engine import Arrays

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
SPINNING = "session.intra_op.allow_spinning"
NO_FUSED_QUANTIZATION = "session.disable_quant_qdq"
FP8_MARK = b"fp8_scale"  # a constant of every FP8 graph (`export.quantize`)
KNOWS_FP8 = (1, 32)
"""From this version on, ONNX Runtime fuses quantized products without taking FP8 for INT8."""
INT4_ACCURACY, FP32_INPUTS = "session.qdq_matmulnbits_accuracy_level", "1"  # its default rounds inputs to 8 bits


@cache
def _share_threads() -> bool:
    """Make the pool of this process, or find one that is there; False where ONNX Runtime is too old for one."""
    make = getattr(onnxruntime, "set_global_thread_pool_sizes", None)
    if make is None:
        return False
    with suppress(onnxruntime.capi.onnxruntime_pybind11_state.Fail):  # there is a pool already
        make(_threads(), 1)
    return True


def _threads() -> int:
    """0, which is a thread for each core of the machine, or as many as the cores that this process is kept on.

    ONNX Runtime does not see that itself, and two threads on one core that wait by spinning take twice the time.
    """
    usable = usable_cores()
    return 0 if usable == os.cpu_count() else usable


class OnnxRuntimeEngine:
    """A graph whose weights lie in a file beside it. Raises BundleError where ONNX Runtime refuses it.

    All engines of the process share one pool of threads: components run one after another, and a pool of its own for
    each, whose threads wait by spinning, costs a third of the speed on two cores.
    """

    def __init__(self, plan: Path, weights: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if _share_threads():
            options.use_per_session_threads = False
        else:
            options.add_session_config_entry(SPINNING, "0")
        options.add_session_config_entry(WEIGHTS_FOLDER, str(weights.parent))
        options.add_session_config_entry(INT4_ACCURACY, FP32_INPUTS)
        data = plan.read_bytes()
        version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
        if version < KNOWS_FP8 and FP8_MARK in data:
            options.add_session_config_entry(NO_FUSED_QUANTIZATION, "1")
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # pybind exceptions of ONNX Runtime share no base class
            reason = str(error).splitlines()[0]
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {plan}: {reason}; build the bundle again, or "
                "update it: pip install -U onnxruntime"
            ) from error
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))
