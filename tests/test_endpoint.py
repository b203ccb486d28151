"""Addresses hold no keys, keys do not travel in the open, and neither is shown."""

import pytest

from flux2_trt.endpoint import Endpoint, checked_url, key_from
from flux2_trt.errors import UsageError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://openrouter.ai/api/v1/", "https://openrouter.ai/api/v1"),
        ("http://[::1]:11434/v1", "http://[::1]:11434/v1"),
    ],
)
def test_addresses(url, expected):
    assert checked_url(url) == Endpoint(url).url == expected


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000", "ftp://host/x", "file:///etc/passwd", "http://", "http:///v1", "http://host:99999/",
        "http://host:0/", "http://[::1/v1", "http://ho st/", "http://host/\x1b[2J", "http://höst/",
        "javascript:alert(1)",
    ],
)  # fmt: skip
def test_what_is_no_address(url):
    with pytest.raises(UsageError, match="is no address") as caught:
        checked_url(url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["https://me:SECRET@host/v1", "https://SECRET@host/v1", "https://host/v1?key=SECRET", "https://host/#SECRET"]
)
def test_keys_do_not_belong_into_addresses(url):
    with pytest.raises(UsageError) as caught:
        checked_url(url)
    assert "SECRET" not in str(caught.value)


def test_a_key_travels_encrypted_or_not_at_all():
    for url in ("http://host/v1", "http://192.168.0.7/v1"):
        with pytest.raises(UsageError, match="in the open") as caught:
            Endpoint(url, "SECRET")
        assert "SECRET" not in str(caught.value)
        assert Endpoint(url).key is None
    for url in ("https://host/v1", "http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]/v1"):
        assert Endpoint(url, "SECRET").key == "SECRET"


@pytest.mark.parametrize("key", ["SEC RET", "SECRET\n", "SECRET\r\nX-Other: 1", "SÉCRET", "SECRET\0"])
def test_what_is_no_key_is_not_shown(key):
    with pytest.raises(UsageError) as caught:
        Endpoint("https://host/v1", key)
    assert "RET" not in str(caught.value)


def test_what_a_server_says_is_one_short_line_without_the_key():
    endpoint = Endpoint("https://host/v1", "SECRET")
    assert "SECRET" not in repr(endpoint)
    said = endpoint.line("bad key SECRET\n\x1b[31mred " + "x" * 10_000)
    assert "SECRET" not in said and said.isprintable() and len(said) < 250


def test_keys_come_from_the_environment():
    assert key_from("KEY", {"KEY": " abc\n"}) == "abc"
    assert key_from("KEY", {"KEY": " "}) is key_from("KEY", {}) is None
