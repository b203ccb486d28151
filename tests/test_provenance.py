"""A picture carries what made it; a file appears whole or not at all, and nobody else's file is ever replaced."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.provenance import Parameters, Reference, next_free_name, read_parameters, write_png

PARAMETERS = Parameters(
    prompt="a red cube",
    seed=42,
    width=256,
    height=256,
    num_inference_steps=8,
    guidance_scale=1.0,
    model="tiny",
    model_key="tiny-cpu-0123456789ab",
    version="0.1.0",
)
FULL = replace(
    PARAMETERS,
    seed=2**64 - 1,
    guidance_scale=2.5,
    sigmas=(1.0, 0.6509, 0.1 + 0.2 - 0.2, 0.00031),
    references=(Reference("cat.png", "a" * 64), Reference("日本.webp", "b" * 64)),
    image_index=3,
)
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
OTHER = 255 - PICTURE


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(action: Callable[[], object], *words: str, kind: type[Flux2Error] = UsageError) -> None:
    with pytest.raises(Flux2Error) as caught:
        action()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("parameters", [PARAMETERS, FULL])
def test_pixels_and_parameters_survive_the_file(tmp_path: Path, parameters: Parameters) -> None:
    path = tmp_path / "out.png"
    write_png(path, PICTURE, parameters)
    assert np.array_equal(pixels(path), PICTURE)
    assert read_parameters(path) == read_parameters(str(path)) == parameters
    assert names(tmp_path) == ["out.png"]


def test_other_tools_read_the_settings_in_the_form_they_know(tmp_path: Path) -> None:
    write_png(tmp_path / "out.png", PICTURE, PARAMETERS)
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["parameters"] == (
            "a red cube\n"
            "Steps: 8, Sampler: Euler, CFG scale: 1, Seed: 42, Size: 256x256, Model: tiny, Version: flux2-trt 0.1.0"
        )
        assert json.loads(image.info["flux2-trt"])["seed"] == 42
    assert "CFG scale: 2.5" in FULL.to_text()
    assert 'Model: "a, b: c", Version' in replace(PARAMETERS, model="a, b: c").to_text()


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "two\nlines\r\n\n",
        "Zürich 日本 🐈‍⬛ \u202e",
        "Steps: 3, Seed: 1",
        "nul\0inside",
        "lone \udce4 surrogate",
        "x" * 100_000,
    ],
)
def test_any_prompt_survives_the_file(tmp_path: Path, prompt: str) -> None:
    write_png(tmp_path / "out.png", PICTURE, replace(PARAMETERS, prompt=prompt))
    assert read_parameters(tmp_path / "out.png").prompt == prompt
    with Image.open(tmp_path / "out.png") as image:
        shown = image.info["parameters"].rpartition("\nSteps: 8")[0]
    assert shown == prompt.replace("\0", "\ufffd").replace("\udce4", "?")


def test_numpy_numbers_in_the_parameters_do_not_cost_the_picture(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        "seed": np.uint64(2**63),
        "guidance_scale": np.float32(2.5),
        "sigmas": (np.float32(1), 0.5),
    }
    odd = replace(PARAMETERS, **numbers)
    write_png(tmp_path / "out.png", PICTURE, odd)
    assert read_parameters(tmp_path / "out.png") == replace(odd, seed=2**63)


def png_with(path: Path, text: str | None) -> Path:
    chunks = PngInfo()
    if text is not None:
        chunks.add_itxt("flux2-trt", text)
    Image.fromarray(PICTURE).save(path, pnginfo=chunks)
    return path


def changed(**values: object) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **values})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("null", "cannot read"),
        ("{}", "missing"),
        (changed(seed="42"), "seed is a str"),
        (changed(seed=True), "seed is a bool"),
        (changed(width=256.0), "width is a float"),
        (changed(prompt=None), "prompt is a NoneType"),
        (changed(sigmas=["a"]), "cannot read"),
        (changed(sigmas=[10**400]), "cannot read"),
        (changed(references=["cat.png"]), "cannot read"),
        (changed(references=5), "cannot read"),
        (changed(references=[{"name": "cat.png", "sha256": 1}]), "sha256 is a int"),
        (changed(lora="x"), "lora"),
    ],
)
def test_damaged_parameters_are_refused_on_one_line(tmp_path: Path, text: str, word: str) -> None:
    path = png_with(tmp_path / "odd.png", text)
    refused(partial(read_parameters, path), "odd.png", word)


def test_files_without_parameters_are_refused(tmp_path: Path) -> None:
    refused(lambda: read_parameters(png_with(tmp_path / "plain.png", None)), "plain.png", "no flux2-trt parameters")
    refused(partial(read_parameters, tmp_path / "missing.png"), "missing.png", "No such file")
    (tmp_path / "text.png").write_text("hello")
    refused(partial(read_parameters, tmp_path / "text.png"), "text.png", "PNG")
    refused(partial(read_parameters, tmp_path), "cannot be read")


def test_reading_parameters_does_not_decode_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    write_png(path, PICTURE, FULL)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") + 4])
    assert read_parameters(path) == FULL


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
    write_png(tmp_path / "out.png", PICTURE, PARAMETERS)
    (tmp_path / "out-0001.png").touch()
    free = str(tmp_path / "out-0002.png")
    refused(partial(write_png, tmp_path / "out.png", OTHER, PARAMETERS), "out.png", "exists", free)
    assert np.array_equal(pixels(tmp_path / "out.png"), PICTURE)
    assert names(tmp_path) == ["out-0001.png", "out.png"]
    write_png(free, OTHER, PARAMETERS)
    assert np.array_equal(pixels(Path(free)), OTHER)


@pytest.mark.usefixtures("links")
def test_links_and_folders_in_the_way_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("dangling.png", "folder.png"):
        refused(partial(write_png, tmp_path / name, PICTURE, PARAMETERS), name, "exists")
    assert names(tmp_path) == ["dangling.png", "folder.png"]


def test_overwrite_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(bytes(100_000))
    write_png(path, PICTURE, PARAMETERS, overwrite=True)
    assert np.array_equal(pixels(path), PICTURE) and names(tmp_path) == ["out.png"]
    (tmp_path / "folder.png").mkdir()
    refused(partial(write_png, tmp_path / "folder.png", PICTURE, PARAMETERS, True), "folder.png", kind=Flux2Error)
    assert names(tmp_path) == ["folder.png", "out.png"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_png(tmp_path / "out.png", PICTURE, PARAMETERS)
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
        pictures = [np.full((16, 16, 3), index, np.uint8) for index in range(8)]
        results = racing(8, lambda index, p=path, i=pictures: write_png(p, i[index], PARAMETERS))  # type: ignore[misc]
        winners = [index for index, result in enumerate(results) if result is None]
        assert len(winners) == 1
        assert all(isinstance(result, UsageError) for result in results if result is not None)
        assert np.array_equal(pixels(path), pictures[winners[0]])
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
    write_png(path, PICTURE, PARAMETERS, overwrite=True)
    assert read_parameters(path) == PARAMETERS and names(tmp_path) == ["cube-0001.png"]


def test_a_stem_cannot_leave_its_folder(tmp_path: Path) -> None:
    for stem in ("../cube", "/tmp/cube", "a/b"):
        refused(partial(next_free_name, tmp_path, stem), "without slashes")
    assert names(tmp_path) == []


def test_a_file_larger_than_the_disk_allows_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a real write that stops in the middle of the file
    try:
        refused(partial(write_png, tmp_path / "out.png", PICTURE, PARAMETERS), "out.png", "too large", kind=Flux2Error)
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
        write_png(tmp_path / "out.png", PICTURE, PARAMETERS, overwrite=function == "replace")

    refused(action, "out.png", "No space left", "free some space", kind=Flux2Error)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("fsync", "link"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, function, interrupt)
            write_png(tmp_path / "out.png", PICTURE, PARAMETERS)
        assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, word in (("missing", "No such file"), ("file", "Not a directory"), ("nul\0", "null byte")):
        path = tmp_path / folder / "out.png"
        refused(partial(write_png, path, PICTURE, PARAMETERS), word, "folder", kind=Flux2Error)
        refused(partial(next_free_name, path.parent, "out"), word, "folder", kind=Flux2Error)
    long = tmp_path / ("x" * 300 + ".png")
    refused(partial(write_png, long, PICTURE, PARAMETERS), "too long", "another name", kind=Flux2Error)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes in every folder")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(partial(write_png, tmp_path / "out.png", PICTURE, PARAMETERS), "Permission denied", kind=Flux2Error)


def test_other_suffixes_and_arrays_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    refused(partial(write_png, tmp_path / "out.jpg", PICTURE, PARAMETERS), "out.jpg", "out.png")
    refused(partial(write_png, tmp_path / "out", PICTURE, PARAMETERS), "out.png")
    pictures: tuple[Any, ...] = (PICTURE.astype(np.float32), PICTURE[:, :, 0], PICTURE[:, :, :2], PICTURE[None])
    for picture in pictures:
        refused(partial(write_png, tmp_path / "out.png", picture, PARAMETERS), "uint8 [H, W, 3]")
    assert names(tmp_path) == []
