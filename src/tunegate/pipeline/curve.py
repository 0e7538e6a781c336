"""The learning curve of ``advise``: the same few steps on 10, 25, 50 and 100 % of the rows, scored on the same items.

Shares are nested (rows in the order of their hashes), and every size takes the same number of optimizer steps, a
small one passing over its rows more often. What differs is then the variety of the rows and not the amount of training.
Each training lies in a folder of its own and resumes there; nothing of it is used by a run. When its time is over,
training stops after its step, there is no curve, and the next call goes on.

One seed per size: the spread between trainings is not measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tunegate import records
from tunegate.data.types import Rendered
from tunegate.engine.backends import find_backend
from tunegate.engine.schedule import StepPlan
from tunegate.engine.train import Hooks, Interrupted
from tunegate.evaluation.advise import Trained
from tunegate.evaluation.learning_curve import fit_curve
from tunegate.evaluation.statistics import compare
from tunegate.evaluation.types import Measurement
from tunegate.files import hash_json
from tunegate.pipeline.advise import Bench, Extras
from tunegate.pipeline.evidence import measurement_of
from tunegate.pipeline.folders import begin, finish, is_done
from tunegate.pipeline.session import adapter_spec
from tunegate.records import EvalRecord

SHARES = (0.1, 0.25, 0.5, 1.0)
FEWEST = 10  # rows, of which a tenth is one


def shares(rows: list[Rendered]) -> dict[int, list[Rendered]]:
    """Nested parts of ``rows``, by percent."""
    ordered = sorted(rows, key=lambda row: hash_json([row.ids, row.target]))
    return {round(100 * share): ordered[: max(1, round(share * len(rows)))] for share in SHARES}


def measure_curve(
    bench: Bench, best: str, extras: Extras, stop: Callable[[], bool], missing: dict[str, str]
) -> Trained | None:
    """Train on every share, fit the curve, and compare the adapter of all rows with the option called ``best``.

    None where the rows are too few or the time is over; ``missing`` says which.
    """
    rows = bench.prepared.train_rows
    if len(rows) < FEWEST:
        missing["learning curve"] = f"{len(rows)} rows are too few, {FEWEST} are needed"
        return None
    settings = bench.prepared.config.task.train
    steps = StepPlan(rows, settings.model_copy(update={"max_steps": extras.curve_steps})).total
    end = time.monotonic() + 60 * extras.curve_minutes
    found: list[tuple[int, EvalRecord, Measurement]] = []
    try:
        for percent, part in shares(rows).items():
            folder = bench.folder / "curve" / f"p{percent:03d}"
            record = _train(bench, part, steps, folder, percent, lambda: stop() or time.monotonic() > end)
            found.append((len(part), record, _measured(bench, folder)))
    except Interrupted:
        if stop():
            raise
        done = f"{len(found)} of {len(SHARES)} sizes were trained in {extras.curve_minutes:g} minutes"
        missing["learning curve"] = f"{done} (--curve-minutes); the same command goes on"
        return None
    finally:
        bench.session.drop_adapter()
    confidence = bench.prepared.policy.confidence
    curve = fit_curve([n for n, _, _ in found], np.stack([m.scores for _, _, m in found]), confidence)
    _, record, measured = found[-1]
    over_best = compare(measured, bench.measurements[best], best, confidence)
    return Trained(curve, record.score, over_best, steps, max(steps, StepPlan(rows, settings).total))


def _measured(bench: Bench, folder: Path) -> Measurement:
    return measurement_of(bench.prepared, folder / "adapter.items.jsonl", bench.prepared.baseline_items)


def _train(
    bench: Bench, rows: list[Rendered], steps: int, folder: Path, percent: int, stop: Callable[[], bool]
) -> EvalRecord:
    """The record of the adapter after ``steps`` steps on ``rows``."""
    prepared, session = bench.prepared, bench.session
    settings = prepared.config.task.train
    once = StepPlan(rows, settings.model_copy(update={"epochs": 1.0, "max_steps": None})).total
    settings = settings.model_copy(
        update={"max_steps": steps, "epochs": float(math.ceil(steps / once)), "eval_every": steps}
    )
    used = settings.model_dump(mode="json", exclude={"threads", "checkpoint_every", "memory"})
    key = hash_json([prepared.advise_key, used, [[row.ids, row.target] for row in rows]])
    if is_done(folder, key):
        return records.load(folder / "adapter.json", EvalRecord)
    begin(folder, keep=True)
    injection = session.start_adapter(adapter_spec(settings), settings.seed)
    label = f"{percent} % of the rows"

    def evaluate(step: int) -> tuple[float, dict[str, Any]]:
        found = session.evaluate(prepared.baseline_items, label, "valid", folder / "adapter.items.jsonl")
        records.save(folder / "adapter.json", replace(found.record, subject="adapter", step=step))
        return found.record.score.value, {}

    with session.reporter.progress("training", steps) as advance:

        def report(event: dict[str, Any]) -> None:
            if event["event"] == "resume":
                advance(event["step"])
            elif event["event"] == "step":
                advance(1)

        session.reporter.line(f"training {steps} steps on {len(rows):,} rows ({label})")
        find_backend(settings.backend)(
            session.runner, injection, rows, settings, folder, key, Hooks(evaluate, report, stop)
        )
    finish(folder, key)
    return records.load(folder / "adapter.json", EvalRecord)
