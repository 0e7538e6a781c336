"""From replies to scores per item: single answers over several samples, pairs in both orders, and people beside them.

An item's score is the mean of its samples, and it passes if that reaches the rubric's ``pass_at``. In a pair each
sample asks twice with the answers swapped; an answer wins a sample only if it wins in both orders, else it is a tie:
judges prefer places (Zheng et al. 2023, arXiv:2306.05685). What comes out are item files and measures for the gate,
``judge.mean``, ``judge.pass_rate`` and ``judge.win_rate`` (a tie counts half), and agreement as plain numbers.

It asks through ``ask`` and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.evaluation.judge.agreement import krippendorff_alpha, weighted_kappa
from tunegate.evaluation.judge.ask import Asker, Question
from tunegate.evaluation.judge.rubric import HIGHEST, LOWEST, Rubric
from tunegate.evaluation.measures import Source
from tunegate.files import write_jsonl


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer to judge; ``other`` is the answer it is compared with in a pair."""

    row_id: str
    prompt: str
    answer: str
    reference: str | None = None
    other: str | None = None


@dataclass(frozen=True)
class Judged:
    """``scores`` and ``reasons`` by sample; ``score`` is their mean."""

    row_id: str
    score: float
    passed: bool
    scores: tuple[int, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class JudgedPair:
    """``won``: 1 for each sample that the answer won in both orders, 0 where it lost both, a half else; their mean.
    ``consistent``: the share of samples in which both orders named the same side, or both a tie."""

    row_id: str
    won: float
    consistent: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """Two raters' scores of the same ``n`` items: Krippendorff's alpha (ordinal), quadratically weighted kappa of the
    scores rounded to whole ones, and by how much the first scores higher. None where it is not defined."""

    n: int
    alpha: float | None
    kappa: float | None
    bias: float | None


Progress = Callable[[int], None]


def judge_items(
    asker: Asker,
    rubric: Rubric,
    items: Sequence[Answered],
    samples: int = 1,
    progress: Progress = lambda n: None,
) -> list[Judged]:
    """Score every answer ``samples`` times, in the order of ``items``."""
    questions = [
        Question(
            rubric.question(item.prompt, item.answer, item.reference),
            rubric.schema,
            ["score", sample],
            {"row_id": item.row_id, "sample": sample},
        )
        for item in items
        for sample in range(samples)
    ]
    verdicts = asker.ask_all(questions, progress)
    judged = []
    for place, item in enumerate(items):
        mine = verdicts[place * samples : (place + 1) * samples]
        scores = tuple(int(v["score"]) for v in mine)
        mean = sum(scores) / samples
        reasons = tuple(str(v["reasons"]) for v in mine)
        judged.append(Judged(item.row_id, mean, mean >= rubric.pass_at, scores, reasons))
    return judged


def judge_pairs(
    asker: Asker,
    rubric: Rubric,
    items: Sequence[Answered],
    samples: int = 1,
    progress: Progress = lambda n: None,
) -> list[JudgedPair]:
    """Compare every answer with its ``other``, ``samples`` times in both orders. Equal answers are a tie, unasked."""
    questions, places = [], []
    for place, item in enumerate(items):
        if item.other is None or item.answer == item.other:
            progress(2 * samples)
            continue
        for sample in range(samples):
            for order, (a, b) in enumerate(((item.answer, item.other), (item.other, item.answer))):
                messages = rubric.pair_question(item.prompt, a, b, item.reference)
                about = {"row_id": item.row_id, "sample": sample, "order": order}
                questions.append(Question(messages, rubric.pair_schema, ["pair", sample], about))
                places.append(place)
    replies: dict[int, list[dict[str, Any]]] = {}
    for place, verdict in zip(places, asker.ask_all(questions, progress), strict=True):
        replies.setdefault(place, []).append(verdict)
    return [_pair(item, replies.get(place, [])) for place, item in enumerate(items)]


def _pair(item: Answered, verdicts: Sequence[Mapping[str, Any]]) -> JudgedPair:
    points, same = [], []
    for first, swapped in zip(verdicts[::2], verdicts[1::2], strict=True):
        sides = first["better"], {"A": "B", "B": "A"}.get(swapped["better"], "tie")
        same.append(sides[0] == sides[1])
        points.append({("A", "A"): 1.0, ("B", "B"): 0.0}.get(sides, 0.5))
    if not points:
        return JudgedPair(item.row_id, 0.5, 1.0, ())
    reasons = tuple(str(v["reasons"]) for v in verdicts)
    return JudgedPair(item.row_id, sum(points) / len(points), sum(same) / len(same), reasons)


def write_judged(
    run: Path,
    folder: str,
    judged: Mapping[str, Sequence[Judged]],
    pairs: Sequence[JudgedPair] = (),
) -> dict[str, Source]:
    """Item files of every subject (``adapter``, and ``base`` if it was judged) in ``run/folder``, and the measures
    over them; ``save_measures`` then shows them to the gate."""
    for subject, items in judged.items():
        write_jsonl(run / folder / f"{subject}.items.jsonl", [asdict(item) for item in items])
    mine = f"{folder}/adapter.items.jsonl"
    references = {name: f"{folder}/{name}.items.jsonl" for name in judged if name != "adapter"}
    scale: list[float | None] = [float(LOWEST), float(HIGHEST)]
    found = {
        "judge.mean": Source("mean", mine, "score", references=references, limits=scale),
        "judge.pass_rate": Source("proportion", mine, "passed", references=references),
    }
    own = self_agreement(judged["adapter"])
    if own is not None:
        found["judge.alpha"] = Source("scalar", mine, value=own)
    if pairs:
        write_jsonl(run / folder / "pairs.items.jsonl", [asdict(pair) for pair in pairs])
        found["judge.win_rate"] = Source("mean", f"{folder}/pairs.items.jsonl", "won")
    return found


def self_agreement(judged: Sequence[Judged]) -> float | None:
    """Alpha of the judge's own samples; None with one sample, or where all scores are the same."""
    if not judged or len(judged[0].scores) < 2:
        return None
    found = krippendorff_alpha(np.array([item.scores for item in judged], dtype=np.float64).T)
    return None if math.isnan(found) else found


def compare_raters(one: Mapping[str, float], two: Mapping[str, float]) -> Agreement:
    """How two raters agree on the items that both have scored, by row id: a judge and people, or two judges."""
    shared = sorted(set(one) & set(two))
    if not shared:
        return Agreement(0, None, None, None)
    a, b = (np.array([rater[row] for row in shared], dtype=np.float64) for rater in (one, two))
    whole = [np.clip(np.floor(x + 0.5), LOWEST, HIGHEST).tolist() for x in (a, b)]
    alpha = krippendorff_alpha(np.stack([a, b]))
    kappa = weighted_kappa(*whole)
    return Agreement(len(shared), _defined(alpha), _defined(kappa), float((a - b).mean()))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
