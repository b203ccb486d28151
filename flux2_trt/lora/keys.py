"""Keys: what the tensor names of LoRA files say, which part of which weight they change and how.

A key is a prefix, the name of a module, and a role. Modules have BFL's or diffusers' names, with dots or, where kohya's
sd-scripts and LyCORIS wrote them, with underscores:

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha         sd-scripts, musubi-tuner
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight               ai-toolkit, ComfyUI
    base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight                              peft
    transformer.transformer_blocks.0.attn.to_q.lora_A.weight                                 diffusers
    diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff                            ComfyUI, LyCORIS: W + diff
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flux2_trt.inventory import expected_tensors
from flux2_trt.naming import diffusers_source
from flux2_trt.spec import ModelSpec

Role = Literal["down", "up", "alpha", "diff"]

_PREFIX = re.compile(
    r"(?:(?:base_model\.model\.|model\.(?=diffusion_model\.)|diffusion_model\.|transformer\.)+"
    r"|lora_unet_|lora_transformer_|lycoris_)"
)
_ADAPTER = r"(?:\.[^.]+)?"  # peft's name of the adapter, which some exports leave in
_ROLES: Mapping[Role, str] = {
    "down": rf"lora_(?:A|down){_ADAPTER}\.weight",
    "up": rf"lora_(?:B|up){_ADAPTER}\.weight",
    "alpha": "alpha",
    "diff": "diff",
}
_OTHER_KINDS: Mapping[str, str] = {
    "DoRA": rf"dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "LoKr": r"lokr_\w+",
    "LoHa": r"hada_\w+",
    "OFT": r"oft_\w+",
    "GLoRA": r"[ab][12]\.weight",
    "Tucker decomposition": r"lora_mid\.weight",
    "bias, which FLUX.2 has nowhere": rf"diff_b|lora_(?:B|up){_ADAPTER}\.bias",
    "weight in place of another": r"set_weight",
}
_KEY = re.compile(r"(?P<module>.+?)\.(?:" + "|".join(f"(?P<{role}>{text})" for role, text in _ROLES.items()) + ")")
_OTHER_KEYS = {kind: re.compile(rf"(?:.+\.)?(?:{text})") for kind, text in _OTHER_KINDS.items()}
_TEXT_ENCODER = re.compile(r"lora_te\d?_|(?:text_encoder|text_encoders|te\d?)(?:_\d)?\.")


@dataclass(frozen=True)
class Rows:
    """`count` rows of a module from `start` on: those of the canonical weight from `first` on."""

    first: int
    start: int
    count: int


@dataclass(frozen=True)
class Target:
    """The canonical weight that a module of `shape` [N, K] is, or is a part of."""

    weight: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]


def parse_key(key: str) -> tuple[str, Role] | None:
    """The module of a key, without a prefix, and its role; None for a key that is not a LoRA's."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    (role,) = (role for role in _ROLES if match[role] is not None)
    module = match["module"]
    prefix = _PREFIX.match(module)
    return module[prefix.end() :] if prefix else module, role


def other_kind(key: str) -> str | None:
    """What a key is that belongs to something else than a LoRA of the transformer; None where that is not known."""
    if _TEXT_ENCODER.match(key):
        return "LoRA of a text encoder"
    return next((kind for kind, pattern in _OTHER_KEYS.items() if pattern.fullmatch(key)), None)


def targets(spec: ModelSpec) -> dict[str, Target]:
    """By the names of modules, BFL's and diffusers', with dots and with underscores, where in the model they are.

    Single blocks are also known by the separate projections to_q, to_k, to_v, proj_mlp and proj_out, as FLUX.1 has them
    and some trainers write them.
    """
    found: dict[str, Target] = {}
    for weight, shape in expected_tensors(spec, "transformer").items():
        module = weight.rpartition(".")[0]
        found[module] = found[weight.removesuffix(".weight")] = Target(weight, shape, (Rows(0, 0, shape[0]),))
        source = diffusers_source(weight)
        count = shape[0] // len(source.names)
        for part, name in enumerate(source.names):
            rows: tuple[Rows, ...] = (Rows(part * count, 0, count),)
            if source.arrangement == "halves_swapped":
                rows = (Rows(0, count // 2, count // 2), Rows(count // 2, 0, count // 2))
            found[name.rpartition(".")[0]] = Target(weight, (count, *shape[1:]), rows)
    hidden, gate_and_up = spec.transformer.hidden_size, 2 * spec.transformer.mlp_hidden_size
    for block in range(spec.transformer.num_single_blocks):
        first, theirs = 0, f"single_transformer_blocks.{block}"
        projections = {"attn.to_q": hidden, "attn.to_k": hidden, "attn.to_v": hidden, "proj_mlp": gate_and_up}
        for name, count in projections.items():
            rows = (Rows(first, 0, count),)
            found[f"{theirs}.{name}"] = Target(f"single_blocks.{block}.linear1.weight", (count, hidden), rows)
            first += count
        found[f"{theirs}.proj_out"] = found[f"single_blocks.{block}.linear2"]
    return {**found, **{name.replace(".", "_"): target for name, target in found.items()}}
