"""Shards: the .safetensors files that stand behind the one path which the user gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flux2_trt.errors import CheckpointError
from flux2_trt.naming import Family
from flux2_trt.tensor_file import TensorFile

INDEX_SUFFIX = ".safetensors.index.json"
COMPONENT_FOLDER: dict[Family, str] = {
    "transformer": "transformer",
    "autoencoder": "vae",
    "text_encoder": "text_encoder",
}
# What save_pretrained of diffusers and of transformers writes; repositories keep other precisions beside it.
STANDARD_NAMES = (
    f"diffusion_pytorch_model{INDEX_SUFFIX}",
    "diffusion_pytorch_model.safetensors",
    f"model{INDEX_SUFFIX}",
    "model.safetensors",
)


def open_tensor_files(path: Path, family: Family) -> tuple[TensorFile, ...]:
    """The files of a component at `path`: a .safetensors file, an index of shards, a component folder or its parent.

    Raises CheckpointError where there are none, where a shard is missing, and where a folder leaves a choice.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file or a diffusers folder")
    if path.is_dir():
        path = _weights_of_folder(path, family)
    if not path.name.endswith(".json"):
        return (TensorFile(path),)
    weight_map = read_weight_map(path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path.parent / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; download it again"
        )
    files = {shard: TensorFile(path.parent / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{path} says that {shard} holds {name}, but it does not; download both again")
    return tuple(files.values())


def read_weight_map(index: Path) -> dict[str, str]:
    """`tensor name -> file name` of a `*.safetensors.index.json`. Raises CheckpointError."""
    try:
        values: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}; download it again") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_plain_name, weight_map.values())):
        raise CheckpointError(
            f"{index} has no weight_map of .safetensors files beside it; give the index or the .safetensors file"
        )
    return weight_map


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and "/" not in value and "\\" not in value


def _weights_of_folder(folder: Path, family: Family) -> Path:
    component = folder / COMPONENT_FOLDER[family]
    if component.is_dir():
        folder = component
    choices = (
        [folder / name for name in STANDARD_NAMES if (folder / name).exists()]
        or sorted(folder.glob(f"*{INDEX_SUFFIX}"))
        or sorted(folder.glob("*.safetensors"))
    )
    if not choices:
        raise CheckpointError(
            f"{folder} holds no .safetensors weights, nor has it a {COMPONENT_FOLDER[family]}/ folder; give a "
            ".safetensors file or a diffusers folder"
        )
    if len(choices) > 1:
        names = ", ".join(choice.name for choice in choices[:4]) + (", ..." if len(choices) > 4 else "")
        raise CheckpointError(f"{folder} holds {len(choices)} checkpoints ({names}); give the path of one of them")
    return choices[0]
