"""Rendered rows into flat batches by token budget, and epochs into optimizer steps.

A :class:`Batch` is one run of tokens with row borders (:class:`tunegate.kernels.Layout`), never padded. Where
all rows of a batch begin alike (a system prompt, the template's header), that prefix is stored once and seen by
all; the loss and its gradient are the same, the work is less. Order depends on the seed, the epoch and the rows
alone, so a run can be resumed at any step without replaying what came before.

It does not move tensors to a device and knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunegate.data.types import Rendered
from tunegate.kernels import Layout

SHORTEST_PREFIX = 4  # sharing fewer tokens does not pay for its bookkeeping


@dataclass(frozen=True)
class Batch:
    """A flat run of ``T`` tokens with ``N`` targets.

    ``ids`` and ``positions`` are (T,) int64; hidden state ``predictors[i]`` predicts ``labels[i]`` (both (N,)
    int64), a target of row ``target_rows[i]`` of ``row_ids``. ``row_tokens`` counts the rows' tokens as if no
    prefix were shared.
    """

    ids: Tensor
    positions: Tensor
    layout: Layout
    predictors: Tensor
    labels: Tensor
    target_rows: Tensor
    row_ids: tuple[str, ...]
    row_tokens: int

    @property
    def n_targets(self) -> int:
        return len(self.labels)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all ``rows`` share."""
    keys = [tuple(row) for row in rows]
    first, last = min(keys), max(keys)  # the two that differ most, in lexicographic order
    n = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        n += 1
    return n


def make_batch(rows: Sequence[Rendered], *, share_prefix: bool = True) -> Batch:
    """Pack ``rows`` into one run. Their common prefix is shared up to the token that predicts the first target."""
    prefix = _shareable(rows) if share_prefix and len(rows) > 1 else 0
    ids: list[int] = list(rows[0].ids[:prefix])
    lengths = [prefix] if prefix else []
    predictors: list[int] = []
    labels: list[int] = []
    target_rows: list[int] = []
    for number, row in enumerate(rows):
        start = len(ids) - prefix  # where the row's token 0 would lie
        ids.extend(row.ids[prefix:])
        lengths.append(len(row.ids) - prefix)
        for i in range(max(prefix, 1), len(row.ids)):
            if row.target[i]:
                predictors.append(start + i - 1)
                labels.append(row.ids[i])
                target_rows.append(number)
    layout = Layout(tuple(lengths), prefix)
    return Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(layout.positions()),
        layout=layout,
        predictors=torch.tensor(predictors, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        target_rows=torch.tensor(target_rows, dtype=torch.long),
        row_ids=tuple(row.row_id for row in rows),
        row_tokens=sum(len(row) for row in rows),
    )


def _shareable(rows: Sequence[Rendered]) -> int:
    longest = common_prefix([row.ids for row in rows])
    for row in rows:
        first_target = next((i for i, t in enumerate(row.target) if t and i > 0), len(row.ids))
        longest = min(longest, first_target - 1, len(row.ids) - 1)
    return longest if longest >= SHORTEST_PREFIX else 0


def split_batches(rows: Sequence[Rendered], tokens: int, *, share_prefix: bool = True) -> list[Batch]:
    """``rows`` in order, in batches of at most ``tokens`` computed tokens (a longer row has a batch of its own)."""
    prefix = _shareable(rows) if share_prefix and len(rows) > 1 else 0
    groups: list[list[Rendered]] = []
    used = 0
    for row in rows:
        own = len(row) - prefix
        if not groups or used + own > tokens:
            groups.append([])
            used = prefix
        groups[-1].append(row)
        used += own
    return [make_batch(group, share_prefix=share_prefix) for group in groups]


def epoch_steps(rows: Sequence[Rendered], tokens_per_step: int, *, seed: int, epoch: int) -> list[list[Rendered]]:
    """One epoch as optimizer steps: shuffled rows, each step filled up to ``tokens_per_step`` row tokens.

    Shared prefixes count in full, so that what a step learns from does not depend on how it is computed.
    """
    order = list(range(len(rows)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    steps: list[list[Rendered]] = []
    used = 0
    for index in order:
        row = rows[index]
        if not steps or used + len(row) > tokens_per_step:
            steps.append([])
            used = 0
        steps[-1].append(row)
        used += len(row)
    return steps
