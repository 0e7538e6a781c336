"""What the gate judges: the records of a run as named measures.

``task`` is the primary metric and ``task.NAME`` each metric, with their intervals as they were taken at the test;
``task.items``, ``task.stop_rate``, ``train.loss_ratio``, ``train.loss_gap``, ``data.leaked_rows`` and
``data.near_leaks`` follow from the records. What other steps measured comes in by name and wins over these, with item
values where there are some. It judges nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunegate.errors import InputError, Problem
from tunegate.evaluation.measures import Measure
from tunegate.records import Comparison, EvalRecord, RunRecord

TINY_LOSS = 0.1  # nats per token; below it the ratio of two losses says nothing about over-fitting
PROMPT, BEST_PROMPT = "prompt", "best_prompt"  # the name in records, and in rules


@dataclass(frozen=True)
class Evidence:
    """``comparisons`` holds adapter minus ``base`` and adapter minus ``prompt`` (the best prompt baseline), None or
    absent where not measured; their intervals are at the policy's confidence. ``near_leaks`` are near duplicates of
    training rows in the test set. ``measures``: everything else, by the names that rules use.
    """

    adapter: EvalRecord
    comparisons: Mapping[str, Comparison | None]
    run: RunRecord
    leaked_test_rows: int
    near_leaks: int = 0
    measures: Mapping[str, Measure] = field(default_factory=dict)


def check_evidence(evidence: Evidence, confidence: float) -> None:
    """:class:`InputError` if the records do not belong together."""
    adapter = evidence.adapter
    problems = []
    if adapter.primary not in adapter.scores:
        raise InputError(
            "the evaluation lacks its primary metric", expected=adapter.primary, got=str(list(adapter.scores))
        )
    if adapter.score.confidence != confidence:
        problems.append(
            Problem(
                "the score's interval is not at the policy's confidence",
                expected=str(confidence),
                got=str(adapter.score.confidence),
            )
        )
    for name, comparison in evidence.comparisons.items():
        if comparison is None:
            continue
        expected = f"{adapter.primary} on {adapter.score.n} items"
        got = f"{comparison.metric} on {comparison.n} items"
        if got != expected:
            problems.append(
                Problem(f"the comparison with {name} is not of this evaluation", expected=expected, got=got)
            )
    if problems:
        raise InputError(problems)


def measures_of(evidence: Evidence) -> dict[str, Measure]:
    """Every measure by its name. ``task`` is ``task.PRIMARY`` under a short name."""
    adapter, run = evidence.adapter, evidence.run
    found = {f"task.{name}": _of_score(evidence, name) for name in adapter.scores}
    found["task.items"] = Measure("count", value=adapter.score.n, items={"": adapter.items_path})
    found["task.stop_rate"] = Measure("scalar", value=adapter.stop_rate, items={"": adapter.items_path})
    check = {"": "check.json"}
    found["data.leaked_rows"] = Measure("count", value=evidence.leaked_test_rows, items=check)
    found["data.near_leaks"] = Measure("count", value=evidence.near_leaks, items=check)
    if run.train_loss is not None and run.valid_loss is not None:
        found |= loss_measures(run.train_loss, run.valid_loss)
    for name, measure in evidence.measures.items():
        before = found.get(name)
        if before is not None and measure.score is None:  # the intervals on the card are those of the decision
            measure = dataclasses.replace(measure, score=before.score, comparisons=before.comparisons)
        found[name] = measure
    found["task"] = found[f"task.{adapter.primary}"]
    return found


def _of_score(evidence: Evidence, name: str) -> Measure:
    """A metric of the test; only the primary one has been compared with the base and the best prompt."""
    adapter = evidence.adapter
    compared = {}
    if name == adapter.primary:
        given = evidence.comparisons
        compared = {BEST_PROMPT if n == PROMPT else n: c for n, c in given.items() if c is not None}
    return Measure("mean", score=adapter.scores[name], comparisons=compared, items={"": adapter.items_path})


def loss_measures(train: float, valid: float) -> dict[str, Measure]:
    """``train.loss_ratio``: validation loss over training loss; ``train.loss_gap``: their difference, nats per target
    token. Both say nothing where the validation loss is tiny."""
    got, items = f"validation {valid:.3f}, training {train:.3f}", {"": "train/run.json"}
    moot = ""
    if valid <= TINY_LOSS:
        moot = f"Both are judged only above {TINY_LOSS} nats per token; below it their ratio says nothing."
    ratio = valid / train if train > 0.0 else math.nan if math.isnan(train + valid) else math.inf
    return {
        "train.loss_ratio": Measure("scalar", value=ratio, items=items, moot=moot, got=got),
        "train.loss_gap": Measure("scalar", value=valid - train, items=items, moot=moot, got=got),
    }
