"""Download: where a component's weights lie: a path from the environment, else the pinned files of its repository."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flux2_trt.errors import CheckpointError, UsageError
from flux2_trt.naming import Family
from flux2_trt.shards import INDEX_SUFFIX, read_weight_map
from flux2_trt.spec import ModelSpec

ENVIRONMENT: Mapping[Family, str] = {
    "transformer": "FLUX2_MODEL_PATH",
    "autoencoder": "AE_MODEL_PATH",
    "text_encoder": "TEXT_ENCODER_PATH",
}
# mistralai's repositories hold the same weights a second time, as consolidated.safetensors
TEXT_ENCODER_FILES = (f"model{INDEX_SUFFIX}", "model.safetensors")
TOKENIZER = "tokenizer.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """What `Checkpoint` opens; `repo` and `revision` (a commit) where it came from the Hugging Face hub."""

    path: Path
    repo: str | None = None
    revision: str | None = None


def locate(
    spec: ModelSpec, family: Family, *, revision: str | None = None, environment: Mapping[str, str] | None = None
) -> Location:
    """The weights of a component: `FLUX2_MODEL_PATH`, `AE_MODEL_PATH` or `TEXT_ENCODER_PATH` where set and not empty,
    else the files of the repository in `spec.source`, downloaded at one commit.

    `revision`: the branch, tag or commit to take instead of the newest. Offline, the commit in the cache is taken.
    Raises CheckpointError with what to do about it, UsageError for a revision beside a path.
    """
    variable = ENVIRONMENT[family]
    given = (os.environ if environment is None else environment).get(variable)
    if given:
        path = Path(given).expanduser()
        if revision:
            raise UsageError(f"revision {revision} has no effect while {variable}={given} is set; unset one of them")
        if not path.exists():
            raise CheckpointError(
                f"{variable}={given} does not exist; set it to a .safetensors file or a diffusers folder, or unset it"
            )
        return Location(path)
    source = spec.source
    if family == "text_encoder" and spec.text_encoder is None:
        raise UsageError(f"{spec.name} has no text encoder; it takes prompt embeds")
    if source is None:
        raise CheckpointError(
            f"{spec.name} has no published weights; set {variable} to a .safetensors file or a diffusers folder"
        )
    repo, files = {
        "transformer": (source.transformer_repo, (source.transformer_file,)),
        "autoencoder": (source.autoencoder_repo, (source.autoencoder_file,)),
        "text_encoder": (source.text_encoder_repo, TEXT_ENCODER_FILES),
    }[family]
    return _download(repo, files, revision, variable)


def _download(repo: str, choices: Sequence[str], revision: str | None, variable: str) -> Location:
    """The first of `choices` that the repository has, with its shards if it is an index."""
    import huggingface_hub

    with _advice(repo, choices, revision, variable):
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        except Exception as error:
            cached = _cached(repo, choices, revision, variable) if _is_unreachable(error) else None
            if cached is None:
                raise
            log.warning("%s cannot be reached; using commit %s of it from the cache", repo, cached.revision)
            return cached
        published = {sibling.rfilename for sibling in info.siblings or ()}
        file = next((choice for choice in choices if choice in published), None)
        if file is None or info.sha is None:
            raise CheckpointError(f"{repo} has no {' or '.join(choices)}; set {variable} to a local copy")
        (path,) = _fetch(repo, [file], info.sha, variable)
        if file.endswith(INDEX_SUFFIX):
            _fetch(repo, sorted(set(read_weight_map(path).values())), info.sha, variable)
    return Location(path, repo, info.sha)


def _fetch(repo: str, files: Sequence[str], commit: str, variable: str) -> list[Path]:
    """Downloads nothing unless the disk has room for all that is not in the cache yet."""
    import huggingface_hub
    from huggingface_hub import constants

    plans = [huggingface_hub.hf_hub_download(repo, name, revision=commit, dry_run=True) for name in files]
    needed = sum(plan.file_size or 0 for plan in plans if plan.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{repo} needs {needed / 1e9:.1f} GB in {cache}, which has {free / 1e9:.1f} GB free; free some space, set "
            f"HF_HUB_CACHE to a larger disk, or set {variable} to a local copy"
        )
    return [Path(huggingface_hub.hf_hub_download(repo, name, revision=commit)) for name in files]


def _cached(repo: str, choices: Sequence[str], revision: str | None, variable: str) -> Location | None:
    """The commit in the cache: the asked for, else the one of `main`, else the only one."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    commits = {
        commit.commit_hash: commit
        for cached in repos
        if cached.repo_type == "model" and cached.repo_id == repo
        for commit in cached.revisions
        if revision is None or revision == commit.commit_hash or revision in commit.refs
    }
    paths = {
        key: path
        for key, commit in commits.items()
        for choice in reversed(choices)
        if (path := commit.snapshot_path / choice).exists()
    }
    main = [key for key in paths if "main" in commits[key].refs]
    if len(paths) > 1 and not main:
        raise CheckpointError(
            f"{repo} cannot be reached and its cache holds {len(paths)} commits; set {variable} to one of "
            f"{', '.join(str(path) for path in paths.values())}"
        )
    key = next(iter(main or paths), None)
    return Location(paths[key], repo, key) if key else None


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):  # there was an answer
        return False
    return isinstance(error, (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError))


