"""Layers: what a TensorRT compiler made of a graph, read from its own list of final kernels.

An engine can be inspected only on a GPU; the builder's verbose log has the same list without one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LIST_STARTS = ("Layers:", "Engine Layer Information:")  # TensorRT-RTX, TensorRT
FUSED_ATTENTION = "_gemm_mha"
FUSED_INT4 = re.compile(r"ReplCastMulCastFc")  # weights are dequantized in the kernel that multiplies with them
NO_KERNELS = ("signal", "wait", "shape_call", "allocate", "deallocate")  # nothing runs on the GPU
MERGED = "+"  # between the names of products with one input and constant weights, which become one kernel
FP8, NVFP4 = "FP8", "FP4E2M1+FP8"
"""Data types of the inputs of a matrix product: NVFP4 has those of its block scales too."""

_LAYER = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[")
_TENSOR = re.compile(r"Name: (?P<name>[^{}]+?), Dimensions: \[[^]]*\], [^{}]*?Datatype: (?P<dtype>\w+)")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")


@dataclass(frozen=True)
class Layer:
    """A kernel: its type, and the data types of its inputs by name."""

    name: str
    kind: str
    inputs: Mapping[str, str]

    @property
    def is_fused_attention(self) -> bool:
        return self.name.startswith(FUSED_ATTENTION)

    @property
    def dtypes(self) -> str:
        return "+".join(sorted(set(self.inputs.values())))


@dataclass(frozen=True)
class ProfileReport:
    """The kernels of one optimization profile."""

    layers: tuple[Layer, ...] = field(repr=False)

    @property
    def gemms(self) -> dict[str, int]:
        """Matrix products by the data types of their inputs."""
        return dict(Counter(layer.dtypes for layer in self.layers if layer.kind == "gemm"))

    @property
    def fused_attentions(self) -> dict[str, int]:
        """Attentions that are one kernel, by the data types of their inputs."""
        return dict(Counter(layer.dtypes for layer in self.layers if layer.is_fused_attention))

    @property
    def fused_int4(self) -> int:
        """Matrix products with INT4 weights that are one kernel; it bears no name of the graph."""
        return sum(layer.kind == "runtime_fusion" and bool(FUSED_INT4.search(layer.name)) for layer in self.layers)

    def missing(self, names: Collection[str], dtypes: str) -> list[str]:
        """Those of `names`, of matrix products in the graph, that are no matrix product in these data types here."""
        products = [layer for layer in self.layers if layer.kind == "gemm" and layer.dtypes == dtypes]
        there = {name for layer in products for name in _SUBGRAPH.sub("", layer.name).split(MERGED)}
        return sorted(set(names) - there)

    def to_dict(self) -> dict[str, Any]:
        """Counts as JSON values; `kinds` are the compiler's names of all its kernels."""
        return {
            "gemms": self.gemms,
            "fused_attentions": self.fused_attentions,
            "fused_int4": self.fused_int4,
            "kinds": dict(Counter(layer.kind for layer in self.layers)),
            "kernels": len(self.layers),
        }


@dataclass(frozen=True)
class LayerReport:
    """The kernels of every profile, and the most scratch memory that one of them needs."""

    profiles: tuple[ProfileReport, ...]
    scratch_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"profiles": [profile.to_dict() for profile in self.profiles], "scratch_bytes": self.scratch_bytes}


def report_from_log(messages: Iterable[str]) -> LayerReport:
    """The report of a build with `profiling_verbosity` DETAILED from its VERBOSE log."""
    text, scratch = "", 0
    for message in messages:
        if message.startswith(LIST_STARTS):
            text += message
        elif match := _SCRATCH.search(message):
            scratch = max(scratch, int(match[1]))
    return LayerReport(tuple(map(ProfileReport, _layers_by_profile(text.splitlines()))), scratch)


def _layers_by_profile(lines: Iterable[str]) -> Sequence[tuple[Layer, ...]]:
    """A layer's name ends with the number of its subgraph; names from the graph say which profile that belongs to."""
    subgraphs: dict[str, list[Layer]] = {}
    profile_of: dict[str, int] = {}
    for line in lines:
        match = _LAYER.match(line)
        if not match or match["kind"] in NO_KERNELS:
            continue
        subgraph = number[1] if (number := _SUBGRAPH.search(match["name"])) else ""
        if profile := _PROFILE.search(line):
            profile_of[subgraph] = int(profile[1])
        inputs = {tensor["name"]: tensor["dtype"] for tensor in _TENSOR.finditer(_PROFILE.sub("", match["inputs"]))}
        subgraphs.setdefault(subgraph, []).append(Layer(_PROFILE.sub("", match["name"]), match["kind"], inputs))
    profiles: dict[int, list[Layer]] = {}
    for subgraph, layers in subgraphs.items():
        profiles.setdefault(profile_of.get(subgraph, 0), []).extend(layers)
    return [tuple(layers) for _, layers in sorted(profiles.items())]
