"""An engine's tokens as pieces of answers: text, calls, log-probabilities, and why the answer ended.

A :class:`Reader` takes one answer's tokens through detokenizer, stop scanner and call reader. Log-probabilities leave
with the text that they belong to, so a token whose text is kept back is kept back with it, and tokens behind a stop
string are never seen. :func:`answers` follows all jobs of a request at once; leaving it cancels what still runs.

It knows nothing of JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from tunegate.serve.engine_client import EngineClient
from tunegate.serve.jobs import EngineGone, Job, TokenLogprob, Tokens
from tunegate.serve.openai_plan import Plan
from tunegate.serve.text import Detokenizer, StopScanner
from tunegate.serve.tools import Call, CallReader

Numbered = tuple[int, "Piece"]


@dataclass(frozen=True)
class Piece:
    """What came since the last piece. ``logprobs``: with the place, in characters, at which the token's text begins.
    ``prompt``: those of the prompt's tokens from the second on, once. ``made``: tokens of the answer so far;
    ``cached``: tokens of its prompt that were not computed; ``waited``: seconds until it was begun, None if not
    known."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    finish: str | None = None
    made: int = 0
    cached: int = 0
    waited: float | None = None
    prompt: tuple[TokenLogprob, ...] | None = None

    @property
    def empty(self) -> bool:
        return not (self.text or self.calls or self.logprobs or self.finish or self.prompt is not None)


@dataclass
class Answer:
    """The pieces of one answer together."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    prompt: tuple[TokenLogprob, ...] | None = None
    finish: str | None = None
    made: int = 0
    cached: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.calls += piece.calls
        self.logprobs += piece.logprobs
        self.prompt = piece.prompt if self.prompt is None else self.prompt
        self.finish = piece.finish or self.finish
        self.made, self.cached = piece.made, max(self.cached, piece.cached)


class Reader:
    """One answer of ``plan``."""

    def __init__(self, plan: Plan):
        calls, shown = plan.calls, dict[int, str]()
        self._calls: CallReader | None = None
        if calls is not None:
            marks = (calls.format.mark, calls.format.closing)
            shown = {i: text for i, text in plan.words.special.items() if text in marks}
            self._calls = CallReader(calls.format, calls.names, calls.forced)
        self._single = calls is not None and calls.single
        self._words = Detokenizer(plan.words, shown)
        self._scanner = StopScanner(plan.stops)
        self._entries: list[tuple[int, TokenLogprob]] = []
        self._read = self._released = self._made = self._cached = 0  # the first two in characters
        self._waited: float | None = None

    def take(self, tokens: Tokens) -> Piece:
        released, finish = "", None if tokens.finish is None else str(tokens.finish)
        self._cached = max(self._cached, tokens.cached)
        self._waited = tokens.waited if self._waited is None else self._waited
        for place, token in enumerate(tokens.ids):
            if tokens.logprobs is not None:
                self._entries.append((self._read, tokens.logprobs[place]))
            self._made += 1
            released += self._scan(self._words.push(token))
            if self._scanner.hit:
                break
        if tokens.logprobs is not None and not self._scanner.hit:
            self._entries += [(self._read, entry) for entry in tokens.logprobs[len(tokens.ids) :]]
        if finish is not None and not self._scanner.hit:
            released += self._scan(self._words.finish())
            released += self._scanner.finish()
        finish = "stop" if self._scanner.hit else finish
        self._released += len(released)
        whole = finish is not None and not self._scanner.hit
        entries = [e for e in self._entries if whole or e[0] < self._released]
        self._entries = self._entries[len(entries) :]
        text, calls = self._sort(released, finish is not None)
        if self._calls is not None and self._calls.calls and (finish == "stop" or self._single):
            finish = "tool_calls"
        counts = (self._made, self._cached, self._waited)
        return Piece(text, tuple(calls), tuple(entries), finish, *counts, prompt=tokens.prompt)

    def _scan(self, text: str) -> str:
        self._read += len(text)
        return self._scanner.push(text)

    def _sort(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """What is text and what are calls."""
        if self._calls is None:
            return text, []
        said, calls = self._calls.push(text)
        if last:
            more, others = self._calls.finish()
            said, calls = said + more, calls + others
        return said, calls[:1] if self._single else calls


async def _follow(engine: EngineClient, job: Job, reader: Reader) -> AsyncGenerator[Piece, None]:
    stream = cast(AsyncGenerator[Tokens, None], engine.generate(job))
    async with aclosing(stream):
        async for tokens in stream:
            if tokens.finish == "cancelled":
                break
            piece = reader.take(tokens)
            if not piece.empty:
                yield piece
            if piece.finish is not None:
                return
    raise EngineGone("the engine ended before the answer did", fix="send the request again")


async def answers(engine: EngineClient, plan: Plan) -> AsyncGenerator[Numbered, None]:
    """The pieces of all answers as they come, each with its choice's number."""
    followed = [_follow(engine, job, Reader(plan)) for job in plan.jobs]
    if len(followed) == 1:
        async with aclosing(followed[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    async with aclosing(_merged(followed)) as merged:
        async for numbered in merged:
            yield numbered


async def _merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Numbered, None]:
    queue: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    queue.put_nowait((number, piece))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
