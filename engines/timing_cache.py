"""Timing cache: the kernel times that a compiler measured, kept for the next build."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimingCache:
    """A file that builds of one compiler version for one kind of device read and add to, several at once."""

    file: Path

    def load(self, config: Any) -> None:
        """Give a builder's config what earlier builds measured; a file that the compiler refuses counts as empty."""
        config.set_timing_cache(self._read(config), ignore_mismatch=False)

    def save(self, config: Any) -> None:
        """Add what a build measured to what is in the file by now; a plan is not lost where that cannot be written."""
        temporary = self.file.with_name(f".{self.file.name}-{uuid.uuid4().hex}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.file.with_suffix(".lock")):
                merged = self._read(config)
                merged.combine(config.get_timing_cache(), ignore_mismatch=False)
                temporary.write_bytes(bytes(merged.serialize()))
                os.replace(temporary, self.file)
        except OSError as error:
            _log.warning("%s cannot be written (%s); the next build will measure again", self.file, error.strerror)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _read(self, config: Any) -> Any:
        data = self.file.read_bytes() if self.file.exists() else b""
        cache = config.create_timing_cache(data)
        if cache is None:
            _log.warning("%s is no timing cache of this compiler; starting an empty one", self.file)
            cache = config.create_timing_cache(b"")
        return cache
