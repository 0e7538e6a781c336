"""Alpha and kappa: published examples, values derived by hand, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.errors import InputError
from tunegate.evaluation.judge.agreement import krippendorff_alpha, weighted_kappa
from tunegate.evaluation.judge.results import compare_raters

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), example C: four observers, twelve units, gaps
_ = math.nan
EXAMPLE = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
])  # fmt: skip


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_example(level: str, alpha: float) -> None:
    assert krippendorff_alpha(EXAMPLE, level) == pytest.approx(alpha, abs=6e-4)


def test_alpha_by_hand() -> None:
    # two raters, items (1, 1) (1, 2) (2, 2): coincidences o11 = 2, o12 = o21 = 1, o22 = 2; totals 3 and 3 of 6.
    # observed disagreement 2/6, expected 2 * 3 * 3 / (6 * 5) = 0.6: alpha = 1 - (1/3) / 0.6
    assert krippendorff_alpha(np.array([[1, 1, 2], [1, 2, 2]]), "nominal") == pytest.approx(1 - (1 / 3) / 0.6)


def test_alpha_where_it_is_not_defined() -> None:
    assert math.isnan(krippendorff_alpha(np.array([[4, 4, 4], [4, 4, 4]])))
    assert math.isnan(krippendorff_alpha(np.array([[1, _, 3], [_, 2, _]])))
    with pytest.raises(InputError, match="level"):
        krippendorff_alpha(EXAMPLE, "ratio")


scores = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=20)


@given(scores, st.sampled_from(["nominal", "ordinal", "interval"]))
def test_laws_of_alpha(pairs: list[tuple[int, int]], level: str) -> None:
    ratings = np.array(pairs, dtype=float).T
    found = krippendorff_alpha(ratings, level)
    if math.isnan(found):
        assert len(set(ratings.ravel())) == 1
        return
    assert found <= 1.0 + 1e-12
    assert found == pytest.approx(krippendorff_alpha(ratings[::-1], level))
    same = np.stack([ratings[0], ratings[0]])
    if len(set(ratings[0])) > 1:
        assert krippendorff_alpha(same, level) == pytest.approx(1.0)


def test_kappa_by_hand() -> None:
    # scores 1..3, pairs (1,1) (1,2) (2,2) (3,3) (3,1). Linear: observed (1 + 2) / 5 = 0.6.
    # margins a: .4 .2 .4, b: .4 .4 .2; by chance sum a_i b_j |i-j| =
    # .4*.4*1 + .4*.2*2 + .2*.4*1 + .2*.2*1 + .4*.4*2 + .4*.4*1 = .92: kappa = 1 - .6 / .92
    a, b = [1, 1, 2, 3, 3], [1, 2, 2, 3, 1]
    assert weighted_kappa(a, b, (1, 2, 3), "linear") == pytest.approx(1 - 0.6 / 0.92)
    # squared: observed (1 + 4) / 5 = 1; by chance .16 + .08*4 + .08 + .04 + .16*4 + .16 = 1.4
    assert weighted_kappa(a, b, (1, 2, 3)) == pytest.approx(1 - 1 / 1.4)


def test_kappa_edges() -> None:
    assert weighted_kappa([1, 5, 3], [1, 5, 3]) == 1.0
    assert weighted_kappa([1, 5, 1, 5], [5, 1, 5, 1]) == -1.0
    assert math.isnan(weighted_kappa([4, 4], [4, 4]))
    for a, b, weights in (([1], [1, 2], "linear"), ([], [], "linear"), ([6], [1], "linear"), ([1], [1], "cubic")):
        with pytest.raises(InputError):
            weighted_kappa(a, b, weights=weights)


@given(scores)
def test_quadratic_kappa_is_the_concordance_correlation(pairs: list[tuple[int, int]]) -> None:
    # Fleiss and Cohen (1973), and Lin's coefficient with population variances
    a, b = (np.array(x, dtype=float) for x in zip(*pairs, strict=True))
    spread = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    found = weighted_kappa(a.tolist(), b.tolist())
    if spread == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(2 * np.cov(a, b, ddof=0)[0, 1] / spread)


def test_a_judge_beside_people() -> None:
    judge = {f"r{i}": s for i, s in enumerate([4.5, 3.0, 2.0, 5.0, 1.0])}
    people = {f"r{i}": float(s) for i, s in enumerate([4, 3, 1, 5])} | {"other": 2.0}
    found = compare_raters(judge, people)
    assert found.n == 4 and found.bias == pytest.approx((0.5 + 0 + 1 + 0) / 4)
    assert found.alpha is not None and 0.7 < found.alpha < 1.0
    assert found.kappa == pytest.approx(weighted_kappa([5, 3, 2, 5], [4, 3, 1, 5]))
    assert compare_raters(judge, {}).n == 0
    assert compare_raters({"a": 4.0}, {"a": 4.0}).alpha is None
