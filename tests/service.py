"""An OpenAI-compatible service on 127.0.0.1 for tests: it answers by a script, or with a function, and remembers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: Any = "hello", reason: str = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}], **more}


class Server:
    """Answers each request with the next of ``script``, or what ``answer`` says to its body: (status, headers, body),
    or a word for a trick."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.script: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.seen.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
                step = server.script.pop(0) if answer is None else answer(server.seen[-1]["body"])
                if step == "hang up":
                    self.connection.close()
                    return
                if step == "slow":
                    server.waiting.wait(5)
                    return
                status, headers, data = step
                raw = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw) + (100 if headers.get("X-Cut") else 0)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.waiting = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.waiting.set()
        self.http.shutdown()
        self.http.server_close()
