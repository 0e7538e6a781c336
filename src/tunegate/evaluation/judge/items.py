"""From replies to scores per item: single answers over several samples, and pairs in both orders.

An item's score is the mean of its samples, and it passes if that reaches the rubric's ``pass_at``. In a pair each
sample asks twice with the answers swapped; an answer wins a sample only if it wins in both orders, else it is a tie:
judges prefer places (Zheng et al. 2023, arXiv:2306.05685).

It asks through ``ask``; ``results`` says what the scores amount to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunegate.data.types import Message
from tunegate.evaluation.judge.ask import Asker, Question
from tunegate.evaluation.judge.rubric import Rubric
from tunegate.files import canonical_json


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


Progress = Callable[[int], None]


def conversation(messages: Sequence[Message]) -> str:
    """What the model was asked with, as one text: a single user message as it is, else every turn under its role."""
    if len(messages) == 1 and set(messages[0]) <= {"role", "content"}:
        return str(messages[0].get("content") or "")
    turns = []
    for message in messages:
        parts = [str(message.get("content") or "")]
        parts += [canonical_json(message["tool_calls"])] if message.get("tool_calls") else []
        turns.append(f"{message['role']}: " + "\n".join(part for part in parts if part))
    return "\n\n".join(turns)


def item_questions(rubric: Rubric, items: Sequence[Answered], samples: int) -> list[Question]:
    """Every item's questions, sample after sample, in the order of ``items``."""
    return [
        Question(
            rubric.question(item.prompt, item.answer, item.reference),
            rubric.schema,
            ["score", sample],
            {"row_id": item.row_id, "sample": sample},
        )
        for item in items
        for sample in range(samples)
    ]


def judge_items(
    asker: Asker,
    rubric: Rubric,
    items: Sequence[Answered],
    samples: int = 1,
    progress: Progress = lambda n: None,
) -> list[Judged]:
    """Score every answer ``samples`` times, in the order of ``items``."""
    verdicts = asker.ask_all(item_questions(rubric, items, samples), progress)
    judged = []
    for place, item in enumerate(items):
        mine = verdicts[place * samples : (place + 1) * samples]
        scores = tuple(int(v["score"]) for v in mine)
        mean = sum(scores) / samples
        judged.append(Judged(item.row_id, mean, mean >= rubric.pass_at, scores, tuple(v["reasons"] for v in mine)))
    return judged


def pair_questions(rubric: Rubric, items: Sequence[Answered], samples: int) -> list[Question]:
    """Each sample's two questions, the second with the answers swapped; none where the answers are equal."""
    questions = []
    for item in items:
        assert item.other is not None
        for sample in range(samples if item.answer != item.other else 0):
            for order, (a, b) in enumerate(((item.answer, item.other), (item.other, item.answer))):
                messages = rubric.pair_question(item.prompt, a, b, item.reference)
                about = {"row_id": item.row_id, "sample": sample, "order": order}
                questions.append(Question(messages, rubric.pair_schema, ["pair", sample], about))
    return questions


def judge_pairs(
    asker: Asker,
    rubric: Rubric,
    items: Sequence[Answered],
    samples: int = 1,
    progress: Progress = lambda n: None,
) -> list[JudgedPair]:
    """Compare every answer with its ``other``, ``samples`` times in both orders. Equal answers are a tie, unasked."""
    verdicts = iter(asker.ask_all(pair_questions(rubric, items, samples), progress))
    return [
        _pair(item, [next(verdicts) for _ in range(2 * samples if item.answer != item.other else 0)]) for item in items
    ]


def _pair(item: Answered, verdicts: Sequence[Mapping[str, Any]]) -> JudgedPair:
    points, same = [], []
    for first, swapped in zip(verdicts[::2], verdicts[1::2], strict=True):
        sides = first["better"], {"A": "B", "B": "A"}.get(swapped["better"], "tie")
        same.append(sides[0] == sides[1])
        points.append({("A", "A"): 1.0, ("B", "B"): 0.0}.get(sides, 0.5))
    if not points:
        return JudgedPair(item.row_id, 0.5, 1.0, ())
    reasons = tuple(v["reasons"] for v in verdicts)
    return JudgedPair(item.row_id, sum(points) / len(points), sum(same) / len(same), reasons)
