"""FLUX.2 pictures from compiled engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux2_trt.pipeline import Flux2Pipeline

__all__ = ["Flux2Pipeline"]


def __getattr__(name: str) -> Any:
    """`Flux2Pipeline`, imported when it is asked for: the command line's help does without it."""
    if name in __all__:
        from flux2_trt import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
