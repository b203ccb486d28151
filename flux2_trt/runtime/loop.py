"""The Euler loop on a device: a launch each step, and nothing else.

Latents and the number of the step lie in two places each. A step reads one and writes the other, and the next step the
other way round, so that two graphs in turn make a loop of any length. The tables of modulation and `dt`, the rotary
tables and the text tokens are on the device before the first step.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from flux2_trt.errors import DeviceError, UsageError
from flux2_trt.manifest import TensorShape
from flux2_trt.runtime.component import Component, Slots
from flux2_trt.runtime.denoiser import Floats, OnStep, Stage, Trajectory, untimed
from flux2_trt.runtime.device import Address, Scope
from flux2_trt.runtime.lane import Lane
from flux2_trt.runtime.plan import Execution, Sizes, Tensors

STEPS_AHEAD = 2
"""That the host puts into the stream before an earlier one is done: the device never waits, and a loop stops soon."""
TABLE_ROWS = 100
"""Rows of the tables for a plan that takes any number, so that one graph serves every schedule."""
LOOPS_KEPT = 2
"""Sizes of pictures whose buffers and executions stay; the oldest goes first."""
TURNS = (0, 1)
CONDITIONED = ("modulation", "text_tokens")
"""What the plan of conditioning leaves where the transformer reads it."""


class Step(Protocol):
    """The work of one step, in either direction between the two places."""

    def enqueue(self, turn: int) -> None: ...

    def close(self) -> None: ...


MakeStep = Callable[[Sizes, Mapping[str, Address]], Step]
"""From sizes and addresses: `latents` and `step` are at "latents.0", "latents.1", "step.0" and "step.1"."""


class WholeStep:
    """A step that is one plan."""

    def __init__(self, component: Component, sizes: Sizes, at: Mapping[str, Address]) -> None:
        self._component = component
        self._executions: list[Execution] = []
        try:
            for turn in TURNS:
                addresses = turned(component.record.shapes, at, turn)
                self._executions.append(component.execution(sizes, addresses))
        except BaseException:
            self.close()
            raise

    def enqueue(self, turn: int) -> None:
        self._executions[turn].enqueue(self._component.lane.stream)

    def close(self) -> None:
        while self._executions:
            self._component.dismiss(self._executions.pop())


def turned(names: Mapping[str, object], at: Mapping[str, Address], turn: int) -> dict[str, Address]:
    """Addresses of a plan's tensors in one direction."""
    places = {
        "latents": f"latents.{turn}",
        "step": f"step.{turn}",
        "updated_latents": f"latents.{1 - turn}",
        "next_step": f"step.{1 - turn}",
    }
    return {name: at[places.get(name, name)] for name in names if places.get(name, name) in at}


class _NotFinite(Exception):
    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class DeviceLoop:
    """A `Denoiser` on a device.

    `shapes`: of the tensors of a step, as the record of the transformer has them. `rows`: the most steps that the plans
    were built for; None where they take any. `make_step`: of one plan, or of the blocks one after the other.
    """

    def __init__(
        self, conditioning: Component, shapes: Mapping[str, TensorShape], rows: int | None, make_step: MakeStep
    ) -> None:
        self._conditioning, self._shapes, self._rows, self._make_step = conditioning, shapes, rows, make_step
        self._lane: Lane = conditioning.lane
        self._prepared: OrderedDict[tuple[tuple[str, int], ...], _Prepared] = OrderedDict()

    def run(self, trajectory: Trajectory, on_step: OnStep, stage: Stage = untimed) -> Floats:
        """Raises UsageError for sizes that the plans were not built for, DeviceError where the device fails, and one
        that names the step where latents are not finite."""
        self._lane.device.use_in_this_thread()
        with stage("conditioning"):
            prepared = self._prepare(self._sizes(trajectory))
        with stage("denoise"), self._lane.settling():
            tokens = self._run(prepared, trajectory, on_step)
            if not np.isfinite(tokens).all():
                raise DeviceError(self._diagnosis(prepared, trajectory))
        return tokens

    def close(self) -> None:
        for key in list(self._prepared):
            self._evict(key)

    def _run(self, prepared: _Prepared, trajectory: Trajectory, on_step: OnStep) -> Floats:
        device, stream = self._lane.device, self._lane.stream
        prepared.start(trajectory)
        for index in range(trajectory.steps):
            prepared.launch(index % 2)
            device.record(prepared.done[index % STEPS_AHEAD], stream)
            if index + 1 >= STEPS_AHEAD:
                device.wait_on_host(prepared.done[(index + 1) % STEPS_AHEAD])
            place = f"latents.{(index + 1) % 2}"
            changed = on_step(index, lambda place=place: prepared.read(place))  # type: ignore[misc]
            if changed is not None:
                self._lane.synchronize()
                prepared.slots.put(self._lane, place, changed, "float")
        return prepared.read(f"latents.{trajectory.steps % 2}")

    def _diagnosis(self, prepared: _Prepared, trajectory: Trajectory) -> str:
        """The first step after which latents are not finite, by going through them again."""

        def look(index: int, read: Callable[[], Floats]) -> None:
            if not np.isfinite(read()).all():
                raise _NotFinite(index)

        try:
            self._run(prepared, trajectory, look)
        except _NotFinite as found:
            where = f"after step {found.step + 1} of {trajectory.steps}"
            return f"latents are not finite {where}; verify the weights: flux2-trt bundles verify"
        return "latents were not finite, but are when the loop runs again: this device does not compute reliably"

    def _sizes(self, trajectory: Trajectory) -> dict[str, int]:
        batch, tokens, _ = trajectory.tokens.shape
        text_tokens, steps = trajectory.prompt_embeds.shape[1], trajectory.steps
        if self._rows is not None and steps > self._rows:
            raise UsageError(f"the plans take up to {self._rows} steps, not {steps}")
        return {
            "batch": batch,
            "tokens": tokens,
            "text_tokens": text_tokens,
            "all_tokens": text_tokens + tokens,
            "steps": self._rows or max(TABLE_ROWS, steps),
        }

    def _prepare(self, sizes: dict[str, int]) -> _Prepared:
        key = tuple(sorted(sizes.items()))
        if key not in self._prepared:
            while len(self._prepared) >= LOOPS_KEPT:
                self._evict(next(iter(self._prepared)))
            self._prepared[key] = _Prepared(self._conditioning, self._shapes, self._make_step, sizes)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _evict(self, key: tuple[tuple[str, int], ...]) -> None:
        self._prepared.pop(key).close()


