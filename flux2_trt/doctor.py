"""Doctor: what this machine has of what the work needs; looks, and changes nothing."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flux2_trt.cores import usable_cores
from flux2_trt.errors import BundleError
from flux2_trt.listing import BundleSummary, folder_bytes
from flux2_trt.store import Store
from flux2_trt.version import own_version

# What to type for a package that is not there; the distributions that carry it, by the part of the work they serve.
PACKAGES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "pip install onnxruntime"),
    "tokenizers": (("tokenizers",), "pip install tokenizers"),
    "torch": (("torch",), "pip install torch"),
    "onnx": (("onnx",), "pip install onnx"),
    "onnxscript": (("onnxscript",), "pip install onnxscript"),
    "tensorrt": (("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "pip install 'flux2-trt[tensorrt]'"),
    "tensorrt_rtx": (("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"), "pip install 'flux2-trt[rtx]'"),
    "openai": (("openai",), "pip install 'flux2-trt[upsample]'"),
    "transformers": (("transformers",), "pip install 'flux2-trt[language]'"),
}
CPU_PROVIDER = "CPUExecutionProvider"
NVIDIA_SMI_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Examination:
    """What was found. `cpu_problem`: why pictures cannot be drawn on the CPU; None where they can.

    `packages`: versions, None for what is not installed. `gpu_source`: who told of the GPUs.
    """

    version: str
    python: str
    platform: str
    cores: int
    memory_bytes: int | None
    packages: dict[str, str | None]
    gpus: tuple[Gpu, ...]
    gpu_source: str
    store: Path
    store_bytes: int
    free_bytes: int
    bundles: tuple[BundleSummary, ...]
    store_problem: str | None
    cpu_problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, but for paths."""
        return asdict(self) | {"bundles": [summary_values(bundle) for bundle in self.bundles]}

    def lines(self) -> list[str]:
        """The report as people read it."""
        memory = "unknown" if self.memory_bytes is None else size_text(self.memory_bytes)
        damaged = sum(not bundle.ok for bundle in self.bundles)
        rows = [
            ("flux2-trt", self.version),
            ("python", self.python),
            ("platform", self.platform),
            ("cores", str(self.cores)),
            ("memory", memory),
            *((name, found or f"not installed: {PACKAGES[name][1]}") for name, found in self.packages.items()),
            *(
                ("gpu", f"{gpu.name}, {size_text(gpu.memory_bytes)}, sm {gpu.compute_capability}, driver {gpu.driver}")
                for gpu in self.gpus
            ),
            *([] if self.gpus else [("gpu", f"none ({self.gpu_source})")]),
            ("store", f"{self.store} ({size_text(self.store_bytes)} used, {size_text(self.free_bytes)} free)"),
            ("bundles", f"{len(self.bundles)}" + (f", {damaged} damaged: flux2-trt bundles list" if damaged else "")),
            *([("store", f"problem: {self.store_problem}")] if self.store_problem else []),
            ("cpu path", "works" if self.cpu_problem is None else f"does not work: {self.cpu_problem}"),
        ]
        return [f"{name:13} {text}" for name, text in rows]


def examine(store: Store | None = None) -> Examination:
    store = store or Store()
    bundles: tuple[BundleSummary, ...] = ()
    store_problem = None
    try:
        bundles = tuple(store.list())
    except BundleError as error:
        store_problem = str(error)
    gpus, gpu_source = find_gpus()
    return Examination(
        version=own_version(),
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        packages={name: _installed(distributions) for name, (distributions, _) in PACKAGES.items()},
        gpus=gpus,
        gpu_source=gpu_source,
        store=store.root,
        store_bytes=folder_bytes(store.root),
        free_bytes=shutil.disk_usage(_nearest_folder(store.root)).free,
        bundles=bundles,
        store_problem=store_problem,
        cpu_problem=cpu_problem(),
    )


def cpu_problem() -> str | None:
    """Why the CPU path cannot run here; None where it can."""
    try:
        import numpy  # noqa: F401
        import onnxruntime
        import PIL  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as error:  # also where a library below the package is missing
        return f"{error}; pip install --force-reinstall flux2-trt"
    if CPU_PROVIDER not in (there := onnxruntime.get_available_providers()):
        return f"onnxruntime has no {CPU_PROVIDER}, only {', '.join(there)}; pip install onnxruntime"
    return None


def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """The NVIDIA GPUs and who told of them: NVML, else nvidia-smi, else the reason why there are none."""
    try:
        import pynvml
    except ImportError:
        return _gpus_from_nvidia_smi()
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(
            Gpu(
                name=pynvml.nvmlDeviceGetName(handle),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                driver=driver,
                compute_capability="{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in handles
        )
    except pynvml.NVMLError as error:
        return (), f"NVML: {error}"
    return gpus, "NVML"


def _gpus_from_nvidia_smi() -> tuple[tuple[Gpu, ...], str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), "no NVIDIA driver: neither NVML nor nvidia-smi is there"
    query = [program, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
        rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
        gpus = tuple(Gpu(name, int(mebibytes) * 2**20, driver, sm) for name, mebibytes, driver, sm in rows)
    except subprocess.CalledProcessError as error:
        return (), f"nvidia-smi: {' '.join((error.stderr or error.stdout or str(error)).split())}"
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return (), f"nvidia-smi: {error}"
    return gpus, "nvidia-smi"


def summary_values(bundle: BundleSummary) -> dict[str, Any]:
    """A line of the listing as JSON values."""
    return asdict(bundle) | {"path": str(bundle.path), "name": bundle.path.name, "ok": bundle.ok}


def size_text(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
