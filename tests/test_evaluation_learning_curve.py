"""The power law: exact curves are found again, scipy agrees, intervals cover, and flat curves promise nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from tunegate.errors import InputError
from tunegate.evaluation.learning_curve import PowerLaw, fit_curve, fit_law

ROWS = (50, 125, 250, 500)


@pytest.mark.parametrize("law", [PowerLaw(2.0, 0.5, 0.1), PowerLaw(5.0, 1.0, 0.05), PowerLaw(1.0, 0.3, 0.0)])
def test_an_exact_curve_is_found_again(law: PowerLaw) -> None:
    found = fit_law(ROWS, [law.score(n) for n in ROWS])
    for rows in (*ROWS, 1000, 2000):
        assert found.score(rows) == pytest.approx(law.score(rows), abs=2e-3)
    assert found.b == pytest.approx(law.b, rel=0.05)


@settings(max_examples=40)
@given(st.lists(st.floats(0.05, 0.95), min_size=4, max_size=4))
def test_no_worse_than_scipy(scores: list[float]) -> None:
    def loss(law: PowerLaw) -> float:
        return sum((1 - law.a * n**-law.b - law.c - s) ** 2 for n, s in zip(ROWS, scores, strict=True))

    def model(n: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return 1 - a * (n / 500) ** -b - c

    mine = fit_law(ROWS, scores)
    assert mine.a >= 0 and mine.c >= 0
    try:
        (a, b, c), _ = curve_fit(
            model, np.array(ROWS, float), scores, p0=(0.3, 0.5, 0.1), bounds=([0, 0.02, 0], [9, 3, 1])
        )
    except RuntimeError:
        return
    assert loss(mine) <= loss(PowerLaw(a * 500**b, b, c)) * 1.01 + 1e-5


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(1, 8))
def test_predictions_never_fall_and_stay_scores(scores: list[float], factor: float) -> None:
    law = fit_law(ROWS, scores)
    assert 0.0 <= law.score(500) <= law.score(500 * factor) + 1e-12 <= 1.0 + 1e-12


def items(means: list[float], n: int, seed: int) -> np.ndarray:
    """0/1 scores with the same luck of each item at every size."""
    luck = np.random.default_rng(seed).random(n)
    return np.stack([(luck < mean).astype(float) for mean in means])


def test_a_rising_curve_promises_more_and_a_flat_one_nothing() -> None:
    rising = fit_curve(ROWS, items([0.2, 0.36, 0.5, 0.65], 400, 0))
    assert rising.more_rows_help and rising.doubling.low > 0.03
    assert rising.predicted["4x"].value > rising.predicted["2x"].value > rising.scores[-1] - 0.02
    flat = fit_curve(ROWS, items([0.7, 0.7, 0.7, 0.7], 400, 0))
    assert not flat.more_rows_help and flat.doubling.value == pytest.approx(0.0, abs=1e-3)
    assert not flat.flat and fit_curve(ROWS, np.zeros((4, 11))).flat and fit_curve(ROWS, np.ones((4, 11))).flat
    falling = fit_curve(ROWS, items([0.8, 0.7, 0.6, 0.5], 400, 0))
    assert not falling.more_rows_help


def test_the_interval_covers_the_truth() -> None:
    law = PowerLaw(3.0, 0.5, 0.1)
    hits = 0
    for seed in range(40):
        curve = fit_curve(ROWS, items([law.score(n) for n in ROWS], 200, seed))
        hits += curve.predicted["1x"].low <= law.score(500) <= curve.predicted["1x"].high
    assert hits >= 34  # 95 % wanted; below 34 of 40 has a chance of 0.3 %


def test_the_same_scores_give_the_same_curve() -> None:
    scores = items([0.2, 0.4, 0.5, 0.6], 60, 1)
    assert fit_curve(ROWS, scores) == fit_curve(ROWS, scores)


def test_what_cannot_be_fitted() -> None:
    for rows, scores in (((10, 20), [0.1, 0.2]), ((10, 10, 20), [0.1, 0.2, 0.3]), ((10, 20, 40), [0.1, 1.2, 0.3])):
        with pytest.raises(InputError):
            fit_law(rows, scores)
    with pytest.raises(InputError, match="same items"):
        fit_curve(ROWS, np.zeros((3, 5)))
