"""Keys in front of an application: ``Authorization: Bearer KEY``, or 401; 429 for a key that asks more than it may.

A key is hashed, and its hash compared with every known one in constant time. Limits are token buckets that hold a
minute's worth and fill evenly. A request costs one when it comes. Tokens are counted as they are read and made, so a
key is let in while anything is left, may owe what its answers then take, and waits until that is paid back. The file is
looked at once a second at most, when a request comes, and read again if it changed; one that cannot be read leaves the
keys as they are. Answers under way are finished by whoever began them.

``/health`` is open, for whoever restarts the server, and so are the page's own files, which hold nothing. Which models
a key may use is the application's to ask (:func:`caller_of`), as is what only an administrator may. Buckets are this
process's own: several servers count apart, and a restart fills them.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunegate.errors import InputError
from tunegate.serve import openai_errors as errors
from tunegate.serve.keys import Key, hash_of, read_keys

log = logging.getLogger("tunegate.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Stamp = tuple[int, int, int]

_OWN_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":[0-9]*\Z")
_OPEN = ("/", "/health")
_OPEN_BELOW = "/page/"
_LOOK = 1.0  # seconds between looks at the file
_CALLER = "tunegate.caller"


class Bucket:
    """What is left of ``per_minute``; below 0 what is owed. Times in seconds of one clock."""

    def __init__(self) -> None:
        self._left, self._at = math.inf, 0.0

    def left(self, per_minute: int, now: float) -> float:
        self._left = min(float(per_minute), self._left + (now - self._at) * per_minute / 60)
        self._at = now
        return self._left

    def wait(self, per_minute: int, now: float) -> float:
        """Seconds until one is left."""
        return max(0.0, (1.0 - self.left(per_minute, now)) * 60 / per_minute)

    def spend(self, per_minute: int, amount: int, now: float) -> None:
        self._left = self.left(per_minute, now) - amount


@dataclass
class Caller:
    """A key and what is left to it."""

    key: Key
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)

    def ask(self, now: float) -> tuple[float, str]:
        """Count a request. If the key must wait: the seconds, and which limit says so; else 0."""
        key, waits = self.key, [(0.0, "")]
        if key.requests_per_minute is not None:
            seconds = self.requests.wait(key.requests_per_minute, now)
            waits.append((seconds, f"{key.requests_per_minute} requests a minute"))
        if key.tokens_per_minute is not None:
            waits.append((self.tokens.wait(key.tokens_per_minute, now), f"{key.tokens_per_minute} tokens a minute"))
        longest = max(waits)
        if longest[0] > 0:
            return longest
        if key.requests_per_minute is not None:
            self.requests.spend(key.requests_per_minute, 1, now)
        return 0.0, ""

    def use(self, tokens: int) -> None:
        if self.key.tokens_per_minute is not None:
            self.tokens.spend(self.key.tokens_per_minute, tokens, time.monotonic())


ANYONE = Caller(Key("", "", admin=True))  # where no key is asked for


def caller_of(scope: Scope) -> Caller:
    """Who sent a request."""
    found = scope.get(_CALLER, ANYONE)
    assert isinstance(found, Caller)
    return found


class Keys:
    """``own``: (name, key) that may do everything; ``file``: the others, as it is now. :class:`InputError` if it cannot
    be read at the start."""

    def __init__(self, own: tuple[str, str] | None = None, file: Path | None = None):
        first = [] if own is None else [Key(own[0], hash_of(own[1].encode()), admin=True)]
        self._own = [Caller(key) for key in first]
        self._file, self._seen, self._looked = file, _stamp(file), time.monotonic()
        self._listed = [] if file is None else [Caller(key) for key in read_keys(file)]

    def find(self, secret: bytes) -> Caller | None:
        """Whose key ``secret`` is. The time that takes says nothing of any key."""
        self._follow(time.monotonic())
        digest = hash_of(secret)
        found = [caller for caller in (*self._own, *self._listed) if hmac.compare_digest(caller.key.hash, digest)]
        return found[0] if found else None

    def _follow(self, now: float) -> None:
        if self._file is None or now - self._looked < _LOOK:
            return
        self._looked, before, self._seen = now, self._seen, _stamp(self._file)
        if self._seen == before:
            return
        try:
            keys = read_keys(self._file)
        except InputError as error:
            log.error("the keys stay as they were: %s", error)
            return
        known = {caller.key.hash: caller for caller in self._listed}
        self._listed = [
            Caller(key, known[key.hash].requests, known[key.hash].tokens) if key.hash in known else Caller(key)
            for key in keys
        ]
        log.info("%s was read again: %d keys", self._file, len(keys))


def _stamp(file: Path | None) -> Stamp | None:
    try:
        found = None if file is None else file.stat()
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


class KeyGuard:
    """The ASGI application ``app`` for those who have one of ``keys``."""

    def __init__(self, app: App, keys: Keys):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_open(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"a {scope['type']} connection, and this server has none")
        caller = self._caller(scope)
        if caller is None:
            message, header = "this server wants its key: Authorization: Bearer KEY", (b"www-authenticate", b"Bearer")
            await _refuse(send, 401, message, "invalid_request_error", "invalid_api_key", header)
            return
        scope[_CALLER] = caller
        seconds, limit = caller.ask(time.monotonic()) if scope["method"] == "POST" else (0.0, "")
        if seconds > 0:
            header = (b"retry-after", str(math.ceil(seconds)).encode())
            message = f"this key has {limit}; wait {math.ceil(seconds)} s"
            await _refuse(send, 429, message, "rate_limit_error", "rate_limit_exceeded", header)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return None
        kind, _, secret = given[0].partition(b" ")
        return self._keys.find(secret.strip()) if kind.lower() == b"bearer" else None


class HostGuard:
    """The ASGI application ``app`` for requests to one of ``hosts``, or to a name of this machine's own. A page of
    another site, whose name was made to mean this machine (DNS rebinding), is sent by browsers under its own name."""

    def __init__(self, app: App, hosts: Sequence[str]):
        self._app, self._hosts = app, frozenset(host.lower() for host in (*_OWN_HOSTS, *hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = next((value for name, value in scope.get("headers", ()) if name == b"host"), b"")
        host = _PORT.sub("", asked.decode("latin-1").strip().lower())
        if host in self._hosts or not host or host.endswith(".localhost"):
            await self._app(scope, receive, send)
            return
        message = f"this server is asked as {host[:200]!r}; without keys it answers to this machine's names, and to "
        message += "those of --allow-host"
        await _refuse(send, 403, message, "invalid_request_error", "host_not_allowed")


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] == "GET" and (path in _OPEN or path.startswith(_OPEN_BELOW))


async def _refuse(send: Send, status: int, message: str, kind: str, code: str, *more: tuple[bytes, bytes]) -> None:
    body = json.dumps(errors.body(message, kind, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
