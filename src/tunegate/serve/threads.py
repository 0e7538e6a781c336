"""Work that may never come back (a file system or a store that is gone), in threads that hold up nothing.

Each piece of work has a thread of its own, so one that hangs takes nobody's place, and the process ends without it. Who
waits may leave; the work goes on and its result is dropped. asyncio's own threads are few, and its end waits for them.

It bounds neither the number of threads nor their time: callers see to it that the same work runs once (``once``), and
leave when their own time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """What ``work`` returns or raises."""
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

    threading.Thread(target=run, daemon=True).start()
    return await waiting
