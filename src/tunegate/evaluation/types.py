"""What evaluation passes around: an item to score, a metric that scores it, and what came out.

A metric maps one :class:`Item` to a number between 0 and 1. A metric whose reported value is not the mean of
those numbers (BLEU, chrF, micro F1) also gives per-item counts and a function of their sum, so that any subset or
resample of the items can be scored without reading the texts again. Nothing here knows a concrete metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunegate.data.types import Example


@dataclass(frozen=True)
class Item:
    """One answer and what it is judged against. ``example`` is the labelled example it answers."""

    prediction: str
    reference: str
    example: Example

    @property
    def row_id(self) -> str:
        return self.example.row_id


@dataclass(frozen=True)
class Metric:
    """A named way to score an item.

    ``per_item`` gives the item's score in [0, 1]. ``counts`` and ``aggregate`` are both set or both None: the
    reported value is then ``aggregate(sum of counts over items)``, in [0, 1]; without them it is the mean of the
    scores. ``check_reference`` says what is wrong with a reference that cannot be scored against (None: nothing).
    ``readable`` says whether an answer could be read at all; an unreadable one scores 0 and is counted.
    """

    name: str
    per_item: Callable[[Item], float]
    counts: Callable[[Item], Sequence[float]] | None = None
    aggregate: Callable[[np.ndarray], float] | None = None
    check_reference: Callable[[str], str | None] | None = None
    readable: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Measurement:
    """One metric over the items of one subject, in order.

    ``scores``: (n,) float64 in [0, 1]. ``counts``: (n, k) float64 or None, and ``aggregate`` with it.
    ``unreadable`` is the number of answers that could not be read (no label, no JSON, no number), None where the
    metric reads every answer.
    """

    metric: str
    row_ids: tuple[str, ...]
    scores: np.ndarray
    counts: np.ndarray | None = None
    aggregate: Callable[[np.ndarray], float] | None = None
    unreadable: int | None = None

    @property
    def value(self) -> float:
        """The reported value: the aggregate where the metric has one, else the mean score."""
        if self.counts is not None and self.aggregate is not None:
            return float(self.aggregate(self.counts.sum(axis=0)))
        return float(self.scores.mean())
