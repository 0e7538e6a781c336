"""A sweep's result as a record and as a page.

``sweep.json`` and ``sweep.md`` are functions of what the run folders hold, so a sweep that is asked again leaves the
same bytes. The charts (``sweep_charts``) are text in the page, and ``sweep.png`` where matplotlib is installed.

It measures nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunegate import records
from tunegate.errors import InputError
from tunegate.evaluation.regression import summarise_divergence
from tunegate.evaluation.statistics import detectable_gain, score
from tunegate.evaluation.sweeping import Climb, fit_forgetting, forgetting_band
from tunegate.files import canonical_json, read_json, write_bytes, write_json, write_text
from tunegate.pipeline.kept import REGRESSION
from tunegate.pipeline.reporter import count, p_value
from tunegate.pipeline.sweep import Trial
from tunegate.pipeline.sweep_charts import can_draw, charts, draw, forgotten
from tunegate.records import Comparison, RegressionRecord, SweepPoint, SweepRecord, SweepTrial

COMPLETE, PRUNED, CUT_OFF, NOT_NEEDED, NOT_STARTED = "complete", "pruned", "cut off", "not needed", "not started"
BAND_POINTS = 25


# --- the record --------------------------------------------------------------------------------------------------


def build_record(trials: Sequence[Trial], climbed: Climb, folder: Path) -> SweepRecord:
    """Everything about a sweep, from its run folders and what they decide."""
    prepared = trials[0].prepared
    confidence = prepared.policy.confidence
    level = 1 - (1 - confidence) / max(1, len(trials) - 1)
    told = [_trial(trial, climbed, folder) for trial in trials]
    curve, reason = _curve(told, confidence)
    best = next((t for t in told if t.rank == climbed.rank), None)
    recommended = None
    if best is not None:
        kept = _kept(best)
        recommended = {"rank": best.rank, "epoch": kept.epoch, "step": kept.step, "run": best.run}
    chosen = next((t for t in trials if t.rank == climbed.rank), None)
    return SweepRecord(
        name=prepared.config.name,
        metric=prepared.scorer.task.metric,
        confidence=confidence,
        level=level,
        epochs=trials[0].prepared.config.task.train.epochs,
        trials=told,
        curve=curve,
        curve_reason=reason,
        finished=climbed.next is None,
        recommended=recommended,
        reason=_reason(told, climbed, level),
        settings=_settings(chosen) if chosen is not None else {},
    )


def _trial(trial: Trial, climbed: Climb, folder: Path) -> SweepTrial:
    prepared, record = trial.prepared, trial.record()
    look = next((one for one in climbed.looks if one.rank == trial.rank), None)
    points = [_point(trial, event, folder) for event in trial.evaluations()]
    best = trial.curve().best(look.pruned if look else None) if points else None
    path = trial.folder / REGRESSION / f"{REGRESSION}.json"
    asked = prepared.regression is not None and record is not None and path.exists()
    if record is not None:
        status = COMPLETE
    elif look is not None:
        status = PRUNED
    elif climbed.next is None:
        status = NOT_NEEDED
    else:
        status = CUT_OFF if points else NOT_STARTED
    alpha = prepared.config.task.train.alpha
    assert alpha is not None
    return SweepTrial(
        rank=trial.rank,
        alpha=alpha,
        run=trial.folder.name,
        status=status,
        points=points,
        kept=points[best].step if best is not None else None,
        lower=look.lower if look else None,
        gain=look.comparison if look else None,
        raised=look.raised if look else None,
        regression=records.load(path, RegressionRecord).accuracy["total"] if asked else None,
        seconds=record.seconds if record is not None else None,
    )


def _point(trial: Trial, event: Mapping[str, Any], folder: Path) -> SweepPoint:
    step, items = int(event["step"]), trial.items(int(event["step"]))
    confidence, texts = trial.prepared.policy.confidence, trial.forgetting(step)
    moved = summarise_divergence(texts, confidence) if texts is not None else None
    record = trial.record()
    return SweepPoint(
        epoch=trial.steps.epochs_done(step),
        step=step,
        parameters=record.trainable_parameters if record is not None else int(event["trainable_parameters"]),
        score=score(trial.measured(step), confidence),
        valid_loss=event.get("valid_loss"),
        forgetting=None if moved is None else {name: moved[name] for name in ("kl", "kl_low", "kl_high", "texts")},
        items_path=Path(os.path.relpath(items, folder)).as_posix(),
    )


def _kept(trial: SweepTrial) -> SweepPoint:
    return next(point for point in trial.points if point.step == trial.kept)


def _curve(trials: Sequence[SweepTrial], confidence: float) -> tuple[dict[str, Any] | None, str]:
    points = forgotten(trials)
    work, moved = [w for _, w, _ in points], [kl for _, _, kl in points]
    try:
        found = fit_forgetting(work, moved)
    except InputError as error:
        problem = error.problems[0]
        return None, f"{problem.what}: it takes {problem.expected}; there are {problem.got}"
    at = np.geomspace(min(work), max(work), BAND_POINTS)
    band = forgetting_band(work, moved, list(at), confidence)
    value = np.asarray(found.at(at))
    return {
        "form": "scale * ((1 + x / shift)**exponent - 1), x = trained parameters * steps",
        "scale": found.scale, "shift": found.shift, "exponent": found.exponent,
        "exponent_low": band.exponent_low, "exponent_high": band.exponent_high,
        "r_squared": found.r_squared if np.isfinite(found.r_squared) else None,
        "points": len(points), "confidence": confidence,
        "band": [
            {"x": float(x), "value": float(v), "low": float(low), "high": float(high)}
            for x, v, low, high in zip(at, value, band.low, band.high, strict=True)
        ],
    }, ""  # fmt: skip


def _reason(trials: Sequence[SweepTrial], climbed: Climb, level: float) -> str:
    by_rank = {trial.rank: trial for trial in trials}
    if climbed.rank is None:
        return f"rank {climbed.next}, the lowest, has not been trained to its end"
    parts = []
    kept = by_rank[climbed.rank]
    if kept.gain is not None:
        parts.append(f"rank {kept.rank} beats rank {kept.lower}: {_gain(kept.gain)}")
    last = climbed.looks[-1] if climbed.looks and not climbed.looks[-1].raised else None
    if climbed.next is not None:
        parts.append(f"rank {climbed.next} is not decided yet")
    elif last is not None:
        early = f", pruned after evaluation {last.pruned}" if last.pruned else ""
        parts.append(f"rank {last.rank} shows no significant gain over it{early}: {_gain(last.comparison)}")
        smallest = detectable_gain(last.comparison, level)
        if smallest > 0:
            parts.append(f"gains below about {smallest:.3f} would mostly go unseen with {last.comparison.n} items")
        parts += _dearer(by_rank[climbed.rank], by_rank[last.rank])
    elif len(trials) > 1:
        parts.append("every raise was significant, and no higher rank was asked for")
    else:
        parts.append("no other rank was asked for")
    return "; ".join(parts) + f" (confidence of one comparison {level:.4g})"


def _dearer(kept: SweepTrial, higher: SweepTrial) -> list[str]:
    """What the higher rank forgets beside the kept one, at their best points."""
    one, other = _kept(kept).forgetting, _kept(higher).forgetting
    if one is None or other is None:
        return []
    return [f"at its best it moved the base by {other['kl']:.3g} nats a token, rank {kept.rank} by {one['kl']:.3g}"]


def _gain(found: Comparison) -> str:
    return f"{found.difference:+.4f} ({found.low:+.3f} to {found.high:+.3f}), {p_value(found.p_value)}"


def _settings(trial: Trial) -> dict[str, Any]:
    """The lines under ``train:`` that give this trial's run."""
    config, train = trial.prepared.config, trial.prepared.config.task.train
    found: dict[str, Any] = {"rank": train.rank}
    if not config.origins["train.alpha"].startswith("default"):
        found["alpha"] = train.alpha
    found["epochs"] = train.epochs
    if config.origins["train.eval_every"] == "sweep":  # the task evaluates at other steps
        found["eval_every"] = "epoch"
    return found


