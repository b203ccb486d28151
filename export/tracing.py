"""Tracing by several processes: a component's graph follows from the spec alone, so that every core can trace one."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import IO, get_args

from export.graph import Graph
from export.recipes import Dtype
from export.trace import trace_parts
from flux2_trt.cores import usable_cores
from flux2_trt.spec import Component, ModelSpec

HELPERS = 3  # at most: the largest component takes as long as they take for all others
ROOT = Path(__file__).parents[1]  # helpers start here, for nothing else to be found by the name of this package

_log = logging.getLogger(__name__)


class Tracing:
    """A context that traces `components`: this process those it asks for, helpers the others, from the last one back.

    `helpers`: how many processes to start; None for one less than there are cores or components. Each ends when nothing
    is left to trace.
    """

    def __init__(
        self, spec: ModelSpec, dtype: Dtype, components: Sequence[Component], helpers: int | None = None
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self._helpers = min(usable_cores() - 1, HELPERS) if helpers is None else helpers
        self._left = list(components)
        self._traced: dict[Component, Future[dict[str, Graph] | None]] = {name: Future() for name in components}
        self._lock = Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[Thread] = []
        self._peaks: dict[int, int] = {}

    def __enter__(self) -> Tracing:
        command = [sys.executable, "-m", __name__, json.dumps(self.spec.to_dict()), self.dtype]
        for _ in range(min(self._helpers, len(self._left) - 1)):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,  # an interrupt is this process's affair
            )
            self._processes.append(process)
            self._threads.append(Thread(target=self._serve, args=(process,), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._left.clear()
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()

    def parts(self, component: Component) -> dict[str, Graph]:
        """As `export.trace.trace_parts` gives them, to be asked for once."""
        with self._lock:
            mine = component in self._left
            if mine:
                self._left.remove(component)
        traced = None if mine else self._traced[component].result()
        return traced or trace_parts(component, self.spec, self.dtype)

    @property
    def helpers_peak_rss_bytes(self) -> int:
        """The sum of what each helper took at most."""
        return sum(self._peaks.values())

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Keep a helper at work. What it fails at is traced by who asks for it, and fails there."""
        with suppress(OSError), process:
            while component := self._next():
                parts = None
                try:
                    parts = self._ask(process, component)
                except (OSError, ValueError):
                    _log.info("a process that traces beside this one ended while it traced %s", component)
                    return
                finally:
                    self._traced[component].set_result(parts)

    def _ask(self, process: subprocess.Popen[bytes], component: Component) -> dict[str, Graph]:
        assert process.stdin and process.stdout
        process.stdin.write(f"{component}\n".encode())
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        parts = {name: Graph.from_bytes(_read(process.stdout, size)) for name, size in answer["sizes"]}
        self._peaks[process.pid] = answer["peak_rss_bytes"]
        return parts

    def _next(self) -> Component | None:
        with self._lock:
            return self._left.pop() if self._left else None


def _read(stream: IO[bytes], size: int) -> bytes:
    """Raises ValueError where the stream ends before."""
    data = stream.read(size)
    if len(data) < size:
        raise ValueError(f"{size - len(data)} bytes are missing")
    return data


def main() -> None:
    """Answer each component on stdin: a line of JSON with the sizes of its parts and peak memory, then the graphs."""
    spec, dtype = ModelSpec.from_dict(json.loads(sys.argv[1])), sys.argv[2]
    assert dtype in get_args(Dtype)
    for line in sys.stdin:
        parts = trace_parts(line.strip(), spec, dtype)  # type: ignore[arg-type]
        graphs = {name: graph.to_bytes() for name, graph in parts.items()}
        answer = {
            "sizes": [(name, len(graph)) for name, graph in graphs.items()],
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + b"".join(graphs.values()))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
