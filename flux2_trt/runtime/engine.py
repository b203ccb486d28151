"""Engine: a compiled component that can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

RUNNABLE_TARGET = "cpu"
"""The target whose plans this version has an engine for."""

Backend = Literal["plans", "torch", "torch-compile"]
"""What runs a bundle: its plans, or the modules that they are traced from, by torch, eager or compiled."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PLANS: Backend = "plans"

Arrays = dict[str, NDArray[Any]]


class Engine(Protocol):
    """One component's plan with its weights, loaded and ready. Names and shapes are in the bundle's manifest."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Inputs by name to outputs by name; the outputs are the caller's to keep."""
        ...
