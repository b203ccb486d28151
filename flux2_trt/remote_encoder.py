"""RemoteTextEncoder: prompt embeds from an endpoint, so that the text encoder need not be on this machine.

The protocol is that of Hugging Face's public endpoint for [dev] (flux2 `docs/flux2_dev_hf.md`): POST {"prompt": TEXT},
answered with a tensor [1, T, context_dim] as `torch.save` writes it; or, which is asked for first, with a .safetensors
file as `flux2-trt encode` writes it. The prompt leaves this machine. What comes back is hostile until checked: it is
cut off at the size and the time that an answer can need, redirects are not followed, and nothing in it is run.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from flux2_trt.embeds import PromptEmbeds, from_bytes
from flux2_trt.endpoint import Endpoint, key_from
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.spec import ModelSpec
from flux2_trt.torch_file import MAGIC, read_tensor

KEY = "TEXT_ENCODER_API_KEY"
HUGGING_FACE = ".huggingface.co"  # whose token goes to nobody else: .huggingface.cloud are endpoints of anybody
ACCEPTED = "application/vnd.safetensors, application/octet-stream;q=0.5, */*;q=0.1"
OVERHEAD_BYTES = 2**20  # around the numbers of an answer: a zip archive's, or a header with its prompt
ATTEMPTS = 3
RETRIED = (429, 500, 502, 503, 504)
FIRST_PAUSE_SECONDS = 0.5
_CHUNK_BYTES = 2**16


class EncodingError(Flux2Error):
    """Embeds that did not come, or are none. Exit code 1."""


class RemoteTextEncoder:
    """A text encoder for `spec` at an address; `identity` is `embeds.encoder_identity` of the bundle at hand."""

    def __init__(self, endpoint: Endpoint, spec: ModelSpec, identity: str | None) -> None:
        if spec.prompt is None:
            raise UsageError(f"{spec.name} has no text encoder, here or elsewhere; give --prompt-embeds")
        self._endpoint, self._spec, self._identity = endpoint, spec, identity
        self._shape = (1, spec.prompt.max_length, spec.transformer.context_dim)

    def encode(self, prompt: str) -> PromptEmbeds:
        """Embeds [1, T, context_dim] of one prompt. Raises EncodingError."""
        data = self._post({"prompt": prompt})
        where = f"the answer of {self._endpoint.url}"
        try:
            if data.startswith(MAGIC):
                made = PromptEmbeds(read_tensor(data, self._shape[1] * self._shape[2]))
            else:
                made = from_bytes(data, "the answer")
            made.checked(self._spec, self._identity, where)
        except (ValueError, UsageError) as error:
            raise EncodingError(
                f"{where} holds no embeds for {self._spec.name}: {self._endpoint.line(error)}"
            ) from None
        if len(made.embeds) != 1:
            raise EncodingError(f"{where} holds embeds of {len(made.embeds)} prompts, and one was asked for")
        return made

    def _post(self, question: dict[str, str]) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._answer(json.dumps(question).encode("ascii"))
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"answered {error.code} ({self._endpoint.line(_start_of(error))})"
                if error.code in (401, 403):
                    reason += f"; set {KEY}, or for a Hugging Face address log in: hf auth login"
                again = error.code in RETRIED
            except TimeoutError:
                reason, again = f"gave no answer within {self._endpoint.seconds:g} s", False
            except (OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(cause, TimeoutError):
                    reason, again = f"gave no answer within {self._endpoint.seconds:g} s", False
                else:
                    reason, again = f"cannot be reached ({self._endpoint.line(cause)})", True
            if not again or attempt == ATTEMPTS:
                break
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise EncodingError(f"{self._endpoint.url} {reason}")

    def _answer(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": ACCEPTED, "Accept-Encoding": "identity"}
        request = urllib.request.Request(self._endpoint.url, body, headers, method="POST")
        if self._endpoint.key:  # which urllib sends to this host alone
            request.add_unredirected_header("Authorization", f"Bearer {self._endpoint.key}")
        deadline = time.monotonic() + self._endpoint.seconds
        limit = 2 * 4 * self._shape[1] * self._shape[2] + OVERHEAD_BYTES  # fp32, and the empty prompt's beside it
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=self._endpoint.seconds) as response:
            data = bytearray()
            promised = response.length or 0
            while promised <= limit and (part := response.read1(_CHUNK_BYTES)):
                data += part
                promised = max(promised, len(data))
                if time.monotonic() > deadline:
                    raise TimeoutError
        if promised > limit:
            raise EncodingError(f"{self._endpoint.url} sends more than the {limit:,} bytes that embeds can have")
        return bytes(data)


def text_encoder_at(url: str, seconds: float) -> Endpoint:
    """The endpoint with its key: `TEXT_ENCODER_API_KEY`, or for Hugging Face's own addresses the token of its login."""
    key = key_from(KEY)
    host = urlsplit(url).hostname or ""
    if key is None and urlsplit(url).scheme == "https" and host.endswith(HUGGING_FACE):
        from huggingface_hub import get_token

        key = get_token()
    return Endpoint(url, key, seconds)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # the answer then is the error that it is


def _start_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(1024).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return error.reason
