"""Decisions of a sweep: scripted score tables, and planted forgetting curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.errors import InputError
from tunegate.evaluation.sweeping import (
    Climb,
    Curve,
    ForgettingCurve,
    climb,
    fit_forgetting,
    forgetting_band,
    rank_gain,
    survivors,
)
from tunegate.evaluation.types import Measurement


def test_halving_keeps_the_best_and_breaks_ties_to_the_first() -> None:
    assert survivors({"r4": 0.5, "r8": 0.7, "r16": 0.5, "r32": 0.1}) == ["r8", "r4"]
    assert survivors({"r4": 0.5, "r8": 0.5, "r16": 0.5}) == ["r4", "r8"]
    with pytest.raises(InputError):
        survivors({"r4": float("nan")})


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 1.6), st.floats(5.0, 7.0), st.floats(0.001, 1.0))
def test_a_planted_curve_is_recovered_between_its_points(exponent: float, shift: float, scale: float) -> None:
    planted = ForgettingCurve(scale, 10**shift, exponent, 1.0)
    work = np.geomspace(1e4, 1e8, 9)
    found = fit_forgetting(list(work), list(planted.at(work)))
    between = np.sqrt(work[4:-1] * work[5:])
    assert found.at(between) == pytest.approx(planted.at(between), rel=0.02)
    assert found.exponent == pytest.approx(exponent, abs=0.05)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be fitted"):
        fit_forgetting([1, 2, 3], [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="2 amounts"):
        fit_forgetting([1, 2, 2, 1], [0.1, 0.2, 0.3, 0.1])
    assert forgetting_band([1, 2, 2, 4], [0.1, 0.19, 0.21, 0.4], [2.0]).low[0] < 0.2  # two runs at the same work


def test_the_number_of_looks_decides_a_borderline_gain() -> None:
    """6 wins and no loss: McNemar's exact p is 2 / 2**6 = 0.03125, below 0.05 but not below 0.05 / 2."""
    lower, higher = measured([0.0] * 6 + [1.0] * 14), measured([1.0] * 20)
    assert rank_gain(higher, lower, "r4", looks=1)[0]
    assert not rank_gain(higher, lower, "r4", looks=2)[0]
    assert not rank_gain(lower, higher, "r4", looks=1)[0]


def measured(scores: list[float]) -> Measurement:
    return Measurement(metric="exact_match", row_ids=tuple(str(i) for i in range(len(scores))), scores=np.array(scores))


# --- climbing ----------------------------------------------------------------------------------------------------

ITEMS = 60


def right(count: int) -> Measurement:
    """The first ``count`` of :data:`ITEMS` items are right."""
    return measured([1.0] * count + [0.0] * (ITEMS - count))


def drive(full: dict[int, list[int]]) -> tuple[Climb, dict[int, int]]:
    """What a driver that trains one epoch at a time decides, and how many epochs of each rank it trained."""
    epochs = dict.fromkeys(full, 0)
    while True:
        found = climb([Curve(r, tuple(map(right, full[r][:n])), complete=n == len(full[r])) for r, n in epochs.items()])
        if found.next is None:
            return found, epochs
        epochs[found.next] += 1


def whole(full: dict[int, list[int]]) -> Climb:
    return climb([Curve(r, tuple(map(right, counts)), complete=True) for r, counts in full.items()])


def test_it_starts_low_and_stops_where_nothing_is_gained() -> None:
    found, epochs = drive({4: [20, 30], 8: [40, 50], 16: [41, 51], 32: [60, 60]})
    assert (found.rank, [look.raised for look in found.looks]) == (8, [True, False])
    assert epochs == {4: 2, 8: 2, 16: 2, 32: 0}
    assert [(look.lower, look.comparison.reference) for look in found.looks] == [(4, "rank 4"), (8, "rank 8")]


def test_a_rank_that_is_behind_is_pruned_and_a_tie_goes_to_the_lower_one() -> None:
    found, epochs = drive({4: [20, 30, 31], 8: [20, 60, 60]})
    assert (found.rank, epochs, found.looks[0].pruned) == (4, {4: 3, 8: 1}, 1)
    assert found.looks[0].comparison.difference == pytest.approx((20 - 31) / ITEMS)
    late = whole({4: [20, 30, 31], 8: [20, 60, 60]})  # trained whole before: nothing is saved by not looking
    assert (late.rank, late.looks[0].pruned) == (8, None)


def test_a_lower_rank_that_stopped_early_keeps_its_best_score() -> None:
    found, epochs = drive({4: [40, 30], 8: [41, 41, 39, 60]})
    assert found.looks[0].pruned is None and epochs[8] == 4
    assert drive({4: [42, 30], 8: [43, 41, 39, 60]})[1][8] == 4  # its best so far is ahead


