"""EXIF: texts and bytes as the block of a JPEG, PNG or WebP file.

Pillow writes bytes as numbers of type BYTE, where EXIF wants UNDEFINED, and readers such as piexif, which the web UI
uses, then find no comment. So the few entries that are needed are laid out here (EXIF 2.32, 4.6.2; TIFF 6.0, section
2), most significant byte first.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import pack

PREFIX = b"Exif\0\0"
ASCII, LONG, UNDEFINED = 2, 4, 7
POINTER_TO_DETAILS = 0x8769
_HEADER = b"MM\0\x2a" + pack(">L", 8)  # TIFF's, and where the first directory begins


def exif_block(texts: Mapping[int, str], details: Mapping[int, bytes]) -> bytes:
    """`texts` are ASCII values of the main directory, `details` values without a type of the Exif directory."""
    main = {tag: (ASCII, text.encode("ascii", "replace") + b"\0") for tag, text in texts.items()}
    if not details:
        return PREFIX + _HEADER + _directory(main, len(_HEADER))
    main[POINTER_TO_DETAILS] = (LONG, bytes(4))
    start = len(_HEADER) + len(_directory(main, len(_HEADER)))
    main[POINTER_TO_DETAILS] = (LONG, pack(">L", start))
    rest = _directory({tag: (UNDEFINED, value) for tag, value in details.items()}, start)
    return PREFIX + _HEADER + _directory(main, len(_HEADER)) + rest


def _directory(entries: Mapping[int, tuple[int, bytes]], start: int) -> bytes:
    """Entries in order of their tags; values of more than four bytes follow them. `start`: the directory's offset."""
    fixed, values = pack(">H", len(entries)), b""
    end = start + 2 + 12 * len(entries) + 4
    for tag, (kind, value) in sorted(entries.items()):
        count = len(value) // 4 if kind == LONG else len(value)
        if len(value) <= 4:
            place = value.ljust(4, b"\0")
        else:
            place = pack(">L", end + len(values))
            values += value + b"\0" * (len(value) % 2)  # offsets are even
        fixed += pack(">HHL", tag, kind, count) + place
    return fixed + bytes(4) + values
