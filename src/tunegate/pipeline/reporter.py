"""How the pipeline speaks to whoever runs it: lines, JSON-able events and progress, never ``print``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

Advance = Callable[[int], None]


class Reporter(Protocol):
    def line(self, text: str) -> None:
        """One line for a person."""

    def event(self, event: dict[str, Any]) -> None:
        """Something that happened, for a program: ``{"event": name, ...}``."""

    def progress(self, label: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """A bar; the function it yields is told how many more are done."""


def count(n: int) -> str:
    """``134.5M`` for 134,515,008: a number of parameters as people say it."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= unit:
            return f"{n / unit:.1f}{name}"
    return str(n)


def p_value(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


class Silent:
    """Says nothing."""

    def line(self, text: str) -> None:
        del text

    def event(self, event: dict[str, Any]) -> None:
        del event

    @contextlib.contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        del label, total, done
        yield lambda n: None
