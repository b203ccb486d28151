"""Operations and parameters, against torch's own counter and the table that was published of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engines.footprint import parameters
from engines.work import Work, runs_of, work_of
from export.modules import build_module
from flux2_trt.drawing import Drawing
from flux2_trt.errors import UsageError
from flux2_trt.models import published_spec
from flux2_trt.spec import Component, ModelSpec

TERA = 1e12


def on_meta(component: Component, spec: ModelSpec, drawing: Drawing) -> dict[str, int]:
    """Operations of one run of the module by kind of product, as torch counts them; nothing is computed."""
    with torch.device("meta"):
        module = build_module(component, spec)
        d, rows, text, steps = spec.transformer.hidden_size, drawing.sequences, drawing.text_tokens, drawing.steps
        positions = torch.empty(drawing.all_tokens, spec.transformer.head_dim // 2)
        inputs: dict[Component, tuple[Any, ...]] = {
            "text_encoder": (torch.zeros(1, text, dtype=torch.long), torch.ones(1, text, dtype=torch.long)),
            "conditioning": (torch.empty(steps), torch.empty(rows, text, spec.transformer.context_dim)),
            "transformer": (
                torch.empty(rows, drawing.latent_tokens, spec.transformer.in_channels),
                torch.empty(steps, spec.transformer.modulation_size),
                torch.empty(rows, text, d),
                positions,
                positions,
                torch.empty(steps, drawing.latent_tokens),
                torch.zeros(1, dtype=torch.int32),
            ),
            "vae_encoder": (torch.empty(1, drawing.height, drawing.width, 3),),
            "vae_decoder": (
                torch.empty(1, drawing.height // 16, drawing.width // 16, spec.autoencoder.token_channels),
            ),
        }
        if component == "conditioning" and spec.transformer.guidance_embeds:
            inputs[component] += (torch.empty(steps),)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            module(*inputs[component])
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("component", ["text_encoder", "conditioning", "transformer", "vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("model", ["tiny", "klein-base-4b", "klein-9b", "dev"])
def test_operations_are_those_that_torch_counts(model: str, component: Component) -> None:
    spec = published_spec(model)
    references = 2 if component == "transformer" else 0
    drawing = Drawing.of(spec, 256, 192, batch=2, num_references=references, steps=3)
    if component == "vae_encoder":
        drawing = replace(drawing, references=(drawing.pixels,))
    counted = on_meta(component, spec, drawing)
    work = work_of(component, spec, drawing)
    assert work.flops == sum(counted.values())
    attention = sum(flops for name, flops in counted.items() if "bmm" in name or "scaled_dot_product" in name)
    assert work.attention_flops == attention


@pytest.mark.parametrize("model", ["tiny", "klein-4b", "klein-base-9b", "dev"])
def test_parameters_are_those_of_the_modules(model: str) -> None:
    spec = published_spec(model)
    for component in spec.components:
        with torch.device("meta"):
            module = build_module(component, spec)
        there = [*module.parameters(), *module.buffers()]
        assert parameters(component, spec) == sum(tensor.numel() for tensor in there), component


@pytest.mark.parametrize(
    ("model", "published"), [("dev", 32_223_281_152), ("klein-9b", 9_078_581_248), ("klein-4b", 3_875_544_576)]
)
def test_parameters_of_the_transformer_as_published(model: str, published: int) -> None:
    spec = published_spec(model)
    assert parameters("conditioning", spec) + parameters("transformer", spec) == published


# Model, width, height, references of 1 MP; tokens; 10^12 operations: linear, attention, all with one conditioning.
PUBLISHED = """
dev 512 512 0 1536 84.42 3.25 87.77
dev 1024 1024 0 4608 253.27 29.22 282.60
dev 1360 768 0 4592 252.39 29.02 281.52
dev 2048 2048 0 16896 928.64 392.89 1321.68
dev 1024 1024 1 8704 478.39 104.26 582.77
dev 1024 1024 2 12800 703.52 225.49 929.13
dev 1024 1024 4 20992 1153.77 606.47 1760.37
dev 1024 1024 8 37376 2054.27 1922.58 3977.01
klein-9b 512 512 0 1536 21.44 1.24 22.73
klein-9b 1024 1024 0 4608 64.32 11.13 75.51
klein-9b 1360 768 0 4592 64.10 11.06 75.21
klein-9b 2048 2048 0 16896 235.85 149.67 385.60
klein-4b 512 512 0 1536 9.42 0.72 10.17
klein-4b 1024 1024 0 4608 28.27 6.52 34.82
klein-4b 1360 768 0 4592 28.17 6.48 34.68
klein-4b 2048 2048 0 16896 103.64 87.70 191.39
"""


@pytest.mark.parametrize("row", PUBLISHED.split("\n")[1:-1])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_operations_of_a_step_as_published(row: str, batch: int) -> None:
    model, *numbers = row.split()
    width, height, references, tokens = map(int, numbers[:4])
    linear, attention, everything = (float(number) * batch for number in numbers[4:])
    spec = published_spec(model)
    drawing = Drawing.of(spec, width, height, batch, references, steps=1)
    step = work_of("transformer", spec, drawing)
    rounding = 0.005 * batch
    assert drawing.all_tokens == tokens
    assert step.linear_flops / TERA == pytest.approx(linear, abs=rounding)
    assert step.attention_flops / TERA == pytest.approx(attention, abs=rounding)
    both = step.flops + work_of("conditioning", spec, drawing).flops
    assert both / TERA == pytest.approx(everything, rel=1e-3, abs=rounding)


@pytest.mark.parametrize(
    ("side", "height", "decoding", "attention", "encoding"),
    [
        (512, 512, 2.516, 0.034, 1.119),
        (1024, 1024, 10.475, 0.550, 4.888),
        (1360, 768, 10.432, 0.545, 4.866),
        (2048, 2048, 48.496, 8.796, 26.147),
    ],
)
def test_operations_of_the_autoencoder_as_published(
    side: int, height: int, decoding: float, attention: float, encoding: float
) -> None:
    spec = published_spec("dev")
    drawing = replace(Drawing.of(spec, side, height), references=(side * height,))
    decoder, encoder = work_of("vae_decoder", spec, drawing), work_of("vae_encoder", spec, drawing)
    found = (decoder.flops, decoder.attention_flops, encoder.flops)
    assert [flops / TERA for flops in found] == pytest.approx([decoding, attention, encoding], abs=0.0006)


def test_operations_of_the_text_encoder_as_published() -> None:
    work = work_of("text_encoder", published_spec("dev"), Drawing.of(published_spec("dev")))
    assert work.linear_flops / TERA == pytest.approx(17.07, abs=0.005)
    assert work.attention_flops / TERA == pytest.approx(0.129, abs=0.0005)


def test_activations_that_a_step_moves_scale_with_tokens_and_batch() -> None:
    spec = published_spec("dev")
    one = work_of("transformer", spec, Drawing.of(spec, 1024, 1024))
    two = work_of("transformer", spec, Drawing.of(spec, 1024, 1024, batch=2))
    assert (two.wide_values, two.narrow_values) == (2 * one.wide_values, 2 * one.narrow_values)
    # Published as 23 times tokens x channels for every one of 56 blocks: 72.9 GB in bf16. That is right for the 48
    # single blocks; the 8 double ones have a second norm and a second product behind it, 28 times, and there are ends.
    block = 4608 * 6144
    values = one.wide_values + one.narrow_values + one.attention_values
    assert 48 * 23 * block + 8 * 28 * block < values < (48 * 23 + 8 * 28 + 5) * block


def test_a_guided_picture_is_two_sequences_and_one_more_prompt() -> None:
    spec = published_spec("klein-base-4b")
    drawing = Drawing.of(spec, 1024, 1024, batch=3)
    alone = Drawing.of(published_spec("klein-4b"), 1024, 1024, batch=6)
    assert work_of("transformer", spec, drawing) == work_of("transformer", published_spec("klein-4b"), alone)
    assert [runs_of(name, drawing) for name in spec.components] == [4, 1, 50, 0, 3]


def test_tiny_is_not_guided_by_default() -> None:
    assert Drawing.of(published_spec("tiny")).sequences == 1


def test_references_of_a_model_with_a_limit_of_its_own() -> None:
    assert Drawing.of(published_spec("tiny"), num_references=2).references == (512 * 512, 512 * 512)


def test_no_text_encoder_no_work() -> None:
    spec = replace(published_spec("klein-4b"), text_encoder=None, prompt=None)
    with pytest.raises(UsageError, match="has no component 'text_encoder'; it has conditioning, transformer"):
        work_of("text_encoder", spec, Drawing.of(spec))
    assert Drawing.of(spec).text_tokens == 512
    assert work_of("vae_encoder", spec, Drawing.of(spec)) == Work()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 100}, r"size 100x768 is not allowed; .* the nearest is 96x768"),
        ({"height": 0}, r"size 1360x0 is not allowed"),
        ({"width": 8192, "height": 8192}, r"the nearest is 4096x4096"),
        ({"batch": 0}, r"--batch is 0; it is at least 1"),
        ({"num_references": -1}, r"--num-references is -1; it is at least 0"),
        ({"steps": 0}, r"--steps is 0; it is from 1 to 100"),
        ({"steps": 101}, r"--steps is 101; it is from 1 to 100"),
    ],
)
def test_pictures_that_are_not_drawn(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Drawing.of(published_spec("dev"), **values)
