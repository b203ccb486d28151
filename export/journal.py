"""Journal: which weights of a file were written, so that a conversion that was killed goes on where it was.

A line is a claim: the name of a weight, and the CRC-32 of the bytes that were written for it. It counts only after
those bytes are read back and agree. So nothing depends on the order in which the disk got them: a torn line, or data
that a loss of power kept from the disk, cost the one weight.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path


class Journal:
    """Claims about one weight file, of this process and of those that were killed before it."""

    def __init__(self, path: Path) -> None:
        self.claims = _read(path)
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def add(self, weight: str, crc32: int) -> None:
        """To be called once the bytes are written."""
        with self._lock:
            self._file.write(b"\n" + json.dumps([weight, crc32]).encode())  # first, to end a line that was torn

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> dict[str, int]:
    claims: dict[str, int] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            weight, crc32 = json.loads(line)
            claims[weight] = crc32
        except (ValueError, TypeError):  # torn
            continue
    return claims
