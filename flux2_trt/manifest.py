"""The manifest of a bundle: what `bundle.json` says, as values; no file is touched here.

Strict both ways: a record that could not be true cannot be made, and a manifest with a missing, unknown or impossible
entry is refused with the file's name and the command that rebuilds it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from flux2_trt.errors import BundleError, UsageError
from flux2_trt.models import FAMILY
from flux2_trt.spec import TRANSFORMER_PARTS, ModelSpec

SCHEMA_VERSION = 3
MANIFEST_FILE = "bundle.json"

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
WeightPlacement = Literal["bound", "embedded", "external"]
SYNTHETIC = "random"  # the key of a manifest's `source` that holds the seed of made-up weights
LORAS = "loras"  # the key of a manifest's `source` that lists the LoRAs in the weights: file, sha256 and strength
BASE = "base"  # the key of a manifest's `source` that holds the key of the bundle without the LoRAs
REQUEST = "request"  # the key of a manifest's `source` that holds the request, with which it is built again with LoRAs
UNCOMPILED = "none"  # the compiler of a plan that is still a graph
PART_NAMES = frozenset(f"transformer.{part}" for part in TRANSFORMER_PARTS)


class TensorShape(TypedDict):
    """An input or output of a plan; a dimension is a number or the name of a dynamic one."""

    dtype: str
    shape: list[int | str]


def content_key(parts: Mapping[str, JSON]) -> str:
    """Hex sha256 of everything that a bundle is made from.

    `parts`: graph hashes, recipe, target, compiler and its version, shapes, hashes of the weights. Order of keys does
    not matter, and tuples equal lists. Raises TypeError or ValueError for what is not JSON (NaN included).
    """
    return _digest({"schema_version": SCHEMA_VERSION, "parts": parts})


def build_command(model: str = "MODEL", target: str = "T") -> str:
    """The command that makes a bundle; every error about one ends with it."""
    return f"flux2-trt build {shlex.quote(model)} --target {shlex.quote(target)}"


def bundle_name(model: str, recipe: str, target: str, key: str) -> str:
    """The folder name `<model>-<recipe>-<target>-<key12>`; odd characters of a name become `_`."""
    return "-".join((file_name_part(model), file_name_part(recipe), file_name_part(target), key[:12]))


def file_name_part(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:60]


def identity_from_name(name: str) -> tuple[str, str, str, str]:
    """(model, recipe, target, key12) of a folder name, `?` for what it cannot say: for damaged manifests only."""
    match = re.fullmatch(r"(.+)-([^-]+)-([0-9a-f]{12})", name)
    if not match:
        return "?", "?", "?", "?"
    front, target, key = match.groups()
    for model in sorted(FAMILY, key=len, reverse=True):
        if front.startswith(f"{model}-"):
            return model, front[len(model) + 1 :], target, key
    return "?", "?", target, key


def guess_build_command(folder_name: str, values: Any = None) -> str:
    """The build command from what can still be read of a damaged manifest, else from the name of its folder."""
    model, _, target, _ = identity_from_name(folder_name)
    if isinstance(values, dict):
        spec = values.get("model")
        if isinstance(spec, dict) and _is_text(spec.get("name")):
            model = spec["name"]
        if _is_text(values.get("target")):
            target = values["target"]
    return build_command("MODEL" if model == "?" else model, "T" if target == "?" else target)


@dataclass(frozen=True)
class FileRecord:
    """A file: its path inside the bundle (`plans/transformer.plan`), its size and its digest."""

    file: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        steps = self.file.split("/") if _is_text(self.file) else [""]
        inside = not any(step in ("", ".", "..") for step in steps) and not set(self.file) & set("\\:")
        _require(inside and self.file != MANIFEST_FILE, f"{self.file!r} is no path of a file inside the bundle")
        _require(type(self.bytes) is int and self.bytes >= 0, f"{self.file}: {self.bytes!r} is no size in bytes")
        _require(is_sha256(self.sha256), f"{self.file}: {self.sha256!r} is no sha256")


@dataclass(frozen=True)
class ComponentRecord:
    """A compiled component: its plan, what it was compiled from and by, and where its weights are.

    A transformer that is compiled block by block has a record for each part, "transformer.single_block" and so on,
    whose inputs double_blocks.0.* and single_blocks.0.* take the weights of any block.

    `shapes`: inputs and outputs by name. `profiles`: for every optimization profile the least, best and largest value
    of each dynamic side; empty where any value goes. `layers`: the compiler's report, as it gave it. `weights`: None
    only where they are embedded in the plan, or bound and made from a seed.
    """

    name: str
    plan: FileRecord
    graph_sha256: str
    compiler: str
    compiler_version: str
    weights: FileRecord | None
    weight_placement: WeightPlacement
    shapes: dict[str, TensorShape]
    layers: dict[str, Any]
    profiles: list[dict[str, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(_is_text(self.name), f"{self.name!r} is no component name")
        _require(is_sha256(self.graph_sha256), f"{self.name}: graph_sha256 {self.graph_sha256!r} is no sha256")
        for key in ("compiler", "compiler_version"):
            _require(_is_text(getattr(self, key)), f"{self.name}: {key} {getattr(self, key)!r} is no name")
        placements = get_args(WeightPlacement)
        _require(
            self.weight_placement in placements,
            f"{self.name}: weight_placement {self.weight_placement!r}; known are {', '.join(placements)}",
        )
        _require(isinstance(self.shapes, dict), f"{self.name}: shapes are no JSON object")
        for tensor, value in self.shapes.items():
            _require(_is_tensor_shape(value), f"{self.name}: {tensor} has no dtype and shape but {value!r}")
        _require(isinstance(self.layers, dict), f"{self.name}: layers are no JSON object")
        sound = isinstance(self.profiles, list) and all(map(_is_profile, self.profiles))
        _require(sound, f"{self.name}: profiles are no list of ranges")


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says.

    `source`: where the weights came from (request, revision, hashes, seed, LoRAs). `created`: ISO 8601 with zone.
    The file also carries `digest`, the sha256 of everything else in it, so that a flipped byte in a size of the model
    is found and not drawn.
    """

    key: str
    model: ModelSpec
    recipe: str
    target: str
    source: dict[str, Any]
    components: tuple[ComponentRecord, ...]
    assets: tuple[FileRecord, ...]
    created: str
    flux2_trt_version: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _require(
            type(self.schema_version) is int and self.schema_version == SCHEMA_VERSION,
            f"schema version {self.schema_version!r:.40}, this flux2-trt reads {SCHEMA_VERSION}",
        )
        _require(is_sha256(self.key), f"key {self.key!r} is no sha256")
        for key in ("recipe", "target", "flux2_trt_version"):
            _require(_is_text(getattr(self, key)), f"{key} {getattr(self, key)!r} is no name")
        _require(isinstance(self.source, dict), "source is no JSON object")
        loras = self.source.get(LORAS, [])
        _require(isinstance(loras, list) and all(map(_is_lora, loras)), "the LoRAs of source are no list of files")
        _require(_is_text(self.model.name), f"{self.model.name!r} is no model name")
        names = [component.name for component in self.components]
        _require(bool(names), "no components")
        _require(len(names) == len(set(names)), f"more than one record of a component in {', '.join(names)}")
        known = {*self.model.components, *(PART_NAMES if "transformer" in self.model.components else ())}
        strangers = set(names) - known
        _require(not strangers, f"{self.model.name} has no component {', '.join(sorted(strangers))}")
        for component in self.components:
            without_file = component.weight_placement == "embedded" or (
                component.weight_placement == "bound" and SYNTHETIC in self.source
            )
            _require(
                component.weights is not None or without_file,
                f"{component.name}: {component.weight_placement} weights without a weight file",
            )
        records = {record.file: record for record in self.files}
        _require(set(records.values()) == set(self.files), "one file has two different records")
        try:
            zoned = datetime.fromisoformat(self.created).tzinfo is not None
        except (TypeError, ValueError):
            zoned = False
        _require(zoned, f"created {self.created!r} is no time with a zone")

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file, once: plans first, then weights, then assets."""
        plans = [component.plan for component in self.components]
        weights = [component.weights for component in self.components if component.weights]
        return tuple(dict.fromkeys((*plans, *weights, *self.assets)))

    @property
    def loras(self) -> list[dict[str, Any]]:
        """The LoRAs in the weights, in the order in which they were given."""
        return list(self.source.get(LORAS, ()))

    @property
    def is_compiled(self) -> bool:
        """Every plan is one, and none still a graph."""
        return all(component.compiler != UNCOMPILED for component in self.components)

    @property
    def makes_pictures(self) -> bool:
        """All components are there and the weights are no made-up ones: once compiled, fit to be chosen unnamed."""
        built = {component.name for component in self.components}
        if built >= PART_NAMES:
            built.add("transformer")
        return built.issuperset(self.model.components) and SYNTHETIC not in self.source

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files)

    def to_json(self) -> str:
        values = asdict(self)
        return json.dumps({**values, "digest": _digest(values)}, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes, file: Path = Path(MANIFEST_FILE)) -> Manifest:
        """Raises BundleError that names `file` and the build command: not JSON, unknown or missing keys, bad values."""
        values: Any = None
        try:
            try:
                values = json.loads(text, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise BundleError(f"no JSON ({error})") from error
            return _manifest_from_dict(values)
        except BundleError as error:
            problem = "".join(c if c.isprintable() else "?" for c in str(error))[:400]
            raise BundleError(
                f"{file}: {problem}; rebuild it: {guess_build_command(file.parent.name, values)}"
            ) from error


def _manifest_from_dict(values: Any) -> Manifest:
    _require(isinstance(values, dict), "no JSON object")
    if values.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:  # its other keys are not ours to judge
        raise BundleError(
            f"schema version {values['schema_version']!r:.40}, this flux2-trt reads {SCHEMA_VERSION}: "
            "another version built it"
        )
    content = {key: value for key, value in values.items() if key != "digest"}
    arguments = _exact(Manifest, content, "the manifest")
    try:
        arguments["model"] = ModelSpec.from_dict(content["model"])
    except (UsageError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"model: {error}") from error
    _require(_digest(arguments["model"].to_dict()) == _digest(content["model"]), "model: keys are missing")
    arguments["components"] = tuple(_component_from_dict(value) for value in _list(content, "components"))
    arguments["assets"] = tuple(FileRecord(**_exact(FileRecord, v, "an asset")) for v in _list(content, "assets"))
    manifest = Manifest(**arguments)
    if values.get("digest") != _digest(content):
        raise BundleError("its content is not what its digest says: it was changed after the build")
    return manifest


def _component_from_dict(values: Any) -> ComponentRecord:
    arguments = _exact(ComponentRecord, values, "a component")
    for key in ("plan", "weights"):
        if arguments[key] is not None or key == "plan":
            arguments[key] = FileRecord(**_exact(FileRecord, arguments[key], f"{key} of a component"))
    return ComponentRecord(**arguments)


def _exact(cls: type, values: Any, where: str) -> dict[str, Any]:
    _require(isinstance(values, dict), f"{where} is no JSON object")
    known = {field.name for field in fields(cls)}
    for problem, names in (("missing", known - set(values)), ("unknown", set(values) - known)):
        _require(not names, f"{where}: {problem} keys {', '.join(sorted(map(ascii, names)))[:200]}")
    return dict(values)


def _list(values: dict[str, Any], key: str) -> list[Any]:
    _require(isinstance(values[key], list), f"{key} is no JSON list")
    return list(values[key])


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise BundleError(problem)


def _digest(value: JSON) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _is_text(value: object) -> bool:
    """A name that may be printed in one line of a terminal."""
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_profile(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(
        isinstance(r, list) and len(r) == 3 and all(type(n) is int for n in r) and 0 <= r[0] <= r[1] <= r[2]
        for r in value.values()
    )


def _is_lora(value: object) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("file")) or not is_sha256(value.get("sha256")):
        return False
    return type(value.get("strength")) in (int, float)


def _is_tensor_shape(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape"} or not _is_text(value["dtype"]):
        return False
    shape = value["shape"]
    return isinstance(shape, list) and all(_is_text(size) or (type(size) is int and size >= 0) for size in shape)
