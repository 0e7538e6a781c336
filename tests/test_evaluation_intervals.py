"""The score test and the intervals on it: against scipy, published examples, numerical maximum likelihood and laws."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from tunegate.evaluation.intervals import (
    FEW,
    clopper_pearson,
    difference,
    excess,
    mcnemar,
    mean,
    proportion,
    ratio,
    ratio_of_sums,
    score_test,
    sign_flip,
    tango,
    wilson,
    z_of,
)
from tunegate.evaluation.statistics import items_to_decide


def pairs(both: int, wins: int, losses: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    mine = [1] * both + [1] * wins + [0] * losses + [0] * neither
    theirs = [1] * both + [0] * wins + [1] * losses + [0] * neither
    return np.array(mine, float), np.array(theirs, float)


# --- the score test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "p"), [(45, 50, 0.8), (3, 50, 0.1), (50, 50, 0.9), (0, 20, 0.2), (7, 9, 0.7)])
def test_it_is_the_textbook_test_of_a_proportion(k: int, n: int, p: float) -> None:
    y = np.array([1.0] * k + [0.0] * (n - k)) - p
    z, sd = score_test(y, -p, 1 - p)
    assert float(z) == pytest.approx((k / n - p) / math.sqrt(p * (1 - p) / n), rel=1e-6)
    assert float(sd) == pytest.approx(math.sqrt(p * (1 - p)), rel=1e-6)


@pytest.mark.parametrize(("wins", "losses", "n"), [(9, 4, 40), (3, 0, 25), (0, 0, 30), (30, 45, 300), (0, 6, 30)])
def test_it_is_tangos_test_of_a_difference(wins: int, losses: int, n: int) -> None:
    low, high = tango(wins, losses, n)
    mine, theirs = pairs(0, wins, losses, n - wins - losses)
    for bound, sign in ((low, 1), (high, -1)):
        z, _ = score_test(mine - theirs - bound, -1 - bound, 1 - bound)
        assert float(z) == pytest.approx(sign * z_of(0.95), abs=1e-4)


def constrained_sd(cells: tuple[int, int, int, int], r: float) -> float:
    """The standard deviation of a - r b with the cell rates found by a numerical search under mean(a) = r mean(b)."""
    d = np.array([1 - r, 1.0, -r, 0.0])
    counts = np.array(cells, float)

    def loss(p: np.ndarray) -> float:
        return -float(counts @ np.log(np.maximum(p, 1e-12)))

    limits = [{"type": "eq", "fun": lambda p: p.sum() - 1}, {"type": "eq", "fun": lambda p: p @ d}]
    start = (counts + 1) / (counts + 1).sum()
    found = optimize.minimize(
        loss, start, bounds=[(0, 1)] * 4, constraints=limits, options={"ftol": 1e-14, "maxiter": 500}
    )
    return math.sqrt(float(found.x @ d**2))


@pytest.mark.parametrize("cells", [(40, 3, 5, 2), (20, 0, 2, 8), (30, 6, 0, 4), (70, 1, 9, 20)])
@pytest.mark.parametrize("r", [0.9, 0.95, 1.1])
def test_it_is_the_likelihood_test_of_a_ratio(cells: tuple[int, int, int, int], r: float) -> None:
    mine, theirs = pairs(*cells)
    z, sd = score_test(mine - r * theirs, -r, 1.0)
    assert float(sd) == pytest.approx(constrained_sd(cells, r), abs=2e-4)
    n = sum(cells)
    assert float(z) == pytest.approx((mine - r * theirs).sum() / math.sqrt(n) / float(sd), rel=1e-9)


def test_its_mass_at_an_unseen_end_closes_the_distribution() -> None:
    # all scores 0.8, mean under test 0.5: 5/8 of the mass stays at 0.8, 3/8 must lie at 0. Variance 0.5 * 0.3
    z, sd = score_test(np.full(40, 0.3), -0.5, 0.5)
    assert float(sd) == pytest.approx(math.sqrt(0.15))
    assert float(z) == pytest.approx(40 * 0.3 / math.sqrt(40 * 0.15))


def test_it_works_on_many_samples_at_once() -> None:
    random = np.random.default_rng(0)
    y = random.uniform(-0.5, 0.5, (7, 30))
    z, sd = score_test(y, -0.5, 0.5)
    for i, row in enumerate(y):
        one_z, one_sd = score_test(row, -0.5, 0.5)
        assert (z[i], sd[i]) == pytest.approx((float(one_z), float(one_sd)))
    counts = np.array([[3, 5, 2], [1, 0, 9]])
    values = np.array([-0.5, 0.1, 0.5])
    z, _ = score_test(values, -0.5, 0.5, counts)
    for i, row in enumerate(counts):
        assert z[i] == pytest.approx(float(score_test(np.repeat(values, row), -0.5, 0.5)[0]))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(0.01, 0.99))
def test_it_mirrors(scores: list[float], mu: float) -> None:
    y = np.array(scores) - mu
    forth, sd = score_test(y, -mu, 1 - mu)
    back, sd_back = score_test(-y, mu - 1, mu)
    assert float(forth) == pytest.approx(-float(back), rel=1e-5, abs=1e-7)
    assert float(sd) == pytest.approx(float(sd_back), rel=1e-5, abs=1e-7)


def test_a_mean_at_the_end_of_the_scale_is_out_of_reach() -> None:
    z, _ = score_test(np.array([0.2, 0.4]), 0.0, 1.0)  # scores minus 0: no distribution with mean 0 gives these
    assert float(z) == math.inf
    assert float(score_test(np.zeros(3), 0.0, 1.0)[0]) == 0.0


# --- proportions and means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 30), (30, 30), (4, 30), (26, 30)])
def test_few_of_a_kind_are_counted_exactly(k: int, n: int) -> None:
    found = proportion(k, n)
    exact = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found.method == "Clopper-Pearson"
    assert clopper_pearson(k, n) == (found.low, found.high)


@pytest.mark.parametrize("n", [FEW, 2 * FEW, 30, 101])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_more_successes_never_lower_a_bound(n: int, confidence: float) -> None:
    bounds = [proportion(k, n, confidence) for k in range(n + 1)]
    for less, more in pairwise(bounds):
        assert less.low <= more.low and less.high <= more.high
    assert {b.method for b in bounds} == ({"Clopper-Pearson", "Wilson"} if n >= 2 * FEW else {"Clopper-Pearson"})


def test_a_mean_of_graded_scores_is_scipys_bca_or_wider() -> None:
    scores = np.random.default_rng(4).beta(5, 2, 400)
    found = mean(scores)
    plain = stats.bootstrap(
        (scores,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.003)
    z = z_of(0.95)
    for bound in (found.low, found.high):  # never narrower than the score interval
        assert abs(float(score_test(scores - bound, -bound, 1 - bound)[0])) >= z - 1e-6


def test_scores_of_a_judge_keep_their_scale() -> None:
    scores = np.array([5.0] * 30 + [4.0] * 18 + [3.0] * 2)
    found = mean(scores, limits=(1.0, 5.0))
    same = mean((scores - 1) / 4)
    assert (found.low, found.value, found.high) == pytest.approx(
        (1 + 4 * same.low, 1 + 4 * same.value, 1 + 4 * same.high), abs=1e-6
    )
    assert mean(np.full(20, 4.0), limits=(1.0, 5.0)).low < 4.0 < mean(np.full(20, 4.0), limits=(1.0, 5.0)).high


def test_without_ends_equal_scores_set_no_bound() -> None:
    found = mean(np.full(20, 1.3), limits=(0.0, math.inf))
    assert (found.low, found.high) == (0.0, math.inf)
    free = mean(np.random.default_rng(0).exponential(1.0, 300), limits=(0.0, math.inf))
    assert 0.8 < free.low < free.value < free.high < 1.3


def test_one_item_decides_little() -> None:
    for scores in ([1.0], [0.7]):
        found = mean(np.array(scores))
        assert found.low < 0.3 and found.high == pytest.approx(1.0, abs=0.16)


# --- two subjects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [(40, 3, 5, 2), (20, 0, 2, 8), (30, 6, 0, 4), (70, 1, 9, 20), (45, 0, 0, 5)])
def test_a_ratio_of_rates_solves_its_score_equation(cells: tuple[int, int, int, int]) -> None:
    mine, theirs = pairs(*cells)
    found = ratio(mine, theirs, 0.9)
    assert found.method == "Nam-Blackwelder"
    assert found.low < found.value < found.high
    for bound, sign in ((found.low, 1), (found.high, -1)):
        z, _ = score_test(mine - bound * theirs, -bound, 1.0)
        assert float(z) == pytest.approx(sign * z_of(0.9), abs=1e-4)


def test_swapping_the_subjects_inverts_the_ratio() -> None:
    mine, theirs = pairs(40, 3, 9, 8)
    forth, back = ratio(mine, theirs), ratio(theirs, mine)
    assert (forth.low, forth.high) == pytest.approx((1 / back.high, 1 / back.low), rel=1e-5)


def test_a_ratio_of_graded_means_is_fiellers_or_a_little_wider() -> None:
    random = np.random.default_rng(8)
    theirs = random.beta(6, 3, 300)
    mine = np.clip(theirs * 0.97 + random.normal(0, 0.08, 300), 0, 1)
    found = ratio(mine, theirs)
    s = np.cov(mine, theirs) / 300
    a, b, t = mine.mean(), theirs.mean(), stats.t.ppf(0.975, 299)
    roots = np.sort(np.roots([b * b - t * t * s[1, 1], -2 * (a * b - t * t * s[0, 1]), a * a - t * t * s[0, 0]]))
    assert roots[0] - 0.006 <= found.low <= roots[0] + 0.002  # wider for what was not seen
    assert roots[1] - 0.002 <= found.high <= roots[1] + 0.006
    assert found.method == "BCa bootstrap"


def test_a_reference_that_scored_nothing_gives_no_ratio() -> None:
    found = ratio(np.array([1.0, 0.0]), np.zeros(2))
    assert math.isnan(found.value) and (found.low, found.high) == (0.0, math.inf)
    unsure = ratio(*pairs(0, 1, 1, 18))  # one of twenty each: anything up to nine times either way
    assert unsure.high > 9 and unsure.low * unsure.high == pytest.approx(1.0, rel=1e-5)


def test_a_difference_agrees_with_its_p_value() -> None:
    mine, theirs = pairs(60, 5, 0, 35)
    found = difference(mine, theirs)
    assert found.p_value == mcnemar(5, 0) == pytest.approx(0.0625)
    assert found.low == 0.0  # Tango alone excludes zero
    random = np.random.default_rng(0)
    a, b = random.random(40), random.random(40)
    graded = difference(a, b)
    expected = stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(3)
    ).pvalue
    assert graded.p_value == pytest.approx(expected, abs=0.035)  # three standard errors of two samples
    assert sign_flip(np.array([0.3])) == sign_flip(np.zeros(5)) == 1.0


def test_a_difference_on_another_scale() -> None:
    random = np.random.default_rng(5)
    a, b = random.integers(1, 6, 60).astype(float), random.integers(1, 6, 60).astype(float)
    wide, unit = difference(a, b, limits=(1.0, 5.0)), difference((a - 1) / 4, (b - 1) / 4)
    assert (wide.low, wide.high) == pytest.approx((4 * unit.low, 4 * unit.high), abs=1e-6)


def test_newcombes_example() -> None:
    # Newcombe (1998, Statistics in Medicine 17:873), method 10, example (a): 56/70 and 48/80, 0.0524 to 0.3339
    found = excess(np.array([1.0] * 56 + [0.0] * 14), np.array([1.0] * 48 + [0.0] * 32))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert found.value == pytest.approx(0.2) and found.n == 150
    assert found.method == "Wilson, combined"


def test_a_ratio_of_sums_weighs_items_by_size() -> None:
    random = np.random.default_rng(2)
    sizes = random.integers(10, 200, 200).astype(float)
    hits = random.binomial(sizes.astype(int), 0.3).astype(float)
    found = ratio_of_sums(hits, sizes)
    assert found.value == pytest.approx(hits.sum() / sizes.sum())
    assert found.low < 0.3 < found.high and found.high - found.low < 0.03
    assert math.isnan(ratio_of_sums(np.zeros(3), np.zeros(3)).value)


# --- how many items decide ---------------------------------------------------------------------------------------


def test_items_to_decide_is_the_textbook_sample_size() -> None:
    # one proportion, 0.85 against 0.9: ((1.96 sqrt(.85 .15) + .8416 sqrt(.9 .1)) / .05)^2
    y = np.array([1.0] * 90 + [0.0] * 10) - 0.85
    by_hand = ((1.959964 * math.sqrt(0.85 * 0.15) + 0.841621 * math.sqrt(0.09)) / 0.05) ** 2
    assert items_to_decide(y, -0.85, 0.15) == math.ceil(by_hand)
    assert items_to_decide(-y, -0.15, 0.85) == math.ceil(by_hand)  # either side


def test_all_right_needs_as_many_as_the_interval_says() -> None:
    n = items_to_decide(np.ones(20) - 0.9, -0.9, 0.1)
    assert n is not None
    assert wilson(n, n)[0] >= 0.9 > wilson(n - 1, n - 1)[0]


def test_no_number_decides_an_effect_of_nothing() -> None:
    assert items_to_decide(np.array([0.5, -0.5]), -1.0, 1.0) is None
    assert items_to_decide(np.zeros(9), -1.0, 1.0) is None
