"""A key in front of an application: ``Authorization: Bearer KEY``, or 401 in OpenAI's shape.

Only the key's hash is kept, and hashes are compared in constant time. ``/health`` is open, for whoever restarts the
server, and so are the page's own files, which hold nothing. It knows one key and no users.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = ("/", "/health")
_OPEN_BELOW = "/page/"
_REFUSAL = json.dumps(
    {"error": {
        "message": "this server wants its key: Authorization: Bearer KEY", "type": "invalid_request_error",
        "param": None, "code": "invalid_api_key",
    }}
).encode()  # fmt: skip


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyGuard:
    """The ASGI application ``app`` for those who have ``key``."""

    def __init__(self, app: App, key: str):
        self._app = app
        self._wanted = _hash(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._may(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"a {scope['type']} connection, and this server has none")
        headers = [
            (b"content-type", b"application/json"), (b"content-length", str(len(_REFUSAL)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSAL})

    def _may(self, scope: Scope) -> bool:
        path = scope["path"]
        if scope["method"] == "GET" and (path in _OPEN or path.startswith(_OPEN_BELOW)):
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        kind, _, key = given[0].partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(_hash(key.strip()), self._wanted)
