"""Requests to an OpenAI-compatible server on this machine, counted and timed, with as little work as can be done here.

The client shares the machine with the server it measures, so it is a few reads on a plain socket: no HTTP library, no
JSON before an answer is complete. Every load is bounded: so many requests, so many at a time, each with a time limit.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
TIMEOUT = 600.0


@dataclass(frozen=True)
class Answer:
    """``first``: seconds to the first token of a stream; ``times`` of the reads that brought tokens, and ``began``, by
    time.perf_counter. ``text`` is what was answered, or the error."""

    status: int
    seconds: float
    tokens: int
    text: str
    began: float = 0.0
    first: float | None = None
    times: tuple[float, ...] = ()

    @property
    def gap(self) -> float | None:
        """The longest time between two reads that brought tokens."""
        return self.gap_within(0.0, math.inf)

    def gap_within(self, begin: float, end: float) -> float | None:
        """:attr:`gap` of reads of which the later one came after ``begin``, and the earlier one before ``end``."""
        return max((b - a for a, b in itertools.pairwise(self.times) if b > begin and a < end), default=None)


async def ask(port: int, body: dict[str, Any], path: str = "/v1/chat/completions", key: str = "") -> Answer:
    """One request. A stream's reads are timed as they come."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\n\r\n" if key else "\r\n"
    began = time.perf_counter()
    times: list[float] = []
    parts: list[bytes] = []

    async def exchange() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(head.encode() + data)
            await writer.drain()
            while part := await reader.read(1 << 16):
                parts.append(part)
                if b"data:" in part:
                    times.append(time.perf_counter())
        finally:
            writer.close()

    await asyncio.wait_for(exchange(), TIMEOUT)
    return _answer(b"".join(parts), bool(body.get("stream")), began, time.perf_counter() - began, times)


def _answer(raw: bytes, streamed: bool, began: float, seconds: float, times: Sequence[float]) -> Answer:
    head, _, content = raw.partition(b"\r\n\r\n")
    status = int(head.split(None, 2)[1]) if head.startswith(b"HTTP/") else 0
    if b"transfer-encoding: chunked" in head.lower():
        content = unchunked(content)
    if status != 200:
        return Answer(status, seconds, 0, content.decode("utf-8", errors="replace")[:300], began)
    if not streamed:
        found = json.loads(content) if content.startswith(b"{") else {}
        return Answer(status, seconds, _tokens(found), _text(found) or content.decode()[:300], began)
    events = [
        json.loads(line[5:]) for line in content.split(b"\n") if line.startswith(b"data:") and b"[DONE]" not in line
    ]
    tokens = max((_tokens(event) for event in events), default=0)
    first = times[0] - began if times else None
    return Answer(status, seconds, tokens, "".join(map(_text, events)), began, first, tuple(times))


def unchunked(content: bytes) -> bytes:
    """A body in HTTP's chunked coding as it was before."""
    parts = []
    while content:
        size, _, rest = content.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        if length == 0:
            break
        parts.append(rest[:length])
        content = rest[length + 2 :]
    return b"".join(parts)


def _tokens(found: dict[str, Any]) -> int:
    return int((found.get("usage") or {}).get("completion_tokens") or 0)


def _text(found: dict[str, Any]) -> str:
    text = ""
    for choice in found.get("choices") or ():
        said = choice.get("delta") or choice.get("message") or choice
        text += said.get("content") or said.get("text") or ""
    return text


async def together(
    port: int, bodies: Sequence[dict[str, Any]], concurrency: int, path: str = "/v1/chat/completions", key: str = ""
) -> list[Answer]:
    """All of ``bodies``, ``concurrency`` at a time; the next one begins when one ends."""
    waiting = iter(list(enumerate(bodies)))
    found: list[Answer | None] = [None] * len(bodies)

    async def work() -> None:
        for number, body in waiting:
            found[number] = await ask(port, body, path, key)

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(bodies)))))
    return [answer for answer in found if answer is not None]


async def healthy(port: int, path: str = "/health") -> bool:
    """Whether a GET is answered with 200."""
    try:
        return b" 200 " in (await asyncio.wait_for(get(port, path), 5)).partition(b"\r\n")[0]
    except (OSError, asyncio.TimeoutError):
        return False


async def get(port: int, path: str, key: str = "") -> bytes:
    """A GET's whole answer, head and body."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        allowed = f"Authorization: Bearer {key}\r\n" if key else ""
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n{allowed}Connection: close\r\n\r\n".encode())
        return await reader.read()
    finally:
        writer.close()
