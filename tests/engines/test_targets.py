"""Which GPU a target's plans are compiled on."""

from __future__ import annotations

import pytest

from engines.targets import TARGETS
from flux2_trt.doctor import Gpu


def gpu(name: str, capability: str) -> Gpu:
    return Gpu(name, 80 * 2**30, "590.12", capability)


@pytest.mark.parametrize(
    ("target", "name", "capability", "fits"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", "9.0", True),
        ("h100", "NVIDIA H100 PCIe", "9.0", True),
        ("h100", "NVIDIA H200", "9.0", False),  # its kernels would be timed for another memory
        ("h200", "NVIDIA H200 NVL", "9.0", True),
        ("h100", "NVIDIA GH200 480GB", "9.0", True),  # no target of its own
        ("b200", "NVIDIA GB200", "10.0", False),
        ("gb200", "NVIDIA GB200", "10.0", True),
        ("b200", "NVIDIA B200", "10.0", True),
        ("gb300", "NVIDIA GB300", "10.3", True),
        ("h100", "NVIDIA GeForce RTX 4090", "8.9", False),
    ],
)
def test_a_device_is_known_by_its_capability_and_name(target: str, name: str, capability: str, fits: bool) -> None:
    others = [gpu("NVIDIA GeForce RTX 3090", "8.6")]
    found = TARGETS[target].device([*others, gpu(name, capability)])
    assert found == (gpu(name, capability) if fits else None)
    assert TARGETS[target].device(others) is None
