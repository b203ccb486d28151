"""Choice: which bundles this machine runs, and which of a model's it runs when none is named."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flux2_trt.errors import BundleError
from flux2_trt.runtime.engine import CPU, PLANS, Backend
from flux2_trt.store import Store


def runnable_targets() -> tuple[str, ...]:
    """Those of this machine's GPUs, the first GPU first, and the CPU."""
    from engines.targets import TARGETS
    from flux2_trt.doctor import find_gpus

    gpus, _ = find_gpus()
    fitting = [name for gpu in gpus for name, target in TARGETS.items() if target.device([gpu])]
    return (*dict.fromkeys(fitting), CPU)


def find_runnable(store: Store, model: str, backend: Backend = PLANS) -> Path:
    """The newest bundle of a model for the best device of this machine; partial bundles and synthetic weights are
    passed over, and for `plans` those that are only prepared.

    Raises BundleError with the build command where there is none.
    """
    if any(bundle.model == model and bundle.target != CPU for bundle in store.list()):
        for target in runnable_targets():
            with suppress(BundleError):
                return store.find(model, target, makes_pictures=True, compiled=target == CPU or backend == PLANS)
    return store.find(model, CPU, makes_pictures=True)
