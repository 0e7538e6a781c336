"""Decisions of a sweep: scripted score tables, and planted forgetting curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.errors import InputError
from tunegate.evaluation.sweeping import ForgettingCurve, fit_forgetting, rank_gain, survivors
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


def test_the_number_of_looks_decides_a_borderline_gain() -> None:
    """6 wins and no loss: McNemar's exact p is 2 / 2**6 = 0.03125, below 0.05 but not below 0.05 / 2."""
    lower, higher = measured([0.0] * 6 + [1.0] * 14), measured([1.0] * 20)
    assert rank_gain(higher, lower, "r4", looks=1)[0]
    assert not rank_gain(higher, lower, "r4", looks=2)[0]
    assert not rank_gain(lower, higher, "r4", looks=1)[0]


def measured(scores: list[float]) -> Measurement:
    return Measurement(metric="exact_match", row_ids=tuple(str(i) for i in range(len(scores))), scores=np.array(scores))