class _Prepared:
    """The buffers and executions of one size of pictures."""

    def __init__(
        self,
        conditioning: Component,
        shapes: Mapping[str, TensorShape],
        make_step: MakeStep,
        sizes: Mapping[str, int],
    ) -> None:
        self._lane = conditioning.lane
        self._tensors = Tensors({**conditioning.record.shapes, **shapes}, sizes)
        bytes_of = {name: self._tensors.bytes(name) for name in conditioning.record.shapes}
        for name in shapes.keys() - {"updated_latents", "next_step", *CONDITIONED}:
            places = [f"{name}.{turn}" for turn in TURNS] if name in ("latents", "step") else [name]
            bytes_of |= dict.fromkeys(places, self._tensors.bytes(name))
        self._scope = Scope(self._lane.device)
        with self._scope.filling():
            self.slots = Slots.of(self._scope, bytes_of, device_only=CONDITIONED)
            self.done = [self._scope.event() for _ in range(STEPS_AHEAD)]
            at = {name: self.slots.device[name] for name in conditioning.record.shapes}
            self._conditioning = conditioning.execution(sizes, at)
            self._scope.callback(conditioning.dismiss, self._conditioning)
            self._step = make_step(sizes, self.slots.device)
            self._scope.callback(self._step.close)
            self._scope.callback(self._forget)

    def start(self, trajectory: Trajectory) -> None:
        """Everything that the loop needs onto the device, and the work of a step ready to be launched."""
        for name, values in {**trajectory.conditioning(), **trajectory.static()}.items():
            if self._tensors.sides(name)[0] == "steps":
                missing = self._tensors.shape(name)[0] - len(values)
                values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), np.float32)])
            self.slots.put(self._lane, name, values, self._tensors.dtype(name))
        self._lane.repeat(self._key("conditioning"), lambda: self._conditioning.enqueue(self._lane.stream))()
        self._place(trajectory)
        self._launches = [
            self._lane.repeat(self._key(turn), functools.partial(self._step.enqueue, turn)) for turn in TURNS
        ]
        self._place(trajectory)  # a capture goes through a step first

    def launch(self, turn: int) -> None:
        self._launches[turn]()

    def read(self, place: str) -> Floats:
        """Tokens [B, N, C], once what is in the stream is done."""
        self.slots.fetch(self._lane, place)
        self._lane.synchronize()
        return self.slots.array(place, self._tensors.shape("latents"), "float")

    def close(self) -> None:
        self._scope.close()

    def _place(self, trajectory: Trajectory) -> None:
        self.slots.put(self._lane, "latents.0", trajectory.tokens, "float")
        self.slots.put(self._lane, "step.0", np.zeros(1, np.int32), "int32")

    def _key(self, work: str | int) -> tuple[int, str | int]:
        return id(self), work

    def _forget(self) -> None:
        self._lane.forget(lambda key: isinstance(key, tuple) and key[0] == id(self))
