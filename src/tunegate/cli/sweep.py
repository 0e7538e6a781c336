"""``tunegate sweep``: rank x epochs, as a table, two charts and the lines to use."""

from __future__ import annotations

import argparse

from rich.markup import escape

from tunegate import records
from tunegate.cli.console import Console
from tunegate.config import load_config


def sweep(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.sweep import SweepRequest
    from tunegate.pipeline.sweep import sweep as run_sweep
    from tunegate.pipeline.sweep_charts import charts
    from tunegate.pipeline.sweep_report import HEADER, describe_curve, recommendation, table, yaml_lines

    config = load_config(arguments.task, arguments.overrides)
    request = SweepRequest(
        ranks=arguments.ranks, epochs=arguments.epochs, max_trials=arguments.max_trials, budget=arguments.budget,
        ray=arguments.ray,
    )  # fmt: skip
    outcome = run_sweep(config, console, request, stop=console.stop)
    record = outcome.record
    console.table(list(HEADER), [[escape(cell.replace("*", "")) for cell in row] for row in table(record)])
    for drawn in charts(record):
        console.text(escape(drawn) + "\n")
    console.text(escape(describe_curve(record)))
    console.text(f"\n{escape(recommendation(record))}\n{escape(record.reason)}")
    if not record.finished:
        console.text("[yellow]not finished: the same command goes on from there[/]")
    if record.settings:
        console.text(f"\n{escape(yaml_lines(record.settings))}")
        sets = " ".join(f"--set train.{name}={value}" for name, value in record.settings.items())
        console.text(f"\nnext      tunegate run {escape(arguments.task)} {escape(sets)}")
    console.text(f"result    {escape(str(outcome.folder / 'sweep.md'))}")
    if not outcome.drawn:
        console.line("no sweep.png: matplotlib is not installed (pip install 'tunegate[plot]')")
    console.result({"folder": str(outcome.folder), **records.to_json(record)})
    return 0
