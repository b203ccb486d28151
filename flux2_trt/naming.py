"""Naming: how BFL's, diffusers' and transformers' tensor names map onto the canonical ones.

Canonical are BFL's names for the transformer and the autoencoder, transformers' names without a prefix for the text
encoder. Sources: black-forest-labs/flux2 `src/flux2/model.py`, `autoencoder.py`; huggingface/diffusers
`scripts/convert_flux2_to_diffusers.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from flux2_trt.errors import CheckpointError
from flux2_trt.spec import Component

Family = Literal["transformer", "autoencoder", "text_encoder"]
FAMILIES: tuple[Family, ...] = ("transformer", "autoencoder", "text_encoder")
FAMILY_OF: Mapping[Component, Family] = {
    "text_encoder": "text_encoder",
    "conditioning": "transformer",
    "transformer": "transformer",
    "vae_encoder": "autoencoder",
    "vae_decoder": "autoencoder",
}
Arrangement = Literal["plain", "concatenated", "halves_swapped", "pointwise_conv"]


@dataclass(frozen=True)
class Source:
    """The stored tensors that make up a canonical one, and how.

    `concatenated` and `halves_swapped` act on dimension 0; `pointwise_conv` reads a linear `[o, i]` as `[o, i, 1, 1]`.
    """

    names: tuple[str, ...]
    arrangement: Arrangement = "plain"


def canonical_sources(names: Iterable[str], family: Family) -> dict[str, Source]:
    """Canonical name -> source, for stored names in any known layout.

    Tensors that no picture needs (`lm_head`, the vision tower, ...) are left out; a name that is not understood stands
    for itself, so that `Checkpoint.verify` can report it. Raises CheckpointError where two stand for the same tensor.
    """
    used = [name for name in names if not _UNUSED[family].fullmatch(name)]
    last_up_block = max((int(match[1]) for name in used if (match := _UP_BLOCK.match(name))), default=0)
    found: dict[str, list[tuple[int, str, Source | None]]] = defaultdict(list)
    for name in used:
        # diffusers counts the decoder's blocks in the order in which they run, BFL by resolution.
        counted = _UP_BLOCK.sub(lambda match: f"decoder.up_blocks.{last_up_block - int(match[1])}.", name)
        canonical, part, rule = _translate(counted, family)
        found[canonical if rule or counted == name else name].append((part, name, rule))
    sources: dict[str, Source] = {}
    for canonical, members in found.items():
        rule = members[0][2]
        by_part = {part: name for part, name, _ in members}
        if len(by_part) < len(members) or len({rule for _, _, rule in members}) > 1:
            raise CheckpointError(f"it holds {canonical} twice, as {' and as '.join(name for _, name, _ in members)}")
        if rule is None:
            sources[canonical] = Source((by_part[0],))
        elif len(by_part) == len(rule.names):
            sources[canonical] = Source(tuple(by_part[part] for part in sorted(by_part)), rule.arrangement)
        else:  # a part is missing: the others keep the names that they have in the file
            sources.update({name: Source((name,)) for name in by_part.values()})
    return sources


def diffusers_source(canonical: str) -> Source:
    """The tensors in diffusers' layout that make up one of the transformer. Raises KeyError for a name it has not."""
    numbers = tuple(re.findall(r"(?<=_blocks\.)\d+", canonical))
    source = _TRANSFORMER[re.sub(r"(?<=_blocks\.)\d+", "#", canonical)]
    return Source(tuple(_filled(name, numbers) for name in source.names), source.arrangement)


def _translate(name: str, family: Family) -> tuple[str, int, Source | None]:
    """Canonical name, which part of it, and the rule that says so."""
    for pattern, canonical, part, rule in _RULES[family]:
        if match := pattern.fullmatch(name):
            return _filled(canonical, match.groups()), part, rule
    return _PREFIX[family].sub("", name), 0, None


def _filled(template: str, numbers: tuple[str, ...]) -> str:
    remaining = iter(numbers)
    return re.sub("#", lambda _: next(remaining), template)


# Templates of diffusers' names: canonical <- stored; # is a number, the same ones in the same order on both sides.

