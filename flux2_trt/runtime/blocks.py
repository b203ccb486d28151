"""A step in blocks: one plan for all double blocks, one for all single ones, weights streamed from the host.

Blocks that find no room on the device lie in pinned memory, and come through the bus into two slots in turn: while a
block is computed with from one slot, the next streamed one is copied into the other by a stream of its own. When a step
ends, the first two of the next one are on their way. Copies and blocks are captured into one graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flux2_trt.runtime.component import Component
from flux2_trt.runtime.device import Address, Device, Layout, Scope, Stream, host_bytes
from flux2_trt.runtime.lane import Lane
from flux2_trt.runtime.loop import TURNS, turned
from flux2_trt.runtime.plan import Execution, Sizes, Tensors
from flux2_trt.runtime.weights import Weights, WeightSource

KINDS = ("double", "single")
ROWS = ("img_modulation", "txt_modulation", "single_modulation", "final_modulation")
"""What the prologue splits the row of a step into."""
SLOTS = 2
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")

Block = tuple[str, int]
"""Kind and number within it."""


def spread(of: int, chosen: int) -> list[int]:
    """`chosen` of the numbers below `of`, as evenly as possible: the bus works while blocks that stay are computed."""
    return [index * of // chosen for index in range(chosen)]


@dataclass(frozen=True)
class BlockNames:
    """The tensors of a weight file by the block that they belong to; what belongs to none is of the step's ends."""

    blocks: Mapping[Block, tuple[str, ...]]
    ends: tuple[str, ...]

    @staticmethod
    def of(names: Sequence[str]) -> BlockNames:
        blocks: dict[Block, list[str]] = {}
        ends = []
        for name in names:
            if match := _BLOCK.match(name):
                blocks.setdefault((match[1], int(match[2])), []).append(name)
            else:
                ends.append(name)
        ordered = {block: tuple(blocks[block]) for block in sorted(blocks, key=lambda b: (KINDS.index(b[0]), b[1]))}
        return BlockNames(ordered, tuple(ends))


def as_first(name: str) -> str:
    """The name that a tensor of any block has in the plan of its kind, which is traced from the first."""
    return _BLOCK.sub(r"\1_blocks.0.", name)


class StreamedBlocks:
    """The weights of blocks in pinned memory; and for those that `acquire` them two slots on the device, and the stream
    that fills these.

    `order`: the streamed blocks of a step, one after the other; at least one.
    """

    def __init__(
        self, device: Device, source: WeightSource, names: Mapping[Block, Sequence[str]], order: Sequence[Block]
    ) -> None:
        self._device, self.order = device, list(order)
        self._layouts = {block: Layout.of({name: source.sizes[name] for name in names[block]}) for block in order}
        self._users, self._on_device = 0, Scope(device)
        self._host = Scope(device)
        with self._host.filling():
            self._pinned: dict[Block, Address] = {}
            for block, layout in self._layouts.items():
                base = self._pinned[block] = self._host.pinned(layout.bytes)
                for name, size in layout.sizes.items():
                    host_bytes(Address(base + layout.offsets[name]), size)[:] = source.read(name)
            source.check()

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(layout.bytes for layout in self._layouts.values())

    def acquire(self) -> None:
        """Slots with the first blocks in them; `release` ends the use of them."""
        if self._users == 0:
            scope = self._on_device
            with scope.filling():
                largest = max(layout.bytes for layout in self._layouts.values())
                self._slots = [scope.buffer(largest) for _ in range(min(SLOTS, len(self.order)))]
                self.stream = scope.stream()
                self._filled, self._used = ([scope.event() for _ in self._slots] for _ in range(2))
                scope.callback(self._device.synchronize, self.stream)
                self.fill_first()
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._on_device.close()

    def fill_first(self) -> None:
        """The first blocks into their slots, which nothing uses; returns when they are there."""
        for place in range(len(self._slots)):
            self._copy(place)
        self._device.synchronize(self.stream)

    @contextmanager
    def using(self, compute: Stream, place: int) -> Iterator[dict[str, Address]]:
        """The addresses of the streamed block at `place` of the order, for work that the block puts into `compute`.

        Then the slot is filled with the next block that it takes: in this step, or the first one of the next.
        """
        slot, slots = place % len(self._slots), len(self._slots)
        if place >= slots:
            self._device.wait(compute, self._filled[slot])
        yield self._layouts[self.order[place]].addresses(self._slots[slot])
        self._device.record(self._used[slot], compute)
        self._device.wait(self.stream, self._used[slot])
        following = place + slots
        self._copy(following if following < len(self.order) else slot)
        self._device.record(self._filled[slot], self.stream)

    def join(self, compute: Stream) -> None:
        """What comes next in `compute` comes after all copies."""
        for filled in self._filled:
            self._device.wait(compute, filled)

    def close(self) -> None:
        """Frees the pinned memory; nobody uses the blocks any more."""
        self._host.close()

    def _copy(self, place: int) -> None:
        block = self.order[place]
        slot = self._slots[place % len(self._slots)]
        self._device.copy(slot, self._pinned[block], self._layouts[block].bytes, self.stream)


