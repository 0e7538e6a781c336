"""The commands: each takes parsed arguments and a console, calls the library and returns the exit code."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from tunegate import records
from tunegate.cli.advise import advise
from tunegate.cli.arguments import task_of
from tunegate.cli.check import check
from tunegate.cli.console import Console
from tunegate.cli.deploy import deploy
from tunegate.cli.doctor import doctor
from tunegate.cli.export import export, items_of, limits_of, parity_line, tell_items
from tunegate.cli.kept import tell_kept
from tunegate.cli.keys import keys
from tunegate.cli.quantize import quantize
from tunegate.cli.registry import registry
from tunegate.cli.review import review
from tunegate.cli.serve import serve
from tunegate.cli.sweep import sweep
from tunegate.config import Config, describe_defaults, load_config
from tunegate.errors import InputError
from tunegate.files import read_json, write_text
from tunegate.gate import PASS, SHIP
from tunegate.pipeline.reporter import count, p_value
from tunegate.records import AdapterCard, Comparison, Decision, EvalRecord

# the commands, by the name that is typed
__all__ = [
    "advise", "check", "deploy", "doctor", "eval", "export", "gate", "init", "keys", "merge", "plan", "quantize",
    "registry", "review", "run", "serve", "show", "sweep", "train",
]  # fmt: skip
COLOURS = {"ship": "green", "hold": "red", "inconclusive": "yellow", "pass": "green", "fail": "red"}


def init(arguments: argparse.Namespace, console: Console) -> int:
    path = Path(arguments.path)
    if path.exists() or path.is_symlink():
        raise InputError("the file exists", where=str(path), fix="name another file, or remove it")
    write_text(path, describe_defaults(arguments.base, arguments.data, arguments.metric))
    load_config(path)
    console.text(f"wrote {escape(str(path))}\nnext: tunegate check {escape(str(path))}")
    console.result({"written": str(path)})
    return 0


def plan(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.cli.plan import plan as tell  # needs torch, which commands without a model do not wait for

    return tell(arguments, console)


# --- run, train, eval, gate --------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import run as run_pipeline

    config = task_of(arguments)
    outcome = run_pipeline(config, console, reopen=arguments.reopen_test, stop=console.stop)
    _print_card(outcome.card, console)
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
            "version": outcome.version,
        }
    )
    return 0 if outcome.decision.verdict == SHIP else 1


def _next_step(decision: Decision, adapter: Path) -> str:
    if decision.verdict == SHIP:
        return f"tunegate show {adapter}; load it with PeftModel.from_pretrained(base, {str(adapter)!r})"
    unmet = [rule for rule in decision.rules if rule.verdict != PASS and rule.required]
    files = dict.fromkeys(str(adapter.parent / rule.items[0]) for rule in unmet if rule.items)
    told = f"see {', '.join(rule.rule for rule in unmet)} above"
    return f"{told}; what was counted lies in {', '.join(files)}" if files else told


def train(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import train_only

    folder, record = train_only(task_of(arguments), console, stop=console.stop)
    console.text(
        f"best step {record.best_step} of {record.steps}, score {record.best_score:.4f}, "
        f"{record.tokens_per_second:,.0f} tokens/s\nadapter   {escape(str(folder / 'adapter'))}"
    )
    console.result({"run": str(folder), "adapter": str(folder / "adapter"), "training": asdict(record)})
    return 0


def eval(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import EvalRequest, evaluate_kept, evaluate_only

    request = EvalRequest(
        adapter=Path(arguments.adapter) if arguments.adapter else None,
        plain_base=arguments.plain_base,
        split=arguments.split,
        reopen=arguments.reopen_test,
        allow_base_mismatch=arguments.allow_base_mismatch,
    )
    families = [name for name in ("regression", "safety", "judge") if getattr(arguments, name)]
    if families:
        return tell_kept(evaluate_kept(task_of(arguments), console, request, families), console)
    folder, record = evaluate_only(task_of(arguments), console, request)
    _print_evaluations([record], console)
    console.text(f"items     {escape(str(folder.parent / record.items_path))}")
    console.result(asdict(record))
    return 0


def gate(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.run import decide_again

    folder, decision = decide_again(task_of(arguments), console)
    _print_decision(decision, console)
    console.result({"run": str(folder), "decision": asdict(decision)})
    return 0 if decision.verdict == SHIP else 1


def merge(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.merge import MergeRequest
    from tunegate.pipeline.merge import merge as run_merge
    from tunegate.registry.pulling import adapter_folders

    adapters = tuple(map(Path, adapter_folders(arguments.adapters, arguments.registry, "merged", console.line)))
    request = MergeRequest(
        adapters, Path(arguments.out), tuple(arguments.weights or [1.0] * len(adapters)), arguments.method,
        arguments.density, arguments.seed, arguments.base, arguments.onto, limits_of(arguments),
        arguments.allow_base_mismatch, items_of(arguments),
    )  # fmt: skip
    report = run_merge(request, console)
    console.text(f"merged    {report['changed']} of {report['modules']} adapted tensors changed, {report['onto']}")
    console.text(f"parity    {parity_line(report['parity'])}")
    tell_items(report, console)
    console.text(f"model     {escape(str(arguments.out))}")
    console.result(report)
    return 0


# --- show --------------------------------------------------------------------------------------------------------


def show(arguments: argparse.Namespace, console: Console) -> int:
    path = Path(arguments.path)
    if path.suffix in (".yaml", ".yml"):
        return _show_task(load_config(path), console)
    from tunegate.pipeline.card import load_card

    latest = path / "latest.json"  # of a task's run folder
    newest = path / str(read_json(latest)["run"]) if latest.exists() else path
    for folder in (path, path / "adapter", newest / "adapter"):
        if (folder / "card.json").exists():
            card = load_card(folder)
            _print_card(card, console)
            console.result(records.to_json(card))
            return 0
    raise InputError(
        "nothing to show here" if path.exists() else "no such folder",
        where=str(path),
        expected="a task YAML, a run folder or an adapter folder",
        fix="`tunegate run` finishes a run; the adapter then has a card.json" if path.exists() else "",
    )


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


_KEPT = {"regression": "general ability", "safety": "refusals"}


def _print_card(card: AdapterCard, console: Console) -> None:
    base = card.base
    console.text(f"\n[bold]{escape(card.name)}[/]  run {escape(str(card.adapter['run']))}")
    console.text(
        f"base      {escape(base['name'])}, {count(base['parameters'])} parameters, {base['fingerprint']['total']}"
    )
    run = card.run
    console.text(
        f"training  {run.method}, kept step {run.best_step} of {run.steps}, {run.tokens:,} tokens at "
        f"{run.tokens_per_second:,.0f}/s, peak memory {run.peak_rss_bytes / 2**30:.2f} GiB"
    )
    _print_evaluations(card.evaluations, console)
    for comparison in card.comparisons:
        console.text(f"adapter against {_comparison(comparison)}")
    _print_decision(card.decision, console)
    judged = {rule.metric.partition(".")[0] for rule in card.decision.rules if rule.metric}
    if missing := [what for family, what in _KEPT.items() if family not in judged]:
        console.text(f"not judged: whether the base's {' and '.join(missing)} were kept (gate.rules, docs/gate.md)")
    reasons = [str(o["reason"]) for o in card.test_openings if o.get("reason")]
    if len(card.test_openings) > 1 or reasons:
        why = f"; reopened because: {'; '.join(reasons)}" if reasons else ""
        times = f"{len(card.test_openings)} openings of this test set, by all runs of this task"
        console.text(f"[yellow]{escape(times + why)}[/]")


def _comparison(comparison: Comparison) -> str:
    name = "best prompt" if comparison.reference == "prompt" else comparison.reference
    return (
        f"{name}: {comparison.difference:+.4f} ({comparison.low:+.3f} to {comparison.high:+.3f}), "
        f"{comparison.wins} better, {comparison.losses} worse, {p_value(comparison.p_value)}"
    )


def _print_evaluations(evaluations: list[EvalRecord], console: Console) -> None:
    """One line a subject. Base and adapter are asked with the task's own prompt; where no other was better on
    validation, the best prompt is that one, and its line is the base's."""
    metrics = list(evaluations[0].scores)
    subjects = [e.subject for e in evaluations]
    rows = []
    for e in evaluations:
        scores = [f"{e.scores[m].value:.4f} [dim]{e.scores[m].low:.3f}-{e.scores[m].high:.3f}[/]" for m in metrics]
        cells = [*scores, f"{e.score.n:,}", f"{e.stop_rate:.1%}"]
        name = f"best prompt: {escape(e.settings['prompt'])}" if e.subject == "prompt" else e.subject
        rows.append([name, *cells])
        if e.subject == "base" and "adapter" in subjects and "prompt" not in subjects:
            rows.append(["best prompt: as_is", *cells])
    console.table([f"{evaluations[0].split} split", *metrics, "items", "stopped"], rows)
    if "adapter" in subjects and "base" in subjects and "prompt" not in subjects:
        console.text("as_is is the task's own prompt: no other was better on validation items")


def _print_decision(decision: Decision, console: Console) -> None:
    colour = COLOURS.get(decision.verdict, "yellow")
    console.text(f"\ndecision  [bold {colour}]{decision.verdict}[/]")
    for rule in decision.rules:
        colour = COLOURS.get(rule.verdict, "yellow")
        got = rule.got.split(" (")[0] if rule.verdict == PASS else rule.got
        console.text(f"  [{colour}]{rule.verdict:<12}[/] {rule.rule:<22} {escape(got)}")
        if rule.verdict != PASS:
            console.text(f"  [dim]{'':<12} {escape(rule.reason)}[/]")
    console.text()