_TRANSFORMER: dict[str, Source] = {
    "img_in.weight": Source(("x_embedder.weight",)),
    "txt_in.weight": Source(("context_embedder.weight",)),
    "time_in.in_layer.weight": Source(("time_guidance_embed.timestep_embedder.linear_1.weight",)),
    "time_in.out_layer.weight": Source(("time_guidance_embed.timestep_embedder.linear_2.weight",)),
    "guidance_in.in_layer.weight": Source(("time_guidance_embed.guidance_embedder.linear_1.weight",)),
    "guidance_in.out_layer.weight": Source(("time_guidance_embed.guidance_embedder.linear_2.weight",)),
    "double_stream_modulation_img.lin.weight": Source(("double_stream_modulation_img.linear.weight",)),
    "double_stream_modulation_txt.lin.weight": Source(("double_stream_modulation_txt.linear.weight",)),
    "single_stream_modulation.lin.weight": Source(("single_stream_modulation.linear.weight",)),
    # (scale, shift) in diffusers, (shift, scale) here
    "final_layer.adaLN_modulation.1.weight": Source(("norm_out.linear.weight",), "halves_swapped"),
    "final_layer.linear.weight": Source(("proj_out.weight",)),
    **{
        f"double_blocks.#.{canonical}": Source(
            tuple(f"transformer_blocks.#.{name}.weight" for name in names),
            "concatenated" if len(names) > 1 else "plain",
        )
        for canonical, *names in (
            ("img_attn.qkv.weight", "attn.to_q", "attn.to_k", "attn.to_v"),
            ("img_attn.norm.query_norm.scale", "attn.norm_q"),
            ("img_attn.norm.key_norm.scale", "attn.norm_k"),
            ("img_attn.proj.weight", "attn.to_out.0"),
            ("img_mlp.0.weight", "ff.linear_in"),
            ("img_mlp.2.weight", "ff.linear_out"),
            ("txt_attn.qkv.weight", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ("txt_attn.norm.query_norm.scale", "attn.norm_added_q"),
            ("txt_attn.norm.key_norm.scale", "attn.norm_added_k"),
            ("txt_attn.proj.weight", "attn.to_add_out"),
            ("txt_mlp.0.weight", "ff_context.linear_in"),
            ("txt_mlp.2.weight", "ff_context.linear_out"),
        )
    },
    **{
        f"single_blocks.#.{canonical}": Source((f"single_transformer_blocks.#.attn.{name}.weight",))
        for canonical, name in (
            ("linear1.weight", "to_qkv_mlp_proj"),
            ("linear2.weight", "to_out"),
            ("norm.query_norm.scale", "norm_q"),
            ("norm.key_norm.scale", "norm_k"),
        )
    },
}


def _autoencoder_sources() -> dict[str, Source]:
    modules = {
        "encoder.quant_conv": "quant_conv",
        "decoder.post_quant_conv": "post_quant_conv",
        "encoder.down.#.downsample.conv": "encoder.down_blocks.#.downsamplers.0.conv",
        "decoder.up.#.upsample.conv": "decoder.up_blocks.#.upsamplers.0.conv",
    }
    residuals = {
        "encoder.down.#.block.#": "encoder.down_blocks.#.resnets.#",
        "decoder.up.#.block.#": "decoder.up_blocks.#.resnets.#",
    }
    for coder in ("encoder", "decoder"):
        modules[f"{coder}.norm_out"] = f"{coder}.conv_norm_out"
        modules[f"{coder}.mid.attn_1.norm"] = f"{coder}.mid_block.attentions.0.group_norm"
        residuals[f"{coder}.mid.block_1"] = f"{coder}.mid_block.resnets.0"
        residuals[f"{coder}.mid.block_2"] = f"{coder}.mid_block.resnets.1"
    for canonical, stored in residuals.items():
        modules |= {f"{canonical}.{layer}": f"{stored}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2")}
        modules[f"{canonical}.nin_shortcut"] = f"{stored}.conv_shortcut"
    sources = {
        f"{canonical}.{kind}": Source((f"{stored}.{kind}",))
        for canonical, stored in modules.items()
        for kind in ("weight", "bias")
    }
    for coder in ("encoder", "decoder"):
        for canonical, stored in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            canonical, stored = f"{coder}.mid.attn_1.{canonical}", f"{coder}.mid_block.attentions.0.{stored}"
            sources[f"{canonical}.weight"] = Source((f"{stored}.weight",), "pointwise_conv")
            sources[f"{canonical}.bias"] = Source((f"{stored}.bias",))
    return sources


def _compiled(sources: Mapping[str, Source]) -> list[tuple[re.Pattern[str], str, int, Source]]:
    return [
        (re.compile(re.escape(stored).replace(r"\#", r"(\d+)")), canonical, part, source)
        for canonical, source in sources.items()
        for part, stored in enumerate(source.names)
    ]


_RULES = {"transformer": _compiled(_TRANSFORMER), "autoencoder": _compiled(_autoencoder_sources()), "text_encoder": []}
_UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d+)\.")
_LANGUAGE_MODEL = r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
# What stands before a name that is canonical otherwise: ComfyUI's exports, and every generation of transformers.
_PREFIX: dict[Family, re.Pattern[str]] = {
    "transformer": re.compile(r"^model\.diffusion_model\."),
    "autoencoder": re.compile(r"(?!)"),
    "text_encoder": re.compile(rf"^{_LANGUAGE_MODEL}(?=layers\.\d|embed_tokens\.)"),
}
# Known and not needed: training state; the heads and the eyes of the language model; the tokenizer in ComfyUI's files.
_UNUSED: dict[Family, re.Pattern[str]] = {
    "transformer": re.compile(r"(?!)"),
    "autoencoder": re.compile(r"bn\.num_batches_tracked"),
    "text_encoder": re.compile(
        rf"(?:language_model\.)?lm_head\.weight|{_LANGUAGE_MODEL}norm\.weight"
        r"|(?:model\.)?(?:vision_tower|multi_modal_projector)\..+|.*\.rotary_emb\.inv_freq|tekken_model"
    ),
}
