"""A device without a GPU that is stricter than one.

Work is done at once, in the order in which the host gives it, and every access is checked against those before it: two
that meet in a byte, one of them writing, must be ordered by their stream, by events, or by the host that waited. The
clock of an access is a vector: for every stream, how much of it has surely happened before (Lamport's partial order).
What the host does wrong is found too: pinned memory that it writes before a copy from it is done, or reads before a
copy to it is. Graphs are recorded and replayed as CUDA does it, with its rules of what may be captured.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flux2_trt.errors import DeviceError, DeviceMemoryError
from flux2_trt.runtime.device import ALIGNMENT, Address, Event, Graph, Stream, host_bytes

FIRST_ADDRESS = 2**40
POISON = 0xA5  # of memory that nothing was written to; NaN-like garbage in fp32 and bf16
HOST = 0  # the host's own clock

IN_USE = threading.local()
"""The device of a thread: what libraries and CUDA itself take where none is named."""

Clock = dict[int, int]
Range = tuple[int, int]


class RuleBroken(AssertionError):
    """The program did what would be undefined on a GPU."""


@dataclass
class Work:
    """Something in a stream: what it reads and writes, and how it is done."""

    what: str
    reads: tuple[Range, ...]
    writes: tuple[Range, ...]
    do: Callable[[], None]


@dataclass
class Recorded:
    """A step of a graph: work, or an event that is recorded or waited for, in a stream of the capture."""

    kind: str
    stream: int
    work: Work | None = None
    event: int = 0


@dataclass
class Access:
    start: int
    end: int
    writes: bool
    stream: int
    tick: int
    what: str


def one_at_a_time(cls: type) -> type:
    """Calls of several threads come one after the other, as the driver takes them."""

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            with self.lock:
                return function(self, *arguments, **named)

        return call

    for name, function in list(vars(cls).items()):
        if inspect.isfunction(function) and not name.startswith("_"):
            setattr(cls, name, guarded(function))
    return cls


@one_at_a_time
@dataclass
class StandIn:
    """A `Device`. `memory`: bytes that it has. `fail`: the name of a call, and at which one of that name it fails; or
    is interrupted, as by Ctrl-C."""

    memory: int = 2**34
    fail: tuple[str, int] | None = None
    interrupted: bool = False
    refuses_capture: bool = False
    name: str = "a stand-in"
    compute_capability: str = "8.9"
    trace: list[str] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        self._blocks: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._streams: dict[int, Clock] = {}
        self._events: dict[int, Clock | None] = {}
        self._graphs: dict[int, list[Recorded]] = {}
        self._accesses: list[Access] = []
        self._host: Clock = {}
        self._next, self._address = 1, FIRST_ADDRESS
        self._ticks: dict[int, int] = {}
        self._capture: tuple[int, list[Recorded], dict[int, int], set[int]] | None = None
        self._pending: list[tuple[int, int, Range, bytes]] = []  # copies out of pinned memory
        self._arriving: list[tuple[int, int, int, bytes]] = []  # copies into it
        self._calls: dict[str, int] = {}
        self.lock = threading.RLock()
        self.use_in_this_thread()

    # what the tests look at

    @property
    def live(self) -> dict[str, int]:
        """How much of everything is not freed yet."""
        counted = {
            "memory": self._blocks,
            "pinned": self._pinned,
            "streams": self._streams,
            "events": self._events,
            "graphs": self._graphs,
        }
        return {name: len(there) for name, there in counted.items() if there}

    @property
    def held_bytes(self) -> int:
        return sum(block.size for block in self._blocks.values())

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes of device or pinned memory; raises RuleBroken where they are no longer allocated."""
        for base, block in (self._blocks if address >= FIRST_ADDRESS and address < 2**45 else self._pinned).items():
            if base <= address and address + size <= base + block.size:
                return block[address - base : address - base + size]
        raise RuleBroken(f"{size} bytes at {address:#x} are not allocated")

    def put(self, what: str, stream: int, reads: Any, writes: Any, do: Callable[[], None]) -> None:
        """Work of a plan into a stream."""
        self._enqueue(stream, Work(what, tuple(reads), tuple(writes), do))

    # Device

    def use_in_this_thread(self) -> None:
        IN_USE.device = self

    def free_bytes(self) -> int:
        return self.memory - self.held_bytes

    def allocate(self, size: int) -> Address:
        self._call("allocate")
        self._outside_capture("allocate")
        if size <= 0:
            raise RuleBroken(f"{size} bytes are allocated")
        if size > self.free_bytes():
            free = self.free_bytes()
            raise DeviceMemoryError(f"{size} bytes are wanted, {free} are free", size, free)
        address = self._address
        self._address += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self._blocks[address] = np.full(size, POISON, np.uint8)
        self.peak = max(self.peak, self.held_bytes)
        return Address(address)

    def free(self, address: Address) -> None:
        self._call("free")
        self._outside_capture("free")
        block = self._take(self._blocks, address, "memory")
        self._idle((address, address + block.size), "freed")

    def allocate_pinned(self, size: int) -> Address:
        self._call("allocate_pinned")
        self._outside_capture("allocate_pinned")
        block = np.full(size, POISON, np.uint8)
        self._pinned[block.ctypes.data] = block
        return Address(block.ctypes.data)

    def free_pinned(self, address: Address) -> None:
        self._call("free_pinned")
        block = self._take(self._pinned, address, "pinned memory")
        self._idle((address, address + block.size), "freed")

    def stream(self) -> Stream:
        self._call("stream")
        handle = self._handle()
        self._streams[handle] = {}
        return Stream(handle)

    def destroy_stream(self, stream: Stream) -> None:
        self._call("destroy_stream")
        self._take(self._streams, stream, "stream")

    def synchronize(self, stream: Stream) -> None:
        self._call("synchronize")
        self._outside_capture("synchronize")
        self._known(self._streams, stream, "stream")
        _merge(self._host, {**self._streams[stream], stream: self._ticks.get(stream, 0)})
        self._settle()

    def copy(self, target: Address, source: Address, size: int, stream: Stream) -> None:
        self._call("copy")
        to, of = self.view(target, size), self.view(source, size)

        def do() -> None:
            to[:] = of

        reads, writes = ((source, source + size),), ((target, target + size),)
        self._enqueue(stream, Work(f"copy {size}", reads, writes, do))

    def event(self) -> Event:
        self._call("event")
        handle = self._handle()
        self._events[handle] = None
        return Event(handle)

    def destroy_event(self, event: Event) -> None:
        self._call("destroy_event")
        self._take(self._events, event, "event")

    def record(self, event: Event, stream: Stream) -> None:
        self._call("record")
        self._known(self._events, event, "event")
        if self._captures(stream):
            assert self._capture
            self._capture[1].append(Recorded("record", stream, event=event))
            self._capture[2][event] = len(self._capture[1])
            return
        self._events[event] = {**self._streams[stream], stream: self._ticks.get(stream, 0)}

    def wait(self, stream: Stream, event: Event) -> None:
        self._call("wait")
        self._known(self._events, event, "event")
        self._known(self._streams, stream, "stream")
        if self._capture and event in self._capture[2]:
            self._capture[3].add(stream)
            self._capture[1].append(Recorded("wait", stream, event=event))
            return
        if self._captures(stream):
            raise RuleBroken("a capture waits for an event that was recorded outside of it")
        clock = self._events[event]
        if clock is not None:
            _merge(self._streams[stream], clock)

    def wait_on_host(self, event: Event) -> None:
        self._call("wait_on_host")
        self._outside_capture("wait_on_host")
        clock = self._events[event]
        if clock is not None:
            _merge(self._host, clock)
        self._settle()

    def begin_capture(self, stream: Stream) -> None:
        self._call("begin_capture")
        if self._capture:
            raise RuleBroken("a capture begins inside of another")
        self._capture = (stream, [], {}, {stream})
        self._capturing_thread = threading.get_ident()

    def end_capture(self, stream: Stream) -> Graph:
        self._call("end_capture")
        if not self._capture or self._capture[0] != stream:
            raise RuleBroken("no capture of this stream is going on")
        _, recorded, _, streams = self._capture
        self._capture = None
        if self.refuses_capture:
            raise DeviceError("the capture was invalidated")
        _check_joined(recorded, stream, streams)
        handle = self._handle()
        self._graphs[handle] = recorded
        return Graph(handle)

    def abandon_capture(self, stream: Stream) -> None:
        self._capture = None

    def launch(self, graph: Graph, stream: Stream) -> None:
        self._call("launch")
        self._known(self._graphs, graph, "graph")
        recorded = self._graphs[graph]
        renamed = {recorded[0].stream: stream} if recorded else {}
        events: dict[int, Clock] = {}
        for step in recorded:
            if step.stream not in renamed:
                renamed[step.stream] = self._handle()
                self._streams[renamed[step.stream]] = {}
            into = renamed[step.stream]
            if step.kind == "record":
                events[step.event] = {**self._streams[into], into: self._ticks.get(into, 0)}
            elif step.kind == "wait":
                _merge(self._streams[into], events[step.event])
            else:
                assert step.work
                self._do(into, step.work)
        for virtual in set(renamed.values()) - {stream}:
            del self._streams[virtual]

    def destroy_graph(self, graph: Graph) -> None:
        self._call("destroy_graph")
        self._take(self._graphs, graph, "graph")

    # inside

    def _call(self, name: str) -> None:
        self.trace.append(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        if getattr(IN_USE, "device", None) is not self:
            raise RuleBroken(f"{name} would go to another GPU, which this thread uses")
        if self.fail == (name, self._calls[name]):
            if self.interrupted:
                raise KeyboardInterrupt
            raise DeviceMemoryError(f"{name} failed", 1, 0) if name == "allocate" else DeviceError(f"{name} failed")

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _enqueue(self, stream: int, work: Work) -> None:
        self._known(self._streams, stream, "stream")
        if self._captures(stream):
            assert self._capture
            self._capture[1].append(Recorded("work", stream, work))
        else:
            self._do(stream, work)

    def _do(self, stream: int, work: Work) -> None:
        clock = self._streams[stream]
        _merge(clock, self._host)  # the host gave it after what it waited for
        tick = self._ticks[stream] = self._ticks.get(stream, 0) + 1
        for ranges, writes in ((work.reads, False), (work.writes, True)):
            for start, end in ranges:
                self.view(start, end - start)
                self._check(start, end, writes, stream, clock, work.what)
        for ranges, writes in ((work.reads, False), (work.writes, True)):
            self._accesses += [Access(start, end, writes, stream, tick, work.what) for start, end in ranges]
        for start, end in work.reads:
            if self._is_pinned(start):
                self._pending.append((stream, tick, (start, end), self.view(start, end - start).tobytes()))
        work.do()
        for start, end in work.writes:
            if self._is_pinned(start):  # it arrives when the host has waited for it
                there = self.view(start, end - start)
                self._arriving.append((stream, tick, start, there.tobytes()))
                there[:] = POISON
        self.trace.append(work.what)

    def _check(self, start: int, end: int, writes: bool, stream: int, clock: Clock, what: str) -> None:
        for other in self._accesses:
            if other.start < end and start < other.end and (writes or other.writes):
                before = other.stream == stream or clock.get(other.stream, 0) >= other.tick
                if not before:
                    raise RuleBroken(f"{what} does not wait for {other.what}, which uses the same memory")

    def _settle(self) -> None:
        """What the host has waited for is over."""
        for stream, tick, (start, end), data in self._pending:
            if self._host.get(stream, 0) >= tick and start in self._starts(self._pinned, start, end):
                if host_bytes(Address(start), end - start).tobytes() != data:
                    raise RuleBroken("pinned memory was written to before the copy from it was done")
        self._pending = [each for each in self._pending if self._host.get(each[0], 0) < each[1]]
        for stream, tick, start, data in self._arriving:
            if self._host.get(stream, 0) >= tick:
                self.view(start, len(data))[:] = np.frombuffer(data, np.uint8)
        self._arriving = [each for each in self._arriving if self._host.get(each[0], 0) < each[1]]
        self._accesses = [each for each in self._accesses if self._host.get(each.stream, 0) < each.tick]

    def _starts(self, blocks: Mapping[int, np.ndarray], start: int, end: int) -> set[int]:
        there = any(base <= start and end <= base + block.size for base, block in blocks.items())
        return {start} if there else set()

    def _idle(self, where: Range, what: str) -> None:
        for access in self._accesses:
            if access.start < where[1] and where[0] < access.end:
                raise RuleBroken(f"memory is {what} while {access.what} may still use it")

    def _is_pinned(self, address: int) -> bool:
        return not FIRST_ADDRESS <= address < 2**45

    def _captures(self, stream: int) -> bool:
        return self._capture is not None and stream in self._capture[3]

    def _outside_capture(self, what: str) -> None:
        if self._capture and self._capturing_thread == threading.get_ident():
            raise RuleBroken(f"{what} during a capture")

    def _take(self, things: dict[int, Any], handle: int, what: str) -> Any:
        self._known(things, handle, what)
        return things.pop(handle)

    @staticmethod
    def _known(things: Mapping[int, Any], handle: int, what: str) -> None:
        if handle not in things:
            raise RuleBroken(f"{what} {handle} is not there, or no more")


def _merge(clock: Clock, other: Mapping[int, int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


def _check_joined(recorded: list[Recorded], origin: int, streams: set[int]) -> None:
    """Every stream that a capture forked into is waited for at its end, directly or through others."""
    clocks: dict[int, dict[int, int]] = {stream: {} for stream in streams}
    ticks: dict[int, int] = dict.fromkeys(streams, 0)
    events: dict[int, dict[int, int]] = {}
    for step in recorded:
        if step.kind == "work":
            ticks[step.stream] += 1
        elif step.kind == "record":
            events[step.event] = {**clocks[step.stream], step.stream: ticks[step.stream]}
        else:
            _merge(clocks[step.stream], events[step.event])
    for stream in streams - {origin}:
        if clocks[origin].get(stream, 0) < ticks[stream]:
            raise RuleBroken("a capture ends while a stream that it forked into is not joined")
