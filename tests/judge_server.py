"""A chat completion server on 127.0.0.1 that misbehaves as it is told: one behaviour a request, then good ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[dict[str, Any]], str]


def completion(text: str, finish: str = "stop", tokens: tuple[int, int] = (100, 20)) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage}


def message(text: str, stop: str = "end_turn") -> dict[str, Any]:
    """The same in the form of Anthropic's Messages."""
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": stop,
        "content": [{"type": "text", "text": text}], "stop_sequence": None,
        "usage": {"input_tokens": 100, "output_tokens": 20},
    }  # fmt: skip


class Server(ThreadingHTTPServer):
    """``behaviours``: names used up one a request; ``say`` makes the text of a good reply from the request."""

    daemon_threads = True

    def __init__(self, behaviours: Sequence[str] = (), say: Say | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviours = list(behaviours)
        self.say = say or (lambda body: json.dumps({"reasons": "fine", "score": 4}))
        self.requests: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, **body})
            self.server.headers_seen.append(dict(self.headers))
            self.server.times.append(time.monotonic())
            behaviour = self.server.behaviours.pop(0) if self.server.behaviours else "good"
        name, _, detail = behaviour.partition(" ")
        getattr(self, f"_{name}")(body, detail)

    def _send(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.send_header("Content-Type", "application/json")
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _reply(self, text: str, whole: bool = True) -> None:
        if self.path.endswith("/messages"):
            data = message(text, "end_turn" if whole else "max_tokens")
        else:
            data = completion(text, "stop" if whole else "length")
        self._send(json.dumps(data).encode())

    def _good(self, body: dict[str, Any], detail: str) -> None:
        self._reply(self.server.say(body))

    def _text(self, body: dict[str, Any], detail: str) -> None:
        self._reply(detail)

    def _refusal(self, body: dict[str, Any], detail: str) -> None:
        if self.path.endswith("/messages"):
            self._send(json.dumps(message("", "refusal")).encode())
            return
        data = completion("")
        data["choices"][0]["message"] = {"content": None, "refusal": detail or "I cannot judge that"}
        self._send(json.dumps(data).encode())

    def _raw(self, body: dict[str, Any], detail: str) -> None:
        self._send(detail.encode())

    def _length(self, body: dict[str, Any], detail: str) -> None:
        self._reply('{"reasons": "and so on and', whole=False)

    def _status(self, body: dict[str, Any], detail: str) -> None:
        status, _, wait = detail.partition(" ")
        extra = {"Retry_After": wait} if wait else {}
        self._send(f"no: {self.headers.get('Authorization')}".encode(), int(status), **extra)

    def _nojson(self, body: dict[str, Any], detail: str) -> None:
        self._send(b"<html>busy</html>")

    def _shape(self, body: dict[str, Any], detail: str) -> None:
        self._send(b'{"choices": []}')

    def _truncated(self, body: dict[str, Any], detail: str) -> None:
        data = json.dumps(completion(self.server.say(body))).encode()
        self._send(data[: len(data) // 2], length=len(data))
        self.close_connection = True

    def _hangup(self, body: dict[str, Any], detail: str) -> None:
        self.close_connection = True

    def _slow(self, body: dict[str, Any], detail: str) -> None:
        time.sleep(float(detail))
        self._good(body, "")

    def _drip(self, body: dict[str, Any], detail: str) -> None:
        data = json.dumps(completion(self.server.say(body))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(float(detail))

    def _huge(self, body: dict[str, Any], detail: str) -> None:
        self._send(b" " * (6 << 20))

    def _moved(self, body: dict[str, Any], detail: str) -> None:
        self._send(b"", 307, Location=detail)


@contextmanager
def serving(*behaviours: str, say: Say | None = None) -> Iterator[Server]:
    server = Server(behaviours, say)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
