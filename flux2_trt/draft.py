"""Draft: a bundle while it is being made, in a staging folder that nobody else writes to.

.staging-<bundle>-<rest of the key>-*/
    owner.json      who works here
    bundle/         what will be published
    journals/       which weights the files in bundle/weights hold, so that another process can go on
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flux2_trt.bundle import Bundle, file_record
from flux2_trt.errors import BundleError
from flux2_trt.manifest import MANIFEST_FILE, ComponentRecord, FileRecord, Manifest, bundle_name, file_name_part
from flux2_trt.spec import ModelSpec
from flux2_trt.version import own_version

OWNER_FILE, CONTENT, JOURNALS = "owner.json", "bundle", "journals"
WEIGHTS = "weights"
FOLDER_MODE = 0o775  # never writable by everybody, whatever the umask


@dataclass
class Draft:
    """What `Store.publish` gives its caller: write files, take their records, `finish`.

    `done` says that there is nothing to write, because the bundle of this key was there and verified; `resumed`, that
    `staging` has weights which a process that was interrupted wrote for this key.
    """

    staging: Path
    key: str
    model: ModelSpec
    recipe: str
    target: str
    manifest: Manifest | None = None
    published: Bundle | None = field(default=None, repr=False)
    resumed: bool = False

    @property
    def folder(self) -> Path:
        """What will be published."""
        return self.staging / CONTENT

    @property
    def name(self) -> str:
        return self.name_of(self.key)

    def name_of(self, key: str) -> str:
        """Of the bundle with another key and else the same."""
        return bundle_name(self.model.name, self.recipe, self.target, key)

    @property
    def done(self) -> bool:
        return self.published is not None

    @property
    def bundle(self) -> Bundle:
        """The published bundle; there is one after the `with` block, or at once where `done`."""
        if self.published is None:
            raise RuntimeError(f"{self.name} is not published before the end of the `with` block")
        return self.published

    def plan_path(self, component: str, suffix: str) -> Path:
        """Where the plan of a component is to be written; `suffix`: `.onnx` or `.plan`."""
        return self._path("plans", f"{component}{suffix}")

    def weights_path(self, component: str) -> Path:
        return self._path(WEIGHTS, f"{component}.{file_name_part(self.recipe)}.safetensors")

    def journal_path(self, component: str) -> Path:
        """Where the progress of a component's weight file is to be kept."""
        (self.staging / JOURNALS).mkdir(mode=FOLDER_MODE, exist_ok=True)
        return self.staging / JOURNALS / component

    def asset_path(self, name: str) -> Path:
        return self._path("assets", name)

    def adopt(self, record: FileRecord, source: Path) -> FileRecord:
        """The same file as in another bundle: a second name for it where the file system has those, else a copy."""
        folder, name = record.file.split("/", 1)
        path = self._path(folder, name)
        if not path.exists():
            try:
                os.link(source, path)
            except OSError:
                shutil.copyfile(source, path)
        return record

    def record(self, path: Path) -> FileRecord:
        """Size and digest of a file that was written to the draft and will not change again."""
        return file_record(path, self.folder)

    def finish(
        self, components: Iterable[ComponentRecord], assets: Iterable[FileRecord] = (), *, source: Mapping[str, Any]
    ) -> None:
        """Says what was made; the end of the `with` block publishes it. `source`: where the weights came from."""
        self.manifest = Manifest(
            key=self.key,
            model=self.model,
            recipe=self.recipe,
            target=self.target,
            source=dict(source),
            components=tuple(components),
            assets=tuple(assets),
            created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            flux2_trt_version=own_version(),
        )

    def begin(self) -> None:
        """Makes the staging folder, or leaves in it only what can be resumed, and says in it who works there."""
        for folder in (self.staging, self.folder):
            folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        for left in self.folder.iterdir():
            if left.name != WEIGHTS:
                delete(left)
        owner = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        (self.staging / OWNER_FILE).write_text(json.dumps(owner), encoding="utf-8")

    def seal(self) -> Bundle:
        """Puts everything on disk, the manifest last, and checks the result as any reader would.

        Raises BundleError where the files are not those that the manifest names.
        """
        if self.manifest is None:
            raise RuntimeError(f"the builder of {self.name} neither finished it nor said why")
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]
        files = [path for folder in folders for path in folder.iterdir() if not path.is_dir()]
        unnamed = {path.relative_to(self.folder).as_posix() for path in files} - {r.file for r in self.manifest.files}
        if unnamed:
            raise BundleError(
                f"{self.name}: the manifest does not name {', '.join(sorted(unnamed))}, yet they are there"
            )
        for path in (*files, *folders):
            _close_to_others(path)
        for path in files:
            _sync(path)
        temporary = self.folder / f"{MANIFEST_FILE}.tmp"
        temporary.write_text(self.manifest.to_json(), encoding="utf-8")
        _close_to_others(temporary)
        _sync(temporary)
        temporary.replace(self.folder / MANIFEST_FILE)
        for folder in reversed(folders):
            sync_folder(folder)
        return Bundle.open(self.folder)

    def _path(self, folder: str, name: str) -> Path:
        (self.folder / folder).mkdir(mode=FOLDER_MODE, exist_ok=True)
        return self.folder / folder / name


@dataclass(frozen=True)
class Owner:
    """The process that works, or worked, in a staging folder."""

    pid: int
    host: str
    since: str

    @staticmethod
    def of(folder: Path) -> Owner | None:
        """None where the folder does not say: it was published, or its process ended at once."""
        try:
            values = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
            return Owner(int(values["pid"]), str(values["host"]), str(values["since"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def lives(self) -> bool:
        """Another process of this machine, and running. A process elsewhere cannot be asked: the lock decides."""
        if self.host != platform.node() or self.pid == os.getpid() or os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, at it since {self.since}"


def new_staging(bundles: Path, name: str, key: str) -> Path:
    """A folder for the bundle `name`; its own name says the whole key."""
    return bundles / f".staging-{name}-{key[12:]}-{uuid.uuid4().hex[:8]}"


def staged(path: Path) -> tuple[str, str] | None:
    """The bundle's name and the key of a staging folder; None for all else."""
    match = re.fullmatch(r"\.staging-(.+-([0-9a-f]{12}))-([0-9a-f]{52})-[0-9a-f]{8}", path.name)
    return (match[1], match[2] + match[3]) if match and path.is_dir() else None


def can_resume(staging: Path) -> bool:
    """Whether there are weights in it, and a journal to tell which."""
    return (staging / CONTENT / WEIGHTS).is_dir() and (staging / JOURNALS).is_dir()


def delete(path: Path) -> None:
    """Removes a folder, or the link to one, and raises OSError if it cannot."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows has no handle on a folder
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _close_to_others(path: Path) -> None:
    """Under a umask of 0 our own files would be refused at the next open."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IWOTH:
        path.chmod(mode & ~stat.S_IWOTH)