def yaml_lines(settings: Mapping[str, Any]) -> str:
    return "\n".join(["train:", *(f"  {name}: {json.dumps(value)}" for name, value in settings.items())])


# --- the page ----------------------------------------------------------------------------------------------------

HEADER = ("rank", "epoch", "parameters", "steps", "score", "gain over the lower rank", "KL, nats", "of base", "")


def table(record: SweepRecord) -> list[list[str]]:
    """Rows under :data:`HEADER`: a line a point, the kept one of each rank with what was compared."""
    rows = []
    for trial in record.trials:
        if not trial.points:
            rows.append([str(trial.rank), "", "", "", "", "", "", "", trial.status])
        for point in trial.points:
            found, kept = point.score, point.step == trial.kept
            moved, ratio = point.forgetting, trial.regression
            rows.append([
                str(trial.rank), f"{point.epoch:g}", count(point.parameters), str(point.step),
                f"{found.value:.4f} ({found.low:.3f} to {found.high:.3f})",
                _gain(trial.gain) if kept and trial.gain is not None else "",
                "" if moved is None else f"{moved['kl']:.4g} ({moved['kl_low']:.3g} to {moved['kl_high']:.3g})",
                "" if ratio is None or not kept or ratio.value is None
                else f"{ratio.value:.3f} ({ratio.low:.3f} to {_top(ratio.high)})",
                ", ".join(notes(record, trial, point)),
            ])  # fmt: skip
    return rows


