"""One exchange of a request and its answer, bounded: a body and an answer that end in time, a client that goes away,
and failures that nobody foresaw.

Whatever ends an answer early closes its pieces, and that cancels its jobs in the engine. A deadline does so whether or
not anybody waits for the next piece, so a client that stops reading holds no pages. The timer is one for each answer,
and costs a token next to nothing.

It does not bound how long a connection may stay open without a request; uvicorn does not either.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunegate.serve import openai_errors as errors
from tunegate.serve.guard import ANYONE, caller_of
from tunegate.serve.metrics import Metrics
from tunegate.serve.telling import tell

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """``body``: bytes of the largest request, ``body_seconds`` for reading it; ``answer_seconds``: from a request to
    the end of its answer."""

    body: int = 2 * 1024 * 1024
    body_seconds: float = 30.0
    answer_seconds: float = 1800.0


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. :class:`~tunegate.serve.openai_errors.BodyTooLarge`, ``BodyTooSlow``."""

    async def read() -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > limits.body:
                raise errors.BodyTooLarge("the body is too large", expected=f"up to {limits.body} bytes")
        return bytes(data)

    try:
        return await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise errors.BodyTooSlow("the body did not come in time", expected=f"{limits.body_seconds:g} s") from None


class ClientGone(Exception):
    """Nobody reads the answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """``work``, cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def until(deadline: float, seconds: float, pieces: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """``pieces``, closed at ``deadline`` (of ``time.monotonic``) and then
    :class:`~tunegate.serve.openai_errors.AnswerTooLong`, which names the limit in ``seconds``."""
    inside: asyncio.Task[Any] | None = None
    closing: asyncio.Task[None] | None = None
    late = False

    def expire() -> None:
        nonlocal late, closing
        late = True
        if inside is not None:
            inside.cancel()
        else:  # it waits to be asked for the next one
            closing = asyncio.ensure_future(pieces.aclose())

    timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), expire)
    try:
        while not late:
            inside = asyncio.current_task()
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if not late:
                    raise
                if sys.version_info >= (3, 11) and inside is not None:
                    inside.uncancel()
                break
            finally:
                inside = None
            yield piece
        raise errors.too_long(seconds)
    finally:
        timer.cancel()
        await (closing or pieces.aclose())


class Exchanges:
    """``app``, its answers counted by route, status and key, and a 500 in OpenAI's shape for what it did not catch.
    Plain ASGI, so that it stands between no client and its disconnection."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route, caller = scope.get("route"), caller_of(scope)
                path = getattr(route, "path_format", None) or getattr(route, "path", None) or "other"
                self._metrics.requests.labels(path, message["status"]).inc()
                if caller is not ANYONE:
                    self._metrics.key_requests.labels(caller.key.name, message["status"]).inc()
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception as error:  # further out it would be logged with its message
            if begun:
                tell("an answer broke off", error)
                return  # the connection is closed, since the answer is not whole
            await errors.response(error)(scope, receive, counted)
