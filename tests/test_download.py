"""A path from the environment wins; a download is pinned to one commit; every failure says what to do. No network."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from flux2_trt.download import ENVIRONMENT, Location, locate
from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.models import published_spec
from flux2_trt.naming import FAMILIES, Family

KLEIN = published_spec("klein-4b")
REPO, FILE = "black-forest-labs/FLUX.2-klein-4B", "flux-2-klein-4b.safetensors"
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


class Hub:
    """The two hub functions that `locate` calls; `fails` is raised by the one that it is keyed by."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files: dict[str, bytes] = {}
        self.fails: Mapping[str, Exception] = {}
        self.sizes: dict[str, int] = {}
        self.calls: list[tuple[str, str, str | None]] = []

    def model_info(self, repo: str, revision: str | None = None) -> Any:
        self.calls.append(("model_info", repo, revision))
        if "model_info" in self.fails:
            raise self.fails["model_info"]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def hf_hub_download(self, repo: str, name: str, *, revision: str, dry_run: bool = False) -> Any:
        self.calls.append(("dry_run" if dry_run else "download", name, revision))
        if "download" in self.fails and not dry_run:
            raise self.fails["download"]
        path = self.cache / revision / name
        if dry_run:
            size = self.sizes.get(name, len(self.files[name]))
            return SimpleNamespace(file_size=size, will_download=not path.exists())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[name])
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "cache")
    hub.files = {"README.md": b"", FILE: b"transformer", "ae.safetensors": b"autoencoder"}
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, *args, **named: hub.model_info(*args, **named))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    return hub


