"""Lora: what one LoRA file adds to the weights of a model, told from its keys and shapes, and checked.

    W + strength * alpha / rank * up @ down          or          W + strength * diff

Rank is that of `down`. Alpha is the file's own tensor, or what peft and diffusers say of it beside the tensors; where
neither does, it is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flux2_trt.bundle import file_sha256
from flux2_trt.checkpoint import listed
from flux2_trt.errors import CheckpointError
from flux2_trt.lora.keys import Role, Target, other_kind, parse_key, targets
from flux2_trt.lora.request import LoraRequest
from flux2_trt.models import FAMILY
from flux2_trt.spec import ModelSpec
from flux2_trt.tensor_file import READABLE, TensorFile, TensorView

DIFFUSERS_CONFIG = "lora_adapter_metadata"  # the key of a file's metadata that holds peft's configuration
TRANSFORMER = "transformer."
_OTHER_MODELS: Mapping[str, str] = {
    "FLUX.1": r"(img|txt)_mod[._]lin|[._]norm1(_context)?[._]linear|blocks[._]\d+[._](norm|modulation)[._]lin"
    r"|[._]ff(_context)?[._]net|^single_transformer_blocks[._]\d+[._]proj_(mlp|out)|^vector_in"
    r"|double_blocks[._](8|9|1\d)[._](img|txt)_attn",
    "Stable Diffusion": r"^(unet[._])?(down|up|mid|input|output|middle)_blocks?[._]",
}


@dataclass(frozen=True, eq=False)
class Delta:
    """What is added to the rows of a canonical weight from `first` on: factor * up @ down, or factor * up.

    `up`: [rows, rank], or the rows themselves where there is no `down` [rank, K].
    """

    first: int
    up: TensorView
    down: TensorView | None
    factor: float

    @property
    def last(self) -> int:
        return self.first + self.up.shape[0]


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that fits the transformer of a model; `deltas` by canonical weight, of strength 1."""

    request: LoraRequest
    deltas: Mapping[str, tuple[Delta, ...]]

    @staticmethod
    def open(request: LoraRequest, spec: ModelSpec) -> Lora:
        """Raises CheckpointError that lists all that is wrong: what no LoRA of the model has, what is not finite."""
        try:
            file = TensorFile(request.file)
        except CheckpointError as error:
            raise CheckpointError(f"the LoRA {error}") from error
        content = _Content(file, _Config.of(request, file.metadata))
        deltas, problems = content.deltas(spec)
        for title, key in content.not_finite(deltas):
            problems[title].append(key)
        if problems:
            lines = [f"{request.file} cannot be folded into {spec.name}: {content.advice(spec, problems)}"]
            raise CheckpointError("\n".join(lines + [f"  {title}: {listed(keys)}" for title, keys in problems.items()]))
        return Lora(request, deltas)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return lora_identity(self.request)


def lora_identity(request: LoraRequest) -> dict[str, Any]:
    """What a bundle says of a LoRA: its file's name and digest, and the strength. JSON values."""
    if not request.file.is_file():
        raise CheckpointError(f"the LoRA {request.path} is missing; give FILE or FILE:STRENGTH")
    identity: dict[str, Any] = {
        "file": request.file.name,
        "sha256": file_sha256(request.file),
        "strength": request.strength,
    }
    if request.config:
        identity["config_sha256"] = file_sha256(request.config)
    return identity