def test_what_is_left_open_is_said() -> None:
    assert climb([Curve(4), Curve(8)]) == Climb(None, 4)
    assert climb([Curve(4, (right(30),), True), Curve(8)]) == Climb(4, 8)
    assert climb([Curve(4, (right(30),), True)]) == Climb(4, None)
    for wrong in ([], [Curve(8), Curve(4)], [Curve(4), Curve(4)]):
        with pytest.raises(InputError, match="climbs through ranks"):
            climb(wrong)


RISING = st.lists(st.integers(0, ITEMS // 2), min_size=2, max_size=5).map(sorted)


@settings(max_examples=150)
@given(RISING, st.lists(st.integers(-20, 30), min_size=2, max_size=4))
def test_pruning_drops_no_better_rank_where_scores_do_not_cross(first: list[int], above: list[int]) -> None:
    """Each rank's curve is the lowest's moved up or down: the order after one epoch is the order at the end."""
    full = {4: first}
    for number, offset in enumerate(above):
        full[8 * 2**number] = [min(max(n + offset, 0), ITEMS) for n in first]
    found, epochs = drive(full)
    assert found.rank == whole(full).rank
    for look in found.looks:
        if look.pruned is not None:
            assert max(full[look.rank]) <= max(full[look.lower])
            assert epochs[look.rank] == look.pruned


@settings(max_examples=100)
@given(st.lists(RISING, min_size=2, max_size=4), st.data())
def test_more_that_is_known_of_higher_ranks_changes_nothing(scores: list[list[int]], data: st.DataObject) -> None:
    """Ranks that train at once: what is decided from whole curves does not wait for those above it."""
    full = {4 * 2**n: counts for n, counts in enumerate(scores)}
    end = whole(full)
    top = max([4, *(look.rank for look in end.looks)])
    known = {r: len(c) if r <= top else data.draw(st.integers(0, len(c))) for r, c in full.items()}
    part = climb([Curve(r, tuple(map(right, c[: known[r]])), known[r] == len(c)) for r, c in full.items()])
    assert part == end


def test_ranks_that_are_alike_are_seldom_raised() -> None:
    """Best of three epochs each, answers by chance: the choice of epochs on the same items does not break the level."""
    random = np.random.default_rng(0)
    raised = 0
    for _ in range(150):
        curves = [
            Curve(rank, tuple(measured(list((random.random(ITEMS) < 0.6).astype(float))) for _ in range(3)), True)
            for rank in (4, 8, 16)
        ]
        raised += any(look.raised for look in climb(curves).looks)
    assert raised / 150 <= 0.05


# --- the band ----------------------------------------------------------------------------------------------------


def test_a_planted_curve_lies_within_its_band() -> None:
    random, inside, below, n = np.random.default_rng(1), 0, 0, 40
    work = np.geomspace(1e4, 1e8, 8)
    at = float(np.sqrt(work[4] * work[5]))
    for _ in range(n):
        planted = ForgettingCurve(0.3, 10 ** random.uniform(5, 7), random.uniform(0.3, 1.6), 1.0)
        true = np.asarray(planted.at(work))
        seen = true + 0.05 * np.sqrt((true**2).mean()) * random.normal(size=len(work))
        band = forgetting_band(list(work), list(seen), [at])
        inside += (band.exponent_low or 0.0) <= planted.exponent <= (band.exponent_high or 9.0)
        below += band.low[0] <= planted.at(at) <= band.high[0]
    assert inside >= 0.85 * n and below >= 0.85 * n


def test_without_noise_the_band_is_the_curve() -> None:
    planted = ForgettingCurve(0.02, 2e5, 0.8, 1.0)
    work = np.geomspace(1e4, 1e8, 9)
    band = forgetting_band(list(work), list(planted.at(work)), list(work[3:]))
    assert band.exponent_low == pytest.approx(0.8, abs=0.03) and band.exponent_high == pytest.approx(0.8, abs=0.03)
    assert band.low == pytest.approx(planted.at(work[3:]), rel=0.03)
    assert band.high == pytest.approx(planted.at(work[3:]), rel=0.03)


def test_few_noisy_points_leave_the_exponent_open() -> None:
    band = forgetting_band([1e5, 2e5, 3e5, 4e5], [0.01, 0.03, 0.02, 0.05], [3e5])
    assert band.exponent_low is None and band.exponent_high is None
    assert band.low[0] < 0.03 < band.high[0]
