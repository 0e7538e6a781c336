"""``tunegate advise``: should this task be fine-tuned at all?"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.markup import escape

from tunegate.cli.arguments import task_of, whole
from tunegate.cli.console import Console
from tunegate.config import Config, TaskKind
from tunegate.errors import InputError, Problem

if TYPE_CHECKING:
    from tunegate.evaluation.advise import Advice, Option, Trained

COLOURS = {"fine-tune": "green", "do not (safety)": "red"}


@dataclass(frozen=True)
class Prices:
    """Per million tokens of the reference model, and per hour of this machine; None: not known. Any one currency."""

    tokens_in: float | None
    tokens_out: float | None
    hour: float | None

    def of_thousand(self, option: Option) -> float | None:
        """What 1,000 requests cost; None where a price is missing. The service's tokens are its own count."""
        if option.own:
            return None if self.hour is None or option.seconds is None else 1000 * option.seconds / 3600 * self.hour
        if self.tokens_in is None or self.tokens_out is None or not option.counted:
            return None
        return (option.prompt_tokens * self.tokens_in + option.answer_tokens * self.tokens_out) / 1000


def advise(arguments: argparse.Namespace, console: Console) -> int:
    config = _config(arguments)
    from tunegate.pipeline.advise import Extras, Request
    from tunegate.pipeline.advise import advise as measure

    request = Request(arguments.shots, arguments.passages, arguments.passage_tokens, arguments.embed)
    minutes = arguments.curve_minutes if arguments.curve else 0.0
    extras = Extras(arguments.reference, arguments.reference_model, arguments.curve_steps, minutes)
    outcome = measure(config, console, request, extras, stop=console.stop)
    evidence, advice = outcome.evidence, outcome.advice
    prices = Prices(arguments.price_in, arguments.price_out, arguments.hour_price)
    console.text(f"\n[bold]{escape(config.name)}[/]  {evidence.kind.kind} task: {escape(evidence.kind.reason)}")
    if outcome.form:
        console.text(f"form      {escape(outcome.form)}")
    if outcome.skipped:
        console.text(f"documents {outcome.skipped} files that are no text were left out")
    _print_options(evidence.options, prices, console)
    if evidence.trained is not None:
        _print_curve(evidence.trained, console)
    _print_advice(advice, console)
    console.text(f"items     {escape(str(outcome.folder))}")
    from tunegate.pipeline.advise import describe

    costs = {o.name: prices.of_thousand(o) for o in evidence.options}
    console.result({**describe(evidence, advice), "cost_per_1000": costs, "folder": str(outcome.folder)})
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    """The task with the flags' settings in it."""
    problems = []
    if (arguments.reference is None) != (arguments.reference_model is None):
        problems.append(Problem("--reference and --reference-model go together", "--reference"))
    if (arguments.price_in is None) != (arguments.price_out is None):
        problems.append(Problem("--price-in and --price-out go together", "--price-in"))
    if problems:
        raise InputError(problems)
    config = task_of(arguments)
    if arguments.kind is not None:
        config = config.settle("task.kind", arguments.kind, "--kind")
    if arguments.documents is not None:
        config = config.settle("task.documents", str(Path(arguments.documents).absolute()), "--documents")
    return config


def _print_options(options: tuple[Option, ...], prices: Prices, console: Console) -> None:
    rows = []
    priced = any(prices.of_thousand(o) is not None for o in options)
    for o in options:
        gain = "" if o.gain is None else f"[dim]{o.gain.low:+.2f} to {o.gain.high:+.2f}[/]"
        cells = [
            escape(o.name),
            f"{o.score.value:.3f} [dim]{o.score.low:.2f}-{o.score.high:.2f}[/]",
            gain,
            f"{o.prompt_tokens:,.0f}k" if o.counted else "",
            f"{o.answer_tokens:,.1f}k" if o.counted else "",
            "" if o.seconds is None else f"{1000 * o.seconds:,.0f} s",
        ]
        cost = prices.of_thousand(o)
        rows.append([*cells, *(["" if cost is None else f"{cost:,.2f}"] if priced else [])])
    head = ["without training", "score", "over as_is", "in", "out", "time", *(["cost"] if priced else [])]
    what = f"{options[0].score.metric} on {options[0].score.n} items"
    console.table(head, rows, title=f"{what}; tokens, time and cost of 1,000 requests")


def _print_curve(trained: Trained, console: Console) -> None:
    curve = trained.curve
    rows = [[f"{n:,}", f"{value:.4f}", ""] for n, value in zip(curve.rows, curve.scores, strict=True)]
    full = max(curve.rows)
    for name, e in () if curve.flat else curve.predicted.items():
        rows.append([f"{int(name[:-1]) * full:,}", f"{e.value:.4f} [dim]{e.low:.3f}-{e.high:.3f}[/]", "predicted"])
    console.table(["rows", "score", ""], rows, title=f"after {trained.steps} steps")


def _print_advice(advice: Advice, console: Console) -> None:
    colour = COLOURS.get(advice.verdict, "yellow")
    console.text(f"advice    [bold {colour}]{advice.verdict}[/]")
    for title, lines in (("because", advice.reasons), ("mind", advice.warnings), ("ask", advice.questions)):
        for number, line in enumerate(lines):
            console.text(f"{title if number == 0 else '':<10}{escape(line)}")
    console.text()


def add_parser(commands: Any, task: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser = commands.add_parser(
        "advise",
        parents=[task],
        help="measure prompts, constraints and retrieval, and say whether to fine-tune",
        description="Scores the base without training on validation items: its own prompt, yours, fixed and looked-up "
        "examples, answers held to their form, passages of documents. Then recommends, with the figures.",
    )
    parser.add_argument("--documents", metavar="FOLDER", help="texts to look answers up in (task.documents)")
    parser.add_argument("--kind", choices=get_args(TaskKind), help="of task; default: a guess, shown")
    parser.add_argument(
        "--shots", type=whole(1), default=8, metavar="K", help="examples shown, fixed or looked up; default 8"
    )
    parser.add_argument("--passages", type=whole(1), default=3, metavar="N", help="in a prompt; default 3")
    parser.add_argument("--passage-tokens", type=whole(1), default=160, metavar="N", help="of a passage; default 160")
    parser.add_argument("--embed", metavar="MODEL", help="a sentence-transformers model beside BM25")
    parser.add_argument("--reference", metavar="URL", help="OpenAI-compatible API to compare with, such as .../v1")
    parser.add_argument("--reference-model", metavar="NAME", help="the model to ask for there")
    parser.add_argument(
        "--curve", action=argparse.BooleanOptionalAction, default=True,
        help="where training may pay, train a few steps on 10, 25, 50 and 100 %% of the rows; on unless --no-curve",
    )  # fmt: skip
    parser.add_argument("--curve-steps", type=whole(1), default=40, metavar="N", help="for each size; default 40")
    parser.add_argument("--curve-minutes", type=whole(1), default=10, metavar="N", help="for all sizes; default 10")
    parser.add_argument("--price-in", type=_price, metavar="P", help="of the reference, per million tokens read")
    parser.add_argument("--price-out", type=_price, metavar="P", help="of the reference, per million tokens written")
    parser.add_argument("--hour-price", type=_price, metavar="P", help="of this machine, per hour")


def _price(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price")
    return number
