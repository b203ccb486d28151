"""Work: the operations of a component and the activations that it moves, told from its spec.

Operations are those of matrix products and convolutions, a multiply-add as two; what is done element by element is left
out (below 0.1 % of them). Activations are counted for the best fusion that is known: every product and every attention
is a kernel that reads its inputs and writes its output once, a norm with its modulation is one, rotary embedding with
the norm of queries and keys is one; gates, residuals and the halves of SwiGLU ride along. Kernels that are less fused
move more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from flux2_trt.drawing import Drawing
from flux2_trt.errors import UsageError
from flux2_trt.spec import AutoencoderSpec, Component, ModelSpec, TextEncoderSpec, TransformerSpec

PICTURE_CHANNELS = 3


@dataclass(frozen=True)
class Work:
    """What one run of a component takes.

    `linear_flops`: of the linears that a recipe may quantize; `attention_flops`: of queries with keys and of
    probabilities with values; `other_flops`: of all other products and convolutions. `wide_values` are moved in the
    recipe's dtype, `narrow_values` in the format of its linears, `attention_values` in that of its attention.
    """

    linear_flops: int = 0
    attention_flops: int = 0
    other_flops: int = 0
    wide_values: int = 0
    narrow_values: int = 0
    attention_values: int = 0

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops + self.other_flops


def work_of(component: Component, spec: ModelSpec, drawing: Drawing) -> Work:
    """One run of `component`: a step of the transformer for all pictures, the text encoder for one prompt, the
    autoencoder for one picture (of the largest reference), conditioning for all steps.

    Raises UsageError for a component that the model lacks.
    """
    match component:
        case "text_encoder" if spec.text_encoder:
            return _text_encoder(spec.text_encoder, drawing.text_tokens)
        case "conditioning":
            return _conditioning(spec.transformer, drawing)
        case "transformer":
            return _transformer(spec.transformer, drawing)
        case "vae_encoder":
            side = spec.autoencoder.pixels_per_token
            return _convolutions(_encoder(spec.autoencoder, *_sides(max(drawing.references, default=0), side)))
        case "vae_decoder":
            return _convolutions(_decoder(spec.autoencoder, drawing.height, drawing.width))
    raise UsageError(f"{spec.name} has no component {component!r}; it has {', '.join(spec.components)}")


def runs_of(component: Component, drawing: Drawing) -> int:
    """How often a component runs for one batch of pictures with a prompt each, and the empty one."""
    runs: dict[Component, int] = {
        "text_encoder": drawing.batch + (1 if drawing.guided else 0),
        "conditioning": 1,
        "transformer": drawing.steps,
        "vae_encoder": len(drawing.references),
        "vae_decoder": drawing.batch,
    }
    return runs[component]


def double_block(spec: TransformerSpec, drawing: Drawing) -> Work:
    """One double block for all tokens, each of which is in one of its two streams."""
    d, mlp, rows = spec.hidden_size, spec.mlp_hidden_size, drawing.sequences * drawing.all_tokens
    return Work(
        linear_flops=2 * rows * (4 * d * d + 3 * mlp * d),
        attention_flops=4 * rows * drawing.all_tokens * d,
        wide_values=rows * 10 * d,  # norms read 2, q and k are written once and read once, residuals read and write 4
        narrow_values=rows * (6 * d + 2 * mlp),  # in and out of norms and linears
        attention_values=rows * 6 * d,  # q, k and v
    )


def single_block(spec: TransformerSpec, drawing: Drawing) -> Work:
    """One single block for all tokens."""
    d, mlp, rows = spec.hidden_size, spec.mlp_hidden_size, drawing.sequences * drawing.all_tokens
    return Work(
        linear_flops=2 * rows * (4 * d * d + 3 * mlp * d),
        attention_flops=4 * rows * drawing.all_tokens * d,
        wide_values=rows * 7 * d,
        narrow_values=rows * (4 * d + 2 * mlp),
        attention_values=rows * 6 * d,
    )


def _transformer(spec: TransformerSpec, drawing: Drawing) -> Work:
    rows, channels, d = drawing.sequences * drawing.latent_tokens, spec.in_channels, spec.hidden_size
    ends = Work(other_flops=4 * rows * channels * d, wide_values=rows * (4 * d + 4 * channels))
    double, single = double_block(spec, drawing), single_block(spec, drawing)
    return _sum((double, spec.num_double_blocks), (single, spec.num_single_blocks), (ends, 1))


def _conditioning(spec: TransformerSpec, drawing: Drawing) -> Work:
    d, steps, rows = spec.hidden_size, drawing.steps, drawing.sequences * drawing.text_tokens
    embedders = (2 if spec.guidance_embeds else 1) * (spec.timestep_channels * d + d * d)
    return Work(
        other_flops=2 * steps * (embedders + spec.modulation_size * d) + 2 * rows * spec.context_dim * d,
        wide_values=steps * spec.modulation_size + rows * (2 * spec.context_dim + d),
    )


def _text_encoder(spec: TextEncoderSpec, rows: int) -> Work:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = Work(
        linear_flops=2 * rows * (hidden * (query + 2 * key) + query * hidden + 3 * hidden * inner),
        attention_flops=4 * rows * rows * query,
        wide_values=rows * (6 * hidden + 3 * (query + key) + 2 * key + query + key),
        narrow_values=rows * (4 * hidden + 2 * query + 2 * inner),
    )
    ends = Work(wide_values=rows * (2 * hidden + 2 * spec.context_dim))
    return _sum((layer, spec.num_layers), (ends, 1))


@dataclass(frozen=True)
class _Convolution:
    """`pixels` of its output, `read` of its input; `adds`: its output is added to a residual, which is read too;
    `attends`: positions of an attention of one head that follows it."""

    inputs: int
    outputs: int
    kernel: int
    pixels: int
    read: int
    adds: bool = False
    attends: int = 0

    @property
    def work(self) -> Work:
        return Work(
            other_flops=2 * self.inputs * self.outputs * self.kernel**2 * self.pixels,
            attention_flops=4 * self.attends**2 * self.inputs,
            wide_values=self.inputs * self.read + self.outputs * self.pixels * (2 if self.adds else 1),
            attention_values=4 * self.attends * self.inputs,
        )


def _convolutions(convolutions: Iterator[_Convolution]) -> Work:
    return _sum(*((convolution.work, 1) for convolution in convolutions))


def _conv(inputs: int, outputs: int, pixels: int, kernel: int = 3, adds: bool = False) -> _Convolution:
    return _Convolution(inputs, outputs, kernel, pixels, pixels, adds)


def _residual(inputs: int, outputs: int, pixels: int) -> Iterator[_Convolution]:
    yield _conv(inputs, outputs, pixels)
    yield _conv(outputs, outputs, pixels, adds=True)
    if inputs != outputs:
        yield _conv(inputs, outputs, pixels, kernel=1)


def _middle(channels: int, pixels: int, attends: bool) -> Iterator[_Convolution]:
    yield from _residual(channels, channels, pixels)
    if attends:
        yield from (_conv(channels, channels, pixels, kernel=1) for _ in range(2))  # queries and keys
        yield _Convolution(channels, channels, 1, pixels, pixels, attends=pixels)
        yield _conv(channels, channels, pixels, kernel=1, adds=True)
    yield from _residual(channels, channels, pixels)


def _encoder(spec: AutoencoderSpec, height: int, width: int) -> Iterator[_Convolution]:
    """Picture of `height` x `width` to latents, as `export.modules.autoencoder.Encoder`."""
    widths, pixels = spec.block_out_channels, height * width
    yield _conv(PICTURE_CHANNELS, widths[0], pixels)
    for level, (before, channels) in enumerate(pairwise((widths[0], *widths))):
        for inputs in (before, *[channels] * (spec.layers_per_block - 1)):
            yield from _residual(inputs, channels, pixels)
        if level + 1 < len(widths):
            yield _Convolution(channels, channels, 3, pixels // 4, pixels)
            pixels //= 4
    yield from _middle(widths[-1], pixels, spec.mid_block_attention)
    moments = 2 * spec.latent_channels
    yield _conv(widths[-1], moments, pixels)
    if spec.quant_conv:
        yield _conv(moments, moments, pixels, kernel=1)


def _decoder(spec: AutoencoderSpec, height: int, width: int) -> Iterator[_Convolution]:
    """Latents to a picture of `height` x `width`, as `export.modules.autoencoder.Decoder`."""
    widths = spec.decoder_block_out_channels
    pixels = height * width // 4 ** (len(widths) - 1)
    if spec.post_quant_conv:
        yield _conv(spec.latent_channels, spec.latent_channels, pixels, kernel=1)
    yield _conv(spec.latent_channels, widths[-1], pixels)
    yield from _middle(widths[-1], pixels, spec.mid_block_attention)
    for level, (before, channels) in enumerate(pairwise((widths[-1], *reversed(widths)))):
        for inputs in (before, *[channels] * spec.layers_per_block):
            yield from _residual(inputs, channels, pixels)
        if level + 1 < len(widths):
            yield _Convolution(channels, channels, 3, pixels * 4, pixels)
            pixels *= 4
    yield _conv(widths[0], PICTURE_CHANNELS, pixels)


def _sides(pixels: int, multiple: int) -> tuple[int, int]:
    """Of a picture of so many pixels; only the area matters for the work."""
    return pixels // multiple, multiple


def _sum(*parts: tuple[Work, int]) -> Work:
    names = Work.__dataclass_fields__
    return Work(**{name: sum(getattr(work, name) * times for work, times in parts) for name in names})
