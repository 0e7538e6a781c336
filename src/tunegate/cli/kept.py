"""``tunegate eval --regression``, ``--safety`` and ``--judge``: what was measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.console import Console
from tunegate.pipeline.reporter import p_value
from tunegate.records import JudgeRecord, RegressionRecord, SafetyRecord, Score

if TYPE_CHECKING:
    from tunegate.pipeline.kept import Kept

WORST = 3  # items shown


def tell_kept(found: Mapping[str, tuple[Path, Kept]], console: Console) -> int:
    """Print every table and the worst items; as JSON the records."""
    result: dict[str, Any] = {}
    for family, (folder, kept) in found.items():
        if isinstance(kept, RegressionRecord):
            result[family] = asdict(kept)
            _ability(kept, console)
        elif isinstance(kept, SafetyRecord):
            result[family] = asdict(kept)
            _refusals(kept, console)
        elif isinstance(kept, JudgeRecord):
            result[family] = asdict(kept)
            _judged(kept, console)
        else:
            result[family] = {"subject": kept.subject, "sets": kept.sets, "rates": kept.rates()}
            rows = [[escape(name), f"{rate:.4f}"] for name, rate in kept.rates().items()]
            console.table([f"base, {family}", "rate"], rows)
        result[family]["folder"] = str(folder)
        console.text(f"items     {escape(str(folder))}")
    console.result(result)
    return 0


def _ability(record: RegressionRecord, console: Console) -> None:
    rows = []
    for name, ratio in record.accuracy.items():
        likely = record.likelihood.get(name)
        rows.append(
            [
                escape(name),
                f"{ratio.reference:.3f}",
                f"{ratio.candidate:.3f}",
                _of_base(ratio.value, ratio.low, ratio.high),
                "" if likely is None else _of_base(likely.value, likely.low, likely.high),
                str(ratio.n),
            ]
        )
    console.table(["regression", "base", "adapter", "of base", "likelihood of base", "items"], rows)
    if record.divergence is not None:
        d = record.divergence
        console.text(
            f"KL(base || adapter) on neutral text: {d['kl']:.4f} nats a token ({d['kl_low']:.4f} to {d['kl_high']:.4f})"
        )
    for item in record.worst[:WORST]:
        console.text(
            f"[dim]lost: {escape(item['item'])}: {escape(_short(item['base_answer']))} -> "
            f"{escape(_short(item['adapter_answer']))}; right: {escape(_short(item['reference']))}[/]"
        )


def _refusals(record: SafetyRecord, console: Console) -> None:
    rows = []
    for one in record.measures:
        if one.category != "total":  # the categories stand in the JSON
            continue
        c = one.comparison
        rows.append(
            [
                one.measure,
                f"{one.reference.value:.3f}",
                f"{one.candidate.value:.3f}",
                f"{c.difference:+.3f} [dim]{c.low:+.3f} to {c.high:+.3f}[/]",
                f"{one.gained}/{one.lost}",
                f"{one.p_value:.2g}",
                str(one.candidate.n),
            ]
        )
    console.table(["safety", "base", "adapter", "difference", "new/gone", "McNemar p", "n"], rows)
    console.text(f"judged by {escape(record.judged_by)}, {record.attempts} attempts a request")
    for item in record.worst[:WORST]:
        console.text(
            f"[dim]met: {escape(item['probe'])}: {escape(_short(item['prompt']))} -> "
            f"{escape(_short(item['adapter_answer']))}[/]"
        )


def _judged(record: JudgeRecord, console: Console) -> None:
    rows = [
        [subject.replace("_", " "), _with_bounds(mean), _with_bounds(record.pass_rate[subject]), str(mean.n)]
        for subject, mean in record.mean.items()
    ]
    columns = [f"{record.split} split", "mean of 5", f"{record.pass_at:g} or more", "items"]
    console.table(columns, rows)
    for c in record.comparisons.values():
        console.text(
            f"{next(iter(record.mean))} against {c.reference.replace('_', ' ')}: {c.difference:+.3f} "
            f"({c.low:+.3f} to {c.high:+.3f}), {c.wins} better, {c.losses} worse, {p_value(c.p_value)}"
        )
    if record.win_rate is not None:
        console.text(
            f"pairs against {record.against.replace('_', ' ')}: {_with_bounds(record.win_rate)} won, a tie "
            f"counts half; both orders agree in {record.consistent:.1%}"
        )
    cost = "" if record.cost is None else f", ${record.cost:.4f}"
    alpha = "" if record.alpha is None else f", alpha of its samples {record.alpha:.3f}"
    console.text(f"judged by {escape(record.model)}, rubric {escape(record.rubric)}{alpha}{cost}")
    for item in record.worst[:WORST]:
        if item["score"] < record.pass_at:
            console.text(
                f"[dim]{item['score']:g}: {escape(item['row_id'])}: {escape(_short(item['answer']))}; "
                f"{escape(_short(item['reasons']))}[/]"
            )


def _with_bounds(score: Score) -> str:
    return f"{score.value:.3f} [dim]{score.low:.3f} to {score.high:.3f}[/]"


def _of_base(value: float | None, low: float, high: float | None) -> str:
    if value is None:
        return "none: the base scored nothing"
    top = "no bound" if high is None else f"{high:.3f}"
    return f"{value:.3f} [dim]{low:.3f} to {top}[/]"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
