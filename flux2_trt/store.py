"""Store: the bundles of this machine; publishes, finds, lists, verifies and removes them.

    <root>/bundles/<bundle>             published: complete, and never written to again
    <root>/bundles/.staging-<bundle>-*  being made by the holder of the lock, or left by one that was interrupted
    <root>/bundles/.removed-<key>-*     on its way out
    <root>/locks/<key>.lock             stays: removing a lock file would split those who wait for it

<root>: FLUX2_TRT_HOME, else the user's cache folder.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from flux2_trt.bundle import Bundle, read_manifest
from flux2_trt.draft import FOLDER_MODE, Draft, Owner, can_resume, delete, new_staging, staged, sync_folder
from flux2_trt.errors import BundleError, Flux2Error, Interrupted, UsageError
from flux2_trt.listing import BundleSummary, UnfinishedBundle, is_bundle
from flux2_trt.manifest import build_command, bundle_name, identity_from_name, is_sha256
from flux2_trt.spec import ModelSpec

_log = logging.getLogger(__name__)

FIRST_NOTICE_SECONDS, NEXT_NOTICE_SECONDS = 1.0, 10.0


def store_root(environment: Mapping[str, str] = os.environ) -> Path:
    """FLUX2_TRT_HOME, else the user's cache folder; absolute."""
    if home := environment.get("FLUX2_TRT_HOME"):
        return Path(home).expanduser().absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("flux2-trt", appauthor=False))


Summaries: TypeAlias = "list[BundleSummary]"  # `Store.list` hides the builtin from the annotations of its class
Unfinished: TypeAlias = "list[UnfinishedBundle]"


