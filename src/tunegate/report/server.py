"""The review's page, on this machine alone: static files, the blind state, one request a click.

Listens on 127.0.0.1. Every path begins with a random token, compared in constant time; a request whose Host is another
name is refused (DNS rebinding), and so is a change that comes from another page (Origin) or not as JSON. No answer
allows other origins, and the content policy lets the page load nothing but its own files. Texts travel as JSON and
reach the page as text nodes only, so nothing in an answer is read as markup.

Until a reviewer has finished, what is sent depends on the texts on the left and on the right and on nothing that tells
whose they are: exchanged subjects with exchanged sides give the same bytes. It keeps no state of its own, so several
reviewers, pages and processes may work at once.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, quote

from tunegate.errors import InputError, TunegateError
from tunegate.report.review import LONGEST_NOTE, SIDES, TIE, VERDICTS, Log, Refused, Review, reviewer_name
from tunegate.report.summary import summarize

LARGEST_BODY = 64 * 1024  # bytes
PAGES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "review.css": ("review.css", "text/css; charset=utf-8"),
    "review.js": ("review.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_OPEN = {"left": (None, *VERDICTS), "right": (None, *VERDICTS), "preferred": (None, *SIDES, TIE)}


class ReviewServer(ThreadingHTTPServer):
    """Serves ``review`` until ``shutdown``. ``on_finish(reviewer)`` is called from the thread of the request."""

    daemon_threads = True

    def __init__(self, review: Review, port: int = 0, on_finish: Callable[[str], None] = lambda reviewer: None):
        self.review, self.on_finish = review, on_finish
        self.token = secrets.token_urlsafe(24)
        folder = files("tunegate.report") / "page"
        self.pages = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()}
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            got = getattr(error, "strerror", None) or str(error)
            raise InputError("cannot listen here", where=f"127.0.0.1:{port}", got=got, fix="leave --port out") from None

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of this machine's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))

    def url(self, reviewer: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/?reviewer={quote(reviewer)}"

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """A browser that went away in the middle of an answer is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    server_version, sys_version = "tunegate", ""
    timeout = 20  # seconds for a request to arrive

    def log_message(self, format: str, *arguments: Any) -> None:
        """The terminal is for the reviewer."""

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    # --- requests -------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        if path in self.server.pages:
            data, kind = self.server.pages[path]
            self._send(HTTPStatus.OK, data, kind)
        elif path == "state":
            self._answer(lambda: self._state(self._reviewer()))
        else:
            self._say(HTTPStatus.NOT_FOUND, "no such page")

    def do_POST(self) -> None:
        path = self._path()
        if path is None:
            return
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            self._say(HTTPStatus.FORBIDDEN, "from another page")
        elif self.headers.get_content_type() != "application/json":
            self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is expected")
        elif path in ("verdict", "finish"):
            self._answer(lambda: self._verdict(self._body()) if path == "verdict" else self._finish(self._body()))
        else:
            self._say(HTTPStatus.NOT_FOUND, "no such page")

    def _path(self) -> str | None:
        """What follows the token; None, with the refusal sent, for another host or token."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            self._say(HTTPStatus.FORBIDDEN, "another host")
            return None
        token, slash, path = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or not slash:
            self._say(HTTPStatus.NOT_FOUND, "no such page; the link that `tunegate review` printed leads to it")
            return None
        return path

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > LARGEST_BODY:
            raise _Bad(f"a body of up to {LARGEST_BODY} bytes with its length is expected")
        try:
            data = json.loads(self.rfile.read(int(length)))
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            raise _Bad("the body is not JSON") from None
        if not isinstance(data, dict):
            raise _Bad("an object is expected")
        return data

    # --- answers --------------------------------------------------------------------------------------------------

    def _state(self, reviewer: str) -> dict[str, Any]:
        return state(self.server.review, self.server.review.log(), reviewer)

    def _reviewer(self) -> str:
        return reviewer_name(parse_qs(self.path.partition("?")[2]).get("reviewer", [""])[0])

    def _verdict(self, data: dict[str, Any]) -> dict[str, Any]:
        review = self.server.review
        if set(data) != {"reviewer", "item", "left", "right", "preferred", "note"}:
            raise _Bad("reviewer, item, left, right, preferred and note are expected")
        reviewer, place, note = _name(data["reviewer"]), data["item"], data["note"]
        if type(place) is not int or not 0 <= place < len(review.items):
            raise _Bad("there is no such item")
        if not isinstance(note, str) or len(note) > LONGEST_NOTE:
            raise _Bad(f"a note is a text of up to {LONGEST_NOTE} characters")
        for name, allowed in _OPEN.items():
            if data[name] not in allowed:
                raise _Bad(f"{name} is one of {', '.join(map(str, allowed))}")
        verdict = review.record(reviewer, place, data)
        return {"saved": verdict.at, "complete": verdict.complete}

    def _finish(self, data: dict[str, Any]) -> dict[str, Any]:
        if set(data) != {"reviewer"}:
            raise _Bad("reviewer is expected")
        reviewer = _name(data["reviewer"])
        self.server.review.finish(reviewer)
        self.server.on_finish(reviewer)
        return self._state(reviewer)

    # --- sending --------------------------------------------------------------------------------------------------

    def _answer(self, make: Callable[[], dict[str, Any]]) -> None:
        try:
            found = make()
        except (_Bad, InputError) as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error))
        except Refused as error:
            self._say(HTTPStatus.CONFLICT if error.late else HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except TunegateError as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._send(HTTPStatus.OK, json.dumps(found).encode("ascii"), "application/json")

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(status, json.dumps({"error": text}).encode("ascii"), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Bad(Exception):
    """A request that this page does not send."""


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise _Bad("a reviewer is a text")
    return reviewer_name(value)


def state(review: Review, log: Log, reviewer: str) -> dict[str, Any]:
    """All that the page shows ``reviewer``. Whose answer stands where is in it only after the reviewer has finished."""
    sides = review.sides(reviewer)
    items = []
    for item, (left, right) in zip(review.items, sides, strict=True):
        text = {"adapter": item.adapter, "base": item.base}
        items.append(
            {
                "prompt": [_turn(message) for message in item.prompt],
                "tools": json.dumps(item.tools, indent=2, ensure_ascii=False) if item.tools else "",
                "reference": item.reference,
                "left": text[left],
                "right": text[right],
            }
        )
    finished = reviewer in log.finished
    return {
        "task": review.task,
        "reviewer": reviewer,
        "of": review.of,
        "items": items,
        "verdicts": review.seen(reviewer, log),
        "finished": finished,
        "revealed": [left for left, _ in sides] if finished else None,
        "summary": summarize(review, log) if finished else None,
    }


def _turn(message: dict[str, Any]) -> dict[str, str]:
    """One message as the page shows it; tool calls as JSON below the text."""
    content, calls = str(message.get("content") or ""), message.get("tool_calls")
    parts = [content] if content else []
    if calls:
        parts.append(json.dumps(calls, indent=2, ensure_ascii=False))
    return {"role": str(message.get("role", "")), "text": "\n".join(parts)}
