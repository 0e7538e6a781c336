"""A server as a child process: started, waited for, watched, started again, ended with everything it began.

The child leads a process group of its own, so that what it forks ends with it; on Linux it also ends when its parent
does, however that ends (``leash``). Its output goes to a log file. It counts
as up once ``ready`` says so; until then an exit or the end of ``patience`` is a :class:`TunegateError` with the log's
last lines. A child that ends later is started again after a pause that doubles up to a minute and is short again once
one has run for a while.

It knows nothing of what the child serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunegate.errors import TunegateError

LAST_LINES, TAIL_BYTES = 12, 16_384
POLL = 0.25  # seconds between two questions whether it is up


@dataclass(frozen=True)
class Pace:
    """Seconds: ``patience`` for a start, ``grace`` between the polite and the hard end, ``first`` and ``longest`` pause
    before another start, ``steady`` after which a run counts as a good one."""

    patience: float = 600.0
    grace: float = 20.0
    first: float = 1.0
    longest: float = 60.0
    steady: float = 120.0


USUAL = Pace()


class Child:
    """All calls on one event loop. ``starts`` counts its processes."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        ready: Callable[[], Awaitable[bool]],
        pace: Pace = USUAL,
    ):
        self._command, self._environment = list(command), dict(environment)
        self._log, self._ready, self._pace = log, ready, pace
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._up = False
        self.starts = 0
        self.last_error = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def up(self) -> bool:
        """Whether it answers. Not from the moment on at which its end is known, before anybody has seen to it."""
        return self._up and self.pid is not None

    async def start(self) -> None:
        """Start it and wait until it is up; from then on it is watched."""
        await self._begin()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End it for good."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        await self._end()

    async def _begin(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self._log.open("ab") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *_leashed(self._command), env={**os.environ, **self._environment}, stdin=asyncio.subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise TunegateError("cannot start", where=self._command[0], got=str(error)) from error
        self.starts += 1
        try:
            while not await self._ready():
                if self._process.returncode is not None:
                    raise self._error(f"ended with exit code {self._process.returncode} before it was up")
                if time.monotonic() - began > self._pace.patience:
                    raise self._error(f"was not up after {self._pace.patience:.0f} s")
                await asyncio.sleep(POLL)
        except BaseException:
            await self._end()
            raise
        self._up = True

    async def _watch(self) -> None:
        pause = self._pace.first
        while True:
            began = time.monotonic()
            if self.pid is not None:
                assert self._process is not None
                await self._process.wait()
            await self._end()  # what it forked
            if time.monotonic() - began >= self._pace.steady:
                pause = self._pace.first
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._pace.longest)
            try:
                await self._begin()
            except TunegateError as error:
                self.last_error = str(error)

    async def _end(self) -> None:
        """The whole group: SIGTERM, then SIGKILL for whatever is left after the grace."""
        self._up = False
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + self._pace.grace
        _signal(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline and _runs(process.pid):
            if process.returncode is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), POLL)
            else:
                await asyncio.sleep(POLL)
        _signal(process.pid, signal.SIGKILL)
        await process.wait()
        self._process = None

    def _error(self, what: str) -> TunegateError:
        return TunegateError(f"{self._command[0]} {what}", where=str(self._log), got=tail(self._log))


def tail(log: Path, lines: int = LAST_LINES) -> str:
    """The last lines of a log that hold anything."""
    with contextlib.suppress(OSError), log.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES))
        text = handle.read().decode("utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
    return ""


def _leashed(command: Sequence[str]) -> list[str]:
    """The command behind one that ties it to this process."""
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", str(Path(__file__).with_name("leash.py")), str(os.getpid()), *command]


def group_processes(group: int) -> Iterator[tuple[str, int]]:
    """(state, resident bytes) of each process of a group, as Linux's /proc has them; nothing elsewhere."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield fields[0], int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _runs(group: int) -> bool:
    """Whether anything of the group still runs; what only waits to be reaped does not."""
    if not sys.platform.startswith("linux"):
        return _signal(group, 0)
    return any(state not in "ZX" for state, _ in group_processes(group))


def _signal(group: int, number: int) -> bool:
    """Whether any process of the group was there to be signalled."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
