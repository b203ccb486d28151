"""FakeEndpoint: a server on a real socket of this machine that answers as it is told, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answering = Callable[["Handler"], None]
CHUNK = b"x" * 2**16


@dataclass(frozen=True)
class Asked:
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeEndpoint:
    """`answers` are used one after the other, the last one for all that follow; `asked` is what came."""

    url: str
    answers: list[Answering]
    asked: list[Asked] = field(default_factory=list)
    sent_bytes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def next_answer(self) -> Answering:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: FakeEndpoint

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.endpoint.asked.append(Asked(self.path, headers, json.loads(data) if data else None))
        try:
            self.endpoint.next_answer()(self)
        except OSError:  # the client has left
            self.close_connection = True

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.endpoint.sent_bytes += len(data)


@contextmanager
def answering(*answers: Answering) -> Iterator[FakeEndpoint]:
    endpoint = FakeEndpoint("", list(answers))
    handler = type("Bound", (Handler,), {"endpoint": endpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def bytes_of(data: bytes, status: int = 200, kind: str = "application/octet-stream", **headers: str) -> Answering:
    def answer(handler: Handler) -> None:
        handler.head(status, {"Content-Type": kind, "Content-Length": str(len(data)), **headers})
        handler.send(data)

    return answer


def json_of(values: Any, status: int = 200) -> Answering:
    return bytes_of(json.dumps(values).encode(), status, "application/json")


def completion(text: Any, ended: str = "stop", **message: Any) -> Answering:
    """A chat completion as OpenAI documents it."""
    choice = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": text, **message}}
    return json_of({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


def models(*names: str) -> Answering:
    listed = [{"id": name, "object": "model", "created": 1, "owned_by": "nobody"} for name in names]
    return json_of({"object": "list", "data": listed})


def silent(seconds: float) -> Answering:
    def answer(handler: Handler) -> None:
        handler.endpoint.stopped.wait(seconds)
        handler.close_connection = True

    return answer


def endless(status: int = 200, kind: str = "application/json") -> Answering:
    """As fast as it goes, until the client leaves."""

    def answer(handler: Handler) -> None:
        handler.head(status, {"Content-Type": kind, "Connection": "close"})
        while not handler.endpoint.stopped.is_set():
            handler.send(CHUNK)

    return answer


def dripping(kind: str = "application/json") -> Answering:
    """A byte at a time, faster than any wait for the next one, and without an end."""

    def answer(handler: Handler) -> None:
        handler.head(200, {"Content-Type": kind, "Connection": "close"})
        while not handler.endpoint.stopped.is_set():
            handler.send(b" ")
            time.sleep(0.02)

    return answer
