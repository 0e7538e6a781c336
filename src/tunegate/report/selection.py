"""Which of a run's test items a person is asked about: a systematic sample of the items in order of their strata.

The items are sorted by outcome (both right, the adapter better, the base better, both wrong), then by label or group,
then by a hash. From the sorted list every (N/n)-th is taken, from a start that the seed gives (Cochran, Sampling
Techniques, 1977, chapter 8). So each stratum is represented in proportion to its size, within one item, and every
item is as likely to be taken as any other: shares found on the sample are those of the test set, without weights. The
same items and seed give the same sample, on every machine.

It does not oversample rare strata: what is seldom wrong is seldom shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunegate.files import hash_json

OUTCOMES = ("both right", "adapter better", "base better", "both wrong")
ALIKE = 0.1  # graded scores no further apart than this are alike
RIGHT = 0.5  # a score from here on is right


@dataclass(frozen=True)
class Item:
    """A test item with both answers. ``prompt``: messages as in ``data/types.py``; ``kind``: its label, or else its
    group, where it has one; scores are those of the task's primary metric."""

    row_id: str
    prompt: list[dict[str, Any]]
    reference: str
    base: str
    adapter: str
    base_score: float
    adapter_score: float
    kind: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        gain = self.adapter_score - self.base_score
        if abs(gain) > ALIKE:
            return OUTCOMES[1] if gain > 0 else OUTCOMES[2]
        return OUTCOMES[0] if self.adapter_score >= RIGHT else OUTCOMES[3]


def select(items: Sequence[Item], n: int, seed: int) -> list[Item]:
    """``n`` of ``items`` (all, if there are fewer) in an order that tells nothing about their strata."""

    def place(item: Item, use: str) -> str:
        return hash_json([seed, use, item.row_id])

    ordered = sorted(items, key=lambda i: (OUTCOMES.index(i.outcome), i.kind, place(i, "stratum")))
    total, n = len(ordered), min(n, len(ordered))
    start = int(hash_json([seed, "start", total])[3:19], 16) % total if total else 0
    # Item j is taken if some k has n*j <= start + k*total < n*(j+1): for n of the ``total`` starts, whatever j is.
    chosen = [ordered[(start + k * total) // n] for k in range(n)]
    return sorted(chosen, key=lambda i: place(i, "order"))
