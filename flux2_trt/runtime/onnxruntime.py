"""The ONNX Runtime engine: the same graphs on any CPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from flux2_trt.errors import BundleError
from flux2_trt.runtime.engine import Arrays

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
SPINNING = "session.intra_op.allow_spinning"


@cache
def _share_threads() -> bool:
    """Make the pool of this process, or find one that is there; False where ONNX Runtime is too old for one."""
    make = getattr(onnxruntime, "set_global_thread_pool_sizes", None)
    if make is None:
        return False
    with suppress(onnxruntime.capi.onnxruntime_pybind11_state.Fail):  # there is a pool already
        make(0, 1)
    return True


class OnnxRuntimeEngine:
    """A graph whose weights lie in a file beside it. Raises BundleError where ONNX Runtime refuses it.

    Without a number of `threads` all engines of the process share one pool: components run one after another, and a
    pool of its own for each, whose threads wait by spinning, costs a third of the speed on two cores.
    """

    def __init__(self, plan: Path, weights: Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        elif _share_threads():
            options.use_per_session_threads = False
        else:
            options.add_session_config_entry(SPINNING, "0")
        options.add_session_config_entry(WEIGHTS_FOLDER, str(weights.parent))
        try:
            self.session = onnxruntime.InferenceSession(plan.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # pybind exceptions of ONNX Runtime share no base class
            reason = str(error).splitlines()[0]
            raise BundleError(f"ONNX Runtime cannot load {plan}: {reason}; build the bundle again") from error
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))
