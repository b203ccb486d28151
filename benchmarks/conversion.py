"""How fast a checkpoint becomes a weight file: `python -m benchmarks.conversion`.

Writes a checkpoint of a transformer's true size (random bf16, repeated), has the disk read and write as many bytes
plainly, converts it, and converts it again with a SIGKILL in the middle. Every conversion is a process of its own that
begins with nothing of the checkpoint in the page cache. What the graph takes is told from the model's spec instead of
traced. Writes `results/conversion.json`.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer

from benchmarks.machine import machine
from export.conversion import STORED_DTYPES, Scales
from export.graph import Graph, ScaleSlot, WeightSlot
from export.quantize import FP8_DTYPE, NVFP4_DTYPE, block_scale_name
from export.recipes import QUANTIZED_LINEARS
from export.weights import write_weights
from flux2_trt.checkpoint import Checkpoint
from flux2_trt.inventory import expected_tensors
from flux2_trt.models import published_spec
from flux2_trt.quantized import NVFP4_BLOCK
from flux2_trt.spec import ModelSpec

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("flux2-trt", "torch", "numpy")
BLOCK_BYTES = 2**24
FORMATS = {"bf16": "bfloat16", "fp8": FP8_DTYPE, "nvfp4": NVFP4_DTYPE}
INPUT_SCALE = 0.01
SAMPLE_SECONDS = 0.02


def graph_of(spec: ModelSpec, precision: str) -> Graph:
    """What the transformer's graph takes: linears of a recipe in its format with their scales, the rest in bf16."""
    slots, scales = {}, {}
    for name, shape in expected_tensors(spec, "transformer").items():
        dtype = FORMATS[precision] if re.fullmatch(QUANTIZED_LINEARS["transformer"], name) else "bfloat16"
        transposed = len(shape) == 2 and dtype != NVFP4_DTYPE
        slots[name] = WeightSlot(tuple(reversed(shape)) if transposed else shape, dtype, transposed)
        if dtype != "bfloat16":
            scales[f"{name}.quantize"] = ScaleSlot("quantize", (name,))
            scales[f"{name}.dequantize"] = ScaleSlot("dequantize", (name,))
        if dtype == NVFP4_DTYPE:
            blocks = (shape[0], shape[1] // NVFP4_BLOCK)
            scales[block_scale_name(name)] = ScaleSlot("block", (name,), blocks, FP8_DTYPE)
    return Graph("transformer", onnx.ModelProto(), slots, scales=scales)


def write_checkpoint(spec: ModelSpec, path: Path) -> None:
    """All tensors of the transformer in bf16, deviation 0.02, from one buffer over and over."""
    entries, end = {}, 0
    for name, shape in expected_tensors(spec, "transformer").items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    values = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 2, np.float32) * np.float32(0.02)
    block = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        write_blocks(file, block, end)


def write_blocks(file: Any, block: bytes, count: int) -> None:
    for begin in range(0, count, len(block)):
        file.write(block[: count - begin])
    file.flush()
    os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_all(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(BLOCK_BYTES)
        while file.readinto(buffer):
            pass


def disk_rates(checkpoint: Path, output_bytes: int) -> dict[str, float]:
    """Seconds to read the checkpoint and to write as many bytes as the weight file has, and what that is in GB/s."""
    copy, block = checkpoint.with_name("copy"), os.urandom(BLOCK_BYTES)
    forget(checkpoint)
    reading = seconds_of(lambda: read_all(checkpoint))
    with copy.open("wb") as file:
        writing = seconds_of(lambda: write_blocks(file, block, output_bytes))
    copy.unlink()
    return {
        "read_seconds": round(reading, 1),
        "read_gb_per_second": round(checkpoint.stat().st_size / reading / 1e9, 3),
        "write_seconds": round(writing, 1),
        "write_gb_per_second": round(output_bytes / writing / 1e9, 3),
    }


def convert(model: str, precision: str, folder: Path, name: str) -> None:
    """One conversion, measured from inside: a JSON object on stdout."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            kilobytes = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)
            peak[0] = max(peak[0], sum(map(int, kilobytes)) * 1024)

    graph = graph_of(published_spec(model), precision)
    source = Checkpoint(folder / "checkpoint.safetensors", "transformer")
    scales = Scales(dict.fromkeys(graph.weights, INPUT_SCALE))
    path, journal = folder / f"{name}.safetensors", folder / f"{name}.journal"
    threading.Thread(target=sample, daemon=True).start()
    started, cpu_started = time.perf_counter(), time.process_time()
    write_weights(graph, source, path, scales, journal)
    computed = time.perf_counter() - started
    with path.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    done.set()
    result = {"seconds": round(seconds, 1), "seconds_before_the_last_sync": round(computed, 1)}
    result |= {"cpu_seconds": round(time.process_time() - cpu_started, 1), "peak_anonymous_bytes": peak[0]}
    print(json.dumps(result))


def start(model: str, precision: str, folder: Path, name: str) -> subprocess.Popen[str]:
    forget(folder / "checkpoint.safetensors")
    call = f"convert({model!r}, {precision!r}, Path({str(folder)!r}), {name!r})"
    script = f"from pathlib import Path; from benchmarks.conversion import convert; {call}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"the conversion failed with {process.returncode}")
    return json.loads(output)


def written(journal: Path) -> int:
    """How often a weight was written."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_at_half(process: subprocess.Popen[str], journal: Path, weights: int) -> None:
    while written(journal) < weights // 2 and process.poll() is None:
        time.sleep(SAMPLE_SECONDS)
    process.send_signal(signal.SIGKILL)
    process.wait()


def main(
    model: Annotated[str, typer.Option(help="Whose transformer.")] = "klein-9b",
    precision: Annotated[str, typer.Option(help="bf16, fp8 or nvfp4.")] = "fp8",
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure: 4 bytes a weight, in fp8.")] = None,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "conversion.json",
) -> None:
    """Measure and write the result."""
    spec = published_spec(model)
    graph = graph_of(spec, precision)
    bits = sum(math.prod(slot.shape) * STORED_DTYPES[slot.dtype][1] for slot in graph.weights.values())
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        checkpoint = place / "checkpoint.safetensors"
        write_checkpoint(spec, checkpoint)
        disk = disk_rates(checkpoint, bits // 8)
        whole = finish(start(model, precision, place, "whole"))
        process = start(model, precision, place, "killed")
        journal = place / "killed.journal"
        kill_at_half(process, journal, len(graph.weights))
        kept = written(journal)
        resumed = finish(start(model, precision, place, "killed"))
        if not filecmp.cmp(place / "whole.safetensors", place / "killed.safetensors", shallow=False):
            raise RuntimeError("the file of the conversion that was killed is another")
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "model": model,
            "precision": precision,
            "weights": len(graph.weights),
            "checkpoint_bytes": checkpoint.stat().st_size,
            "file_bytes": (place / "whole.safetensors").stat().st_size,
            "disk": disk,
            "whole": whole | {"gb_per_second": round(checkpoint.stat().st_size / whole["seconds"] / 1e9, 3)},
            "resumed": resumed | {"weights_kept": kept, "weights_converted": written(journal) - kept},
            "load_average": os.getloadavg()[0],
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["whole"]))


if __name__ == "__main__":
    typer.run(main)
