"""A sweep's two charts: scores by epoch, and forgetting over training. As text, and as a PNG through matplotlib.

It computes nothing but places on the page.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence

import numpy as np

from tunegate.records import SweepRecord, SweepTrial

WIDTH, HEIGHT = 64, 12  # of a text chart, characters
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Points = Sequence[tuple[float, float]]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def forgotten(trials: Sequence[SweepTrial]) -> list[tuple[int, float, float]]:
    """``(rank, parameters * steps, KL)`` of every point that has one."""
    return [
        (trial.rank, float(point.parameters) * point.step, point.forgetting["kl"])
        for trial in trials
        for point in trial.points
        if point.forgetting is not None
    ]


def charts(record: SweepRecord) -> list[str]:
    """Scores by epoch, and forgetting over parameters * steps with its curve, as text."""
    scores = {f"rank {t.rank}": [(p.epoch, p.score.value) for p in t.points] for t in record.trials if t.points}
    drawn = []
    if sum(map(len, scores.values())) > 1:
        drawn.append(chart(scores, f"{record.metric} on the validation split, by epoch"))
    moved: dict[str, list[tuple[float, float]]] = {}
    for rank, work, kl in forgotten(record.trials):
        moved.setdefault(f"rank {rank}", []).append((work, kl))
    if sum(map(len, moved.values())) > 1:
        line = [(b["x"], b["value"]) for b in record.curve["band"]] if record.curve is not None else []
        title = "KL from the base on neutral text, nats a token, by trained parameters * steps (log)"
        drawn.append(chart(moved, title, line, log_x=True))
    return drawn


def chart(series: Mapping[str, Points], title: str, line: Points = (), *, log_x: bool = False) -> str:
    """Points as letters (one a series, ``*`` where two meet) over a dotted ``line``, with the ends of both axes."""

    def placed(points: Points) -> np.ndarray:  # (n, 2)
        found = np.array(list(points), dtype=np.float64).reshape(-1, 2)
        if log_x:
            found[:, 0] = np.log10(found[:, 0])
        return found

    dots, marks = placed(line), dict(zip(series, LETTERS * (1 + len(series) // 26), strict=False))
    groups = {name: placed(points) for name, points in series.items()}
    every = np.concatenate([*groups.values(), dots])
    low, size = every.min(axis=0), np.maximum(np.ptp(every, axis=0), 1e-12)
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]

    def put(point: np.ndarray, mark: str) -> None:
        x, y = (point - low) / size * (WIDTH - 1, HEIGHT - 1)
        row = cells[HEIGHT - 1 - round(float(y))]
        row[round(float(x))] = mark if row[round(float(x))] in (" ", ".", mark) else "*"

    if len(dots) > 1:
        for x in np.linspace(dots[0, 0], dots[-1, 0], WIDTH):
            put(np.array([x, np.interp(x, dots[:, 0], dots[:, 1])]), ".")
    for name, points in groups.items():
        for point in points:
            put(point, marks[name])
    flat = float(np.ptp(every[:, 1])) == 0.0
    labels = ["" if flat else f"{low[1] + size[1]:.4g}", *[""] * (HEIGHT - 2), f"{low[1]:.4g}"]
    pad = max(map(len, labels))
    ends = [f"{10**x if log_x else x:.3g}" for x in (low[0], low[0] + size[0])]
    legend = ", ".join(f"{mark} {name}" for name, mark in marks.items()) + (", . fit" if len(dots) > 1 else "")
    body = [f"{label:>{pad}} |{''.join(row).rstrip()}" for label, row in zip(labels, cells, strict=True)]
    foot = f"{'':>{pad}}  {ends[0]}{ends[1]:>{WIDTH - len(ends[0])}}"
    return "\n".join([title, *body, f"{'':>{pad}} +{'-' * WIDTH}", foot, f"{'':>{pad}}  {legend}"])


def draw(record: SweepRecord) -> bytes:
    """Both charts side by side as PNG, with intervals and the curve's band. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for trial in record.trials:
        if not trial.points:
            continue
        value = np.array([p.score.value for p in trial.points])
        ends = np.array([[p.score.value - p.score.low, p.score.high - p.score.value] for p in trial.points]).T
        drawn = left.errorbar([p.epoch for p in trial.points], value, yerr=ends, marker="o", capsize=3, lw=1.2)
        drawn.set_label(f"rank {trial.rank}")
        moved = [p for p in trial.points if p.forgetting is not None]
        kl = np.array([p.forgetting["kl"] for p in moved if p.forgetting is not None])
        spread = [[p.forgetting[n] for p in moved if p.forgetting is not None] for n in ("kl_low", "kl_high")]
        right.errorbar(
            [p.parameters * p.step for p in moved], kl, yerr=np.abs(np.array(spread) - kl) if moved else None,
            fmt="o", capsize=3, label=f"rank {trial.rank}",
        )  # fmt: skip
    if record.curve is not None:
        band = record.curve["band"]
        x = [b["x"] for b in band]
        right.plot(x, [b["value"] for b in band], color="black", lw=1, label="fit")
        low, high = [b["low"] for b in band], [b["high"] for b in band]
        right.fill_between(x, low, high, color="black", alpha=0.12, lw=0, label=f"{record.confidence:g} band")
    left.set(title="validation score", xlabel="epoch", ylabel=record.metric)
    right.set(title="KL from the base on neutral text", xlabel="trained parameters x steps", ylabel="nats a token")
    right.set_xscale("log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
