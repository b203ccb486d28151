"""Endpoint: the address of a service that the user named, and the key that goes there and nowhere else."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from flux2_trt.errors import UsageError

SECONDS = 120.0
SHOWN_CHARACTERS = 200  # of what a server says


@dataclass(frozen=True)
class Endpoint:
    """`url` without a slash at its end; `key` is sent as a bearer token; `seconds` is the wait for one answer."""

    url: str
    key: str | None = field(default=None, repr=False)
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", checked_url(self.url))
        if self.key is not None and not self.key.isascii():
            raise UsageError(f"the key for {self.url} has characters that no key has; set it again")
        if self.key is not None and (not self.key.isprintable() or " " in self.key):
            raise UsageError(f"the key for {self.url} has spaces or line breaks in it; set it again")
        if self.key and urlsplit(self.url).scheme == "http" and not is_loopback(self.url):
            raise UsageError(f"a key for {self.url} would travel in the open; give an https address, or unset the key")

    def line(self, text: object) -> str:
        """What a server said, as the start of one line that steers no terminal, without the key."""
        said = self.without_key(str(text))
        shown = " ".join("".join(each if each.isprintable() else " " for each in said[: 4 * SHOWN_CHARACTERS]).split())
        return shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "…"

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "(the key)") if self.key else text


def checked_url(url: str) -> str:
    """`url` without a slash at its end. Raises UsageError unless it is http(s)://host[:port][/path] and no more.

    Passwords and queries are where keys are put, and addresses get into messages.
    """
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        parts, port, host = urlsplit(""), None, None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError(
            "the address has a name, a password or a query in it, which would be shown in messages; give "
            "https://HOST/PATH alone, and the key by its environment variable"
        )
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or port == 0 or not plain:
        raise UsageError(f"{url[:60]!r} is no address; give for example http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_from(variable: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in an environment variable, None where it is not set or empty."""
    return environment.get(variable, "").strip() or None
