"""Tracing by several processes: a component's graph follows from the spec alone, so that every core can trace one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import get_args

from export.graph import Graph
from export.recipes import Dtype
from export.trace import trace_parts
from flux2_trt.cores import usable_cores
from flux2_trt.spec import Component, ModelSpec

HELPERS = 3  # at most: the largest component takes as long as they take for all others
ROOT = Path(__file__).parents[1]  # helpers start here, for nothing else to be found by the name of this package

log = logging.getLogger(__name__)


class Tracing:
    """A context that traces `components`: this process those it asks for, helpers the others, from the last one back.

    `helpers`: how many processes to start; None for one less than there are cores or components. Each takes 0.5 GB,
    and ends when nothing is left to trace.
    """

    def __init__(
        self, spec: ModelSpec, dtype: Dtype, components: Sequence[Component], helpers: int | None = None
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self._helpers = min(usable_cores() - 1, HELPERS) if helpers is None else helpers
        self._left = list(components)
        self._traced: dict[Component, Future[dict[str, Graph] | None]] = {name: Future() for name in components}
        self._lock = Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[Thread] = []

    def __enter__(self) -> Tracing:
        self._folder = tempfile.TemporaryDirectory(prefix="flux2-trt-")
        command = [sys.executable, "-m", __name__, json.dumps(self.spec.to_dict()), self.dtype, self._folder.name]
        for _ in range(min(self._helpers, len(self._left) - 1)):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
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
        self._folder.cleanup()

    def parts(self, component: Component) -> dict[str, Graph]:
        """As `export.trace.trace_parts` gives them, to be asked for once."""
        with self._lock:
            mine = component in self._left
            if mine:
                self._left.remove(component)
        traced = None if mine else self._traced[component].result()
        return traced or trace_parts(component, self.spec, self.dtype)

    def _serve(self, process: subprocess.Popen[str]) -> None:
        """Keep a helper at work. What it fails at is traced by who asks for it, and fails there."""
        assert process.stdin and process.stdout
        with suppress(OSError), process:
            while component := self._next():
                try:
                    process.stdin.write(f"{component}\n")
                    process.stdin.flush()
                    files = json.loads(process.stdout.readline())
                    parts = {name: Graph.from_bytes(Path(file).read_bytes()) for name, file in files.items()}
                except (OSError, ValueError):
                    log.info("a process that traces beside this one ended while it traced %s", component)
                    self._traced[component].set_result(None)
                    return
                self._traced[component].set_result(parts)

    def _next(self) -> Component | None:
        with self._lock:
            return self._left.pop() if self._left else None


def main() -> None:
    """Answer each component on stdin by a line of JSON: its parts, and the files with their graphs."""
    spec, dtype, folder = ModelSpec.from_dict(json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
    assert dtype in get_args(Dtype)
    for line in sys.stdin:
        component = line.strip()
        files = {}
        for name, graph in trace_parts(component, spec, dtype).items():  # type: ignore[arg-type]
            files[name] = str(folder / f"{component}-{name}.onnx")
            Path(files[name]).write_bytes(graph.to_bytes())
        print(json.dumps(files), flush=True)


if __name__ == "__main__":
    main()