def answer(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the hub's own words\nin several lines", response=response)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the environment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_environment_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setenv(ENVIRONMENT[family], str(tmp_path))
    assert locate(KLEIN, family) == Location(tmp_path)
    assert locate(published_spec("tiny"), family) == Location(tmp_path)
    with pytest.raises(UsageError, match="has no effect while"):
        locate(KLEIN, family, revision="main")
    assert not hub.calls


def test_environment_names_a_path_that_does_not_exist(hub: Hub) -> None:
    text = refused(lambda: locate(KLEIN, "autoencoder", environment={"AE_MODEL_PATH": "/nothing/ae.safetensors"}))
    assert text.startswith("AE_MODEL_PATH=/nothing/ae.safetensors does not exist")


def test_a_model_without_published_weights(hub: Hub) -> None:
    assert "tiny has no published weights; set FLUX2_MODEL_PATH" in refused(
        lambda: locate(published_spec("tiny"), "transformer")
    )


# --- downloads ---------------------------------------------------------------------------------------------------


def test_download_is_pinned_to_the_resolved_commit(hub: Hub) -> None:
    location = locate(KLEIN, "transformer", environment={"FLUX2_MODEL_PATH": ""})
    assert location == Location(hub.cache / COMMIT / FILE, REPO, COMMIT)
    assert location.path.read_bytes() == b"transformer"
    assert hub.calls == [("model_info", REPO, None), ("dry_run", FILE, COMMIT), ("download", FILE, COMMIT)]


def test_a_revision_is_resolved(hub: Hub) -> None:
    assert locate(KLEIN, "autoencoder", revision="refs/pr/1").revision == COMMIT
    assert hub.calls[0] == ("model_info", "black-forest-labs/FLUX.2-dev", "refs/pr/1")


def test_text_encoder_downloads_the_shards_of_its_index_only(hub: Hub) -> None:
    weight_map = {"model.embed_tokens.weight": SHARDS[0], "model.norm.weight": SHARDS[1]}
    hub.files = {name: b"x" for name in (*SHARDS, "consolidated.safetensors")}
    hub.files[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    location = locate(KLEIN, "text_encoder")
    assert location == Location(hub.cache / COMMIT / INDEX, "Qwen/Qwen3-4B", COMMIT)
    assert [name for kind, name, _ in hub.calls if kind == "download"] == [INDEX, *SHARDS]


def test_text_encoder_of_one_file(hub: Hub) -> None:
    hub.files = {"model.safetensors": b"x", "config.json": b"x"}
    assert locate(KLEIN, "text_encoder").path == hub.cache / COMMIT / "model.safetensors"


def test_a_repository_without_the_file(hub: Hub) -> None:
    del hub.files[FILE]
    assert f"{REPO} has no {FILE}; set FLUX2_MODEL_PATH" in refused(lambda: locate(KLEIN, "transformer"))


def test_importing_does_not_import_the_hub() -> None:
    code = "import sys, flux2_trt.download, flux2_trt.checkpoint; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["model_info", "download"])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            answer(errors.GatedRepoError, 403),
            f"is gated; accept its licence at https://huggingface.co/{REPO} and run `hf auth",
        ),
        (
            answer(errors.RepositoryNotFoundError, 404),
            "is not on the Hugging Face hub, or not for this account; run `hf auth",
        ),
        (answer(errors.RevisionNotFoundError, 404), "has no revision v9; give a branch, tag or commit"),
        (answer(errors.RemoteEntryNotFoundError, 404), "lacks a file of the model"),
        (errors.LocalEntryNotFoundError("not in the cache"), f"cannot be reached; run `hf download {REPO} {FILE}`"),
        (ConnectionError("no route to host"), "the Hugging Face hub cannot be reached"),
        (errors.HTTPError("connection reset"), "the Hugging Face hub cannot be reached"),  # what httpx raises
        (answer(errors.HfHubHTTPError, 503), "cannot be downloaded (the hub's own words); try again"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "is full; free some space, set HF_HUB_CACHE to a larger disk",
        ),
        (RuntimeError("IO Error: No space left on device (os error 28)"), "is full; free some space"),  # hf_xet
        (RuntimeError("Data processing error"), "cannot be downloaded (Data processing error)"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be downloaded ([Errno 13] Permission denied)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_say_what_to_do(hub: Hub, where: str, error: Exception, advice: str) -> None:
    hub.fails = {where: error}
    text = refused(lambda: locate(KLEIN, "transformer", revision="v9"))
    assert advice in text and "set FLUX2_MODEL_PATH to a local copy" in text


def test_offline_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fails = {"model_info": errors.OfflineModeIsEnabled("offline")}
    text = refused(lambda: locate(published_spec("dev"), "text_encoder"))
    assert "HF_HUB_OFFLINE is set; run `hf download mistralai/Mistral-Small-3.2-24B-Instruct-2506 --exclude" in text


def test_a_bug_is_no_download_failure(hub: Hub) -> None:
    hub.fails = {"download": ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        locate(KLEIN, "transformer")


def test_no_download_starts_on_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    hub.sizes[FILE] = 7_750_000_000
    text = refused(lambda: locate(KLEIN, "transformer"))
    assert f"{REPO} needs 7.8 GB in {hub.cache}, which has 1.0 GB free" in text
    assert not hub.cache.exists()
    path = hub.cache / COMMIT / FILE  # what is in the cache needs no room
    path.parent.mkdir(parents=True)
    path.touch()
    assert locate(KLEIN, "transformer").path == path


# --- offline, with a cache (the hub's own layout) ----------------------------------------------------------------


def put_in_cache(cache: Path, commit: str, *, refs: tuple[str, ...] = ()) -> Path:
    repo = cache / f"models--{REPO.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "blobs" / commit).write_bytes(b"x")
    path = repo / "snapshots" / commit / FILE
    path.parent.mkdir(parents=True)
    path.symlink_to(repo / "blobs" / commit)
    for ref in refs:
        (repo / "refs" / ref).write_text(commit)
    return path


def test_offline_takes_the_commit_in_the_cache(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.fails = {"model_info": errors.OfflineModeIsEnabled("offline")}
    path = put_in_cache(hub.cache, COMMIT)  # a pinned download leaves no refs/main
    with caplog.at_level(logging.WARNING):
        assert locate(KLEIN, "transformer") == Location(path, REPO, COMMIT)
    assert f"using commit {COMMIT}" in caplog.text
    assert "is not in the cache" in refused(lambda: locate(KLEIN, "transformer", revision=OTHER_COMMIT))
    assert "is not in the cache" in refused(lambda: locate(KLEIN, "text_encoder"))


def test_offline_with_two_commits_in_the_cache(hub: Hub) -> None:
    hub.fails = {"model_info": ConnectionError("no route to host")}
    paths = put_in_cache(hub.cache, COMMIT), put_in_cache(hub.cache, OTHER_COMMIT)
    text = refused(lambda: locate(KLEIN, "transformer"))
    assert "its cache holds 2 commits; set FLUX2_MODEL_PATH to one of" in text and all(
        str(path) in text for path in paths
    )
    assert locate(KLEIN, "transformer", revision=OTHER_COMMIT) == Location(paths[1], REPO, OTHER_COMMIT)
    (hub.cache / f"models--{REPO.replace('/', '--')}" / "refs" / "main").write_text(COMMIT)
    assert locate(KLEIN, "transformer") == Location(paths[0], REPO, COMMIT)


def test_an_answer_of_the_hub_is_not_passed_over_for_the_cache(hub: Hub) -> None:
    put_in_cache(hub.cache, COMMIT, refs=("main",))
    hub.fails = {"model_info": answer(errors.GatedRepoError, 403)}
    assert "is gated" in refused(lambda: locate(KLEIN, "transformer"))