@dataclass(frozen=True)
class _Config:
    """What peft says of a LoRA beside its tensors: alpha, and exceptions by patterns that fit the names of modules.

    As in peft, a pattern fits all of a name, or its end after a dot.
    """

    alpha: float | None = None
    by_module: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    rank_stabilized: bool = False

    @staticmethod
    def of(request: LoraRequest, metadata: Mapping[str, str]) -> _Config:
        where: Any = request.config or request.file
        try:
            if request.config:
                values = json.loads(request.config.read_text(encoding="utf-8"))
            elif DIFFUSERS_CONFIG in metadata:
                values = json.loads(metadata[DIFFUSERS_CONFIG])
            else:
                return _Config()
            values = {key.removeprefix(TRANSFORMER): value for key, value in values.items()}
            used = [key for key in ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora") if values.get(key)]
            alpha, patterns = values["lora_alpha"], values.get("alpha_pattern") or {}
            by_module = {re.compile(rf"(.*\.)?({pattern})"): float(value) for pattern, value in patterns.items()}
            config = _Config(float(alpha), by_module, bool(values.get("use_rslora")))
            if not all(math.isfinite(value) for value in (float(alpha), *by_module.values())):
                raise ValueError("alpha is not finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
            raise CheckpointError(f"what {where} says of peft's configuration cannot be read ({error!r})") from error
        if used:
            raise CheckpointError(f"{where} says {', '.join(used)}, which is not folded; give a plain LoRA")
        return config

    def factor(self, module: str, rank: int) -> float:
        """alpha / rank, or as peft's rsLoRA has it, alpha / sqrt(rank)."""
        if self.alpha is None:
            return 1.0
        alpha = next((a for pattern, a in self.by_module.items() if pattern.fullmatch(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


Problems = defaultdict[str, list[str]]


class _Content:
    """The tensors of a file by module and role."""

    def __init__(self, file: TensorFile, config: _Config) -> None:
        self.tensors, self.config = file.tensors, config
        self.modules: dict[str, dict[Role, list[str]]] = {}
        self.strangers: Problems = defaultdict(list)
        for key in file.tensors:
            parsed = parse_key(key)
            if kind := other_kind(key):
                self.strangers[kind].append(key)
            elif parsed is None:
                self.strangers["not known"].append(key)
            else:
                self.modules.setdefault(parsed[0], {}).setdefault(parsed[1], []).append(key)

    def deltas(self, spec: ModelSpec) -> tuple[dict[str, tuple[Delta, ...]], Problems]:
        """By canonical weight, and the keys that no LoRA of the model has, by what is wrong with them."""
        known = targets(spec)
        problems: Problems = defaultdict(list, {title: list(keys) for title, keys in self.strangers.items()})
        found: dict[str, list[Delta]] = defaultdict(list)
        layers: dict[Target, tuple[str, dict[Role, list[str]]]] = {}  # a layer may go by several names
        for module, roles in self.modules.items():
            if module not in known:
                problems["not known"] += [key for keys in roles.values() for key in keys]
                continue
            _, there = layers.setdefault(known[module], (module, {}))
            for role, keys in roles.items():
                there.setdefault(role, []).extend(keys)
        for target, (module, roles) in layers.items():
            if any(len(keys) > 1 for keys in roles.values()):
                problems["the same twice"] += [key for keys in roles.values() for key in keys]
            elif set(roles) - {"alpha"} not in ({"diff"}, {"down", "up"}):
                problems["not a down with an up, nor a diff"] += [key for keys in roles.values() for key in keys]
            elif problem := self._problem(target, {role: key for role, (key,) in roles.items()}):
                problems[problem[0]].append(problem[1])
            else:
                tensors = {role: self.tensors[key] for role, (key,) in roles.items()}
                factor = self._factor(module, tensors)
                rows_of = tensors["diff"] if "diff" in tensors else tensors["up"]
                for rows in target.rows:
                    part = rows_of.rows(rows.start, rows.start + rows.count)
                    found[target.weight].append(Delta(rows.first, part, tensors.get("down"), factor))
        return {weight: tuple(deltas) for weight, deltas in found.items()}, problems

    def _problem(self, target: Target, keys: Mapping[Role, str]) -> tuple[str, str] | None:
        shapes = {role: self.tensors[key].shape for role, key in keys.items()}
        if unread := [key for key in keys.values() if self.tensors[key].dtype not in READABLE]:
            return f"not {', '.join(READABLE)}", f"{unread[0]} {self.tensors[unread[0]].dtype}"
        wanted: dict[Role, tuple[Any, ...]] = {"diff": target.shape}
        if "down" in shapes:
            rank = shapes["down"][0] if shapes["down"] else 0
            if rank == 0:
                return "of rank 0", keys["down"]
            wanted = {"down": (rank, *target.shape[1:]), "up": (target.shape[0], rank)}
        for role, shape in wanted.items():
            if shapes[role] != shape or (role != "diff" and len(target.shape) != 2):
                return "other shape", f"{keys[role]} {list(shapes[role])} instead of {list(shape)}"
        if "alpha" in keys and self.tensors[keys["alpha"]].size != 1:
            return "other shape", f"{keys['alpha']} {list(shapes['alpha'])} instead of []"
        return None

    def _factor(self, module: str, tensors: Mapping[Role, TensorView]) -> float:
        if "diff" in tensors:
            return 1.0
        rank = tensors["down"].shape[0]
        if "alpha" in tensors:
            return float(tensors["alpha"].float32().item()) / rank
        return self.config.factor(module, rank)

    def not_finite(self, deltas: Mapping[str, tuple[Delta, ...]]) -> Iterator[tuple[str, str]]:
        """Keys whose tensors hold NaN or infinity."""
        if not deltas:
            return
        for module in self.modules.values():
            for keys in module.values():
                for key in keys:
                    view = self.tensors[key]
                    if view.dtype in READABLE and view.size and not math.isfinite(view.largest()):
                        yield "NaN or infinity", key

    def advice(self, spec: ModelSpec, problems: Problems) -> str:
        """What the file looks like, and what to do then."""
        if set(problems) == {"NaN or infinity"}:
            return "it is damaged, or its training failed; download it again or give another LoRA"
        alike = [name for name, factory in FAMILY.items() if not self.deltas(factory())[1]]
        if alike:
            return f"it looks like a LoRA of {' or '.join(alike)}; give it to that, or give another LoRA"
        for model, pattern in _OTHER_MODELS.items():
            if any(re.search(pattern, module) for module in self.modules):
                return (
                    f"it looks like a LoRA of {model}, which has other layers; give one that was trained on {spec.name}"
                )
        return (
            f"a LoRA trained on {spec.name} has a down and an up, or a diff, for each of its layers; give such a file"
        )
