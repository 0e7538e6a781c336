"""Whether an adapter recites: its answers to training prompts against the answers that it was trained on.

Two shares per item: ``verbatim`` (the answer is the reference, white space and case folded) and ``overlap`` (the
share of the answer's word 5-grams that stand in the reference). A model that learned a task is right on training
prompts and on new ones alike, so what accuses is the excess over held-out prompts, not the share alone. A short
answer is its own only right form: references under eight words say nothing and are left out.

What counts as verbatim follows Carlini et al. (2023, "Quantifying memorization across neural language models"), on
whole answers instead of continuations of 50 tokens. It generates nothing and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tunegate.evaluation.measures import Source

MEMORISED = ("verbatim_rate", "verbatim_excess", "ngram_overlap", "ngram_excess")  # after "train."
WORDS = 5  # of an n-gram
SHORTEST = 8  # words of a reference that says something


@dataclass(frozen=True)
class Recall:
    """Per item with a long enough reference, in order: ``rows`` are its indices; both shares are (n,) in [0, 1]."""

    rows: tuple[int, ...]
    verbatim: np.ndarray
    overlap: np.ndarray


def recall(answers: Sequence[str], references: Sequence[str]) -> Recall:
    """How much of each reference came back. Both are (n,) texts; items with short references are left out."""
    rows, verbatim, overlap = [], [], []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        wanted, said = reference.casefold().split(), answer.casefold().split()
        if len(wanted) < SHORTEST:
            continue
        rows.append(row)
        verbatim.append(float(said == wanted))
        overlap.append(shared(said, wanted))
    return Recall(tuple(rows), np.array(verbatim), np.array(overlap))


def shared(said: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of the 5-grams of ``said`` that stand in ``wanted``; 0 for an answer of fewer than five words."""
    mine, theirs = list(_ngrams(said)), set(_ngrams(wanted))
    return sum(gram in theirs for gram in mine) / len(mine) if mine else 0.0


def _ngrams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


def recall_measures(items: dict[str, int], folder: str = "recall") -> dict[str, Source]:
    """The measures over ``train.items.jsonl`` and ``valid.items.jsonl`` of a step's folder, each line with a
    ``row_id``, ``verbatim`` and ``overlap``. ``items``: how many lines each split has. Without any in train, the
    answers are too short to be recited, and each measure says so by being the number 0."""
    train, valid = f"{folder}/train.items.jsonl", f"{folder}/valid.items.jsonl"
    if not items["train"]:
        return {f"train.{name}": Source("scalar", train, value=0.0) for name in MEMORISED}
    found = {
        "train.verbatim_rate": Source("mean", train, "verbatim"),
        "train.ngram_overlap": Source("mean", train, "overlap"),
    }
    if items["valid"]:
        found["train.verbatim_excess"] = Source("excess", train, "verbatim", others=valid)
        found["train.ngram_excess"] = Source("excess", train, "overlap", others=valid)
    return found
