"""Lane: a stream with the scratch memory of what runs in it, one execution after the other, and its CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from flux2_trt.errors import DeviceError
from flux2_trt.runtime.device import Address, Device, Graph, Scope, Stream
from flux2_trt.runtime.plan import Execution

GRAPHS = 16
"""That a lane keeps: two for a size of pictures in a loop, one in other components. The oldest goes first."""

_log = logging.getLogger(__name__)


class Lane:
    """Work in one stream. Executions of a lane share its scratch, since they never run at the same time.

    `graphs`: False runs everything as it is, without capturing.
    """

    def __init__(self, device: Device, graphs: bool = True) -> None:
        self.device = device
        self._scope = Scope(device)
        with self._scope.filling():
            self.stream = self._scope.stream()
        self._graphs = Graphs(device, self.stream) if graphs else None
        self._scratch: tuple[Address, int] | None = None
        self._executions: list[Execution] = []

    def adopt(self, execution: Execution) -> None:
        """Gives an execution its scratch; where it wants more than there is, all get a new one.

        An execution that cannot be adopted is closed.
        """
        self._executions.append(execution)
        try:
            there = self._scratch[1] if self._scratch else 0
            if execution.scratch_bytes > there:
                self._replace_scratch(execution.scratch_bytes)
            elif self._scratch:
                execution.use_scratch(*self._scratch)
        except BaseException:
            self.dismiss(execution)
            raise

    def dismiss(self, execution: Execution) -> None:
        """Closes an execution; the work that it was put into the stream for is done before."""
        self._executions.remove(execution)
        execution.close()

    def repeat(self, key: Hashable, work: Callable[[], None]) -> Callable[[], None]:
        """What puts `work` into the stream again and again: a captured graph of it, if the device lets it be captured.

        `work` is called once before it is captured, so that whatever is made at a first time is made; it uses the same
        memory each time. A graph of `key` that is there is taken as it is.
        """
        return self._graphs.get(key, work) if self._graphs else work

    def forget(self, matches: Callable[[Hashable], bool] = lambda _: True) -> None:
        """Destroys the graphs whose keys match; nothing that was launched is still running."""
        if self._graphs:
            self._graphs.drop(matches)

    def shrink(self) -> None:
        """Frees the scratch where no execution is left to use it."""
        if self._scratch and not self._executions:
            self.synchronize()
            self.forget()
            freed, self._scratch = self._scratch[0], None
            self.device.free(freed)

    def synchronize(self) -> None:
        self.device.synchronize(self.stream)

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Where the block fails or is interrupted, what it put into the stream is done before anything is freed."""
        try:
            yield
        except BaseException:
            with suppress(DeviceError):
                self.synchronize()
            raise

    def close(self) -> None:
        """Frees everything, also after a failure of the device."""
        with self._scope, ExitStack() as rest:
            if self._scratch:
                rest.callback(self.device.free, self._scratch[0])
                self._scratch = None
            for execution in self._executions:
                rest.callback(execution.close)
            self._executions = []
            rest.callback(self.forget)
            rest.callback(self.synchronize)

    def _replace_scratch(self, size: int) -> None:
        self.synchronize()
        self.forget()  # they hold the old address
        if self._scratch:
            old, self._scratch = self._scratch[0], None
            self.device.free(old)
        self._scratch = self.device.allocate(size), size
        for execution in self._executions:
            execution.use_scratch(*self._scratch)


class Graphs:
    """Captures, keeps and destroys CUDA graphs of one stream."""

    def __init__(self, device: Device, stream: Stream, capacity: int = GRAPHS) -> None:
        self._device, self._stream, self._capacity = device, stream, capacity
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()
        """None for work that refused to be captured."""

    def get(self, key: Hashable, work: Callable[[], None]) -> Callable[[], None]:
        if key not in self._graphs:
            if len(self._graphs) >= self._capacity:
                self._device.synchronize(self._stream)
                self._destroy(next(iter(self._graphs)))
            self._graphs[key] = self._capture(work)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        return work if graph is None else lambda: self._device.launch(graph, self._stream)

    def drop(self, matches: Callable[[Hashable], bool]) -> None:
        for key in [key for key in self._graphs if matches(key)]:
            self._destroy(key)

    def _destroy(self, key: Hashable) -> None:
        graph = self._graphs.pop(key)
        if graph is not None:
            self._device.destroy_graph(graph)

    def _capture(self, work: Callable[[], None]) -> Graph | None:
        device, stream = self._device, self._stream
        work()
        device.synchronize(stream)
        try:
            device.begin_capture(stream)
            work()
            return device.end_capture(stream)
        except DeviceError as error:
            device.abandon_capture(stream)
            _log.warning("a CUDA graph was refused, the work is launched piece by piece: %s", error)
            return None
        except BaseException:
            device.abandon_capture(stream)
            raise
