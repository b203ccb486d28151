"""Timing caches: kept, combined and never in the way of a build.

TensorRT measures on a GPU only, and for TensorRT-RTX these calls do nothing, so that sets of words stand in for caches.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.timing_cache import TimingCache


class Times:
    """Stands in for ITimingCache."""

    def __init__(self, words: set[str]) -> None:
        self.words = words

    def combine(self, other: Times, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.words |= other.words
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.words)).encode()


class Build:
    """Stands in for IBuilderConfig, in a build that measures `words` once it has a cache."""

    def __init__(self, *words: str) -> None:
        self.words = set(words)

    def create_timing_cache(self, data: bytes) -> Times | None:
        try:
            return Times(set(json.loads(data or b"[]")))
        except ValueError:
            return None

    def set_timing_cache(self, cache: Times, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = Times(cache.words | self.words)
        return True

    def get_timing_cache(self) -> Times:
        return self.cache


def test_builds_at_the_same_time_lose_nothing_of_each_other(tmp_path: Path) -> None:
    cache, first, second = TimingCache(tmp_path / "new" / "h100.cache"), Build("gemm"), Build("attention")
    for build in (first, second):
        cache.load(build)
    for build in (first, second):
        cache.save(build)
    third = Build()
    cache.load(third)
    assert third.get_timing_cache().words == {"gemm", "attention"}
    assert [path.name for path in cache.file.parent.iterdir() if path.suffix != ".lock"] == ["h100.cache"]


def test_a_file_that_the_compiler_refuses_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, build = TimingCache(tmp_path / "h100.cache"), Build("gemm")
    cache.file.write_bytes(b"\0damaged")
    cache.load(build)
    assert "h100.cache is no timing cache of this compiler" in caplog.text
    cache.save(build)
    assert json.loads(cache.file.read_bytes()) == ["gemm"]


def test_a_plan_is_not_lost_where_the_cache_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache, build = TimingCache(tmp_path / "file" / "h100.cache"), Build("gemm")
    build.set_timing_cache(Times(set()), ignore_mismatch=False)
    cache.save(build)
    assert "cannot be written" in caplog.text
