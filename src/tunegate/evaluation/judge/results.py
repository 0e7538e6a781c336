"""What a judge's scores amount to: measures for the gate, a record, and agreement with itself and with people.

``judge.mean`` (1 to 5), ``judge.pass_rate`` and ``judge.win_rate`` (a tie counts half) are read by the gate from the
item files that are written here. ``judge.alpha`` is Krippendorff's alpha (ordinal) of the judge's own samples.
``judge.kappa`` is quadratically weighted kappa with the people of a spot check, who say good, partly or bad: the judge
says good of an answer that passes, bad of one with a score below 2.5, and partly of the others.

It asks nobody and decides nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.errors import InputError
from tunegate.evaluation.intervals import UNIT, Range, difference, mean
from tunegate.evaluation.judge.agreement import krippendorff_alpha, weighted_kappa
from tunegate.evaluation.judge.items import Judged, JudgedPair
from tunegate.evaluation.judge.rubric import HIGHEST, LOWEST
from tunegate.evaluation.measures import Source
from tunegate.files import read_jsonl, write_jsonl
from tunegate.records import Comparison, Score

SCALE: Range = (float(LOWEST), float(HIGHEST))
PAIRS = "pairs"
BAD_BELOW = 2.5  # a mean score that is nearer to "mostly fails" than to "in part"
VERDICTS = {"good": 3.0, "partly": 2.0, "bad": 1.0}
PREFERRED = {"adapter": 3.0, "tie": 2.0, "base": 1.0}


@dataclass(frozen=True)
class Results:
    """``judged``: subject (adapter, base, best_prompt) → its answers' scores, all of the same items in one order;
    ``pairs``: the first subject's answers beside those of ``against``."""

    judged: Mapping[str, Sequence[Judged]]
    pairs: Sequence[JudgedPair] = ()
    against: str = ""


@dataclass(frozen=True)
class Agreement:
    """Two raters' scores of the same ``n`` items: Krippendorff's alpha (ordinal), quadratically weighted kappa of the
    scores rounded to whole ones, and by how much the first scores higher. None where it is not defined."""

    n: int
    alpha: float | None
    kappa: float | None
    bias: float | None


# --- files -------------------------------------------------------------------------------------------------------


def write_results(folder: Path, found: Results) -> dict[str, Source]:
    """One items file a subject (``adapter.items.jsonl``) and one of pairs in ``folder``, and the measures over them
    with paths from the run around it; ``save_measures`` then shows them to the gate."""
    paths = {subject: f"{folder.name}/{subject}.items.jsonl" for subject in (*found.judged, PAIRS)}
    for subject, items in found.judged.items():
        write_jsonl(folder.parent / paths[subject], [asdict(item) for item in items])
    subject, *others = found.judged
    mine, references = paths[subject], {name: paths[name] for name in others}
    measures = {
        "judge.mean": Source("mean", mine, "score", references=references, limits=list(SCALE)),
        "judge.pass_rate": Source("proportion", mine, "passed", references=references),
    }
    own = self_agreement(found.judged[subject])
    if own is not None:
        measures["judge.alpha"] = Source("scalar", mine, value=own)
    if found.pairs:
        write_jsonl(folder.parent / paths[PAIRS], [asdict(pair) for pair in found.pairs])
        measures["judge.win_rate"] = Source("mean", paths[PAIRS], "won")
    return measures


def read_results(folder: Path, subjects: Sequence[str], against: str = "") -> Results:
    """What :func:`write_results` left."""
    judged = {name: [_made(Judged, row) for row in read_jsonl(folder / f"{name}.items.jsonl")] for name in subjects}
    path = folder / f"{PAIRS}.items.jsonl"
    pairs = [_made(JudgedPair, row) for row in read_jsonl(path)] if path.exists() else []
    return Results(judged, pairs, against)


