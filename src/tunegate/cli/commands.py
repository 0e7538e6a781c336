"""The commands: each takes parsed arguments and a console, calls the library and returns the exit code."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from tunegate import records
from tunegate.cli.console import Console
from tunegate.config import Config, describe_defaults, load_config
from tunegate.data.check import CheckReport, check_examples
from tunegate.data.forms import load_examples
from tunegate.errors import InputError
from tunegate.files import read_json, write_text
from tunegate.gate import SHIP
from tunegate.records import AdapterCard, Comparison, Decision, EvalRecord

COLOURS = {"ship": "green", "hold": "red", "inconclusive": "yellow", "pass": "green", "fail": "red"}


def init(arguments: argparse.Namespace, console: Console) -> int:
    path = Path(arguments.path)
    if path.exists():
        raise InputError("the file exists", where=str(path), fix="name another file, or remove it")
    write_text(path, describe_defaults(arguments.base, arguments.data, arguments.metric))
    load_config(path)
    console.text(f"wrote {escape(str(path))}\nnext: tunegate check {escape(str(path))}")
    console.result({"written": str(path)})
    return 0


# --- check -------------------------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace, console: Console) -> int:
    first = Path(arguments.inputs[0])
    if first.suffix in (".yaml", ".yml"):
        if len(arguments.inputs) > 1:
            raise InputError("check takes one task file, or data files", got=" ".join(arguments.inputs))
        return _check_task(load_config(first, arguments.overrides), arguments.show, console)
    return _check_files(arguments, console)


def _check_task(config: Config, show: int, console: Console) -> int:
    from tunegate.pipeline.prepare import check_data, choose_device, load_base, load_data

    data = load_data(config, strict=False)
    base = load_base(config, console, choose_device(config.task.train.device))
    report = check_data(data, base, config.task.data.max_tokens)
    _print_report(report, console)
    if show:
        _show_tokens(data.splits.train[:show], base.renderer, console)
    console.result(report.to_json())
    return 0 if report.ok else 2


def _check_files(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.data.tokens import check_tokens
    from tunegate.pipeline.prepare import load_base

    loaded = {source: load_examples([source], base_dir=Path.cwd(), form=arguments.form) for source in arguments.inputs}
    splits = {source: one.examples for source, one in loaded.items()}
    report = check_examples(splits, tuple(loaded.values()))
    base_name = arguments.base or ("smollm2-135m-instruct" if arguments.show else None)
    if base_name:
        base = load_base(_bare_config(base_name), console, "cpu")
        check_tokens(splits, base.renderer, 2048, report)
    _print_report(report, console)
    if arguments.show:
        _show_tokens(next(iter(splits.values()))[: arguments.show], base.renderer, console)
    console.result(report.to_json())
    return 0 if report.ok else 2


def _bare_config(base: str) -> Config:
    from tunegate.config import BaseSection, DataSection, Task, TaskSection

    task = Task(base=BaseSection(name=base), data=DataSection(train=("-",)), task=TaskSection(metric="exact_match"))
    return Config(task, Path.cwd(), {})


def _print_report(report: CheckReport, console: Console) -> None:
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for finding in report.findings:
        console.text(f"[{colours[finding.level]}]{finding.level:<8}[/] {escape(finding.message)} ({finding.count:,})")
        for example in finding.examples:
            console.text(f"[dim]         {escape(example)}[/]")
    for key, value in report.stats.items():
        console.text(f"{key:<9} {escape(_brief(value))}")
    console.text("[green]no errors[/]" if report.ok else "[red]the data has errors[/]")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items() if k != "splits")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "; ".join("/".join(str(x) for x in v.values()) for v in value)
    return str(value)


def _show_tokens(examples: list[Any], renderer: Any, console: Console) -> None:
    from tunegate.data.tokens import show_rows
    from tunegate.data.types import Rendered

    rows = [row for row in renderer.render_many(examples) if isinstance(row, Rendered)]
    for text in show_rows(rows, renderer.tokenizer):
        console.text(text)
        console.text()


# --- run, train, eval, gate --------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import run as run_pipeline

    config = load_config(arguments.task, arguments.overrides)
    outcome = run_pipeline(config, console, reopen=arguments.reopen_test, stop=console.stop)
    _print_card(outcome.card, outcome.adapter, console)
    console.text(f"adapter   {escape(str(outcome.adapter))}")
    console.text(f"next      {escape(_next_step(outcome.decision, outcome.adapter))}")
    console.result(
        {
            "run": str(outcome.folder),
            "adapter": str(outcome.adapter),
            "decision": asdict(outcome.decision),
            "evaluations": [asdict(e) for e in outcome.card.evaluations],
            "baselines": {name: record.score.value for name, record in outcome.baselines.items()},
            "training": asdict(outcome.card.run),
        }
    )
    return 0 if outcome.decision.verdict == SHIP else 1


def _next_step(decision: Decision, adapter: Path) -> str:
    if decision.verdict == SHIP:
        return f"tunegate show {adapter}; load it with PeftModel.from_pretrained(base, {str(adapter)!r})"
    open_rules = ", ".join(r.rule for r in decision.rules if r.verdict != "pass")
    return f"look at {open_rules} above; the answers are in {adapter.parent / 'test' / 'adapter.items.jsonl'}"


def train(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import train_only

    folder, record = train_only(load_config(arguments.task, arguments.overrides), console, stop=console.stop)
    console.text(
        f"best step {record.best_step} of {record.steps}, score {record.best_score:.4f}, "
        f"{record.tokens_per_second:,.0f} tokens/s\nadapter   {escape(str(folder / 'adapter'))}"
    )
    console.result({"run": str(folder), "adapter": str(folder / "adapter"), "training": asdict(record)})
    return 0


def eval(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import EvalRequest, evaluate_only

    request = EvalRequest(
        adapter=Path(arguments.adapter) if arguments.adapter else None,
        plain_base=arguments.plain_base,
        split=arguments.split,
        reopen=arguments.reopen_test,
        allow_base_mismatch=arguments.allow_base_mismatch,
    )
    folder, record = evaluate_only(load_config(arguments.task, arguments.overrides), console, request)
    _print_evaluations([record], console)
    console.text(f"items     {escape(str(folder.parent / record.items_path))}")
    console.result(asdict(record))
    return 0


def gate(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import decide_again

    folder, decision = decide_again(load_config(arguments.task, arguments.overrides), console)
    _print_decision(decision, console)
    console.result({"run": str(folder), "decision": asdict(decision)})
    return 0 if decision.verdict == SHIP else 1


# --- show --------------------------------------------------------------------------------------------------------


def show(arguments: argparse.Namespace, console: Console) -> int:
    path = Path(arguments.path)
    if path.suffix in (".yaml", ".yml"):
        return _show_task(load_config(path), console)
    for folder in (path, path / "adapter"):
        if (folder / "card.json").exists():
            card = records.load(folder / "card.json", AdapterCard)
            _print_card(card, folder, console)
            console.result(records.to_json(card))
            return 0
    raise InputError("nothing to show", where=str(path), expected="a task YAML, a run folder or an adapter folder")


def _show_task(config: Config, console: Console) -> int:
    console.table(["key", "value", "origin"], [[k, escape(json.dumps(v)), escape(o)] for k, v, o in config.items()])
    runs = sorted(config.run_dir.glob("run-*/decision.json"))
    for path in runs:
        console.text(f"{path.parent.name}: {records.load(path, Decision).verdict}")
    latest = config.run_dir / "latest.json"
    console.result(
        {
            "settings": {k: {"value": v, "origin": o} for k, v, o in config.items()},
            "runs": {p.parent.name: records.load(p, Decision).verdict for p in runs},
            "latest": read_json(latest)["run"] if latest.exists() else None,
        }
    )
    return 0


def _print_card(card: AdapterCard, folder: Path, console: Console) -> None:
    del folder
    base = card.base
    console.text(f"\n[bold]{escape(card.name)}[/]  run {card.adapter['run']}")
    console.text(f"base      {escape(base['name'])}, {base['parameters'] / 1e6:,.0f}M, {base['fingerprint']['total']}")
    console.text(
        f"training  {card.run.method}, {card.run.steps} steps, {card.run.tokens:,} tokens at "
        f"{card.run.tokens_per_second:,.0f}/s, peak memory {card.run.peak_rss_bytes / 2**30:.2f} GiB"
    )
    _print_evaluations(card.evaluations, console)
    for comparison in card.comparisons:
        console.text(f"adapter against {_comparison(comparison)}")
    _print_decision(card.decision, console)
    if len(card.test_openings) > 1:
        console.text(f"[yellow]this test set was opened {len(card.test_openings)} times, see ledger.json[/]")


def _comparison(comparison: Comparison) -> str:
    return (
        f"{comparison.reference}: {comparison.difference:+.4f} ({comparison.low:+.3f} to {comparison.high:+.3f}), "
        f"{comparison.wins} better, {comparison.losses} worse, p = {comparison.p_value:.2g}"
    )


def _print_evaluations(evaluations: list[EvalRecord], console: Console) -> None:
    metrics = list(evaluations[0].scores)
    rows = [
        [
            e.subject if e.subject != "prompt" else f"best prompt ({e.settings['prompt']})",
            *(f"{e.scores[m].value:.4f} [dim]{e.scores[m].low:.3f}-{e.scores[m].high:.3f}[/]" for m in metrics),
            f"{e.score.n}",
            f"{e.stop_rate:.1%}",
        ]
        for e in evaluations
    ]
    console.table([f"{evaluations[0].split} split", *metrics, "items", "stopped"], rows)


def _print_decision(decision: Decision, console: Console) -> None:
    colour = COLOURS.get(decision.verdict, "yellow")
    console.text(f"\ndecision  [bold {colour}]{decision.verdict}[/]")
    for rule in decision.rules:
        colour = COLOURS.get(rule.verdict, "yellow")
        console.text(f"  [{colour}]{rule.verdict:<12}[/] {rule.rule:<22} {escape(rule.got)}")
        if rule.verdict != "pass":
            console.text(f"  [dim]{'':<12} {escape(rule.reason)}[/]")
    console.text()
