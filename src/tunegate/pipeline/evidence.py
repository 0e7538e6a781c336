"""What a run left behind, as named measures for the gate: test scores item by item, alarms of the training, and what
other steps measured.

Alarms of the training need no further measurement: ``train.loss_turn`` (by how many nats the validation loss had
risen from its lowest when the kept step came), ``train.best_share`` (the kept step over all steps), ``train.score``
(the kept step's validation score, beside the base's on the same items) and ``data.valid_leaks``. ``steps.recall``
leaves those that need answers to training prompts.

It reads files and asks no model. Where a comparison needs item scores, :func:`measurement_of` takes them from the
stored answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.data.types import Example
from tunegate.errors import InputError
from tunegate.evaluation.measures import Measure, load_measures
from tunegate.evaluation.metrics import score_items
from tunegate.evaluation.prompts import AS_IS
from tunegate.evaluation.types import Measurement
from tunegate.files import read_jsonl
from tunegate.gate.evidence import BEST_PROMPT
from tunegate.pipeline.folders import short
from tunegate.pipeline.judging import people_measures
from tunegate.pipeline.prepare import Prepared
from tunegate.records import EvalRecord, RunRecord
from tunegate.report.review import FOLDER, ITEMS, Review

LOG = "train/log.jsonl"
_ROUNDING = 1e-9  # a reported value this far from the mean of its items is a corpus value, no mean


def collect(prepared: Prepared, run: Path, record: RunRecord, adapter: EvalRecord) -> dict[str, Measure]:
    """Every measure of the run. :class:`InputError` if an items file cannot be read or does not fit another, or if a
    review is of other answers than those that lie there now."""
    found = _of_test(run, adapter)
    found |= _of_log(run, record)
    baseline = prepared.config.run_dir / f"baseline-{short(prepared.baseline_key)}"
    found |= _of_validation(run, record, baseline / f"{AS_IS}.items.jsonl", prepared.scorer.task.metric)
    if (run / FOLDER / ITEMS).exists():
        Review.load(run)
    return found | of_data(prepared) | load_measures(run) | people_measures(run)


def of_data(prepared: Prepared) -> dict[str, Measure]:
    """What the check of the data counted; known before anything is trained."""
    stats = prepared.report.stats
    found: dict[str, int] = {}
    leaks = stats.get("leaks", {})
    if "test in train" in leaks:
        found["data.leaked_rows"] = leaks["test in train"]["exact"]
        found["data.near_leaks"] = leaks["test in train"]["near"]
    if "valid in train" in leaks:
        found["data.valid_leaks"] = leaks["valid in train"]["exact"]
    if "safety" in stats:
        found["data.harmful_rows"] = stats["safety"]["flagged"]
    return {name: Measure("count", value=n, items={"": "check.json"}) for name, n in found.items()}


def _of_test(run: Path, adapter: EvalRecord) -> dict[str, Measure]:
    """The adapter's item scores with those of the base and the best prompt; corpus metrics have none."""
    files = {"": "test/adapter.items.jsonl", "base": "test/base.items.jsonl", BEST_PROMPT: "test/prompt.items.jsonl"}
    if not (run / files[BEST_PROMPT]).exists():  # no prompt was better than the task's own
        files[BEST_PROMPT] = files["base"]
    rows = {name: _rows(run, path) for name, path in files.items()}
    _same_items(rows, files)
    found = {}
    for name, score in adapter.scores.items():
        series = {subject: np.array([row["scores"][name] for row in items]) for subject, items in rows.items()}
        own = series.pop("")
        if abs(float(own.mean()) - score.value) <= _ROUNDING:
            found[f"task.{name}"] = Measure("mean", own, series, items=files)
    if all("stopped" in row for items in rows.values() for row in items):
        series = {subject: np.array([float(row["stopped"]) for row in items]) for subject, items in rows.items()}
        found["task.stop_rate"] = Measure("proportion", series.pop(""), series, items=files)
    return found


def _rows(run: Path, path: str) -> list[dict[str, Any]]:
    try:
        return read_jsonl(run / path)
    except (OSError, ValueError) as error:
        raise InputError("cannot read the items", where=str(run / path), got=str(error)) from None


def _same_items(rows: dict[str, list[dict[str, Any]]], files: dict[str, str]) -> None:
    wanted = [row["row_id"] for row in rows[""]]
    for name, items in rows.items():
        if [row["row_id"] for row in items] != wanted:
            raise InputError("the items are not those of the adapter", where=files[name], expected=files[""])


def measurement_of(prepared: Prepared, items: Path, examples: Sequence[Example]) -> Measurement:
    """The primary metric over an items file of ``examples``, scored again from the answers. :class:`InputError` if the
    file is of other examples."""
    rows, name = read_jsonl(items), prepared.scorer.task.metric
    ids = tuple(e.row_id for e in examples)
    if tuple(row["row_id"] for row in rows) != ids:
        raise InputError(
            "the items are not those of this task's validation split", where=str(items),
            fix="remove the folder of that run or advice; the same command makes it again",
        )  # fmt: skip
    metric = next((m for m in prepared.scorer.metrics if m.name == name), None)
    if metric is None:  # the likelihood: no answers to read
        return Measurement(name, ids, np.array([row["scores"][name] for row in rows]))
    answers = [row["prediction"] for row in rows]
    return score_items([metric], answers, [row["reference"] for row in rows], examples)[1][name]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluation events of the training log, in order; a line that a killed run left unfinished is passed over."""
    found = []
    for line in (run / LOG).read_text(encoding="utf-8").splitlines() if (run / LOG).exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "evaluation":
            found.append(event)
    return found


def _of_log(run: Path, record: RunRecord) -> dict[str, Measure]:
    found = {}
    items = {"": LOG}
    if record.steps:
        share, got = record.best_step / record.steps, f"kept step {record.best_step} of {record.steps}"
        found["train.best_share"] = Measure("scalar", value=share, items=items, got=got)
    losses = [e["valid_loss"] for e in evaluations(run) if e["step"] <= record.best_step and "valid_loss" in e]
    if losses:
        found["train.loss_turn"] = loss_turn(losses, items)
    return found


def loss_turn(losses: Sequence[float], items: dict[str, str]) -> Measure:
    """The last of the validation losses over the lowest, nats per target token."""
    got = f"{losses[-1]:.3f} at the kept step, {min(losses):.3f} at its lowest"
    return Measure("scalar", value=losses[-1] - min(losses), items=items, got=got)


def _of_validation(run: Path, record: RunRecord, base: Path, metric: str) -> dict[str, Measure]:
    """The kept step's scores on the validation items that the base was asked too: the first of both files."""
    mine = run / "train" / "evaluations" / f"step-{record.best_step:08d}.items.jsonl"
    if not mine.exists() or not base.exists():
        return {}
    pairs = list(zip(_rows(run, str(mine)), _rows(run, str(base)), strict=False))
    pairs = [(a, b) for a, b in pairs if a["row_id"] == b["row_id"]]
    if not pairs:
        return {}
    scores = np.array([[a["scores"][metric], b["scores"][metric]] for a, b in pairs])
    items = {"": mine.relative_to(run).as_posix(), "base": f"../{base.parent.name}/{base.name}"}
    return {"train.score": Measure("mean", scores[:, 0], {"base": scores[:, 1]}, items=items)}