@dataclass(frozen=True)
class Store:
    """A folder of bundles; it need not exist before something is published."""

    root: Path = field(default_factory=store_root)

    @property
    def bundles(self) -> Path:
        return self.root / "bundles"

    @contextmanager
    def publish(
        self, key: str, *, model: ModelSpec, recipe: str, target: str, on_wait: Callable[[str], None] = _log.warning
    ) -> Iterator[Draft]:
        """Makes the bundle of `key` (`content_key` of all that it is made from), or finds it made.

            with store.publish(key, model=spec, recipe="fp32", target="cpu") as draft:
                if not draft.done:
                    ...  # write draft.plan_path(...), draft.weights_path(...), draft.asset_path(...)
                    draft.finish(components, assets, source=source)
            bundle = draft.bundle

        One process at a time makes a key; `on_wait` is told whom the others wait for. The bundle appears whole or not
        at all. What was written when the process is killed, or an exception ends the block, is removed, but for weights
        with a `draft.journal_path`: the next to make this key finds those, and `remove` removes them. They go with
        a Flux2Error, too, which says that the same would fail again. A bundle of this key that is there and passes
        `Bundle.verify` is left as it is, a damaged one is replaced. Raises Flux2Error where the disk is full or the
        store cannot be written, BundleError where the files are not those that were recorded.
        """
        if not is_sha256(key):
            raise ValueError(f"{key!r} is no content_key")
        name = bundle_name(model.name, recipe, target, key)
        draft = Draft(new_staging(self.bundles, name, key), key, model, recipe, target)
        with self._locked(key, name, on_wait):
            draft.published = self._verified(self.bundles / name, key)
            with self._writing():
                left = self._sweep(key, resume=not draft.done)
            if not draft.done:
                if left:
                    draft.staging, draft.resumed = left, True
                try:
                    with self._writing():
                        draft.begin()
                    with self._filling():
                        yield draft
                    with self._writing():
                        draft.published = self._place(draft)
                except BaseException as error:
                    self._abandon(draft, error)
                    raise
                self._clear(draft.staging)
                return
        yield draft

    def list(self) -> Summaries:
        """Every bundle, newest first, damaged ones with their problem; folders that are no bundles are left out.

        Checks manifest, owner, modes and sizes; only `verify` and `Bundle.open` read whole files.
        """
        try:
            folders = sorted(path for path in self.bundles.iterdir() if is_bundle(path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BundleError(f"the bundle store {self.bundles} cannot be read ({error.strerror})") from error
        return sorted(map(BundleSummary.of, folders), key=lambda bundle: bundle.age_rank, reverse=True)

    def get(self, name: str) -> Bundle | None:
        """The bundle of that folder name, every byte verified; None where there is none, or it is damaged."""
        if not (self.bundles / name).is_dir():
            return None
        try:
            bundle = Bundle.inspect(self.bundles / name)
            bundle.verify()
        except BundleError as error:
            _log.warning("passing over a damaged bundle: %s", error)
            return None
        return bundle

    def find(
        self,
        model: str,
        target: str | None = None,
        recipe: str | None = None,
        *,
        makes_pictures: bool = False,
        compiled: bool = True,
    ) -> Path:
        """The newest sound bundle of a model without LoRAs.

        `makes_pictures`: only a whole one with weights of its own; `compiled`: and with plans, not graphs.

        Raises BundleError with the build command where there is none.
        """
        fitting = [
            bundle
            for bundle in self.list()
            if bundle.model == model
            and target in (None, bundle.target)
            and recipe in (None, bundle.recipe)
            and not bundle.loras
        ]
        for bundle in fitting:
            if bundle.ok:
                manifest = read_manifest(bundle.path)
                if makes_pictures and not (manifest.makes_pictures and (manifest.is_compiled or not compiled)):
                    continue
                return bundle.path
            _log.warning("passing over a damaged bundle: %s", bundle.problem)
        if damaged := [bundle for bundle in fitting if not bundle.ok]:
            raise BundleError(damaged[0].problem)
        wanted = f"{model} for {target or 'any target'}" + (f" in {recipe}" if recipe else "")
        raise BundleError(
            f"no bundle of {wanted} in {self.bundles}; build it: {build_command(model, target or 'auto')}"
        )

    def unfinished(self) -> Unfinished:
        """Every bundle that is being made, or whose making was interrupted, by name."""
        there = self.bundles.iterdir() if self.bundles.is_dir() else ()
        return sorted(filter(None, map(UnfinishedBundle.of, there)), key=lambda bundle: bundle.name)

    def remove(self, which: str | Path, on_wait: Callable[[str], None] = _log.warning) -> Path:
        """Removes a bundle, finished or not, by folder name, path or start of its key; gives the path that it had.

        Raises UsageError for a path outside the store and for a start that fits several, BundleError where none fits.
        """
        path = self._locate(which)
        key = identity_from_name(path.name)[3]
        with self._locked(key, path.name, on_wait), self._writing():
            if path.exists():  # else somebody was quicker, or it is not finished
                self._discard(path, key)
            self._sweep(key)
        return path

    def verify(self, which: str | Path) -> Bundle:
        """Hashes every file of a bundle: one of the store, named as for `remove`, or any by the path of its folder.

        Raises BundleError where one differs.
        """
        path = Path(os.path.abspath(which))
        if not self._is_path(which) or path.parent.resolve() == self.bundles.resolve():
            path = self._locate(which)
            if problem := BundleSummary.of(path).problem:
                raise BundleError(problem)
        bundle = Bundle.inspect(path)
        bundle.verify()
        return bundle

    @staticmethod
    def _is_path(which: str | Path) -> bool:
        text = os.fspath(which)
        return bool(set(text) & {os.sep, os.altsep or os.sep}) or text in ("", ".", "..")

    def _locate(self, which: str | Path) -> Path:
        text = os.fspath(which)
        keys = {bundle.name: bundle.key for bundle in self.unfinished()}
        keys |= {bundle.path.name: bundle.key for bundle in self.list()}
        if text in keys:
            return self.bundles / text
        if self._is_path(text):
            given = Path(os.path.abspath(text))
            if given.parent.resolve() != self.bundles.resolve():
                raise UsageError(f"{text!r} is outside of the bundle store {self.bundles}; see: flux2-trt bundles list")
            if given.name in keys:
                return self.bundles / given.name
        start = text if re.fullmatch(r"[0-9a-f]{4,64}", text) else "?"
        keyed = [name for name, key in keys.items() if key.startswith(start[: len(key)])]
        if len(keyed) > 1:
            raise UsageError(f"{text!r} fits {len(keyed)} bundles, name one of them: {', '.join(keyed)}")
        if not keyed:
            raise BundleError(f"no bundle {text!r} in {self.bundles}; see: flux2-trt bundles list")
        return self.bundles / keyed[0]

    def _verified(self, path: Path, key: str) -> Bundle | None:
        if not os.path.lexists(path):
            return None
        try:
            bundle = Bundle.inspect(path)
            bundle.verify()
        except BundleError as error:
            _log.warning("replacing a damaged bundle: %s", error)
            return None
        return bundle if bundle.manifest.key == key else None

    def _place(self, draft: Draft) -> Bundle:
        draft.seal()
        place = self.bundles / draft.name
        try:
            draft.folder.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            # Damaged since before, or published just now by somebody whom a broken lock let in.
            if there := self._verified(place, draft.key):
                return there
            self._discard(place, draft.key)
            draft.folder.rename(place)
        sync_folder(self.bundles)
        return Bundle.inspect(place)  # sealed a moment ago; its paths are hashed once more before use

    def _discard(self, path: Path, key: str) -> None:
        aside = self.bundles / f".removed-{key[:12]}-{uuid.uuid4().hex}"
        path.rename(aside)  # at once, so that nobody opens half a bundle; a running engine keeps what it has mapped
        delete(aside)

    def _sweep(self, key: str, resume: bool = False) -> Path | None:
        """Removes what killed processes left of this key: its lock is ours, so nobody works there.

        With `resume`, one folder that can be resumed stays; gives its path.
        """
        kept: Path | None = None
        for path in self.bundles.glob(f".*-{key[:12]}-*"):
            owner = Owner.of(path)
            if owner and owner.lives:  # on a file system whose locks do nothing
                _log.warning("leaving %s to %s", path, owner)
            elif resume and kept is None and can_resume(path) and (of := staged(path)) and of[1] == key:
                kept = path
            else:
                self._clear(path)
        return kept

    def _abandon(self, draft: Draft, error: BaseException) -> None:
        """Keeps what can be resumed, but for an error that the same build would meet again."""
        about_disk = isinstance(error.__cause__, OSError) or _is_disk_full(error.__cause__)
        if not can_resume(draft.staging) or (
            isinstance(error, Flux2Error) and not isinstance(error, Interrupted) and not about_disk
        ):
            self._clear(draft.staging)
            return
        _log.warning(
            "weights that were converted are kept: the same build goes on with them, `flux2-trt bundles remove %s` "
            "removes them",
            draft.name,
        )

    def _clear(self, folder: Path) -> None:
        try:
            delete(folder)
        except OSError as error:  # must not hide why we are here
            _log.warning("%s could not be removed (%s); the next build of it will try again", folder, error.strerror)

    @contextmanager
    def _locked(self, key: str, name: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        from filelock import FileLock, Timeout  # 60 ms to import, and listing needs none

        locks = self.root / "locks"
        with self._writing():
            for folder in (self.bundles, locks):
                folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        lock, seconds = FileLock(locks / f"{key[:12]}.lock"), FIRST_NOTICE_SECONDS
        while not lock.is_locked:
            try:
                with self._writing():
                    lock.acquire(timeout=seconds)
            except Timeout:
                seconds = NEXT_NOTICE_SECONDS
                owners = map(Owner.of, self.bundles.glob(f".staging-*-{key[:12]}-*"))
                owner = next(filter(None, owners), "another process")
                on_wait(f"waiting for {owner}, to finish {name} ({lock.lock_file})")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Our own writes: any failure is about the store."""
        with self._filling():
            try:
                yield
            except TimeoutError:
                raise
            except OSError as error:
                if _is_disk_full(error):
                    raise
                where = error.filename or self.root
                raise Flux2Error(
                    f"the bundle store cannot be written: {where}: {error.strerror or error}; set FLUX2_TRT_HOME to a "
                    "folder that you can write to"
                ) from error

    @contextmanager
    def _filling(self) -> Iterator[None]:
        """The caller's writes: a full disk is about the store, the rest is the caller's."""
        try:
            yield
        except Exception as error:
            if isinstance(error, Flux2Error) or not _is_disk_full(error):
                raise
            raise Flux2Error(
                f"the disk is full while writing {getattr(error, 'filename', None) or self.root}; free some space "
                "(flux2-trt bundles remove), or set FLUX2_TRT_HOME to a folder on another disk"
            ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)  # safetensors and ONNX Runtime raise classes of their own