class BlockStep:
    """A `Step` of parts: prologue, double blocks, single blocks, epilogue.

    Every part has one execution, which is bound anew for each block; in a captured step that costs nothing.
    """

    def __init__(
        self,
        parts: Mapping[str, Component],
        names: BlockNames,
        resident: Weights,
        streamed: StreamedBlocks | None,
        sizes: Sizes,
        at: Mapping[str, Address],
    ) -> None:
        """`parts`: by the names of `TRANSFORMER_PARTS`, without weights of their own. `resident`: the weights of the
        ends and of all blocks that are not streamed."""
        self._parts, self._names, self._streamed, self._at = parts, names, streamed, at
        self._lane: Lane = parts["prologue"].lane
        self._places = {block: place for place, block in enumerate(streamed.order if streamed else ())}
        self._broken = False
        shapes = {name: shape for part in parts.values() for name, shape in part.record.shapes.items()}
        self._tensors = Tensors(shapes, sizes)
        self._scope = Scope(self._lane.device)
        with self._scope.filling():
            self._weights = resident.acquire()
            self._scope.callback(resident.release)
            if streamed:
                streamed.acquire()
                self._scope.callback(streamed.release)
            rows = {name: self._tensors.bytes(name) for name in parts["prologue"].record.shapes if name in ROWS}
            flows = {f"{name}.{turn}": self._tensors.bytes(name) for name in self._flows for turn in TURNS}
            layout = Layout.of(rows | flows)
            self._inner = layout.addresses(self._scope.buffer(layout.bytes))
            self._executions: dict[str, Execution] = {}
            for name, part in parts.items():
                self._executions[name] = part.execution(sizes, {})
                self._scope.callback(part.dismiss, self._executions[name])

    @property
    def _flows(self) -> list[str]:
        return [name for name in ("img", "txt", "hidden") if name in self._tensors.of]

    def enqueue(self, turn: int) -> None:
        if self._streamed and self._broken:  # a step ended in its middle: the slots hold whatever it got to
            self._lane.synchronize()
            self._streamed.fill_first()
        self._broken = True  # until every copy of this step is in its stream
        self._step(turn)
        self._broken = False

    def close(self) -> None:
        self._scope.close()

    def _step(self, turn: int) -> None:
        around = {name: self._at[name] for name in self._tensors.of if name in self._at}
        around |= turned(self._tensors.of, self._at, turn) | {name: self._inner[name] for name in ROWS}
        ends = {name: self._weights[name] for name in self._names.ends}
        self._run("prologue", around | ends | {"img": self._inner["img.0"]})
        img, txt = self._inner["img.0"], self._at["text_tokens"]
        for index, block in enumerate(self._of_kind("double")):
            after = {f"updated_{name}": self._inner[f"{name}.{(index + 1) % 2}"] for name in ("img", "txt")}
            self._run_block(block, around | {"img": img, "txt": txt} | after)
            img, txt = after["updated_img"], after["updated_txt"]
        hidden = self._inner["hidden.0"]
        self._join(txt, img, hidden)
        for index, block in enumerate(self._of_kind("single")):
            updated = self._inner[f"hidden.{(index + 1) % 2}"]
            self._run_block(block, around | {"hidden": hidden, "updated_hidden": updated})
            hidden = updated
        self._run("epilogue", around | ends | {"hidden": hidden})
        if self._streamed:
            self._streamed.join(self._lane.stream)

    def _of_kind(self, kind: str) -> list[Block]:
        return [block for block in self._names.blocks if block[0] == kind]

    def _run(self, part: str, addresses: Mapping[str, Address]) -> None:
        execution, wanted = self._executions[part], self._parts[part]
        names = wanted.plan.inputs | wanted.record.shapes.keys()
        execution.bind({name: addresses[name] for name in names})
        execution.enqueue(self._lane.stream)

    def _run_block(self, block: Block, addresses: Mapping[str, Address]) -> None:
        part = f"{block[0]}_block"
        if self._streamed and block in self._places:
            with self._streamed.using(self._lane.stream, self._places[block]) as weights:
                self._run(part, {**addresses, **{as_first(name): at for name, at in weights.items()}})
        else:
            own = {as_first(name): self._weights[name] for name in self._names.blocks[block]}
            self._run(part, {**addresses, **own})

    def _join(self, txt: Address, img: Address, hidden: Address) -> None:
        """Text and image tokens one after the other, in every row of the batch."""
        rows = self._tensors.shape("hidden")[0]
        row, text = (self._tensors.bytes(name) // rows for name in ("hidden", "text_tokens"))
        for index in range(rows):
            into = hidden + index * row
            self._copy(into, txt + index * text, text)
            self._copy(into + text, img + index * (row - text), row - text)

    def _copy(self, target: int, source: int, size: int) -> None:
        self._lane.device.copy(Address(target), Address(source), size, self._lane.stream)
