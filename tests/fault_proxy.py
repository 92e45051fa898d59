"""Servers for tests: a stand-in that answers chat completions from a script, and a proxy that injects faults.

Both run in threads of this process, on the loopback interface.
"""

from __future__ import annotations

import http.client
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

Fault = Literal["die", "429", "429 now", "500", "503", "html", "empty", "no choices", "garbage", "hang"]
Answerer = Callable[[Sequence[Mapping[str, Any]]], str]  # messages -> the answer's text
Faults = Callable[[int, str], "Fault | None"]  # number and body of a request -> what it meets
FAULTS: tuple[Fault, ...] = ("die", "429", "429 now", "500", "503", "html", "empty", "no choices", "garbage", "hang")

_HTML = b"<!doctype html><html><body><h1>It works!</h1></body></html>"
_STATUS: Mapping[str, tuple[int, str, bytes]] = {
    "429": (429, "application/json", b'{"error": {"message": "too many requests", "type": "rate_limit"}}'),
    "429 now": (429, "application/json", b'{"error": {"message": "too many requests", "type": "rate_limit"}}'),
    "500": (500, "application/json", b'{"error": {"message": "internal", "type": "server_error"}}'),
    "503": (503, "text/html", b"<html>Service Unavailable</html>"),
    "html": (200, "text/html", _HTML),
    "empty": (200, "application/json", b""),
    "no choices": (200, "application/json", b'{"object": "chat.completion", "choices": []}'),
    "garbage": (200, "application/json", b'{"object": "chat.completion", "choices": [{"mess'),
}


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written."""

    def send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


@contextmanager
def _running(handler: type[_Quiet], port: int = 0) -> Iterator[str]:
    server = _Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class StandIn:
    """A server of one model, `name`, whose answers are scripted; `asked` holds the messages of every request.

    `answer` may be replaced at any time; with `usage` off no answer says what it cost.
    """

    answer: Answerer
    name: str = "model"
    usage: bool = True
    url: str = ""
    asked: list[Any] = field(default_factory=list[Any])

    @contextmanager
    def serving(self) -> Iterator[StandIn]:
        """The server, while the block lasts; `url` is its API's address, with `/v1`."""
        stand_in = self

        class Handler(_Quiet):
            def do_GET(self) -> None:
                self.send(200, "application/json", json.dumps({"data": [{"id": stand_in.name}]}).encode())

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = stand_in.reply(request)
                self.send(status, "application/json", json.dumps(reply).encode())

        with _running(Handler) as self.url:
            yield self

    def reply(self, request: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and body of the answer to one request."""
        if request["model"] != self.name:
            return 404, {"error": {"message": f"The model {request['model']!r} does not exist.", "code": 404}}
        self.asked.append(request["messages"])
        text = self.answer(request["messages"])
        prompt, written = sum(len(each["content"].split()) for each in request["messages"]), len(text.split())
        message = {"role": "assistant", "content": text}
        reply: dict[str, Any] = {
            "id": "chat-1",
            "object": "chat.completion",
            "created": 0,
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        if self.usage:
            reply["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": written,
                "total_tokens": prompt + written,
            }
        return 200, reply


@dataclass
class FaultProxy:
    """Forwards to `upstream`, and does something else where `faults` says so.

    `faults` is asked with the number of the chat request, from 0, and its body, and says which fault it meets, or None.
    `seen` holds what every chat request met.
    """

    upstream: str
    faults: Faults = lambda number, body: None
    hang: float = 60.0
    retry_after: str = "1"
    url: str = ""
    seen: list[Fault | None] = field(default_factory=list[Any])
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[FaultProxy]:
        """The proxy, while the block lasts; `url` is its API's address, with `/v1`."""
        proxy = self
        self._ended.clear()

        class Handler(_Quiet):
            def do_GET(self) -> None:
                self.send(*proxy.forwarded("GET", self.path, None))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fault = proxy.next_fault(body.decode())
                if fault == "die":
                    self.close_connection = True
                    return
                if fault == "hang":
                    proxy._ended.wait(proxy.hang)
                    self.close_connection = True
                elif fault is not None:
                    status, kind, text = _STATUS[fault]
                    headers = {"Retry_After": proxy.retry_after} if fault == "429 now" else {}
                    self.send(status, kind, text, **headers)
                else:
                    self.send(*proxy.forwarded("POST", self.path, body))

        with _running(Handler, port) as self.url:
            try:
                yield self
            finally:
                self._ended.set()

    def next_fault(self, body: str) -> Fault | None:
        """What the next chat request meets."""
        with self._lock:
            fault = self.faults(len(self.seen), body)
            self.seen.append(fault)
        return fault

    def forwarded(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        """What the upstream answers: status, type and body; 502 where it does not."""
        target = urllib.parse.urlsplit(self.upstream)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=120)
        try:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", "application/json"), answer.read()
        except OSError as error:
            return 502, "application/json", json.dumps({"error": {"message": str(error)}}).encode()
        finally:
            with suppress(OSError):
                connection.close()


def outage(start: int, *, seconds: float, fault: Fault = "503") -> Faults:
    """A fault that begins with request `start` and lasts so many seconds."""
    began: list[float] = []

    def faults(number: int, body: str) -> Fault | None:
        if number < start:
            return None
        began.append(time.monotonic())
        return fault if began[-1] - began[0] < seconds else None

    return faults


def every(count: int, fault: Fault) -> Faults:
    """A fault that every `count`-th request meets, the first one not among them."""
    return lambda number, body: fault if number % count == count - 1 else None


def between(start: int, stop: float, fault: Fault) -> Faults:
    """A fault that the requests from `start` up to `stop` meet."""
    return lambda number, body: fault if start <= number < stop else None
