"""A file appears whole or not at all, and nobody else's file is ever replaced."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.outputs import format_of, next_free_name, write_file

PICTURE = os.urandom(5000)
OTHER = os.urandom(4000)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def refused(action: Callable[[], object], *words: str, kind: type[Flux2Error] = UsageError) -> None:
    with pytest.raises(Flux2Error) as caught:
        action()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.fixture(params=["hard links", "no hard links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways to publish: exFAT, many network and FUSE file systems have no hard links."""
    if request.param == "no hard links":

        def link(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    yield


@pytest.mark.usefixtures("links")
def test_an_existing_file_is_kept_and_a_free_name_given(tmp_path: Path) -> None:
    write_file(tmp_path / "out.png", PICTURE)
    (tmp_path / "out-0001.png").touch()
    free = str(tmp_path / "out-0002.png")
    refused(partial(write_file, tmp_path / "out.png", OTHER), "out.png", "exists", free)
    assert (tmp_path / "out.png").read_bytes() == PICTURE
    assert names(tmp_path) == ["out-0001.png", "out.png"]
    write_file(free, OTHER)
    assert Path(free).read_bytes() == OTHER


@pytest.mark.usefixtures("links")
def test_links_and_folders_in_the_way_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("dangling.png", "folder.png"):
        refused(partial(write_file, tmp_path / name, PICTURE), name, "exists")
    assert names(tmp_path) == ["dangling.png", "folder.png"]


def test_overwrite_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(bytes(100_000))
    write_file(path, PICTURE, overwrite=True)
    assert path.read_bytes() == PICTURE and names(tmp_path) == ["out.png"]
    (tmp_path / "folder.png").mkdir()
    refused(partial(write_file, tmp_path / "folder.png", PICTURE, True), "folder.png", kind=Flux2Error)
    assert names(tmp_path) == ["folder.png", "out.png"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_file(tmp_path / "out.png", PICTURE)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "out.png")}
    assert len(modes) == 1  # a temporary file's 0600 would hide pictures from a web server


def racing(count: int, action: Callable[[int], object]) -> list[object]:
    results: list[object] = [None] * count
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = action(index)
        except Flux2Error as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.usefixtures("links")
def test_of_racing_writers_one_wins_and_its_picture_stays(tmp_path: Path) -> None:
    for attempt in range(10):
        path = tmp_path / f"{attempt}.png"
        pictures = [bytes([index]) * 1000 for index in range(8)]
        results = racing(8, lambda index, p=path, i=pictures: write_file(p, i[index]))  # type: ignore[misc]
        winners = [index for index, result in enumerate(results) if result is None]
        assert len(winners) == 1
        assert all(isinstance(result, UsageError) for result in results if result is not None)
        assert path.read_bytes() == pictures[winners[0]]
    assert names(tmp_path) == sorted(f"{attempt}.png" for attempt in range(10))


def test_racing_runs_never_get_the_same_free_name(tmp_path: Path) -> None:
    (tmp_path / "cube-0002.png").write_bytes(b"mine")
    found = racing(12, lambda _: [next_free_name(tmp_path, "cube") for _ in range(5)])
    reserved = [path for part in found for path in part]  # type: ignore[attr-defined]
    assert len(set(reserved)) == 60
    assert {path.name for path in reserved} == {f"cube-{n:04d}.png" for n in range(1, 62) if n != 2}
    assert (tmp_path / "cube-0002.png").read_bytes() == b"mine"


def test_a_reserved_name_is_written_with_overwrite(tmp_path: Path) -> None:
    path = next_free_name(tmp_path, "cube")
    assert path.stat().st_size == 0
    write_file(path, PICTURE, overwrite=True)
    assert path.read_bytes() == PICTURE and names(tmp_path) == ["cube-0001.png"]


def test_a_stem_cannot_leave_its_folder(tmp_path: Path) -> None:
    for stem in ("../cube", "/tmp/cube", "a/b"):
        refused(partial(next_free_name, tmp_path, stem), "without slashes")
    assert names(tmp_path) == []


def test_a_file_larger_than_the_disk_allows_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a real write that stops in the middle of the file
    try:
        refused(partial(write_file, tmp_path / "out.png", PICTURE), "out.png", "too large", kind=Flux2Error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "link", "replace"])
def test_a_failure_at_any_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    if function == "link":
        monkeypatch.setattr(os, "replace", fail)

    def action() -> None:
        write_file(tmp_path / "out.png", PICTURE, overwrite=function == "replace")

    refused(action, "out.png", "No space left", "free some space", kind=Flux2Error)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("fsync", "link"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, function, interrupt)
            write_file(tmp_path / "out.png", PICTURE)
        assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, word in (("missing", "No such file"), ("file", "Not a directory"), ("nul\0", "null byte")):
        path = tmp_path / folder / "out.png"
        refused(partial(write_file, path, PICTURE), word, "folder", kind=Flux2Error)
        refused(partial(next_free_name, path.parent, "out"), word, "folder", kind=Flux2Error)
    long = tmp_path / ("x" * 300 + ".png")
    refused(partial(write_file, long, PICTURE), "too long", "another name", kind=Flux2Error)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes in every folder")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(partial(write_file, tmp_path / "out.png", PICTURE), "Permission denied", kind=Flux2Error)


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    formats = {name: format_of(Path(name)) for name in ("a.png", "a.JPG", "a.b.jpeg", "a.webp")}
    assert list(formats.values()) == ["PNG", "JPEG", "JPEG", "WEBP"]
    for name in ("a", "a.gif", ".png"):
        refused(partial(format_of, Path(name)), ".png, .jpg", name)


def test_a_private_file_is_private_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (modes.append(stat.S_IMODE(os.fstat(file).st_mode)), fsync(file)))
    write_file(tmp_path / "key.pem", PICTURE, mode=0o600)
    assert modes == [0o600] and stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
