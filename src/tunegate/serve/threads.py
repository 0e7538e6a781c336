"""Work that may never come back (a file system or a store that is gone), in threads that hold up nothing.

Each piece of work has a thread of its own, so one that hangs takes nobody's place, and the process ends without it. Who
waits may leave; the work goes on and its result is dropped. asyncio's own threads are few, and its end waits for them.
To begin a thread costs more than a look at a file: :class:`KeptThread` is for those.

It bounds neither the number of threads nor their time: callers see to it that the same work runs once (``once``), and
leave when their own time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Run = Callable[[], None]


def _begin(run: Run) -> None:
    threading.Thread(target=run, daemon=True).start()


async def in_thread(work: Callable[[], T], begin: Callable[[Run], None] = _begin) -> T:
    """What ``work`` returns or raises. ``begin``: gives what is to run to a thread."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if waiting.done():  # nobody waits any more
            return
        if error is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failed)

    begin(run)
    return await waiting


async def in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """What ``work`` returns or raises; ``asyncio.TimeoutError`` and its end if it takes longer. ``asyncio.wait_for``
    loses a cancellation that comes just as the work is done (before Python 3.12), and what loops over it never ends."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    raise asyncio.TimeoutError


class KeptThread:
    """``await kept(work)`` as :func:`in_thread`, in one thread that stays for the next work. While it is busy, or
    hangs, work gets threads of its own. All calls on one event loop."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Run | None] = SimpleQueue()
        self._busy = False
        _begin(partial(_work_off, self._given))
        weakref.finalize(self, self._given.put, None)

    async def __call__(self, work: Callable[[], T]) -> T:
        if self._busy:
            return await in_thread(work)
        self._busy = True

        def freeing() -> T:
            try:
                return work()
            finally:
                self._busy = False

        return await in_thread(freeing, self._given.put)


def _work_off(given: SimpleQueue[Run | None]) -> None:
    while (run := given.get()) is not None:
        run()
        del run  # it knows the KeptThread, which could not die
