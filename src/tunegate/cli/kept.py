"""``tunegate eval --regression`` and ``--safety``: what was measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.console import Console
from tunegate.records import RegressionRecord, SafetyRecord

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


def _of_base(value: float | None, low: float, high: float | None) -> str:
    if value is None:
        return "none: the base scored nothing"
    top = "no bound" if high is None else f"{high:.3f}"
    return f"{value:.3f} [dim]{low:.3f} to {top}[/]"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
