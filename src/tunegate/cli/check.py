"""``tunegate check``: a task, or data files alone, looked at before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape

from tunegate.cli.console import Console
from tunegate.config import BaseSection, Config, DataSection, Task, TaskSection
from tunegate.data.check import CheckReport, check_examples
from tunegate.data.forms import Loaded, load_examples
from tunegate.errors import InputError, Problem, collecting

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
TOP_LABELS = 5
BAR = 30  # characters


def check(arguments: argparse.Namespace, console: Console) -> int:
    first = Path(arguments.inputs[0])
    if first.suffix not in (".yaml", ".yml"):
        return _check_files(arguments, console)
    if len(arguments.inputs) > 1:
        raise InputError("check takes one task file, or data files", got=" ".join(arguments.inputs))
    from tunegate.pipeline.prepare import check_task
    from tunegate.pipeline.reading import load_task

    opened, report = check_task(load_task(first, arguments.overrides), console)
    return _tell(report, opened.data.splits.train, opened.base.renderer, arguments.show, console)


def _check_files(arguments: argparse.Namespace, console: Console) -> int:
    """Each file is a split of its own; tokens are looked at where a base is named or rows are to be shown."""
    from tunegate.data.tokens import check_tokens
    from tunegate.pipeline.base import load_base

    problems: list[Problem] = []
    loaded: dict[str, Loaded] = {}
    for source in arguments.inputs:
        with collecting(problems):
            loaded[source] = load_examples([source], base_dir=Path.cwd(), form=arguments.form)
    if problems:
        raise InputError(problems)
    splits = {source: one.examples for source, one in loaded.items()}
    report = check_examples(splits, tuple(loaded.values()))
    base_name = arguments.base or ("smollm2-135m-instruct" if arguments.show else None)
    renderer = load_base(_task_of(base_name), console, "cpu").renderer if base_name else None
    if renderer is not None:
        check_tokens(splits, renderer, DataSection.model_fields["max_tokens"].default, report)
    return _tell(report, next(iter(splits.values())), renderer, arguments.show, console)


def _task_of(base: str) -> Config:
    """A task that names ``base`` and nothing else of use."""
    task = Task(base=BaseSection(name=base), data=DataSection(train=("-",)), task=TaskSection(metric="exact_match"))
    return Config(task, Path.cwd(), {})


def _tell(report: CheckReport, examples: list[Any], renderer: Any, show: int, console: Console) -> int:
    for finding in report.findings:
        console.text(f"[{COLOURS[finding.level]}]{finding.level:<8}[/] {escape(finding.message)}")
        for example in finding.examples:
            for line in example.splitlines():
                console.text(f"[dim]         {escape(line)}[/]")
    for line in describe_stats(report.stats):
        console.text(escape(line))
    console.text("[green]no errors[/]" if report.ok else "[red]the data has errors[/]")
    if show:
        _show_tokens(examples[:show], renderer, console)
    console.result(report.to_json())
    return 0 if report.ok else 2


def describe_stats(stats: dict[str, Any]) -> list[str]:
    """The report's numbers as lines of text: rows, labels, lengths in tokens."""
    rows, read = stats["rows"], stats["read"]
    bad = f", {read['bad_rows']:,} of {read['rows']:,} bad" if read["bad_rows"] else ""
    lines = [f"rows     {', '.join(f'{name} {n:,}' for name, n in rows.items())} (form {read['form']}{bad})"]
    if any(stats["groups"].values()):
        lines.append(f"groups   {', '.join(f'{name} {n:,}' for name, n in stats['groups'].items())}")
    labels = stats.get("labels", {}).get("train", {})
    if labels:
        total = sum(labels.values())
        top = [f"{label} {n / total:.0%}" for label, n in list(labels.items())[:TOP_LABELS]]
        more = [f"{len(labels) - TOP_LABELS} more"] if len(labels) > TOP_LABELS else []
        lines.append(f"labels   {len(labels)}: {', '.join(top + more)}")
    tokens = stats.get("tokens")
    if tokens and tokens["rows"]:
        lines.append(
            f"tokens   median {tokens['median']:,}, 95 % up to {tokens['p95']:,}, longest {tokens['max']:,}; "
            f"{tokens['total']:,} in all, {tokens['targets']:,} of them targets"
        )
        lines += _histogram(tokens["histogram"])
    return lines


def _histogram(buckets: list[dict[str, int]]) -> list[str]:
    most = max(bucket["rows"] for bucket in buckets)
    return [
        f"         up to {bucket['upto']:>6,}  {'█' * -(-BAR * bucket['rows'] // most):<{BAR}} {bucket['rows']:,}"
        for bucket in buckets
    ]


def _show_tokens(examples: list[Any], renderer: Any, console: Console) -> None:
    from tunegate.data.tokens import show_rows
    from tunegate.data.types import Rendered

    rows = [row for row in renderer.render_many(examples) if isinstance(row, Rendered)]
    for text in show_rows(rows, renderer.tokenizer):
        console.text()
        console.text(text)
