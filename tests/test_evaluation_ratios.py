"""Ratios to a reference: laws, values by hand, scipy as an oracle, and the coverage of the interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tunegate.errors import InputError
from tunegate.evaluation.ratios import likelihood_ratio, mean_interval, ratio


def test_the_ratio_is_that_of_the_means() -> None:
    reference = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    candidate = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    found = ratio("x", candidate, reference)
    assert found.value == pytest.approx(0.75)
    assert (found.candidate, found.reference, found.n) == (0.5, pytest.approx(4 / 6), 6)
    assert 0.0 <= found.low <= 0.75 <= 1.0
    assert found.high is not None and 0.75 <= found.high <= 1.0  # nobody gained, so no draw exceeds 1


def test_equal_answers_are_not_proof_of_equality() -> None:
    """Wilson: with 0 of n items different, up to z^2 / (n + z^2) of all may differ."""
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (50, 400):
        scores = np.array([1.0, 0.0] * (n // 2))
        found = ratio("x", scores, scores)
        assert found.value == 1.0
        assert found.low == pytest.approx((0.5 - z2 / (n + z2)) / 0.5)
        assert found.high == pytest.approx((0.5 + z2 / (n + z2)) / 0.5)


def test_a_reference_that_scores_nothing_has_no_ratio() -> None:
    zero, some = np.zeros(20), np.array([1.0] + [0.0] * 19)
    nothing = ratio("x", some, zero)
    assert (nothing.value, nothing.low, nothing.high) == (None, 0.0, None)
    assert ratio("x", zero, zero).value is None
    lost = ratio("x", zero, some)
    assert (lost.value, lost.low) == (0.0, 0.0)
    assert lost.high is None  # a third of the draws has no right answer at all


def test_scaling_both_changes_nothing() -> None:
    random = np.random.default_rng(0)
    a, b = random.random(40), random.random(40)
    one, half = ratio("x", a, b), ratio("x", a / 2, b / 2)
    assert (one.value, one.low, one.high) == pytest.approx((half.value, half.low, half.high))


def test_the_interval_is_near_scipys_for_many_items() -> None:
    random = np.random.default_rng(1)
    reference = (random.random(400) < 0.6).astype(float)
    candidate = np.where(random.random(400) < 0.1, 0.0, reference)

    def value(c: np.ndarray, r: np.ndarray, axis: int = -1) -> np.ndarray:
        return c.mean(axis=axis) / r.mean(axis=axis)

    oracle = stats.bootstrap((candidate, reference), value, paired=True, method="percentile", rng=2).confidence_interval
    found = ratio("x", candidate, reference)
    assert found.low == pytest.approx(oracle.low, abs=0.01)
    assert found.high == pytest.approx(oracle.high, abs=0.01)


def test_the_lower_bound_is_seldom_above_the_truth() -> None:
    """One-sided error of the 95 % interval at a true ratio of 0.9, n = 72: at most 2.5 %, and some for chance."""
    random = np.random.default_rng(3)
    wrong = 0
    for trial in range(200):
        reference = (random.random(72) < 0.5).astype(float)
        lost, gained = random.random(72) < 0.2, random.random(72) < 0.1
        candidate = np.where(reference == 1, ~lost, gained).astype(float)  # 0.5*0.8 + 0.5*0.1 = 0.45 of all
        wrong += ratio("x", candidate, reference, seed=trial).low > 0.9
    assert wrong <= 11  # P(more than 11 of 200 at 2.5 %) = 0.3 %


def test_likelihood_ratios_are_those_of_geometric_means() -> None:
    reference, candidate = np.log([0.5, 0.25, 0.1]), np.log([0.25, 0.25, 0.1])
    found = likelihood_ratio("x", candidate, reference)
    assert found.value == pytest.approx(0.5 ** (1 / 3))
    assert found.reference == pytest.approx((0.5 * 0.25 * 0.1) ** (1 / 3))
    assert found.low <= found.value <= 1.0
    same = likelihood_ratio("x", reference, reference)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_mean_intervals_are_near_students() -> None:
    values = np.random.default_rng(4).normal(2.0, 3.0, 60)
    mean, low, high = mean_interval(values)
    half = stats.t.ppf(0.975, 59) * values.std(ddof=1) / np.sqrt(60)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.12), pytest.approx(mean + half, abs=0.12))


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [([], []), ([1.0], [1.0, 0.0]), ([float("nan")], [1.0]), ([float("inf")], [1.0])],
)
def test_what_cannot_be_compared_is_refused(candidate: list[float], reference: list[float]) -> None:
    with pytest.raises(InputError):
        ratio("x", np.array(candidate), np.array(reference))


def test_confidence_must_be_a_share() -> None:
    with pytest.raises(InputError, match="confidence"):
        ratio("x", np.ones(3), np.ones(3), confidence=95)
