"""One shape for every problem a user can meet.

A :class:`Problem` says what is wrong, where, what was expected, what was found and the way out. An error
carries all the problems of one input, so a user mends a file once instead of once per mistake. The exit
code belongs to the class: 2 for wrong use or bad input, 1 for work that failed or was held by a gate.

It does not print: the command line does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN_AT_MOST = 20
LINES_AT_MOST = 24  # with the lines before it, an error fits on one screen
LONGEST_VALUE = 500  # characters


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. Empty fields are left out of the text."""

    what: str
    where: str = ""
    expected: str = ""
    got: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [
            f"    {name}: {_one_line(value)}"
            for name, value in (("expected", self.expected), ("got", self.got), ("fix", self.fix))
            if value
        ]
        return "\n".join(lines)


class TunegateError(Exception):
    """Work that failed. ``problems`` holds everything found wrong, in order."""

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem] | str, **fields: str):
        if isinstance(problems, str):
            problems = Problem(problems, **fields)
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        shown: list[str] = []
        for problem in self.problems[:SHOWN_AT_MOST]:
            text = str(problem)
            if shown and sum(s.count("\n") + 1 for s in [*shown, text]) > LINES_AT_MOST:
                break
            shown.append(text)
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more of {len(self.problems)}")
        return "\n".join(shown)


_SECRETS = re.compile(
    r"(://[^:/@\s]*):[^@\s]*@|([?&;][\w.-]*(?:password|passwd|secret|token|api_?key)[\w.-]*=)[^&;#\s'\"]*",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """``text`` with passwords of URLs in it as ``***``, before ``@`` or as a parameter: what may be shown and kept."""
    return _SECRETS.sub(lambda m: f"{m[1]}:***@" if m[1] else f"{m[2]}***", text)


def _one_line(value: str) -> str:
    text = " ".join(value.splitlines())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


class InputError(TunegateError):
    """The user's input or use is wrong: exit code 2."""

    exit_code = 2


@contextlib.contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of an :class:`InputError` raised inside to ``problems``, and go on after the block."""
    try:
        yield
    except InputError as error:
        problems += error.problems


def nearest(name: str, known: Sequence[str], n: int = 3, folder: Path | None = None) -> str:
    """``did you mean 'a' or 'b'?`` for the names in ``known`` nearest to ``name``; empty if none is near. ``folder``:
    where they are, and said to be."""
    import difflib

    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    shown = [repr(c if folder is None else str(folder / c)) for c in close]
    return f"did you mean {' or '.join(shown)}?" if close else ""
