"""A text encoder behind a real socket: both protocols, and every answer that is none. Nothing is run or written."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_endpoint import Answering, FakeEndpoint, answering, bytes_of, dripping, endless, json_of, silent

from flux2_trt import remote_encoder
from flux2_trt.embeds import PromptEmbeds, to_bytes
from flux2_trt.endpoint import Endpoint
from flux2_trt.errors import UsageError
from flux2_trt.models import published_spec
from flux2_trt.remote_encoder import EncodingError, RemoteTextEncoder, text_encoder_at

TINY = published_spec("tiny")
SHAPE = (1, TINY.prompt.max_length, TINY.transformer.context_dim)  # type: ignore[union-attr]
KEY = "hf_0123456789"
IDENTITY = "a" * 64


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_encoder, "FIRST_PAUSE_SECONDS", 0.01)


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def encode(endpoint: FakeEndpoint, prompt: str = "a cube", key: str | None = KEY, seconds: float = 20) -> PromptEmbeds:
    return RemoteTextEncoder(Endpoint(endpoint.url, key, seconds), TINY, IDENTITY).encode(prompt)


def refusal(answer: Answering, seconds: float = 20) -> tuple[str, FakeEndpoint]:
    with answering(answer) as endpoint, pytest.raises(EncodingError) as caught:
        encode(endpoint, seconds=seconds)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 400 and KEY not in text
    assert caught.value.exit_code == 1
    return text, endpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_public_protocol(dtype: torch.dtype) -> None:
    values = torch.randn(*SHAPE).to(dtype)
    with answering(bytes_of(saved(values))) as endpoint:
        found = encode(endpoint)
    np.testing.assert_array_equal(found.embeds, values.float().numpy())
    [asked] = endpoint.asked
    assert asked.body == {"prompt": "a cube"} and asked.headers["content-type"] == "application/json"
    assert asked.headers["authorization"] == f"Bearer {KEY}"


def test_the_safetensors_protocol_names_the_text_encoder() -> None:
    values = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    with answering(bytes_of(to_bytes(PromptEmbeds(values, values, ("a cube",), IDENTITY, "tiny")))) as endpoint:
        found = encode(endpoint)
    np.testing.assert_array_equal(found.embeds, values)
    assert found.negative is not None and "safetensors" in endpoint.asked[0].headers["accept"]
    other = PromptEmbeds(values, None, ("a cube",), "b" * 64, "tiny")
    assert "another text encoder" in refusal(bytes_of(to_bytes(other)))[0]


def test_prompts_of_every_language_arrive() -> None:
    with answering(bytes_of(saved(torch.ones(*SHAPE)))) as endpoint:
        encode(endpoint, 'ein "Würfel" 日本 🎲\n')
    assert endpoint.asked[0].body == {"prompt": 'ein "Würfel" 日本 🎲\n'}


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(status: int) -> None:
    with answering(json_of({}, status), bytes_of(saved(torch.ones(*SHAPE)))) as endpoint:
        assert encode(endpoint).embeds.all()
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(("status", "times"), [(400, 1), (401, 1), (404, 1), (422, 1), (503, 3)])
def test_what_stays_is_given_up(status: int, times: int) -> None:
    text, endpoint = refusal(json_of({"detail": f"no {KEY} \x1b[31m\n"}, status))
    assert f"answered {status}" in text and len(endpoint.asked) == times
    assert ("hf auth login" in text) == (status == 401)


def test_slow_endpoints() -> None:
    assert "no answer within 0.2 s" in refusal(silent(10), seconds=0.2)[0]
    assert "no answer within 0.3 s" in refusal(dripping(), seconds=0.3)[0]


def test_nobody_there() -> None:
    with answering(json_of({})) as endpoint:
        pass
    with pytest.raises(EncodingError, match="cannot be reached"):
        encode(endpoint)


@pytest.mark.parametrize("status", [200, 500])
def test_gigabytes_are_cut_off(status: int) -> None:
    text, endpoint = refusal(endless(status))
    assert ("sends more than" if status == 200 else "answered 500") in text
    # What the system's buffers of both sides take is sent, and not read.
    assert endpoint.sent_bytes < (3 if status == 500 else 1) * 64 * 2**20


def test_gigabytes_that_are_announced_are_not_read_at_all() -> None:
    def answer(handler: Any) -> None:
        handler.head(200, {"Content-Length": str(10**12)})
        handler.send(b"PK\x03\x04")

    assert "sends more than" in refusal(answer)[0]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (saved(Evil(tmp_path / "was-here")), pickle.dumps(Evil(tmp_path / "was-here"))):
        refusal(bytes_of(data))
    assert not list(tmp_path.iterdir())


def changed(index: tuple[int, ...], value: float) -> torch.Tensor:
    values = torch.ones(*SHAPE)
    values[index] = value
    return values


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (saved(changed((0, -1, -1), float("nan"))), "not finite"),
        (saved(changed((0, 0, 0), float("inf"))), "not finite"),
        (saved(torch.ones(SHAPE[1:])), "have shape"),
        (saved(torch.ones(1, SHAPE[1] - 1, SHAPE[2])), "have shape"),
        (saved(torch.ones(1, SHAPE[1], SHAPE[2] // 2)), "have shape"),
        (saved(torch.ones(2, *SHAPE[1:])), "larger"),
        (saved(torch.ones(1).expand(2**30, 2**20)), "larger"),
        (saved(torch.ones(*SHAPE, dtype=torch.float64)), "DoubleStorage"),
        (saved(torch.ones(*SHAPE, dtype=torch.int32)), "IntStorage"),
        (saved(torch.ones(SHAPE[1:]).to_sparse()), "sparse"),
        (saved([torch.ones(*SHAPE)]), "EMPTY_LIST"),
        (b"", "empty"),
        (b"<html>", "safetensors"),
        (saved(torch.ones(*SHAPE))[:-100], "torch.save"),
        (to_bytes(PromptEmbeds(np.ones((2, *SHAPE[1:]), np.float32), prompts=("a", "b"))), "2 prompts"),
    ],
)
def test_what_is_no_embeds(answer: bytes, word: str) -> None:
    assert word in refusal(bytes_of(answer))[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with answering(bytes_of(saved(torch.ones(*SHAPE)))) as other:
        assert f"answered {status}" in refusal(bytes_of(b"", status, Location=other.url))[0]
    assert not other.asked


def test_the_token_of_hugging_face_goes_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.delenv("TEXT_ENCODER_API_KEY", raising=False)
    assert text_encoder_at("https://remote-text-encoder-flux-2.huggingface.co/predict", 1).key == KEY
    for url in (
        "http://x.huggingface.co/predict",
        "https://huggingface.co.evil.com/predict",
        "https://evilhuggingface.co/predict",
        "https://x.endpoints.huggingface.cloud/predict",
        "http://127.0.0.1:1/predict",
    ):
        assert text_encoder_at(url, 1).key is None
    monkeypatch.setenv("TEXT_ENCODER_API_KEY", "mine")
    assert text_encoder_at("https://host/predict", 1).key == "mine"
    with pytest.raises(UsageError):
        text_encoder_at("http://host/predict", 1)
