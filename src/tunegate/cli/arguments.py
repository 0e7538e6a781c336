"""What several commands take: types of arguments, and the task. ``quantize.size`` reads sizes in bytes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tunegate.config import Config


def task_of(arguments: argparse.Namespace) -> Config:
    """The task that a command names, with its overrides; :class:`InputError` with everything wrong in the file."""
    from tunegate.pipeline.reading import load_task

    return load_task(arguments.task, arguments.overrides)


def actions_of(parser: argparse.ArgumentParser, dest: str, metavar: str) -> Any:
    """A place for the actions of ``parser``. Where none is typed, the error names them all: ``main`` calls ``unnamed``,
    which the actions themselves, having the common arguments as a parent, set to None."""
    actions = parser.add_subparsers(dest=dest, metavar=metavar)
    parser.set_defaults(unnamed=lambda: parser.error(f"which {metavar}? One of: {', '.join(actions.choices)}"))
    return actions


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from ``low`` to ``high``, for the parser; None: any that are large enough."""
    expected = f"of {low} or more" if high is None else f"from {low} to {high:,}"

    def read(text: str) -> int:
        try:
            found = int(text) if text.isdecimal() else -1
        except ValueError:  # thousands of digits
            found = -1
        if found < max(0, low) or (high is not None and found > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {expected}")
        return found

    return read
