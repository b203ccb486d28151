"""Hardware: what a device can do at most, from public data sheets; each figure with its source.

Rates are dense, without sparsity, with sums in fp32, at the boost clock of the data sheet. Where a public measurement
is above the data sheet, as cards that clock higher than their boost clock show, `Hardware.peak` believes it: a floor
must not be beaten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from export.recipes import Dtype, Format
from flux2_trt.errors import UsageError

TERA, GIGA = 10**12, 10**9

CONTEXT_BYTES = GIGA
"""Device memory that is gone before the first tensor, an assumption: 0.72 GB for a CUDA context with the libraries of
PyTorch (discuss.pytorch.org, thread 73021), the code of the plans (56 MB for dev, benchmarks/results/builds.json), and
what allocators lose to alignment. TensorRT's own share was not measured."""


@dataclass(frozen=True)
class Rates:
    """Dense operations a second of matrix products by number format, counting a multiply-add as two; None where the
    tensor cores lack the format, or nothing was measured."""

    bf16: float | None
    fp8: float | None = None
    nvfp4: float | None = None

    def of(self, number_format: Dtype | Format) -> float | None:
        """Of products in this format; INT4 weights are multiplied in bf16, after they are dequantized."""
        return {"bf16": self.bf16, "int4": self.bf16, "fp8": self.fp8, "nvfp4": self.nvfp4}.get(number_format)


@dataclass(frozen=True)
class Bus:
    """How weights come from the host's memory. `bytes_per_second`: one way, from pinned memory; what a copy reaches,
    not what the standard says."""

    name: str
    bytes_per_second: float


PCIE4 = Bus("PCIe 4.0 x16", 25 * GIGA)  # assumed: 79 % of 31.5 GB/s
PCIE5 = Bus("PCIe 5.0 x16", 50 * GIGA)  # assumed: 79 % of 63 GB/s
C2C = Bus("NVLink-C2C", 450 * GIGA)  # NVIDIA, GB200 NVL72: 900 GB/s both ways


@dataclass(frozen=True)
class Hardware:
    """A device type. `memory_bytes`: the name plate in decimal gigabytes, some percent below what drivers report.

    `datasheet`, `measured`: rates; `source` says where they are from. `multiprocessors`: None where sources disagree.
    """

    datasheet: Rates
    memory_bytes: int
    memory_bytes_per_second: float
    bus: Bus
    multiprocessors: int | None
    source: str
    measured: Rates = Rates(None)

    @property
    def peak(self) -> Rates:
        """The highest known rate of each format."""
        highest = (_highest(getattr(self.datasheet, name), getattr(self.measured, name)) for name in _FORMATS)
        return Rates(*highest)


_FORMATS = ("bf16", "fp8", "nvfp4")


def _highest(*rates: float | None) -> float | None:
    return max((rate for rate in rates if rate is not None), default=None)


def _tera(bf16: float, fp8: float | None = None, nvfp4: float | None = None) -> Rates:
    return Rates(*(None if rate is None else rate * TERA for rate in (bf16, fp8, nvfp4)))


_HOPPER = _tera(989.4, 1978.9)
_ADA = "hmc-tech.com (FP8 with fp32 sums runs at half the rate of fp16 sums)"
_SWEEP = "measured with cuBLASLt: github.com/xzwgit/gpu-flops-bench"

HARDWARE: Mapping[str, Hardware] = {
    "gb300": Hardware(
        _tera(2500, 5000, 15000),
        284 * GIGA,
        8.0 * TERA,
        C2C,
        None,
        "NVIDIA GB300 NVL72, a GPU's share, not checked again; memory as NVIDIA/TensorRT-Model-Connect reports it",
    ),
    "gb200": Hardware(_tera(2500, 5000, 10000), 186 * GIGA, 8.0 * TERA, C2C, 148, "NVIDIA GB200 NVL72; hmc-tech.com"),
    "b300": Hardware(_tera(2250, 4500, 14000), 288 * GIGA, 8.0 * TERA, PCIE5, None, "NVIDIA, by datacrunch.io"),
    "b200": Hardware(_tera(2250, 4500, 9000), 180 * GIGA, 8.0 * TERA, PCIE5, 148, "NVIDIA DGX B200; hmc-tech.com"),
    "h200": Hardware(_HOPPER, 141 * GIGA, 4.8 * TERA, PCIE5, 132, "NVIDIA H200 SXM"),
    "h100": Hardware(_HOPPER, 80 * GIGA, 3.35 * TERA, PCIE5, 132, "NVIDIA H100 SXM"),
    "rtx4090": Hardware(_tera(165.2, 330.3), 24 * GIGA, 1.008 * TERA, PCIE4, 128, _ADA),
    "l40s": Hardware(_tera(362.05, 733), 48 * GIGA, 0.864 * TERA, PCIE4, 142, "NVIDIA L40S"),
    "rtx5090": Hardware(
        _tera(209.5, 419, 1676),
        32 * GIGA,
        1.792 * TERA,
        PCIE5,
        170,
        f"half, and all, of the rates with sparsity at spheron.network; {_SWEEP}",
        measured=_tera(254, 773.5, 1617),
    ),
    "rtx-pro-6000": Hardware(_tera(503.8, 1007.6, 2015.2), 96 * GIGA, 1.792 * TERA, PCIE5, 188, "hmc-tech.com"),
    "a100": Hardware(_tera(312), 80 * GIGA, 2.039 * TERA, PCIE4, 108, "NVIDIA A100 80GB SXM"),
    "rtx3090": Hardware(
        _tera(71.2),
        24 * GIGA,
        0.936 * TERA,
        PCIE4,
        82,
        "82 multiprocessors, 1.695 GHz, 512 operations",
    ),
}
"""By the names of targets; the CPU has no data sheet that would tell."""


def hardware_of(target: str) -> Hardware:
    """What a target can do. Raises UsageError for one without known rates."""
    if target not in HARDWARE:
        raise UsageError(f"there are no peak rates of target {target}; give --target {', '.join(HARDWARE)}")
    return HARDWARE[target]
