"""What a person sees: lines, bars and tables through rich.

Messages go to standard error, results to standard output. Text of the user's is never read as markup or emoji.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tunegate.errors import TunegateError
from tunegate.pipeline.reporter import Advance

WIDTH = 120  # columns of a table in a file or pipe, which has no width


class Console:
    """The pipeline's reporter for a terminal; with ``json_only`` it says nothing but the final object."""

    def __init__(self, *, json_only: bool = False):
        self.json_only = json_only
        self.out = rich.console.Console(highlight=False, soft_wrap=True, emoji=False)
        self.err = rich.console.Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        if not self.out.is_terminal and "COLUMNS" not in os.environ:
            self.out.width = WIDTH
        self.training = False
        self.stopping = False

    # --- the pipeline's reporter -------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        if not self.json_only:
            self.err.print(escape(text), style="yellow" if text.startswith("warning") else None)

    def event(self, event: dict[str, Any]) -> None:
        """Events are kept in the run's log; the terminal shows lines and bars."""

    @contextlib.contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        training = label == "training"
        bar = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            disable=self.json_only or not self.err.is_terminal,
        )
        self.training = training
        try:
            with bar:
                task = bar.add_task(label, total=total, completed=done)
                yield lambda n: bar.advance(task, n)
        finally:
            self.training = False
        if not self.json_only and not self.err.is_terminal and not training:
            self.err.print(escape(f"{label}: {total:,} done"))

    # --- interruption ------------------------------------------------------------------------------------------

    def on_interrupt(self, signum: int, frame: Any) -> None:
        """Ctrl-C: training stops after its step, with a checkpoint; anything else, or a second one, at once."""
        del signum, frame
        if self.training and not self.stopping:
            self.stopping = True
            self.line("stopping after this step; Ctrl-C again stops at once")
            return
        raise KeyboardInterrupt

    def stop(self) -> bool:
        return self.stopping

    # --- results -----------------------------------------------------------------------------------------------

    def error(self, text: str) -> None:
        first, *rest = text.split("\n")
        self.err.print(f"[bold red]error[/] {escape(first)}")
        for line in rest:
            self.err.print(escape(line))

    def text(self, text: Any = "") -> None:
        if not self.json_only:
            self.out.print(text)

    def table(self, columns: list[str], rows: list[list[str]], title: str = "") -> None:
        if self.json_only:
            return
        table = Table(title=title or None, title_justify="left", box=rich.box.SIMPLE, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def result(self, value: dict[str, Any]) -> None:
        """The machine's answer; printed only with ``--json``."""
        if self.json_only:
            try:
                print(json.dumps(value, ensure_ascii=False, allow_nan=False))
            except UnicodeEncodeError:
                print(json.dumps(value))
            except ValueError as error:
                raise TunegateError(f"the result is not JSON: {error}") from error
            sys.stdout.flush()
