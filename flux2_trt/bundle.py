"""Bundle: a folder of plans, weight files and assets, and the manifest that says what every byte of them should be.

    <model>-<recipe>-<target>-<key12>/
        bundle.json                                 the manifest, written last
        plans/<component>.onnx | .plan              code
        weights/<component>.<recipe>.safetensors    data
        assets/                                     tokenizer.json, chat template

Deserialising a plan equals running native code, and TensorRT's own validity check passes changed plans, so sizes,
digests, owner and mode are checked here before any runtime sees a file. `flux2_trt.store` publishes and finds bundles.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flux2_trt.errors import BundleError
from flux2_trt.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    ComponentRecord,
    FileRecord,
    Manifest,
    TensorShape,
    WeightPlacement,
    build_command,
    bundle_name,
    content_key,
    guess_build_command,
    identity_from_name,
)

__all__ = [
    "MANIFEST_FILE",
    "SCHEMA_VERSION",
    "Bundle",
    "ComponentRecord",
    "FileRecord",
    "Manifest",
    "TensorShape",
    "WeightPlacement",
    "build_command",
    "bundle_name",
    "content_key",
    "file_record",
    "file_sha256",
    "identity_from_name",
    "read_manifest",
]

MANIFEST_LIMIT_BYTES = 16 * 2**20
HASHED_AT_OPEN_BYTES = 10**9  # larger weight files are checked by size; `Bundle.verify` hashes them too


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what its manifest says."""

    path: Path
    manifest: Manifest
    _checked: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Reads the manifest; checks owner, modes, all sizes, and the digests of all but very large weight files.

        Raises BundleError for anything that is not as the manifest says.
        """
        bundle = Bundle.inspect(path)
        plans = {component.plan for component in bundle.manifest.components}
        bundle._check(r for r in bundle.manifest.files if r in plans or r.bytes <= HASHED_AT_OPEN_BYTES)
        return bundle

    @staticmethod
    def inspect(path: str | Path) -> Bundle:
        """As `open`, without digests: quick enough for a listing. A path that it gives out is still checked first."""
        bundle = Bundle(Path(path).resolve(), read_manifest(path))
        for record in bundle.manifest.files:
            bundle._check_size(record)
        bundle._check_permissions()
        return bundle

    @property
    def build_command(self) -> str:
        return build_command(self.manifest.model.name, self.manifest.target)

    def component(self, name: str) -> ComponentRecord:
        """Raises BundleError where this bundle was built without the component."""
        for record in self.manifest.components:
            if record.name == name:
                return record
        there = ", ".join(record.name for record in self.manifest.components)
        raise BundleError(f"{self.path} has no {name}, only {there}; build all of it: {self.build_command}")

    def plan_path(self, component: str) -> Path:
        """The plan, checked: hashed at `open`, and once more if the file has changed since."""
        return self._checked_path(self.component(component).plan, hashed=True)

    def weights_path(self, component: str) -> Path | None:
        """The weight file, checked; None where the weights are embedded in the plan, or made from a seed."""
        record = self.component(component).weights
        return None if record is None else self._checked_path(record, record.bytes <= HASHED_AT_OPEN_BYTES)

    def asset_path(self, name: str) -> Path:
        """`assets/<name>`, checked. Raises BundleError where the bundle has no such asset."""
        for record in self.manifest.assets:
            if record.file == f"assets/{name}":
                return self._checked_path(record, hashed=True)
        raise BundleError(f"{self.path} has no assets/{name}; rebuild it: {self.build_command}")

    def verify(self) -> None:
        """Hashes every file, whatever its size. Raises BundleError at the first that differs."""
        self._check(self.manifest.files)

    def _checked_path(self, record: FileRecord, hashed: bool) -> Path:
        path, identity = self._check_size(record)
        if hashed and self._checked.get(record.file) != identity:
            self._check([record])
        return path

    def _check(self, records: Iterable[FileRecord]) -> None:
        records, stop = list(records), threading.Event()

        def check(record: FileRecord) -> None:
            path, identity = self._check_size(record)
            try:
                found = file_sha256(path, stop)
            except OSError as error:
                raise self._damaged(record.file, f"cannot be read ({error.strerror})") from error
            if found != record.sha256:
                raise self._damaged(record.file, f"sha256 {record.sha256[:12]} expected, {found[:12]} found")
            self._checked[record.file] = identity

        with ThreadPoolExecutor(max_workers=8) as pool:  # hashlib lets go of the GIL
            try:
                list(pool.map(check, records))
            finally:
                stop.set()  # Ctrl-C, or the first bad file, does not wait for 60 GB

    def _check_size(self, record: FileRecord) -> tuple[Path, tuple[int, ...]]:
        path = self.path / record.file
        try:
            path = path.resolve(strict=True)
            status = path.stat()
        except FileNotFoundError:
            raise self._damaged(record.file, f"{record.bytes} bytes expected, no file found") from None
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
            raise self._damaged(record.file, f"cannot be read ({error})") from error
        if not path.is_relative_to(self.path) or not stat.S_ISREG(status.st_mode):
            raise self._damaged(record.file, f"is no file inside the bundle but {path}")
        if status.st_size != record.bytes:
            raise self._damaged(record.file, f"{record.bytes} bytes expected, {status.st_size} found")
        return path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def _check_permissions(self) -> None:
        plans = [self._check_size(component.plan)[0] for component in self.manifest.components]
        folders = {folder for plan in plans for folder in plan.parents if folder.is_relative_to(self.path)}
        for path in sorted({self.path, self.path / MANIFEST_FILE, *folders, *plans}):
            folder = shlex.quote(str(self.path))
            if is_open_to_all(path):
                raise BundleError(
                    f"{path} can be written by everybody, and a plan is executable content; if you trust it: "
                    f"chmod -R o-w {folder}; if not, rebuild it: {self.build_command}"
                )
            if (owner := stranger_of(path)) is not None:
                raise BundleError(
                    f"{path} belongs to user {owner}, not to you ({os.geteuid()}) or root, and a plan is "
                    f"executable content; if you trust it: sudo chown -R {os.geteuid()} {folder}; if not, rebuild it: "
                    f"{self.build_command}"
                )

    def _damaged(self, file: str, problem: str) -> BundleError:
        return BundleError(f"{self.path / file}: {problem}; rebuild it: {self.build_command}")


def is_open_to_all(path: Path) -> bool:
    """Everybody can write to it."""
    return os.name == "posix" and bool(path.stat().st_mode & stat.S_IWOTH)


def stranger_of(path: Path) -> int | None:
    """The user whom it belongs to, where that is neither this one nor root."""
    owner = path.stat().st_uid
    return owner if os.name == "posix" and owner not in (0, os.geteuid()) else None


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the bundle folder `path`. Raises BundleError; nothing but `bundle.json` is read."""
    folder = Path(path).resolve()
    file = folder / MANIFEST_FILE
    command = guess_build_command(folder.name)
    try:
        if not folder.is_dir():
            raise BundleError(f"{folder} is no bundle folder; build one: {command}")
        if not file.is_file() or file.is_symlink():
            raise BundleError(f"{file} is missing, so {folder} is no bundle; build one: {command}")
        if file.stat().st_size > MANIFEST_LIMIT_BYTES:
            raise BundleError(f"{file}: larger than {MANIFEST_LIMIT_BYTES} bytes; rebuild it: {command}")
        text = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file} cannot be read ({error.strerror}); rebuild it: {command}") from error
    return Manifest.from_json(text, file)


def file_record(path: Path, folder: Path) -> FileRecord:
    """The record of a file that was just written below the bundle folder `folder`."""
    return FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))


def file_sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Hex sha256 of a file, in constant memory. Raises CancelledError soon after `stop` is set."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop and stop.is_set():
                raise CancelledError
            digest.update(buffer[:count])
    return digest.hexdigest()