def _made(kind: Any, row: Mapping[str, Any]) -> Any:
    values = {f.name: row[f.name] for f in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# --- numbers -----------------------------------------------------------------------------------------------------


def scores_of(items: Sequence[Judged], confidence: float) -> tuple[Score, Score]:
    """The mean score and the share that passed."""
    return (
        _score("judge.mean", [item.score for item in items], confidence, SCALE),
        _score("judge.pass_rate", [float(item.passed) for item in items], confidence),
    )


def win_rate(pairs: Sequence[JudgedPair], confidence: float) -> Score:
    return _score("judge.win_rate", [pair.won for pair in pairs], confidence)


def _score(name: str, values: Sequence[float], confidence: float, limits: Range = UNIT) -> Score:
    found = mean(np.array(values), confidence, limits)
    return Score(name, found.value, found.n, found.low, found.high, confidence, found.method)


def compare_scores(mine: Sequence[Judged], other: Sequence[Judged], name: str, confidence: float) -> Comparison:
    """The mean score minus that of ``name``, item by item."""
    a, b = (np.array([item.score for item in items]) for items in (mine, other))
    found, wins, losses = difference(a, b, confidence, SCALE), int((a > b).sum()), int((a < b).sum())
    p_value = 1.0 if found.p_value is None else found.p_value
    return Comparison(
        "judge.mean", name, found.value, found.low, found.high, found.n, p_value, wins, losses,
        found.n - wins - losses, found.method,
    )  # fmt: skip


# --- agreement ---------------------------------------------------------------------------------------------------


def self_agreement(judged: Sequence[Judged]) -> float | None:
    """Alpha of the judge's own samples; None with one sample, or where all scores are the same."""
    if not judged or len(judged[0].scores) < 2:
        return None
    return _defined(krippendorff_alpha(np.array([item.scores for item in judged], dtype=np.float64).T))


def compare_raters(one: Mapping[Any, float], two: Mapping[Any, float]) -> Agreement:
    """How two raters agree on the items that both have scored: a judge and people, or two judges."""
    shared = sorted(set(one) & set(two))
    if not shared:
        return Agreement(0, None, None, None)
    a, b = (np.array([rater[row] for row in shared], dtype=np.float64) for rater in (one, two))
    whole = [np.clip(np.floor(x + 0.5), LOWEST, HIGHEST).tolist() for x in (a, b)]
    alpha = krippendorff_alpha(np.stack([a, b]))
    kappa = weighted_kappa(*whole)
    return Agreement(len(shared), _defined(alpha), _defined(kappa), float((a - b).mean()))


def verdict_of(item: Judged) -> str:
    """The judge's score in the words of a spot check."""
    return "good" if item.passed else "bad" if item.score < BAD_BELOW else "partly"


def compare_with_people(found: Results, labels: Sequence[Mapping[str, Any]]) -> dict[str, Agreement]:
    """The judge beside people, whose labels are lines of ``read_labels``: ``verdicts`` on the answers of adapter and
    base, and ``preferred`` where pairs were against the base. What only one of them has seen is left out."""
    judge = {
        (subject, item.row_id): VERDICTS[verdict_of(item)]
        for subject in ("adapter", "base")
        for item in found.judged.get(subject, ())
    }
    people = {
        (subject, label["row_id"]): VERDICTS[label[subject]]
        for label in labels
        for subject in ("adapter", "base")
        if label.get(subject) is not None
    }
    compared = {"verdicts": compare_raters(judge, people)}
    if found.pairs and found.against == "base":
        won = {pair.row_id: 2.0 + (pair.won > 0.5) - (pair.won < 0.5) for pair in found.pairs}
        liked = {label["row_id"]: PREFERRED[label["preferred"]] for label in labels if label.get("preferred")}
        compared["preferred"] = compare_raters(won, liked)
    return compared


def read_labels(path: Path) -> list[dict[str, Any]]:
    """The labels that people left, one line an item: ``row_id``, ``adapter`` and ``base`` (good, partly, bad) and
    ``preferred`` (adapter, base, tie); what is missing or null was not said. :class:`InputError` with the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            good = isinstance(row["row_id"], str) and row.get("preferred") in (None, *PREFERRED)
            if not good or not all(row.get(subject) in (None, *VERDICTS) for subject in ("adapter", "base")):
                raise ValueError("a word that is no verdict")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                "not a label of a spot check", where=f"{path}:{number}", got=str(error),
                expected=f"row_id, adapter and base ({', '.join(VERDICTS)}), preferred ({', '.join(PREFERRED)})",
            ) from None  # fmt: skip
        found.append(row)
    return found


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