def notes(record: SweepRecord, trial: SweepTrial, point: SweepPoint) -> list[str]:
    """What a point's line says beside its figures."""
    chosen = record.recommended is not None and record.recommended["rank"] == trial.rank
    found = [trial.status] if point is trial.points[-1] and trial.status != COMPLETE else []
    return found + ((["recommended"] if chosen else ["best"]) if point.step == trial.kept else [])


def _top(high: float | None) -> str:
    return "no bound" if high is None else f"{high:.3f}"


def describe_curve(record: SweepRecord) -> str:
    c = record.curve
    if c is None:
        return record.curve_reason
    low = "below 0.01" if c["exponent_low"] is None else f"{c['exponent_low']:.2f}"
    high = "above 3" if c["exponent_high"] is None else f"{c['exponent_high']:.2f}"
    fit = "" if c["r_squared"] is None else f", R^2 {c['r_squared']:.3f}"
    return (
        f"forgetting = {c['scale']:.3g} * ((1 + x / {c['shift']:.3g})^{c['exponent']:.2f} - 1) nats a token, "
        f"x = trained parameters * steps; exponent {low} to {high} at {c['confidence']:g}{fit}, {c['points']} points"
    )


def write_report(folder: Path, record: SweepRecord) -> bool:
    """sweep.md, sweep.png and last sweep.json in ``folder``, unless they are there; whether there is a picture."""
    plots, picture, result = can_draw(), folder / "sweep.png", folder / "sweep.json"
    content = records.to_json(record)
    if (plots and not picture.exists()) or not _holds(result, content):
        write_text(folder / "sweep.md", _page(record, plots))
        if plots:
            write_bytes(picture, draw(record))
        else:
            picture.unlink(missing_ok=True)  # of an earlier result
        write_json(result, content)
    return picture.exists()


def _holds(path: Path, content: dict[str, Any]) -> bool:
    try:
        return canonical_json(read_json(path)) == canonical_json(content)
    except (OSError, ValueError, RecursionError):
        return False


def _page(record: SweepRecord, picture: bool) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    reason, fit = record.reason, describe_curve(record)
    lines = [f"# Sweep of {record.name}", "", recommendation(record), "", reason[:1].upper() + reason[1:] + "."]
    if record.settings:
        lines += ["", "```yaml", yaml_lines(record.settings), "```"]
    lines += ["", row(HEADER), row(["---"] * len(HEADER)), *(row(cells) for cells in table(record))]
    lines += ["", f"Scores are {record.metric} on validation items. The test split was not opened.", ""]
    lines += [fit[:1].upper() + fit[1:] + "."]
    lines += ["", "![scores and forgetting](sweep.png)"] if picture else []
    for drawn in charts(record):
        lines += ["", "```", drawn, "```"]
    return "\n".join(lines) + "\n"


def recommendation(record: SweepRecord) -> str:
    """One or two sentences: the rank, and which epoch its run keeps."""
    best = record.recommended
    if best is None:
        return "No recommendation yet."
    so_far, epochs, kept = "" if record.finished else " so far", record.epochs, best["epoch"]
    text = f"Recommended{so_far}: rank {best['rank']}, {epochs:g} epochs, of which epoch {kept:g} is kept."
    if kept < epochs - 1e-9:
        text += " Fewer epochs alone would follow another learning-rate schedule, which was not measured."
    return text
