"""Where a build takes the model from: its spec, its weights and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from export.tensor_source import RandomSource, TensorSource
from flux2_trt import models
from flux2_trt.bundle import file_sha256
from flux2_trt.checkpoint import Checkpoint
from flux2_trt.download import TOKENIZER, locate, locate_tokenizer
from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.inventory import expected_tensors
from flux2_trt.lora.file import Lora
from flux2_trt.lora.folding import FoldedSource
from flux2_trt.lora.request import LoraRequest
from flux2_trt.manifest import LORAS, SYNTHETIC
from flux2_trt.naming import FAMILIES, Family
from flux2_trt.shards import open_tensor_files
from flux2_trt.spec import ModelSpec

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class ModelSource:
    """A model to build: `paths` to its weights by family, or the `seed` of synthetic ones.

    `calibration`: the file that comes with the model, if one does. `loras`: what is folded into the transformer.
    """

    spec: ModelSpec
    paths: Mapping[Family, Path] = field(default_factory=dict)
    tokenizer: Path | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    calibration: Path | None = None
    loras: tuple[Lora, ...] = ()

    def open(self, family: Family) -> TensorSource:
        """The tensors of one family, verified against the spec. Raises CheckpointError for what does not fit."""
        if self.seed is not None:
            return RandomSource(self.seed, expected_tensors(self.spec, family))
        checkpoint = self.open_checkpoint(family)
        return FoldedSource(checkpoint, self.loras) if self.loras and family == "transformer" else checkpoint

    def open_checkpoint(self, family: Family) -> Checkpoint:
        """As `open`, but as the files have it, without LoRAs."""
        checkpoint = Checkpoint(self.paths[family], family)
        checkpoint.verify(self.spec)
        return checkpoint

    @property
    def touched(self) -> frozenset[str]:
        """The weights that LoRAs change."""
        return frozenset(name for lora in self.loras for name in lora.deltas)

    def identity(self) -> dict[str, Any]:
        """What the weights are: digests of every file, or the seed. JSON values."""
        loras = {LORAS: [lora.identity for lora in self.loras]} if self.loras else {}
        return {**self.base_identity(), **loras}

    def base_identity(self) -> dict[str, Any]:
        """What the weights are without LoRAs."""
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        if self.seed is not None:
            return {SYNTHETIC: self.seed}
        files = {
            family: {file.path.name: file_sha256(file.path) for file in open_tensor_files(path, family)}
            for family, path in self.paths.items()
        }
        identity: dict[str, Any] = {"weights_sha256": files, "revisions": dict(self.revisions)}
        if self.tokenizer:
            identity["tokenizer_sha256"] = file_sha256(self.tokenizer)
        return identity


def resolve_source(model: str, checkpoint: str | None) -> ModelSource:
    """`model`: a published name, a diffusers folder, or a transformer's .safetensors file; `checkpoint`:
    `random:SEED`, a diffusers folder or a transformer's .safetensors file with the weights of a published model.

    Raises UsageError for values that are none of these, CheckpointError for weights that cannot be had.
    """
    if checkpoint and checkpoint.startswith("random:"):
        spec = models.published_spec(model) if model in models.FAMILY else _spec_of(Path(model))
        tokenizer = models.TINY_ASSETS / TOKENIZER if spec.name == "tiny" else None
        return ModelSource(spec, tokenizer=tokenizer, seed=_seed(checkpoint))
    if model not in models.FAMILY:
        if checkpoint:
            raise UsageError(f"--checkpoint {checkpoint} goes with a published model; {model} names its weights itself")
        return _from_path(Path(model), _spec_of(Path(model)))
    spec = models.published_spec(model)
    if checkpoint:
        return _from_path(Path(checkpoint), spec)
    if spec.name == "tiny":
        paths: dict[Family, Path] = {family: models.TINY_ASSETS / f"{family}.safetensors" for family in FAMILIES}
        return ModelSource(spec, paths, models.TINY_ASSETS / TOKENIZER, calibration=models.TINY_ASSETS / CALIBRATION)
    return _downloaded(spec, {})


def with_loras(source: ModelSource, requests: Sequence[LoraRequest]) -> ModelSource:
    """The model with LoRAs, all of them checked; those of strength 0 are left out.

    Raises UsageError for synthetic weights, CheckpointError for a LoRA that does not fit.
    """
    if requests and source.seed is not None:
        raise UsageError(f"--lora goes with weights from files, and those of random:{source.seed} are made up")
    loras = [Lora.open(request, source.spec) for request in requests]
    return replace(source, loras=tuple(lora for lora in loras if lora.request.strength))


def _seed(checkpoint: str) -> int:
    text = checkpoint.removeprefix("random:")
    if not text.isdecimal():
        raise UsageError(f"--checkpoint {checkpoint} has no seed; write for example random:0")
    return int(text)


def _spec_of(path: Path) -> ModelSpec:
    if path.is_dir():
        return models.spec_from_diffusers(path)
    if path.suffix != ".safetensors" or not path.exists():
        raise UsageError(
            f"{path} is no model; give {', '.join(models.FAMILY)}, a diffusers folder, or a .safetensors file"
        )
    found = Checkpoint(path, "transformer")
    shapes = {name: found.shape(name) for name in found.names()}
    alike = [name for name in models.FAMILY if expected_tensors(models.published_spec(name), "transformer") == shapes]
    if not alike:
        raise CheckpointError(f"{path} holds no published transformer; give the diffusers folder that it belongs to")
    return models.published_spec(alike[0])


def _from_path(path: Path, spec: ModelSpec) -> ModelSource:
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a diffusers folder or a .safetensors file")
    if not path.is_dir():
        return _downloaded(spec, {"transformer": path})
    paths: dict[Family, Path] = {"transformer": path / "transformer", "autoencoder": path / "vae"}
    tokenizer = None
    if spec.text_encoder:
        paths["text_encoder"] = path / "text_encoder"
        tokenizer = path / "tokenizer" / TOKENIZER
        if not tokenizer.exists():
            raise CheckpointError(f"{tokenizer} is missing; a text encoder needs it: save the tokenizer there")
    return ModelSource(spec, paths, tokenizer)


def _downloaded(spec: ModelSpec, paths: Mapping[Family, Path]) -> ModelSource:
    """The families that `paths` lacks come from the environment's paths or from the hub."""
    locations = {family: locate(spec, family) for family in FAMILIES if family not in paths}
    revisions = {place.repo: place.revision for place in locations.values() if place.repo and place.revision}
    tokenizer = locate_tokenizer(spec, locations["text_encoder"].path)
    found = {family: place.path for family, place in locations.items()}
    return ModelSource(spec, {**found, **paths}, tokenizer, revisions)
