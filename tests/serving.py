"""A server on 127.0.0.1 with a scripted engine behind it, for the tests of the HTTP front.

The engine is no model: it says the text that its script gives for a job, token by token, and keeps to a job's form by
the real constraint. Everything in front of it is the product's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunegate.data.render import Renderer
from tunegate.engine.constrain import AnswerForm, build_constraint
from tunegate.errors import InputError, nearest
from tunegate.serve.catalogue import AdapterNotFound, DuplicateName, Served, UnknownModel
from tunegate.serve.jobs import EngineFacts, EngineFull, EngineGone, Job, Loaded, TokenLogprob, Tokens

Script = Callable[[Job], "str | list[int]"]


@dataclass
class FakeEngine:
    """``script``: what to say. ``pause``: seconds before each token. ``batch``: ids of one message."""

    tokenizer: Any
    script: Script
    context: int = 512
    pause: float = 0.0
    batch: int = 1
    alive: bool = True
    full: bool = False
    dies_after: int | None = None
    jobs: list[Job] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(self.context, len(self.tokenizer), "fp32", "packed", 64, 16, 1, 0.1)

    async def start(self) -> EngineFacts:
        return self.facts

    async def stop(self) -> None:
        self.alive = False

    async def generate(self, job: Job) -> AsyncGenerator[Tokens, None]:
        self.jobs.append(job)
        if not self.alive:
            raise EngineGone("the engine is gone")
        if self.full:
            raise EngineFull("too many wait", got="1024")
        self.running += 1
        done = False
        try:
            ids, stopped = self._say(job)
            for start in range(0, max(len(ids), 1), self.batch):
                await asyncio.sleep(self.pause)
                if self.dies_after is not None and start >= self.dies_after:
                    raise EngineGone("the engine ended")
                part, last = ids[start : start + self.batch], start + self.batch >= len(ids)
                done = last
                yield Tokens(
                    tuple(part),
                    ("stop" if stopped else "length") if last else None,
                    None if job.logprobs is None else tuple(self._logprob(job, i) for i in part),
                    cached=4,
                    waited=0.02 if start == 0 else None,
                    prompt=self._prompt(job) if start == 0 else None,
                )
        finally:
            self.running -= 1
            self.cancelled += not done

    def _say(self, job: Job) -> tuple[list[int], bool]:
        said = self.script(job)
        ids = self.tokenizer(said, add_special_tokens=False)["input_ids"] if isinstance(said, str) else list(said)
        if job.form is not None:
            ids = self._held(job, ids)
        stop = next((n for n, i in enumerate(ids) if i in job.stop_ids), None)
        if stop is not None and stop < job.max_new_tokens:
            return ids[:stop], True
        return ids[: job.max_new_tokens], len(ids) <= job.max_new_tokens

    def _held(self, job: Job, wanted: list[int]) -> list[int]:
        """The wanted ids where the form allows them, else the first allowed one; stops as soon as it may."""
        assert job.form is not None
        kind, value, compact = job.form
        state = build_constraint(AnswerForm(kind, value, compact), self.tokenizer, job.stop_ids).start()  # type: ignore[arg-type]
        ids: list[int] = []
        for place in range(job.max_new_tokens + 1):
            allowed = state.allowed()
            if any(allowed[i] for i in job.stop_ids):
                return [*ids, job.stop_ids[0]]
            wish = wanted[place] if place < len(wanted) else -1
            token = wish if 0 <= wish < len(allowed) and allowed[wish] else int(np.argmax(allowed))
            ids.append(token)
            state.advance(token)
        return ids

    def _logprob(self, job: Job, token: int) -> TokenLogprob:
        top = tuple((other, -0.5 - n) for n, other in enumerate((token, 5, 6)[: job.logprobs or 0]))
        return TokenLogprob(token, -0.5, top)

    def _prompt(self, job: Job) -> tuple[TokenLogprob, ...] | None:
        if job.prompt_logprobs is None:
            return None
        top = tuple((other, -0.25 - n) for n, other in enumerate((7, 8)[: job.prompt_logprobs]))
        return tuple(TokenLogprob(token, -2.0, top) for token in job.tokens[1:])

    async def identify(self, folder: Path) -> str:
        return f"b3:{folder.name}"

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Loaded:
        return Loaded(key, 1, 8, 0.0, 1.0)

    async def unload(self, key: str) -> None: ...

    async def stats(self) -> dict[str, Any]:
        return {"running": self.running, "waiting": 0, "name": "fake"}


class FakeCatalogue:
    """The base and adapters, all with one renderer; ``b3:NAME`` are their keys."""

    def __init__(self, renderer: Renderer, adapters: tuple[str, ...] = ("support",)):
        self.base = "tiny"
        self._renderer = renderer
        self._served = {"tiny": Served("tiny", None, renderer, "b3:base", "base", "/bases/tiny", None, 1)}
        for name in adapters:
            self._served[name] = self._made(name, "ship", f"/adapters/{name}")

    def _made(self, name: str, standing: str, root: str) -> Served:
        return Served(name, f"b3:{name}", self._renderer, f"b3:{name}", standing, root, "tiny", 2)

    def names(self) -> list[Served]:
        return [*self._served.values()]

    async def resolve(self, name: str) -> Served:
        if name not in self._served:
            raise UnknownModel("no model of this name is served", got=name[:200], fix=nearest(name, [*self._served]))
        return self._served[name]

    async def load(self, name: str, source: str, *, replace: bool = False, pinned: bool = False) -> Served:
        if name in self._served and not replace:
            raise DuplicateName("taken", got=name)
        if source == "missing":
            raise AdapterNotFound("no adapter here", where=source)
        if source == "another-base":
            raise InputError("trained on another base", where=source)
        self._served[name] = self._made(name, "unverified", source)
        return self._served[name]

    async def unload(self, name: str) -> None:
        await self.resolve(name)
        if name == self.base:
            raise InputError("the base is not unloaded", where=name)
        del self._served[name]


@dataclass
class Serving:
    url: str
    engine: FakeEngine
    catalogue: FakeCatalogue
    app: Any

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, **options)


@contextlib.contextmanager
def serving(
    tokenizer: Any, script: Script, around: Callable[[Any], Any] = lambda app: app, *,
    front: Mapping[str, Any] | None = None, bounds: Mapping[str, Any] | None = None, **options: Any,
) -> Iterator[Serving]:  # fmt: skip
    """A server in a thread of its own; it ends with the block. ``around``: what stands before the application;
    ``front``: options of the application, ``bounds`` of its connections, ``options`` are the engine's."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from tunegate.serve.app import create_app
    from tunegate.serve.connections import Bounds
    from tunegate.serve.start import listen

    engine = FakeEngine(tokenizer, script, **options)
    catalogue = FakeCatalogue(Renderer(tokenizer))
    app = create_app(engine, catalogue, **(front or {}))  # type: ignore[arg-type]
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def run(listening: socket.socket) -> None:
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(asked.set) and None)
        await listen(around(app), listening, Bounds(**{"grace": 2.0, **(bounds or {})}), asked, ready.set)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(run(listening)), daemon=True)
        thread.start()
        assert ready.wait(20)
        try:
            yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", engine, catalogue, app)
        finally:
            stop[0]()
            thread.join(20)
