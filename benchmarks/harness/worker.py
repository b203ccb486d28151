"""Worker: one system in a process of its own, so that its peak memory and its threads are nobody else's.

The parent writes requests as JSON lines to stdin and reads answers from a pipe of its own: what libraries print goes to
stderr. Arrays travel as files in a folder that the parent made. A worker gets so many of the machine's cores, and ends
when its stdin closes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.harness.case import Case
from benchmarks.harness.memory import peak_host_bytes, reset_peak
from benchmarks.harness.system import Drawn, Job, Setup, System, load
from benchmarks.harness.threads import pin, thread_environment
from flux2_trt.errors import Flux2Error

LAST_LINES = 6  # of what a worker that failed said


@dataclass(frozen=True)
class Timed:
    """One call: wall seconds, CPU seconds of the process, and its peaks in it; device bytes None without a device."""

    drawn: Drawn
    seconds: float
    cpu_seconds: float
    peak_host_bytes: int | None
    peak_device_bytes: int | None


class Worker(Protocol):
    """A loaded system that can be asked to draw."""

    name: str
    pid: int
    load_seconds: float
    loaded_host_bytes: int | None
    facts: Mapping[str, Any]

    def draw(self, job: Job, watched: bool = False) -> Timed: ...

    def close(self) -> None: ...


def timed(system: System, job: Job, watched: bool) -> Timed:
    """One call of a system, by the host's monotonic clock: it ends when the pictures are in the host's memory."""
    reset_peak()
    cpu, started = time.process_time(), time.perf_counter()
    drawn = system.draw(job, watched)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return Timed(drawn, seconds, cpu_seconds, peak_host_bytes(), _peak_device_bytes())


def _peak_device_bytes() -> int | None:
    """What torch's allocator took at most since the last call; NVML sees the rest."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


class ProcessWorker:
    """Starts the process and loads the system in it. Raises Flux2Error where either fails, or any later call does."""

    def __init__(self, setup: Setup, folder: Path, threads: int, python: str = sys.executable) -> None:
        self.name, self._folder = setup.name, folder
        self._log = folder / f"{setup.name.replace(':', '-').replace('+', '-')}.log"
        answers, self._write_end = os.pipe()
        command = [python, "-m", "benchmarks.harness.worker", str(self._write_end), str(threads)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[self._write_end],
                env=thread_environment(threads),
            )
        os.close(self._write_end)
        self.pid, self._answers = self._process.pid, os.fdopen(answers, encoding="utf-8")
        try:
            answer = self._ask({"do": "load", **asdict(setup)})
        except BaseException:
            self.close()
            raise
        self.load_seconds, self.loaded_host_bytes = answer["seconds"], answer["peak_host_bytes"]
        self.facts = answer["facts"]

    def draw(self, job: Job, watched: bool = False) -> Timed:
        path = self._folder / f"job-{self.pid}.npz"
        arrays: dict[str, np.ndarray] = {f"reference_{i}": pixels for i, pixels in enumerate(job.references)}
        if job.unconditional is not None:
            arrays["unconditional"] = job.unconditional
        np.savez(path, embeds=job.embeds, noise=job.noise, **arrays)  # type: ignore[arg-type]
        request = {"do": "draw", "job": str(path), "case": asdict(job.case), "watched": watched}
        answer = self._ask(request | {"prompt": job.prompt, "seed": job.seed, "reads_prompt": job.reads_prompt})
        with np.load(answer["pictures"]) as file:
            pictures, latents = file["pictures"], tuple(file["latents"])
        drawn = Drawn(pictures, answer["stages"], tuple(answer["steps"]), tuple(answer["gaps"]), latents)
        return Timed(
            drawn, answer["seconds"], answer["cpu_seconds"], answer["peak_host_bytes"], answer["peak_device_bytes"]
        )

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            raise Flux2Error(f"{self.name} ended without an answer: {' | '.join(said) or 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            raise Flux2Error(answer["error"])
        return answer

    def close(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # what was not read by a process that died
                self._process.stdin.close()
        self._answers.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve(answers: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and closes stdin
    pin(threads)
    system: System | None = None
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        for line in sys.stdin:
            request, answer = json.loads(line), dict[str, Any]()
            try:
                if request.pop("do") == "load":
                    started = time.perf_counter()
                    system = load(Setup(**request))
                    seconds = time.perf_counter() - started
                    answer = {"seconds": seconds, "peak_host_bytes": peak_host_bytes(), "facts": dict(system.facts())}
                else:
                    assert system is not None
                    answer = _draw(system, request)
            except Flux2Error as error:
                answer = {"error": str(error)}
            except Exception as error:  # noqa: BLE001 (whatever a system raises is its result)
                import traceback

                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
            out.write(json.dumps(answer) + "\n")
            out.flush()


def _draw(system: System, request: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(request["job"])
    with np.load(path) as file:
        references = tuple(file[name] for name in sorted(file.files) if name.startswith("reference_"))
        unconditional = file["unconditional"] if "unconditional" in file.files else None
        embeds, noise = file["embeds"], file["noise"]
    job = Job(
        Case(**request["case"]), embeds, noise, references, unconditional,
        request["prompt"], request["seed"], request["reads_prompt"],
    )  # fmt: skip
    done = timed(system, job, request["watched"])
    results = path.with_name(f"drawn-{os.getpid()}.npz")
    latents = np.stack(done.drawn.latents) if done.drawn.latents else np.zeros((0,), np.float32)
    np.savez(results, pictures=done.drawn.pictures, latents=latents)
    return {
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_host_bytes": done.peak_host_bytes,
        "peak_device_bytes": done.peak_device_bytes,
        "stages": dict(done.drawn.stages),
        "steps": list(done.drawn.steps),
        "gaps": list(done.drawn.gaps),
        "pictures": str(results),
    }


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
