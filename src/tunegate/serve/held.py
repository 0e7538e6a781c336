"""Which adapters the engine holds: loaded once for all who wait, forgotten when nobody names them any more.

Whoever may send a job with a key holds an object that :meth:`Held.count` was told of. When the last such object of a
key is gone, the engine forgets the key; answers under way there are finished first. A key that is wanted again
meanwhile stays. The engine's own cache decides which weights are in memory: it reads others again from their folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections import Counter
from pathlib import Path
from typing import Protocol

from tunegate.errors import TunegateError
from tunegate.serve.engine_client import EngineClient
from tunegate.serve.jobs import MERGED
from tunegate.serve.once import Locks, Once

log = logging.getLogger("tunegate.serve")


class Keyed(Protocol):
    @property
    def key(self) -> str | None: ...


class Held:
    """All calls on one event loop."""

    def __init__(self, engine: EngineClient):
        self._engine = engine
        self._users: Counter[str] = Counter()  # objects alive, by key
        self._there: dict[str, tuple[Path, bool]] = {}  # folder and pinned, as the engine was told
        self._pinned: set[str] = set()
        self._forgetting: set[asyncio.Task[None]] = set()
        self._once = Once()
        self._locks = Locks()

    def count(self, user: Keyed) -> None:
        """``user.key`` is wanted as long as ``user`` lives."""
        assert user.key is not None
        self._users[user.key] += 1
        weakref.finalize(user, self._from_anywhere, asyncio.get_running_loop(), user.key).atexit = False

    def has(self, key: str | None) -> bool:
        return key in self._there

    async def put(self, key: str, folder: Path, pinned: bool) -> None:
        """Have the engine hold ``key``. Asked each time a request begins, so a key that it was told of costs nothing;
        one that starts again knows its keys."""
        if pinned:
            self._pinned.add(key)
        pinned = key in self._pinned  # by another name, perhaps
        if self._there.get(key) != (folder, pinned):
            await self._once((key, folder, pinned), lambda: self._put(key, folder, pinned))

    async def _put(self, key: str, folder: Path, pinned: bool) -> None:
        async with self._locks[key]:
            found = await self._engine.load(key, folder, pinned=pinned)
            self._there[key] = (folder, pinned)
            if key.endswith(MERGED):
                log.info("%s runs on merged weights: %.0f MB beside the base's", key[:15], found.bytes / 1e6)

    def _from_anywhere(self, loop: asyncio.AbstractEventLoop, key: str) -> None:
        """An object may die in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the engine with it
            loop.call_soon_threadsafe(self._gone, key)

    def _gone(self, key: str) -> None:
        self._users[key] -= 1
        if self._users[key] <= 0:
            del self._users[key]
            task = asyncio.ensure_future(self._forget(key))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

    async def _forget(self, key: str) -> None:
        async with self._locks[key]:
            if key in self._users:  # named again meanwhile
                return
            self._pinned.discard(key)
            if self._there.pop(key, None) is None:
                return
            try:
                await self._engine.unload(key)
            except TunegateError as error:
                log.warning("%s: the engine did not forget it: %s", key[:15], error)
