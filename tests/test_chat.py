"""OpenAI's client against a server on a real socket: what is sent, and what becomes of every kind of answer."""

from __future__ import annotations

import base64
import gzip
import io
import sys

import pytest
from fake_endpoint import answering, bytes_of, completion, dripping, endless, json_of, models, silent
from PIL import Image

from flux2_trt import chat
from flux2_trt.chat import MAX_ANSWER_BYTES, ChatEndpoint
from flux2_trt.endpoint import Endpoint
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.sampling import Sampling
from flux2_trt.upsampling import Answer, UpsamplingError

KEY = "sk-or-0123456789abcdef"


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Without repetitions, but where they are what is tested."""
    monkeypatch.setattr(chat, "RETRIES", 0)


def ask(endpoint, model="m", picture=None, key=KEY, seconds=20.0, sampling=None) -> Answer:
    asked = ChatEndpoint(Endpoint(endpoint.url, key, seconds), model, sampling)
    return asked.rewrite("improve this", "a cube", picture)


def refusal(endpoint, **how) -> str:
    with pytest.raises(UpsamplingError) as caught:
        ask(endpoint, **how)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 400
    assert KEY not in text and caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # a traceback would show the request
    return text


def test_what_is_sent_is_the_documented_request(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: mine")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-secret")
    with answering(completion("a large cube")) as endpoint:
        assert ask(endpoint, sampling=Sampling.from_text("top_p=0.9,seed=7")) == Answer("a large cube")
    [asked] = endpoint.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "improve this"}, {"role": "user", "content": "a cube"}],
        "temperature": 0.15,
        "max_tokens": 512,
        "top_p": 0.9,
        "seed": 7,
    }
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert not [value for value in asked.headers.values() if "secret" in value or "mine" in value]
    assert not [name for name in asked.headers if name.startswith(("x-", "openai"))]


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-secret")
    with answering(completion("a large cube")) as endpoint:
        ask(endpoint, key=None)
    assert "authorization" not in endpoint.asked[0].headers


def test_a_picture_goes_along_as_png():
    with answering(completion("make it red")) as endpoint:
        ask(endpoint, picture=Image.new("RGB", (64, 32), "red"))
    shown, text = endpoint.asked[0].body["messages"][1]["content"]
    assert text == {"type": "text", "text": "a cube"}
    head, _, data = shown["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("PNG", (64, 32), (255, 0, 0))


def test_an_answer_that_was_cut_says_so():
    with answering(completion("a large", ended="length")) as endpoint:
        assert ask(endpoint) == Answer("a large", complete=False)


@pytest.mark.parametrize("status", [500, 429, 503])
def test_what_passes_is_tried_again(monkeypatch, status):
    monkeypatch.setattr(chat, "RETRIES", 2)
    with answering(json_of({"error": {"message": "busy"}}, status), completion("a large cube")) as endpoint:
        assert ask(endpoint).text == "a large cube"
    assert len(endpoint.asked) == 2


def test_what_stays_is_given_up(monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 1)
    with answering(json_of({"error": {"message": "no \x1b[31mluck\n"}}, 500)) as endpoint:
        assert "answered 500" in refusal(endpoint)
    assert len(endpoint.asked) == 2


def test_a_timeout_is_tried_again_and_then_given_up(monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 1)
    with answering(silent(10)) as endpoint:
        assert "gave no answer within 0.2 s" in refusal(endpoint, seconds=0.2)
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404])
def test_a_refused_key_is_not_shown_and_not_tried_again(monkeypatch, status):
    monkeypatch.setattr(chat, "RETRIES", 2)
    with answering(json_of({"error": {"message": f"Incorrect key {KEY}"}}, status)) as endpoint:
        assert f"answered {status}" in refusal(endpoint)
    assert len(endpoint.asked) == 1


def test_nobody_there():
    with answering(completion("")) as endpoint:
        pass
    assert "cannot be reached" in refusal(endpoint)


NONSENSE = {
    "html": bytes_of(b"<html>hello</html>", kind="text/html"),
    "no json": bytes_of(b"{", kind="application/json"),
    "not even text": bytes_of(b"\xff\xfe\x00", kind="application/json"),
    "deep": bytes_of(b"[" * 100_000, kind="application/json"),
    "null": json_of(None),
    "number": json_of(7),
    "list": json_of([]),
    "empty": json_of({}),
    "no choice": json_of({"choices": []}),
    "choices are a text": json_of({"choices": "abc"}),
    "choice is a number": json_of({"choices": [7]}),
    "no message": json_of({"choices": [{"finish_reason": "stop"}]}),
    "content is a list": completion([{"type": "text", "text": "a cube"}]),
    "content is a number": completion(7),
    "error with status 200": json_of({"error": {"message": "upstream \x1b[2J failed", "code": 502}}),
    "filtered": completion(None, ended="content_filter"),
    "refused": completion(None, refusal="I will not"),
    "the key as an answer": completion(f"a cube with {KEY} on it"),
    "compressed": bytes_of(gzip.compress(b" " * 10**6), kind="application/json", **{"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_no_answer(kind):
    with answering(NONSENSE[kind]) as endpoint:
        refusal(endpoint)


@pytest.mark.parametrize("said", [completion(None), completion(""), json_of({"choices": [{"message": "hello"}]})])
def test_no_content_is_an_empty_answer(said):
    with answering(said) as endpoint:
        assert ask(endpoint).text == ""


@pytest.mark.parametrize("status", [200, 400, 500])
def test_gigabytes_are_cut_off(status):
    with answering(endless(status)) as endpoint:
        assert "more than 4 MB" in refusal(endpoint)
    # What the system's buffers of both sides take is sent, and not read.
    assert endpoint.sent_bytes < MAX_ANSWER_BYTES + 64 * 2**20


def test_an_answer_that_never_ends_is_cut_off():
    with answering(dripping()) as endpoint:
        assert "does not end" in refusal(endpoint, seconds=0.3)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status):
    with (
        answering(completion("stolen")) as other,
        answering(bytes_of(b"", status, Location=f"{other.url}/chat/completions")) as endpoint,
    ):
        assert f"answered {status}" in refusal(endpoint)
    assert not other.asked


def test_the_only_model_of_an_endpoint_is_found():
    with answering(models("qwen3-vl"), completion("a large cube")) as endpoint:
        asked = ChatEndpoint(Endpoint(endpoint.url), None)
        assert asked.rewrite("improve", "a cube", None).text == "a large cube"
    assert asked.name == "endpoint qwen3-vl"
    assert [each.path for each in endpoint.asked] == ["/v1/models", "/v1/chat/completions"]
    assert endpoint.asked[1].body["model"] == "qwen3-vl"


def test_of_several_models_one_has_to_be_named():
    with answering(models("a", "b")) as endpoint, pytest.raises(UsageError, match=r"2 models .a, b.*--upsample-model"):
        ask(endpoint, model=None)


@pytest.mark.parametrize("names", [(KEY,), ("\x1b[2J",), ("",), ("x" * 300,)])
def test_names_of_models_are_not_trusted(names):
    with answering(models(*names)) as endpoint:
        refusal(endpoint, model=None)


def test_without_the_client_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(Flux2Error, match=r"pip install 'flux2-trt\[upsample\]'"):
        ChatEndpoint(Endpoint("http://127.0.0.1:1/v1"), "m")


def test_nothing_of_a_request_is_logged(caplog, capsys):
    caplog.set_level("DEBUG")
    with answering(json_of({"error": {"message": KEY}}, 401)) as endpoint:
        refusal(endpoint)
    assert caplog.records and KEY not in caplog.text
    assert KEY not in "".join(capsys.readouterr())
