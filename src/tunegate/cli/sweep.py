"""``tunegate sweep``: rank x epochs, as a table, two charts and the lines to use."""

from __future__ import annotations

import argparse
import shlex

from rich.markup import escape

from tunegate import records
from tunegate.cli.arguments import task_of
from tunegate.cli.console import Console
from tunegate.records import SweepRecord


def sweep(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.sweep import SweepRequest
    from tunegate.pipeline.sweep import sweep as run_sweep
    from tunegate.pipeline.sweep_charts import charts
    from tunegate.pipeline.sweep_report import describe_curve, recommendation, yaml_lines

    config = task_of(arguments)
    request = SweepRequest(
        ranks=arguments.ranks, epochs=arguments.epochs, max_trials=arguments.max_trials, budget=arguments.budget,
        ray=arguments.ray,
    )  # fmt: skip
    outcome = run_sweep(config, console, request, stop=console.stop)
    record = outcome.record
    _print_points(record, console)
    for drawn in charts(record):
        console.text(escape(drawn) + "\n")
    console.text(escape(describe_curve(record)))
    console.text(f"\n{escape(recommendation(record))}\n{escape(record.reason)}")
    if not record.finished:
        console.text("[yellow]not finished: the same command goes on from there[/]")
    if record.settings:
        console.text(f"\n{escape(yaml_lines(record.settings))}")
        chosen = [f"train.{name}={value}" for name, value in record.settings.items()]
        sets = [part for one in [*arguments.overrides, *chosen] for part in ("--set", one)]
        console.text(f"\nnext      {escape(shlex.join(['tunegate', 'run', arguments.task, *sets]))}")
    console.text(f"result    {escape(str(outcome.folder / 'sweep.md'))}")
    if not outcome.drawn:
        console.line("no sweep.png: matplotlib is not installed (pip install 'tunegate[plot]')")
    console.result({"folder": str(outcome.folder), **records.to_json(record)})
    return 0


def _print_points(record: SweepRecord, console: Console) -> None:
    """A line a point, narrow enough for a terminal; sweep.md has every interval."""
    from tunegate.pipeline.reporter import count, p_value
    from tunegate.pipeline.sweep_report import notes

    rows = []
    for trial in record.trials:
        if not trial.points:
            rows.append([str(trial.rank), *[""] * 7, trial.status])
        for point in trial.points:
            found, kept, moved = point.score, point.step == trial.kept, point.forgetting
            gain, ratio = (trial.gain, trial.regression) if kept else (None, None)
            rows.append([
                str(trial.rank), f"{point.epoch:g}", count(point.parameters), str(point.step),
                f"{found.value:.3f} [dim]{found.low:.2f}-{found.high:.2f}[/]",
                "" if gain is None else f"{gain.difference:+.3f} {p_value(gain.p_value)}",
                "" if moved is None else f"{moved['kl']:.3g}",
                "" if ratio is None or ratio.value is None else f"{ratio.value:.3f}",
                ", ".join(notes(record, trial, point)).replace("recommended", "[bold]*[/]"),
            ])  # fmt: skip
    columns = ["rank", "epoch", "trained", "steps", record.metric, "gain", "KL", "of base", ""]
    used = [n for n, name in enumerate(columns) if name != "of base" or any(row[n] for row in rows)]
    console.table([columns[n] for n in used], [[row[n] for n in used] for row in rows])
