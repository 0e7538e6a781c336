"""``tunegate review``: a person looks at some answers, blind, in a browser."""

from __future__ import annotations

import argparse
import getpass
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.arguments import whole
from tunegate.cli.console import Console
from tunegate.errors import InputError
from tunegate.files import write_jsonl

if TYPE_CHECKING:
    from tunegate.report.review import Review


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    review = commands.add_parser(
        "review",
        parents=[common],
        help="look at answers of base and adapter, blind, in a browser",
        description="Shows 24 test items with both answers in random order on a page of this machine, and keeps every "
        "verdict as it is given. What comes out feeds the gate (review.accept, review.preferred). docs/review.md",
    )
    review.add_argument("path", metavar="TASK|RUN", help="the task's YAML file, or a run folder")
    review.add_argument("--items", type=whole(1, 1000), metavar="N", help="test items to look at (default: 24)")
    review.add_argument("--seed", type=whole(0, 2**31), metavar="N", help="of the choice (default: 0)")
    review.add_argument("--reviewer", metavar="NAME", help="who looks (default: the name of this user)")
    review.add_argument("--port", type=whole(0, 65535), default=0, metavar="N", help="default: any that is free")
    review.add_argument("--no-browser", action="store_true", help="print the link, open nothing")
    review.add_argument("--export", metavar="FILE", help="write the verdicts so far as JSONL, and show no page")


def review(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.review import open_review
    from tunegate.report.review import LABELS

    opened = open_review(Path(arguments.path), arguments.items, arguments.seed)
    console.text(
        f"run       {escape(str(opened.run))}\nitems     {len(opened.items)} of {opened.of} test items, "
        f"seed {opened.seed}"
    )
    if arguments.export is None:
        _serve(opened, arguments, console)
    labels = opened.export()
    file = opened.folder / LABELS
    if arguments.export is not None:
        file = Path(arguments.export)
        write_jsonl(file, labels)
    _tell(opened, len(labels), file, arguments.path, console)
    return 0


def _serve(opened: Review, arguments: argparse.Namespace, console: Console) -> None:
    """The page until Ctrl-C."""
    from tunegate.report.review import reviewer_name
    from tunegate.report.server import ReviewServer

    reviewer = reviewer_name(arguments.reviewer or _user())

    def on_finish(name: str) -> None:
        console.line(f"{name} has finished; Ctrl-C ends the page")

    with ReviewServer(opened, arguments.port, on_finish) as server:
        url = server.url(reviewer)
        console.err.print(f"page      {escape(url)}\nCtrl-C ends it; every verdict is saved as it is given")
        if not arguments.no_browser:
            webbrowser.open(url)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            console.line("")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        raise InputError("this user has no name", where="--reviewer", fix="name who looks: --reviewer NAME") from None


def _tell(opened: Review, labels: int, file: Path, path: str, console: Console) -> None:
    """Who has judged how much, and, once somebody has finished, what it comes to."""
    from tunegate.report.summary import describe, summarize

    log, total = opened.log(), len(opened.items)
    done = {name: sum(v.complete for v in log.of(name).values()) for name in log.verdicts}
    for name, n in done.items():
        state = "finished" if name in log.finished else "not finished: the same command goes on"
        console.text(f"reviewer  {escape(name)}: {n} of {total} judged, {state}")
    summary = summarize(opened, log)
    for line in describe(summary) if summary is not None else ():
        console.text(escape(line))
    console.text(f"labels    {labels} in {escape(str(file))}")
    if summary is not None:
        task = path if path.endswith((".yaml", ".yml")) else "TASK"
        console.text(f"next      tunegate gate {escape(task)}")
    reviewers = {name: {"judged": n, "finished": name in log.finished} for name, n in done.items()}
    console.result(
        {"run": str(opened.run), "items": total, "of": opened.of, "reviewers": reviewers, "labels": str(file),
         "summary": summary}
    )  # fmt: skip
