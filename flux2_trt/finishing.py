"""Finishing: final latents become a picture, which is checked and handed on while the next one is denoised."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class PictureSettings:
    """What one picture is made with: `index` counts the pictures of a call from 0, `seed` is its own."""

    index: int
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float


PictureCallback = Callable[[PictureSettings, Any, "str | None"], None]
"""Gets a picture that it may keep, in the form of `output_type`, and why it was refused: it is black then."""


@dataclass(frozen=True)
class Finished:
    """A picture [1, ...], or its latents, and why it was refused."""

    values: NDArray[Any]
    refused: str | None


class InPlace(Executor):
    """Does what it is given at once, on the caller's thread, where it also raises."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def executor_of(threads: int, name: str) -> Executor:
    """`threads` threads with names that begin with `name`; none work in place."""
    return ThreadPoolExecutor(threads, name) if threads else InPlace()


class Ahead(Generic[T]):
    """What `make` gives for 0 to `count` - 1: made at once, or by `submit` each while the one before it is used."""

    def __init__(
        self, make: Callable[[int], T], count: int, submit: Callable[[Callable[[int], T], int], Future[T]] | None = None
    ) -> None:
        self._make, self._submit, self._count = make, submit or InPlace().submit, count
        self._made: list[Future[T]] = []
        self._begin(1 if submit else count)
        self._made[0].result()

    def __getitem__(self, index: int) -> T:
        """To be asked for in order."""
        self._begin(index + 2)
        return self._made[index].result()

    def _begin(self, until: int) -> None:
        for index in range(len(self._made), min(until, self._count)):
            self._made.append(self._submit(self._make, index))


class Finishing:
    """Pictures on their way from latents, in order; `overlaps`: by a thread, while the next one is denoised.

    `decode`: latents [1, C, h, w] to a picture [1, ...]. `hand_on`: a picture's number and it, to what came of it.
    A block that fails calls `stop` and starts no more work; its thread ends with it.
    """

    def __init__(
        self,
        decode: Callable[[Floats], NDArray[Any]],
        hand_on: Callable[[int, NDArray[Any]], Finished],
        stop: Callable[[], None],
        overlaps: bool,
    ) -> None:
        self._decode, self._hand_on, self._stop = decode, hand_on, stop
        self._executor = executor_of(1 if overlaps else 0, "finish")
        self._decoded: list[Future[NDArray[Any]]] = []
        self._finished: list[Future[Finished]] = []

    def decode(self, latents: Floats) -> None:
        self._decoded.append(self._executor.submit(self._decode, latents))

    def hand_on(self) -> None:
        """The picture that was decoded last."""
        index, decoded = len(self._finished), self._decoded[-1]
        self._finished.append(self._executor.submit(lambda: self._hand_on(index, decoded.result())))

    def beside(self, make: Callable[[int], T], index: int) -> Future[T]:
        """Other work for the thread, in its turn."""
        return self._executor.submit(make, index)

    def require_sound(self) -> None:
        """Raises what went wrong with a picture."""
        for finished in self._finished:
            if finished.done():
                finished.result()

    def wait_for_decoding(self) -> None:
        for decoded in self._decoded:
            decoded.result()

    def results(self) -> list[Finished]:
        return [finished.result() for finished in self._finished]

    def __enter__(self) -> Finishing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stop()
        self._executor.shutdown(cancel_futures=True)
