"""Packing: batches derived by hand, no target lost, budgets kept, order a function of seed and epoch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.data.pack import SHORTEST_PREFIX, Batch, common_prefix, epoch_steps, make_batch, split_batches
from tunegate.data.types import Rendered
from tunegate.kernels import Layout


def row(name: str, ids: list[int], targets: str) -> Rendered:
    return Rendered(name, tuple(ids), tuple(mark == "x" for mark in targets))


@st.composite
def _row_lists(draw: st.DrawFn) -> list[Rendered]:
    """Rows over few ids, most of which begin alike; some have no target, some have one at once."""
    header = draw(st.lists(st.integers(0, 2), max_size=9))
    rows = []
    for number in range(draw(st.integers(1, 8))):
        begin = header if draw(st.booleans()) else []
        ids = [*begin, *draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))]
        rows.append(Rendered(f"r{number}", tuple(ids), tuple(draw(st.booleans()) for _ in ids)))
    return rows


def what_is_learned(batches: list[Batch]) -> Counter:
    """(row, label, everything the model sees before it) of every target, read back from the batches."""
    found: Counter = Counter()
    for batch in batches:
        starts, prefix = batch.layout.starts, batch.layout.prefix
        own = starts[1:] if prefix else starts
        shared = batch.ids[:prefix].tolist()
        for predictor, label, number in zip(
            batch.predictors.tolist(), batch.labels.tolist(), batch.target_rows.tolist(), strict=True
        ):
            before = shared + batch.ids[own[number] : predictor + 1].tolist()
            assert batch.positions[predictor] == len(before) - 1
            found[batch.row_ids[number], label, tuple(before)] += 1
    return found


def what_should_be_learned(rows: list[Rendered]) -> Counter:
    return Counter((r.row_id, r.ids[i], r.ids[:i]) for r in rows for i in range(1, len(r)) if r.target[i])


@pytest.mark.parametrize(
    "rows, length",
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 3),
        ([[1, 2], [1, 2, 3]], 2),
        ([[1], [2]], 0),
        ([[], [1]], 0),
        ([[1, 2, 3]], 3),
        ([[1, 5, 9], [1, 4, 9], [1, 5, 2]], 1),
    ],
)
def test_common_prefix(rows: list[list[int]], length: int) -> None:
    assert common_prefix(rows) == length


@given(st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=6))
def test_common_prefix_is_the_longest(rows: list[list[int]]) -> None:
    n = common_prefix(rows)
    assert all(r[:n] == rows[0][:n] and len(r) >= n for r in rows)
    assert any(len(r) == n for r in rows) or len({tuple(r[: n + 1]) for r in rows}) > 1


ROWS = [row("a", [9, 8, 7, 6, 5, 1, 2], ".....xx"), row("b", [9, 8, 7, 6, 5, 3], ".....x")]


def test_a_shared_batch_by_hand() -> None:
    # five tokens are common; the fifth predicts the first target, so four are shared
    batch = make_batch(ROWS)
    assert batch.layout == Layout((4, 3, 2), 4)
    assert batch.ids.tolist() == [9, 8, 7, 6, 5, 1, 2, 5, 3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert batch.predictors.tolist() == [4, 5, 7]
    assert batch.labels.tolist() == [1, 2, 3]
    assert batch.target_rows.tolist() == [0, 0, 1]
    assert batch.row_ids == ("a", "b")
    assert batch.row_tokens == 13
    assert batch.n_targets == 3


def test_an_unshared_batch_by_hand() -> None:
    batch = make_batch(ROWS, share_prefix=False)
    assert batch.layout == Layout((7, 6))
    assert batch.ids.tolist() == [9, 8, 7, 6, 5, 1, 2, 9, 8, 7, 6, 5, 3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert batch.predictors.tolist() == [4, 5, 11]
    assert batch.labels.tolist() == [1, 2, 3]


def test_a_target_in_the_first_place_cannot_be_learned() -> None:
    batch = make_batch([row("a", [4, 5], "x."), row("b", [4, 6], "xx")])
    assert batch.layout.prefix == 0
    assert batch.labels.tolist() == [6]
    assert batch.predictors.tolist() == [2]


def test_equal_rows_keep_a_token_of_their_own() -> None:
    twins = [row(name, [1, 2, 3, 4, 5, 6], "......") for name in "ab"]
    assert make_batch(twins).layout == Layout((5, 1, 1), 5)


def test_a_short_prefix_is_not_shared() -> None:
    def pair(n: int) -> list[Rendered]:
        return [row(name, [*range(n), 90, end], "." * n + ".x") for name, end in (("a", 91), ("b", 92))]

    assert make_batch(pair(SHORTEST_PREFIX - 2)).layout.prefix == 0
    assert make_batch(pair(SHORTEST_PREFIX)).layout.prefix == SHORTEST_PREFIX


def test_one_row_shares_with_nobody() -> None:
    assert make_batch(ROWS[:1]).layout == Layout((7,))


@given(_row_lists(), st.booleans())
def test_no_target_is_lost_or_sees_anything_else(rows: list[Rendered], share: bool) -> None:
    assert what_is_learned([make_batch(rows, share_prefix=share)]) == what_should_be_learned(rows)


@given(_row_lists(), st.booleans(), st.integers(1, 40))
def test_split_batches_keeps_rows_targets_and_budget(rows: list[Rendered], share: bool, tokens: int) -> None:
    batches = split_batches(rows, tokens, share_prefix=share)
    assert [name for batch in batches for name in batch.row_ids] == [r.row_id for r in rows]
    assert what_is_learned(batches) == what_should_be_learned(rows)
    assert sum(batch.row_tokens for batch in batches) == sum(len(r) for r in rows)
    for batch in batches:
        assert len(batch.ids) == len(batch.positions) == batch.layout.tokens
        assert batch.layout.tokens <= tokens or len(batch.row_ids) == 1


def test_split_batches_fills_up() -> None:
    rows = [row(str(n), [n] * 4, "..xx") for n in range(5)]
    assert [len(b.row_ids) for b in split_batches(rows, 8)] == [2, 2, 1]
    assert [len(b.row_ids) for b in split_batches(rows, 3)] == [1] * 5
    assert [len(b.row_ids) for b in split_batches(rows, 1000)] == [5]
    assert split_batches([], 8) == []


def test_the_shared_prefix_counts_once_in_the_budget() -> None:
    rows = [row(str(n), [*range(10, 20), n, n], "." * 11 + "x") for n in range(6)]
    # 10 shared + 2 a row: 16 tokens hold three rows; unshared they hold one
    assert [len(b.row_ids) for b in split_batches(rows, 16)] == [3, 3]
    assert [len(b.row_ids) for b in split_batches(rows, 16, share_prefix=False)] == [1] * 6


@given(_row_lists(), st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_is_a_permutation_within_the_budget(rows: list[Rendered], tokens: int, seed: int, epoch: int) -> None:
    steps = epoch_steps(rows, tokens, seed=seed, epoch=epoch)
    assert sorted(r.row_id for step in steps for r in step) == sorted(r.row_id for r in rows)
    for number, step in enumerate(steps):
        used = sum(len(r) for r in step)
        assert used <= tokens or len(step) == 1
        if number + 1 < len(steps):
            assert used + len(steps[number + 1][0]) > tokens  # filled up: the next row did not fit
    assert steps == epoch_steps(rows, tokens, seed=seed, epoch=epoch)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    rows = [row(str(n), [n, n], ".x") for n in range(30)]

    def order(seed: int, epoch: int, tokens: int) -> list[str]:
        return [r.row_id for step in epoch_steps(rows, tokens, seed=seed, epoch=epoch) for r in step]

    assert order(0, 0, 8) == order(0, 0, 20)
    orders = {tuple(order(seed, epoch, 8)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
