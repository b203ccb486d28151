"""Parts: components as functions that are traced one by one, each kind of block once.

The parts of the transformer are also plans of their own, for a card that streams its weights: prologue, every double
block with the same plan and other weights, every single block likewise, epilogue. Text and image stream lie in one
buffer there, which is what the whole concatenates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from torch import nn

from export.assembly import Assembly
from export.examples import SIZES, TORCH_DTYPES, Dims, Example, Input, component_example
from export.graph import Graph
from export.modules import build_module
from export.modules.text_encoder import TextEncoder
from export.modules.transformer import Transformer, euler_step, image_tokens, row_of
from export.recipes import Dtype
from flux2_trt.spec import Component, ModelSpec


@dataclass(frozen=True)
class Part:
    """A function of a module and the inputs of `example`."""

    compute: Callable[..., Any]
    example: Example


@dataclass(frozen=True)
class Stack:
    """How a component is traced: `module` has no more than one block of each kind."""

    module: Callable[[], nn.Module]
    parts: Mapping[str, Part]
    assemble: Callable[[Mapping[str, Graph]], Graph]


def stack_of(component: Component, spec: ModelSpec, dtype: Dtype) -> Stack:
    match component:
        case "transformer":
            return _transformer(spec, dtype)
        case "text_encoder":
            return _text_encoder(spec, dtype)
    whole = Part(nn.Module.__call__, component_example(component, spec))
    return Stack(lambda: build_module(component, spec), {component: whole}, lambda graphs: graphs[component])


def assemble(component: Component, spec: ModelSpec, dtype: Dtype, graphs: Mapping[str, Graph]) -> Graph:
    """The graph of a component from those of its parts, as `export.trace.trace_parts` gives them."""
    return stack_of(component, spec, dtype).assemble(graphs)


def _transformer(spec: ModelSpec, dtype: Dtype) -> Stack:
    size, compute = spec.transformer, TORCH_DTYPES[dtype]
    d = size.hidden_size

    def stream(name: str, tokens: str) -> Input:
        return Input(name, ("batch", tokens, d), compute)

    def row(name: str, width: int) -> Input:
        return Input(name, (1, 1, width * d), compute)

    latents = Input("latents", ("batch", "tokens", size.in_channels))
    step = Input("step", (1,), torch.int32)
    rotary = tuple(Input(name, ("all_tokens", size.head_dim // 2)) for name in ("cos", "sin"))
    img, txt, hidden = stream("img", "tokens"), stream("txt", "text_tokens"), stream("hidden", "all_tokens")
    rows = (row("img_modulation", 6), row("txt_modulation", 6), row("single_modulation", 3), row("final_modulation", 2))
    mixes = spec.sampling.guidance_kind == "classifier_free"

    def example(inputs: tuple[Input, ...], **outputs: Dims) -> Example:
        return Example(inputs, outputs, SIZES)

    def prologue(model: Transformer, latents: Any, modulation: Any, step: Any) -> Any:
        return model.prologue(latents, row_of(modulation, step))

    def epilogue(
        model: Transformer, hidden: Any, text_tokens: Any, row: Any, latents: Any, dt: Any, step: Any, *mix: Any
    ) -> Any:
        velocity = model.final_layer(image_tokens(hidden, text_tokens), row)
        return euler_step(latents, velocity, row_of(dt, step), *mix), step + 1

    parts = {
        "prologue": Part(
            prologue,
            example(
                (latents, Input("modulation", ("steps", size.modulation_size), compute), step),
                img=img.dims,
                **{each.name: {} for each in rows},
            ),
        ),
        "double_block": Part(
            lambda model, *inputs: model.double_blocks[0](*inputs),
            example((img, txt, *rows[:2], *rotary), updated_img=img.dims, updated_txt=txt.dims),
        ),
        "single_block": Part(
            lambda model, *inputs: model.single_blocks[0](*inputs),
            example((hidden, rows[2], *rotary), updated_hidden=hidden.dims),
        ),
        "epilogue": Part(
            epilogue,
            example(
                (
                    *(hidden, stream("text_tokens", "text_tokens"), rows[3], latents),
                    *(Input("dt", ("steps", "tokens")), step),
                    *([Input("guidance_mix", ("batch", "batch"))] if mixes else []),
                ),
                updated_latents=latents.dims,
                next_step={},
            ),
        ),
    }
    if not size.num_double_blocks:
        del parts["double_block"]
    if not size.num_single_blocks:
        del parts["single_block"]

    def assemble(graphs: Mapping[str, Graph]) -> Graph:
        whole = Assembly("transformer")
        img, img_row, txt_row, single_row, final_row = whole.add(
            graphs["prologue"], "prologue", ["latents", "modulation", "step"]
        )
        txt = "text_tokens"
        for index in range(size.num_double_blocks):
            inputs = [img, txt, img_row, txt_row, "cos", "sin"]
            img, txt = whole.add(graphs["double_block"], f"double_blocks.{index}", inputs)
        hidden = whole.append("Concat", [txt, img], "hidden", axis=1)
        for index in range(size.num_single_blocks):
            inputs = [hidden, single_row, "cos", "sin"]
            (hidden,) = whole.add(graphs["single_block"], f"single_blocks.{index}", inputs)
        inputs = [hidden, "text_tokens", final_row, "latents", "dt", "step", *(["guidance_mix"] if mixes else [])]
        whole.add(graphs["epilogue"], "epilogue", inputs, ["updated_latents", "next_step"])
        return whole.finish()

    shallow = replace(
        size, num_double_blocks=min(1, size.num_double_blocks), num_single_blocks=min(1, size.num_single_blocks)
    )
    return Stack(lambda: Transformer(shallow), parts, assemble)


def _text_encoder(spec: ModelSpec, dtype: Dtype) -> Stack:
    size, compute = spec.text_encoder, TORCH_DTYPES[dtype]
    assert size

    ids, mask = (Input(name, ("batch", "text_tokens"), torch.int64) for name in ("input_ids", "attention_mask"))
    x = Input("x", ("batch", "text_tokens", size.hidden_size), compute)
    context = (
        *(Input(name, ("text_tokens", size.head_dim // 2)) for name in ("cos", "sin")),
        Input("visible", ("batch", 1, "text_tokens", "text_tokens"), torch.bool),
        Input("sees", ("batch", "text_tokens", 1), compute),
    )
    parts = {
        "embed": Part(TextEncoder.embed, Example((ids, mask), {each.name: each.dims for each in (x, *context)}, SIZES)),
        "layer": Part(
            lambda model, *inputs: model.layers[0](*inputs), Example((x, *context), {"updated_x": x.dims}, SIZES)
        ),
    }

    def assemble(graphs: Mapping[str, Graph]) -> Graph:
        whole = Assembly("text_encoder")
        first, *values = whole.add(graphs["embed"], "embed", ["input_ids", "attention_mask"])
        states = [first]
        for index in range(size.num_layers):
            states += whole.add(graphs["layer"], f"layers.{index}", [states[-1], *values])
        joined = whole.append("Concat", [states[index] for index in size.hidden_states], "hidden_states", axis=2)
        whole.append("Cast", [joined], "prompt_embeds", to=onnx.TensorProto.FLOAT)
        sides: list[str | int | None] = ["batch", "text_tokens", size.context_dim]
        return whole.finish([onnx.helper.make_tensor_value_info("prompt_embeds", onnx.TensorProto.FLOAT, sides)])

    return Stack(lambda: TextEncoder(replace(size, hidden_states=(1,))), parts, assemble)
