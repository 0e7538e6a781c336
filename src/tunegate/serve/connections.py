"""Connections that ask for nothing, or never end asking, bounded before HTTP is.

uvicorn reads heads of any size for any time, and takes connections until no file can be opened. So each of its
protocols stands behind a :class:`Connection`, which counts what is read of a head that is not whole, and a watch goes
over all connections every moment and closes those that were without a request for too long, or whose request took
longer than body and answer may together: a client that stops reading, for one. A connection more than there may be is
told so (503) and closed.

It counts all clients together; a proxy in front can tell one from another.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from tunegate.errors import InputError
from tunegate.serve import openai_errors as errors

SPARE_FILES = 256  # beside connections: adapters, the registry, logs
_CODES = {408: ("Request Timeout", "head_timeout"), 431: ("Request Header Fields Too Large", "head_too_large"),
          503: ("Service Unavailable", "too_many_connections")}  # fmt: skip
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Bounds:
    """``most`` connections at a time; ``head``: bytes of a request's head; ``idle``: seconds that a connection may be
    without a whole head, from its beginning or its last answer on; ``busy``: seconds of a request, whatever it does;
    ``grace``: seconds for the requests under way when the server ends."""

    most: int = 2048
    head: int = 65_536
    idle: float = 30.0
    busy: float = 1900.0
    grace: float = 30.0


class Connection:
    """An asyncio protocol around ``inner``, one of uvicorn's."""

    def __init__(self, inner: Any, all_of_them: Connections):
        self._inner, self._all = inner, all_of_them
        self._transport: Any = None
        self._cycle: Any = None  # the newest request when it was last looked at
        self._since = time.monotonic()
        self._was_busy = False
        self._unread = 0  # bytes of a head that is not whole
        self._first = True  # no byte was read

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if not self._all.add(self):
            most = self._all.bounds.most
            self._refuse(503, f"the server has {most} connections, as many as it takes", b"Retry-After: 1\r\n")
            return
        self._inner.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._all.remove(self):
            self._inner.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._first and _UPGRADE.search(data):
            self._inner = self._all.without_upgrades(self._inner)
            self._inner.connection_made(self._transport)
        self._first = False
        self._inner.data_received(data)
        self._unread = self._unread + len(data) if self._in_head() else 0
        if self._unread <= self._all.bounds.head:
            return
        if self._busy():  # an answer to an earlier one is being written
            self._transport.abort()
        else:
            self._refuse(431, f"the request's head is too large; at most {self._all.bounds.head} bytes")

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _in_head(self) -> bool:
        """Whether a head has begun and is not whole. h11 keeps such bytes to itself, and bounds them itself."""
        scope, cycle = self._inner.scope, self._inner.cycle
        return scope is not None and (cycle is None or cycle.scope is not scope)

    def _busy(self) -> bool:
        """Whether a request is being answered."""
        cycle = self._inner.cycle
        return cycle is not None and not cycle.response_complete

    def look(self, now: float) -> None:
        """Close it, if its time is up."""
        cycle, busy = self._inner.cycle, self._busy()
        if cycle is not self._cycle or busy is not self._was_busy:
            self._cycle, self._was_busy, self._since = cycle, busy, now
            return
        bounds, waited = self._all.bounds, now - self._since
        if busy and waited > bounds.busy:
            self._transport.abort()  # what is left to send is read by nobody
        elif not busy and waited > bounds.idle:
            if self._unread:
                self._refuse(408, f"the request's head did not come within {bounds.idle:g} s")
            else:
                self._transport.close()

    def _refuse(self, status: int, message: str, header: bytes = b"") -> None:
        phrase, code = _CODES[status]
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = json.dumps(errors.body(message, kind, code=code)).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._transport.write(head.encode() + header + b"Connection: close\r\n\r\n" + body)
        self._transport.close()


class Connections:
    """Makes uvicorn's protocols, and watches them; given to it as its protocol class."""

    def __init__(self, bounds: Bounds):
        self.bounds = bounds
        self._open: set[Connection] = set()
        self._given: dict[str, Any] = {}

    def __call__(self, **given: Any) -> Connection:
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        self._given = given  # the same for all
        return Connection(AutoHTTPProtocol(**given), self)

    def without_upgrades(self, inner: Any) -> Any:
        """A protocol in the place of ``inner`` that lets a client offer HTTP/2, as Java's does, and goes on with
        HTTP/1.1. llhttp would end such a request with its head, and leave its body."""
        from uvicorn.protocols.http.h11_impl import H11Protocol

        inner.connections.discard(inner)
        return H11Protocol(**self._given)

    def add(self, connection: Connection) -> bool:
        """False if there are enough."""
        if len(self._open) >= self.bounds.most:
            return False
        self._open.add(connection)
        return True

    def remove(self, connection: Connection) -> bool:
        """Whether it was one of them."""
        found = connection in self._open
        self._open.discard(connection)
        return found

    async def watch(self) -> None:
        """Look at all of them, for ever."""
        while True:
            await asyncio.sleep(min(1.0, self.bounds.idle / 4))
            now = time.monotonic()
            for connection in list(self._open):
                connection.look(now)


def open_files(most: int) -> None:
    """Let this process open as many files as ``most`` connections need; :class:`InputError` if it may not."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InputError(
            "this process may not open so many connections", where="--max-connections",
            expected=f"at most {max(0, hard - SPARE_FILES)}", got=str(most),
            fix="a higher limit of open files (ulimit -Hn)",
        )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
