"""The engine in a process of its own, started, listened to, and started again if it ends.

The front stays responsive whatever a pass costs, and outlives an engine that is killed: jobs under way get
:class:`EngineGone`, and once the next engine has its base, pinned adapters are loaded again; the others are read when a
job names them.

It gives up after several ends in a row without an answer between them; :attr:`EngineProcess.alive` stays False then.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tunegate.errors import InputError, TunegateError
from tunegate.serve.jobs import EngineFacts, EngineGone, EngineOptions, Job, Loaded, Tokens, to_json
from tunegate.serve.wire import LONGEST_LINE, error_of, line

log = logging.getLogger("tunegate.serve")

_MOST_FAILURES = 5
_PATIENCE = 10.0  # seconds that an engine has to stop


class EngineProcess:
    """An :class:`~tunegate.serve.engine_client.EngineClient`."""

    def __init__(self, options: EngineOptions):
        self.options = options
        self._facts: EngineFacts | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._jobs: dict[int, asyncio.Queue[Tokens | TunegateError]] = {}
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._folders: dict[str, tuple[Path, bool]] = {}  # adapters by key: where, and whether pinned
        self._keeper: asyncio.Task[None] | None = None
        self._failures = 0
        self._stopping = False

    @property
    def facts(self) -> EngineFacts:
        if self._facts is None:
            raise RuntimeError("the engine was not started")
        return self._facts

    @property
    def alive(self) -> bool:
        return self._writer is not None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> EngineFacts:
        reader = await self._spawn()
        self._keeper = asyncio.create_task(self._keep(reader))
        return self.facts

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tunegate.serve.engine_worker", str(theirs.fileno()),
                *(["debug"] if log.isEnabledFor(logging.DEBUG) else []),
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        writer.write(line(to_json(self.options)))
        first = await reader.readline()
        if not first:
            writer.close()
            code = await self._process.wait()
            raise TunegateError("the engine ended before it had its base", got=f"exit status {code}")
        message = json.loads(first)
        if "failed" in message:
            writer.close()
            await self._process.wait()
            raise error_of(message["failed"])
        self._facts = EngineFacts(**message["started"])
        self._writer = writer
        return reader

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Listen to the engine, and start the next one when it is gone."""
        while True:
            await self._listen(reader)
            self._lost()
            assert self._process is not None
            code = await self._process.wait()
            if self._stopping:
                return
            log.error("the engine ended with status %s; starting it again", code)
            try:
                reader = await self._again()
            except TunegateError as error:
                log.error("the engine does not start again: %s", error)
                return

    async def _again(self) -> asyncio.StreamReader:
        while True:
            self._failures += 1
            if self._failures > _MOST_FAILURES:
                raise TunegateError("the engine ended too often", got=f"{_MOST_FAILURES} times without an answer")
            await asyncio.sleep(0.1 * 2**self._failures)
            try:
                reader = await self._spawn()
            except TunegateError as error:
                log.error("%s", error)
                continue
            for key, (folder, pinned) in self._folders.items():
                if pinned:
                    self._send({"load": next(self._numbers), "key": key, "folder": str(folder), "pinned": True})
            return reader

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while text := await reader.readline():
                message = json.loads(text)
                if "tokens" in message:
                    self._failures = 0
                    if (waiting := self._jobs.get(message["tokens"])) is not None:
                        waiting.put_nowait(Tokens.from_json(message["data"]))
                elif "answer" in message:
                    if (asked := self._asked.pop(message["answer"], None)) is not None and not asked.done():
                        asked.set_result(message["data"])
                else:
                    error = error_of(message["data"])
                    if (waiting := self._jobs.get(message["error"])) is not None:
                        waiting.put_nowait(error)
                    elif (asked := self._asked.pop(message["error"], None)) is not None and not asked.done():
                        asked.set_exception(error)

    def _lost(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        for waiting in self._jobs.values():
            waiting.put_nowait(Tokens((), "cancelled") if self._stopping else _gone())
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(_gone())
        self._asked.clear()

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is None:
            raise _gone()
        self._writer.write(line(message))

    async def stop(self) -> None:
        self._stopping = True
        if self._writer is not None:
            self._send({"stop": True})
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), _PATIENCE)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._lost()

    async def generate(self, job: Job) -> AsyncIterator[Tokens]:
        number = next(self._numbers)
        folder = None
        if job.adapter is not None:
            if job.adapter not in self._folders:
                raise InputError("no adapter with this hash was loaded", got=job.adapter)
            folder = str(self._folders[job.adapter][0])
        waiting: asyncio.Queue[Tokens | TunegateError] = asyncio.Queue()
        self._send({"job": number, "data": to_json(job), "folder": folder})
        self._jobs[number] = waiting
        over = False
        try:
            while not over:
                found = await waiting.get()
                over = isinstance(found, TunegateError) or found.finish is not None
                if isinstance(found, TunegateError):
                    raise found
                yield found
        finally:
            del self._jobs[number]
            if not over and self._writer is not None:
                self._send({"cancel": number})

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Loaded:
        data = await self._ask(lambda n: {"load": n, "key": key, "folder": str(folder), "pinned": pinned})
        self._folders[key] = (folder, pinned)
        return Loaded(**data)

    async def identify(self, folder: Path) -> str:
        return str(await self._ask(lambda n: {"identify": n, "folder": str(folder)}))

    async def unload(self, key: str) -> None:
        self._folders.pop(key, None)
        if self.alive:  # one that ended holds nothing, and the next one is not told of it
            self._send({"unload": key})

    async def stats(self) -> dict[str, Any]:
        return await self._ask(lambda n: {"stats": n})

    async def _ask(self, message: Any) -> Any:
        number = next(self._numbers)
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        try:
            self._send(message(number))
            return await asked
        finally:
            self._asked.pop(number, None)


def _gone() -> EngineGone:
    return EngineGone("the engine ended and is started again", fix="send the request again")
