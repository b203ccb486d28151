"""Listing: what can be said of a bundle at a glance, damaged ones included."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flux2_trt.bundle import Bundle, read_manifest
from flux2_trt.draft import Owner, staged
from flux2_trt.errors import BundleError
from flux2_trt.manifest import MANIFEST_FILE, Manifest, identity_from_name


@dataclass(frozen=True)
class BundleSummary:
    """A line of the listing. `problem`: why the bundle cannot be used; then what it cannot say is `?` or empty.

    `compiled`: its plans are there; a prepared bundle waits for the device that they need. `loras`: those in its
    weights, as FILE:STRENGTH.
    """

    path: Path
    model: str
    recipe: str
    target: str
    key: str
    bytes: int
    created: str
    problem: str | None = None
    compiled: bool = True
    loras: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.problem is None

    @property
    def age_rank(self) -> float:
        """Larger is newer; what cannot say when it was made counts as oldest."""
        return datetime.fromisoformat(self.created).timestamp() if self.created else 0.0

    @staticmethod
    def of(path: Path) -> BundleSummary:
        """Checks manifest, owner, modes and sizes, but reads no file but the manifest."""
        manifest: Manifest | None = None
        problem: str | None = None
        try:
            manifest = read_manifest(path)
            bundle = Bundle.inspect(path)
            if manifest.key[:12] != identity_from_name(path.name)[3]:
                found = f"{path} holds the bundle of another key, {manifest.key[:12]}"
                problem = f"{found}; rebuild it: {bundle.build_command}"
        except BundleError as error:
            problem = str(error)
        if manifest is None:
            return BundleSummary(path, *identity_from_name(path.name), folder_bytes(path), "", problem)
        name, recipe, target, key = manifest.model.name, manifest.recipe, manifest.target, manifest.key
        total, created = manifest.total_bytes, manifest.created
        loras = tuple(f"{lora['file']}:{lora['strength']:g}" for lora in manifest.loras)
        return BundleSummary(path, name, recipe, target, key, total, created, problem, manifest.is_compiled, loras)


@dataclass(frozen=True)
class UnfinishedBundle:
    """A bundle that is being made, or whose making was interrupted. `owner`: who makes it, or did."""

    name: str
    key: str
    path: Path
    bytes: int
    owner: Owner | None

    @property
    def state(self) -> str:
        if self.owner and self.owner.lives:
            return f"being built by {self.owner}"
        return "unfinished: the same build goes on with it"

    @staticmethod
    def of(path: Path) -> UnfinishedBundle | None:
        """None for what is no staging folder."""
        found = staged(path)
        return UnfinishedBundle(*found, path, folder_bytes(path), Owner.of(path)) if found else None


def is_bundle(path: Path) -> bool:
    """A folder with the name and something of the content of a bundle; nothing else in a store is ours to touch."""
    named = not path.name.startswith(".") and identity_from_name(path.name)[3] != "?"
    own = path.is_dir() and not path.is_symlink()
    return named and own and ((path / MANIFEST_FILE).is_file() or (path / "plans").is_dir())


def folder_bytes(path: Path) -> int:
    """The sizes of all files below `path`, added up."""
    total = 0
    for file in path.rglob("*"):
        with suppress(OSError):  # it may go while we look
            total += file.lstat().st_size
    return total
