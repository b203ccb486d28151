"""Audit: whether the kernels of a plan are in the formats of its recipe."""

from __future__ import annotations

from collections.abc import Mapping

from engines.layers import FP8, NVFP4, LayerReport
from engines.tensorrt import DECOMPOSABLE
from export.graph import Graph
from export.quantize import product_name
from export.recipes import QUANTIZED_ATTENTION, Format, Recipe

KERNEL_DTYPES: Mapping[Format | None, str] = {"fp8": FP8, "nvfp4": NVFP4}


def lost_formats(graph: Graph, recipe: Recipe, report: LayerReport) -> str:
    """What the recipe wanted and the compiler did not give, in words; empty where all is there."""
    products = [product_name(scale.weights[0]) for scale in graph.scales.values() if scale.kind == "dequantize"]
    attention = FP8 if recipe.attention and graph.component in QUANTIZED_ATTENTION else None
    blocks = sum(scale.kind == "block" for scale in graph.scales.values())
    for number, profile in enumerate(report.profiles):
        if recipe.linears == "int4" and profile.fused_int4 != blocks:
            return f"{profile.fused_int4} of {blocks} linears are a fused int4 kernel in profile {number}"
        if products and (missing := profile.missing(products, KERNEL_DTYPES[recipe.linears])):
            names = ", ".join(missing[:3])
            return (
                f"{len(missing)} of {len(products)} linears have no {recipe.linears} kernel in profile {number} "
                f"({names}, ...)"
            )
        fused = profile.fused_attentions
        there = sum(fused.values()) if attention is None else fused.get(attention, 0)
        if graph.component not in DECOMPOSABLE and there != graph.attentions:
            kind = "a fused kernel" if attention is None else f"a fused {attention} kernel"
            return f"{there} of {graph.attentions} attentions are {kind} in profile {number} ({fused})"
    return "" if report.profiles else "it listed no kernels"
