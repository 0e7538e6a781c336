"""Errors that nobody foresaw, in the log: their kind and the places they came from, and not their messages, which may
quote a prompt. At DEBUG (``--debug``) they are logged whole.

For both processes; it imports nothing else of the package.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("tunegate.serve")
FORMAT = "%(asctime)s %(levelname)s %(message)s"
FRAMES = 8  # of each error


def begin(debug: bool) -> None:
    """Log to stderr from here on, in a process of the server; also what ends a thread, without its message."""
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    threading.excepthook = _ended


def tell(what: str, error: BaseException) -> None:
    """Log an error that nobody foresaw; with its message only where the log is at DEBUG."""
    log.error(
        "%s: %s", what, "; from ".join(_places(error)), exc_info=error if log.isEnabledFor(logging.DEBUG) else None
    )


def _ended(found: Any) -> None:
    if found.exc_value is not None and not issubclass(found.exc_type, SystemExit):
        tell("a thread ended", found.exc_value)


def _places(error: BaseException) -> Iterator[str]:
    """An error, and those it came from: ``ValueError at serve/text.py:88 in push``."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting and len(seen) < FRAMES:
        one = waiting.pop()
        if any(one is other for other in seen):
            continue
        seen.append(one)
        frames = traceback.extract_tb(one.__traceback__)[-FRAMES:]
        places = [f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} in {f.name}" for f in frames]
        yield f"{type(one).__name__} at {', '.join(places) or 'no place'}"
        waiting += [e for e in (one.__cause__ or one.__context__, *getattr(one, "exceptions", ())) if e is not None]
