"""Chat: a language model behind an address that speaks OpenAI's chat completions, asked with OpenAI's own client.

OpenRouter, vLLM, Ollama, llama.cpp and many more speak it. Answers are hostile until checked: they are cut off at a
size and at a time, redirects are not followed, and nothing but text is taken from them.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flux2_trt.endpoint import Endpoint
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.sampling import Sampling
from flux2_trt.upsampling import Answer, UpsamplingError

if TYPE_CHECKING:
    from PIL import Image

OPENROUTER = "https://openrouter.ai/api/v1"
OPENROUTER_MODEL = "mistralai/pixtral-large-2411"  # the reference's (flux2 `openrouter_api_client.py`)
OPENROUTER_KEY = "OPENROUTER_API_KEY"
OTHER_KEY = "UPSAMPLE_API_KEY"
RETRIES = 2  # of which the client waits half a second before the first, twice as long before the next
MAX_ANSWER_BYTES = 4 * 2**20
# The client adds what the environment says of an account at OpenAI, which is nobody else's business.
SENT_HEADERS = frozenset(
    ("host", "connection", "accept", "content-type", "content-length", "user-agent", "authorization")
)


class ChatEndpoint:
    """A `Rewriter` at an endpoint. `model`: None asks the endpoint for the only one that it has.

    `at` is what metadata call the endpoint. Raises Flux2Error where the client is not installed.
    """

    sees = True

    def __init__(self, endpoint: Endpoint, model: str | None, sampling: Sampling | None = None, at: str = "endpoint"):
        self._endpoint, self._model, self._at = endpoint, model, at
        self._sampling = sampling or Sampling()
        self._library = _client_library()

    @property
    def name(self) -> str:
        return f"{self._at} {self._model}" if self._model else self._at

    def rewrite(self, instructions: str, prompt: str, picture: Image.Image | None) -> Answer:
        """Raises UpsamplingError for anything but an answer, UsageError where the endpoint has several models."""
        openai = self._library
        with _client(openai, self._endpoint) as client:
            try:
                self._model = self._model or _only_model(client, self._endpoint)
                said = client.chat.completions.create(
                    model=self._model,
                    messages=_messages(instructions, prompt, picture),
                    extra_body=self._sampling.to_dict(),
                )
            except _TooMuch as cut:
                raise UpsamplingError(f"{self._endpoint.url} gave {cut}") from None
            except openai.OpenAIError as error:
                # Without the cause: it holds the request, and the request the key.
                raise UpsamplingError(_reason(openai, error, self._endpoint)) from None
            except (ValueError, TypeError, RecursionError, AttributeError):
                raise UpsamplingError(f"{self._endpoint.url} gave no chat completion") from None
        return _answer(said, self._endpoint)


def _client_library() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise Flux2Error(
            f"rewriting prompts at an endpoint needs the package {error.name!r}; pip install 'flux2-trt[upsample]'"
        ) from error
    return openai


def _client(openai: Any, endpoint: Endpoint) -> Any:
    http = openai.DefaultHttpxClient(
        follow_redirects=False,  # to where the key does not belong
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [_strip], "response": [_Limit(endpoint.seconds)]},
    )
    return openai.OpenAI(
        api_key=endpoint.key or "none",  # the client insists on one
        base_url=endpoint.url,
        timeout=endpoint.seconds,
        max_retries=RETRIES,
        http_client=http,
    )


def _strip(request: Any) -> None:
    for name in {name.lower() for name in request.headers} - SENT_HEADERS:
        del request.headers[name]
    request.headers["accept-encoding"] = "identity"
    if request.headers.get("authorization") == "Bearer none":
        del request.headers["authorization"]


class _TooMuch(Exception):
    """An answer that is too large or too slow."""


class _Limit:
    """Cuts every answer off, errors too, before the client has read it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, response: Any) -> None:
        import httpx2

        if response.headers.get("content-encoding", "identity") != "identity":
            raise _TooMuch("an answer that is compressed, which was not asked for")
        source, deadline = response.stream, time.monotonic() + self._seconds

        class Limited(httpx2.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                size = 0
                for chunk in source:
                    size += len(chunk)
                    if size > MAX_ANSWER_BYTES:
                        raise _TooMuch(f"an answer of more than {MAX_ANSWER_BYTES // 2**20} MB")
                    if time.monotonic() > deadline:
                        raise _TooMuch("an answer that does not end")
                    yield chunk

            def close(self) -> None:
                source.close()

        response.stream = Limited()


def _messages(instructions: str, prompt: str, picture: Image.Image | None) -> list[dict[str, Any]]:
    content: Any = prompt
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return [{"role": "system", "content": instructions}, {"role": "user", "content": content}]


def _only_model(client: Any, endpoint: Endpoint) -> str:
    names = [model.id for model in client.models.list().data]
    if not all(isinstance(name, str) and 0 < len(name) < 256 and name.isprintable() for name in names):
        raise ValueError("names of models")
    if endpoint.key and any(endpoint.key in name for name in names):
        raise ValueError("the key as the name of a model")
    if len(names) != 1:
        there = ", ".join(names[:10]) or "none"
        raise UsageError(f"the endpoint has {len(names)} models ({there}); give one with --upsample-model")
    return names[0]


def _reason(openai: Any, error: Any, endpoint: Endpoint) -> str:
    where, cause = endpoint.url, error.__cause__
    if isinstance(error, openai.APITimeoutError):
        return f"{where} gave no answer within {endpoint.seconds:g} s"
    if isinstance(error, openai.APIConnectionError):
        return f"{where} cannot be reached ({endpoint.line(cause or error)})"
    if isinstance(error, openai.APIStatusError):
        said = endpoint.line(getattr(error, "message", ""))
        advice = {401: ": check its key", 403: ": check its key", 402: ": the account has no credit left"}
        return f"{where} answered {error.status_code}{advice.get(error.status_code, '')} ({said})"
    return f"{where} gave no chat completion"


def _answer(said: Any, endpoint: Endpoint) -> Answer:
    """Text and how it ended, out of what may be anything."""
    choices = getattr(said, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message, ended = getattr(choice, "message", None), getattr(choice, "finish_reason", None)
    text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    if message is None:
        problem = getattr(said, "error", None)  # OpenRouter's, with status 200
        told = f" ({endpoint.line(problem)})" if problem else ""
        raise UpsamplingError(f"{endpoint.url} gave no chat completion{told}")
    if refusal or ended == "content_filter":
        told = f" ({endpoint.line(refusal)})" if isinstance(refusal, str) and refusal else ""
        raise UpsamplingError(f"the language model refused{told}")
    if text is not None and not isinstance(text, str):
        raise UpsamplingError(f"{endpoint.url} gave no text")
    text = text or ""
    if endpoint.key and endpoint.key in text:
        raise UpsamplingError(f"{endpoint.url} sent the key back, which is no prompt")
    return Answer(text, complete=ended != "length")