@contextmanager
def _advice(repo: str, choices: Sequence[str], revision: str | None, variable: str) -> Iterator[None]:
    """Turns the failures of a download into a CheckpointError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local = f"or set {variable} to a local copy"
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the errors of three HTTP stacks and of hf_xet: told apart here, the rest goes on
        if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, which it is a kind of
            text = (
                f"{repo} is gated; accept its licence at https://huggingface.co/{repo} and run `hf auth login`, {local}"
            )
        elif isinstance(error, RepositoryNotFoundError):
            text = f"{repo} is not on the Hugging Face hub, or not for this account; run `hf auth login`, {local}"
        elif isinstance(error, RevisionNotFoundError):
            text = f"{repo} has no revision {revision}; give a branch, tag or commit of it, {local}"
        elif _is_unreachable(error):
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face hub cannot be reached"
            command = f"hf download {repo} " + (choices[0] if len(choices) == 1 else "--exclude 'consolidated*'")
            text = f"{repo} is not in the cache and {why}; run `{command}` where there is a network, {local}"
        elif _is_disk_full(error):
            text = (
                f"the disk of {constants.HF_HUB_CACHE} is full; free some space, set HF_HUB_CACHE to a larger disk, "
                f"{local}"
            )
        elif isinstance(error, EntryNotFoundError):
            text = f"{repo} lacks a file of the model ({_first_line(error)}); {local}"
        elif isinstance(error, (HfHubHTTPError, OSError)) or type(error) is RuntimeError:
            text = f"{repo} cannot be downloaded ({_first_line(error)}); try again, set HF_HUB_OFFLINE=1, {local}"
        else:
            raise
        raise CheckpointError(text) from error


def _is_disk_full(error: Exception) -> bool:
    """hf_xet raises RuntimeError with the text of the operating system's error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return re.search(r"No space left|os error 28\b", str(error)) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def locate_tokenizer(spec: ModelSpec, text_encoder: Path) -> Path:
    """`tokenizer.json` beside the text encoder's weights, in a diffusers folder's `tokenizer`, else from the hub.

    Raises CheckpointError as `locate` does.
    """
    folder = text_encoder if text_encoder.is_dir() else text_encoder.parent
    for candidate in (folder / TOKENIZER, folder / "tokenizer" / TOKENIZER, folder.parent / "tokenizer" / TOKENIZER):
        if candidate.exists():
            return candidate
    if spec.source is None:
        raise CheckpointError(f"{folder} has no {TOKENIZER}; put the text encoder's tokenizer there")
    return _download(spec.source.tokenizer_repo, (TOKENIZER,), None, ENVIRONMENT["text_encoder"]).path
