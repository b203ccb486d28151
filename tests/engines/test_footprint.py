"""Bytes of weights, against graphs and published files; scratch, against what compilers said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from traces import traced_once

from engines.footprint import TENSORS, scratch_bytes, tensors_of, weight_bytes
from engines.shapes import ShapeRequest, profiles
from export.conversion import STORED_DTYPES
from export.quantize import quantize
from export.recipes import RECIPES
from flux2_trt.drawing import Drawing
from flux2_trt.inventory import expected_tensors
from flux2_trt.models import published_spec
from flux2_trt.naming import FAMILY_OF
from flux2_trt.spec import Component

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GIGA = 1e9


@pytest.mark.parametrize("component", TENSORS)
def test_weights_are_what_a_graph_takes(component: Component) -> None:
    spec = published_spec("tiny")
    graphs = {dtype: traced_once(component, spec, dtype) for dtype in ("fp32", "bf16")}
    for recipe in (*RECIPES.values(), replace(RECIPES["int4"], dtype="fp32"), replace(RECIPES["fp8"], fp8_layout="nk")):
        graph = quantize(graphs[recipe.dtype], recipe)
        slots = [(slot.shape, slot.dtype) for slot in (*graph.weights.values(), *graph.scales.values())]
        taken = sum(math.prod(shape) * STORED_DTYPES[dtype][1] // 8 for shape, dtype in slots)
        assert weight_bytes(component, spec, recipe) == taken, recipe


def test_every_tensor_belongs_to_a_component() -> None:
    for model in ("dev", "klein-4b"):
        spec = published_spec(model)
        for family in set(FAMILY_OF.values()):
            components = [component for component in spec.components if FAMILY_OF[component] == family]
            assert {TENSORS[component][0] for component in components} == {family}
            names = [name for component in components for name in tensors_of(component, spec)]
            assert set(names) == set(expected_tensors(spec, family))
            assert [name for name in set(names) if names.count(name) > 1 and not name.startswith("bn.")] == []


@pytest.mark.parametrize(
    ("model", "precision", "published"),
    [
        ("klein-4b", "bf16", 7.75e9),  # flux-2-klein-4b.safetensors
        ("klein-4b", "fp8", 4_070_624_520),  # flux-2-klein-4b-fp8.safetensors
        ("klein-4b", "nvfp4", 2.29 * 2**30),  # flux-2-klein-4b-nvfp4.safetensors
        ("klein-9b", "fp8", 8.79 * 2**30),  # flux-2-klein-9b-fp8.safetensors
        ("dev", "bf16", 64.4e9),  # flux2-dev.safetensors
        ("dev", "fp8", 33.04e9),  # and what was computed of it
        ("dev", "nvfp4", 19.30e9),
        ("dev", "int4", 18.32e9),
    ],
)
def test_weights_of_the_transformer_as_published(model: str, precision: str, published: float) -> None:
    """The files have a header of some hundred kilobytes, which ours do not count."""
    spec, recipe = published_spec(model), RECIPES[precision]
    both = weight_bytes("conditioning", spec, recipe) + weight_bytes("transformer", spec, recipe)
    assert both == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(("precision", "published"), [("bf16", 34.69), ("fp8", 18.01), ("nvfp4", 10.72)])
def test_weights_of_the_text_encoder_as_published(precision: str, published: float) -> None:
    size = weight_bytes("text_encoder", published_spec("dev"), RECIPES[precision])
    assert size / GIGA == pytest.approx(published, abs=0.006)


def recorded_builds() -> list[tuple[str, Component, int]]:
    """Model, component and scratch of the full models in the committed results; the autoencoder's are in another."""
    builds = json.loads((RESULTS / "builds.json").read_text())["builds"]
    return [
        (build["model"], component["name"], component["layers"]["scratch_bytes"])
        for build in builds
        if build["model"] in ("dev", "klein-4b", "klein-9b") and "@" not in build["command"]
        for component in build["components"]
        if component["name"] in ("text_encoder", "transformer")
    ]


def test_scratch_is_estimated_from_above_for_plans_of_a_range() -> None:
    found = recorded_builds()
    assert len(found) == 11
    for model, component, compiled in found:
        spec = published_spec(model)
        (profile,) = profiles(component, spec, ShapeRequest())
        tokens = profile["tokens"].most if component == "transformer" else 0
        drawing = replace(Drawing.of(spec), width=16, height=16 * tokens, text_tokens=profile["text_tokens"].most)
        assert compiled <= scratch_bytes(component, spec, drawing) <= 1.1 * compiled, (model, component)


def compiled_alone() -> list[Any]:
    return json.loads((RESULTS / "scratch.json").read_text())["scratch"]


@pytest.mark.parametrize("case", compiled_alone(), ids=lambda case: f"{case['component']}-{case['side']}")
def test_scratch_is_estimated_from_above_for_plans_of_a_size(case: dict[str, Any]) -> None:
    spec, side = published_spec(case["model"]), case["side"]
    drawing = replace(Drawing.of(spec, side, side), references=(side * side,))
    if case["component"] == "transformer":
        drawing = replace(drawing, references=())
    estimate = scratch_bytes(case["component"], spec, drawing)
    assert case["scratch_bytes"] <= estimate <= 1.4 * case["scratch_bytes"]
