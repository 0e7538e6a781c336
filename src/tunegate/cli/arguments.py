"""What several commands take: types of arguments, and the task. ``quantize.size`` reads sizes in bytes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from tunegate.config import Config
from tunegate.errors import nearest


def task_of(arguments: argparse.Namespace) -> Config:
    """The task that a command names, with its overrides; :class:`InputError` with everything wrong in the file."""
    from tunegate.pipeline.reading import load_task

    return load_task(arguments.task, arguments.overrides)


def actions_of(parser: argparse.ArgumentParser, dest: str, metavar: str) -> Any:
    """A place for the actions of ``parser``, which :func:`parse` goes by. The actions themselves have the common
    arguments as a parent, and these say that there are no further ones."""
    actions = parser.add_subparsers(dest=dest, metavar=metavar)
    parser.set_defaults(actions=actions)
    return actions


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """``words`` parsed. A missing action is answered with all of them, a misspelt option with the nearest of its
    command."""
    arguments, unknown = parser.parse_known_args(words)
    for word in words:
        if (actions := parser.get_default("actions")) and word in actions.choices:
            parser = actions.choices[word]
    if arguments.actions:
        parser.error(f"which {arguments.actions.metavar}? One of: {', '.join(arguments.actions.choices)}")
    if unknown:
        options = sorted(set(re.findall(r"--[a-z][a-z-]*", parser.format_help())))
        known = [word for word in unknown if word in options]
        near = [nearest(word.partition("=")[0], options, 1) for word in unknown if word.startswith("--")]
        fix = f"{known[0]} stands after the command" if known else "; ".join(filter(None, near))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{f' ({fix})' if fix else ''}")
    return arguments


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
