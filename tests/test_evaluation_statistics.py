"""Intervals and p-values against scipy, published examples and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from tunegate.data.types import Example
from tunegate.errors import InputError
from tunegate.evaluation.intervals import mcnemar, tango, wilson
from tunegate.evaluation.metrics import build_metric, score_items
from tunegate.evaluation.statistics import (
    compare,
    detectable_gain,
    interval,
    items_needed,
    minimum_detectable,
    score,
)
from tunegate.evaluation.types import Measurement


def measured(scores: object, metric: str = "m") -> Measurement:
    values = np.asarray(scores, dtype=np.float64)
    return Measurement(metric, tuple(f"r:{i}" for i in range(len(values))), values)


def table(wins: int, losses: int, both: int, neither: int = 0) -> tuple[Measurement, Measurement]:
    mine = [1] * wins + [0] * losses + [1] * both + [0] * neither
    theirs = [0] * wins + [1] * losses + [1] * both + [0] * neither
    return measured(mine), measured(theirs)


# ---------------------------------------------------------------------------------------- one score


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 7), (270, 300)])
def test_wilson_is_scipys(k: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
    if min(k, n - k) < 10:  # too few for a normal approximation
        expected = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    assert interval([1.0] * k + [0.0] * (n - k), confidence) == pytest.approx(
        (k / n, expected.low, expected.high), abs=1e-12
    )


def test_bootstrap_interval_of_a_mean_is_close_to_students() -> None:
    scores = np.random.default_rng(1).beta(2, 2, 200)
    value, low, high = interval(scores)
    student = stats.t.interval(0.95, 199, loc=scores.mean(), scale=stats.sem(scores))
    assert value == pytest.approx(scores.mean())
    assert (low, high) == pytest.approx(student, abs=0.004)


def test_intervals_are_deterministic_and_follow_the_seed() -> None:
    scores = np.random.default_rng(0).random(40)
    assert interval(scores) == interval(scores.copy())
    assert interval(scores, seed=1) != interval(scores, seed=2)


@pytest.mark.parametrize("n", [5, 10, 30])
def test_bootstrap_covers_with_few_items(n: int) -> None:
    random = np.random.default_rng(n)
    held = 0
    for _ in range(150):
        _, low, high = interval(random.beta(2, 3, n))
        held += low <= 0.4 <= high
    assert held / 150 >= 0.9  # a plain percentile bootstrap gives about 0.83 at n = 5


def test_scores_that_never_vary_still_have_an_interval() -> None:
    z = stats.norm.ppf(0.975)
    for n in (1, 20):
        share = z * z / (n + z * z)
        expected = (0.3, 0.3 * (1 - share), 0.3 + share * 0.7)
        assert interval([0.3] * n) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [[], [0.5, math.nan], [1.2], [-0.1], [math.inf]])
def test_unusable_scores_are_refused(scores: list[float]) -> None:
    with pytest.raises(InputError):
        interval(scores)


def test_confidence_must_be_a_share() -> None:
    with pytest.raises(InputError, match="confidence"):
        interval([1.0], confidence=95)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_holds_its_value(scores: list[float]) -> None:
    value, low, high = interval(scores)
    assert 0.0 <= low <= value <= high <= 1.0
    assert high > low


# ------------------------------------------------------------------------------- paired, 0/1 scores


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (7, 1), (12, 15), (300, 240)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected)
    assert mcnemar(losses, wins) == pytest.approx(expected)


def test_tango_published_example() -> None:
    # Fagerland, Lydersen, Laake (2014): 1 and 7 discordant pairs of 21, 95 % interval -0.517 to -0.026
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def score_statistic(delta: float, wins: int, losses: int, n: int) -> float:
    """The score test's z with the nuisance rate found by a numerical search, not by the closed form."""

    def loss(rate: float) -> float:
        won, same = rate + delta, 1 - 2 * rate - delta
        terms = ((wins, won), (losses, rate), (n - wins - losses, same))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    least, most = max(0.0, -delta), (1 - delta) / 2
    rate = optimize.minimize_scalar(loss, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
    return (wins - losses - n * delta) / math.sqrt(n * (2 * rate + delta * (1 - delta)))


@pytest.mark.parametrize(("wins", "losses", "n"), [(9, 4, 40), (3, 0, 25), (30, 45, 300), (2, 2, 4)])
def test_tango_bounds_solve_the_score_equation(wins: int, losses: int, n: int) -> None:
    low, high = tango(wins, losses, n, 0.9)
    z = stats.norm.ppf(0.95)
    assert score_statistic(low, wins, losses, n) == pytest.approx(z, abs=1e-3)
    assert score_statistic(high, wins, losses, n) == pytest.approx(-z, abs=1e-3)


@pytest.mark.parametrize(("wins", "losses", "n"), [(0, 0, 1), (1, 0, 1), (0, 0, 50), (50, 0, 50), (0, 50, 50)])
def test_tango_at_its_edges(wins: int, losses: int, n: int) -> None:
    low, high = tango(wins, losses, n)
    assert -1 <= low <= (wins - losses) / n <= high <= 1
    assert high - low > 0
    mirrored = tango(losses, wins, n)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(
    ("n", "win_rate", "loss_rate"), [(30, 0.1, 0.1), (60, 0.25, 0.05), (100, 0.02, 0.01), (50, 0.4, 0.3)]
)
def test_paired_interval_covers(n: int, win_rate: float, loss_rate: float) -> None:
    random = np.random.default_rng(7)
    held, cache = 0, {}
    for wins, losses, _ in random.multinomial(n, [win_rate, loss_rate, 1 - win_rate - loss_rate], 3000):
        key = int(wins), int(losses)
        if key not in cache:
            cache[key] = compare(*table(*key, n - sum(key)), "base")
        held += cache[key].low <= win_rate - loss_rate <= cache[key].high
    assert 0.94 <= held / 3000 <= 0.995


def test_comparison_of_labels() -> None:
    result = compare(*table(wins=20, losses=5, both=60, neither=15), "base")
    assert (result.wins, result.losses, result.ties, result.n) == (20, 5, 75, 100)
    assert result.difference == pytest.approx(0.15)
    assert result.p_value == pytest.approx(stats.binomtest(5, 25).pvalue)
    assert (result.low, result.high) == pytest.approx(tango(20, 5, 100))
    assert (result.metric, result.reference) == ("m", "base")


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30))
def test_interval_and_p_value_agree_about_zero(wins: int, losses: int, both: int) -> None:
    if wins + losses + both == 0:
        return
    result = compare(*table(wins, losses, both), "base")
    assert result.low <= result.difference <= result.high
    if result.p_value > 0.05:
        assert result.low <= 0 <= result.high


def test_five_wins_alone_show_nothing_at_95_percent() -> None:
    # Tango's own interval excludes zero here, but five coins fall alike with probability 1/16.
    assert tango(5, 0, 100)[0] > 0
    result = compare(*table(5, 0, 95), "base")
    assert (result.p_value, result.low) == (pytest.approx(0.0625), 0.0)


# --------------------------------------------------------------------------- paired, graded scores


def test_sign_flip_test_is_exact_for_few_items() -> None:
    gains = [0.3, 0.1, 0.2, -0.05, 0.4]
    observed = sum(gains)
    flips = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True))) for signs in itertools.product((1, -1), repeat=5)
    ]
    expected = sum(flip >= observed - 1e-9 for flip in flips) / 32
    result = compare(measured([0.5 + g for g in gains] + [0.5] * 3), measured([0.5] * 8), "base")
    assert result.p_value == pytest.approx(expected)
    assert (result.wins, result.losses, result.ties) == (4, 1, 3)


def test_sampled_p_value_is_close_to_scipys() -> None:
    random = np.random.default_rng(3)
    theirs = random.random(600)
    mine = np.clip(theirs + random.normal(0.02, 0.1, 600), 0, 1)
    result = compare(measured(mine), measured(theirs), "prompt")
    expected = stats.permutation_test(
        (mine - theirs,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(5)
    )
    assert result.p_value == pytest.approx(expected.pvalue, abs=0.02)
    student = stats.t.interval(0.95, 599, loc=(mine - theirs).mean(), scale=stats.sem(mine - theirs))
    assert (result.low, result.high) == pytest.approx(student, abs=0.004)
    assert result == compare(measured(mine), measured(theirs), "prompt")


def test_a_single_graded_item_decides_nothing() -> None:
    result = compare(measured([0.9]), measured([0.4]), "base")
    assert result.difference == pytest.approx(0.5)
    assert result.p_value == 1.0
    assert result.low < 0 < result.high


def test_identical_answers_differ_by_nothing_but_not_for_sure() -> None:
    graded = compare(measured([0.5] * 30), measured([0.5] * 30), "base")
    labels = compare(*table(0, 0, 30), "base")
    assert graded.difference == labels.difference == 0.0
    assert graded.p_value == labels.p_value == 1.0
    assert (graded.low, graded.high) == pytest.approx((labels.low, labels.high), abs=1e-9)
    assert graded.high > 0.05


def test_swapping_the_subjects_mirrors_the_comparison() -> None:
    random = np.random.default_rng(2)
    mine, theirs = measured(random.random(25)), measured(random.random(25))
    forth, back = compare(mine, theirs, "a"), compare(theirs, mine, "b")
    assert forth.difference == pytest.approx(-back.difference)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=0.03)
    assert forth.p_value == pytest.approx(back.p_value)
    assert (forth.wins, forth.losses) == (back.losses, back.wins)


# ----------------------------------------------------------------------------------- corpus values

REFERENCES = [f"the {w} sat on the old {v} mat today" for w in ("cat", "dog", "hen", "cow") for v in "abcdefgh"]


def texts_measured(name: str, predictions: list[str]) -> Measurement:
    rows = [Example("t.jsonl", i + 1) for i in range(len(predictions))]
    return score_items([build_metric(name)], predictions, REFERENCES, rows)[1][name]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_values_are_compared_as_corpus_values(name: str) -> None:
    good = texts_measured(name, [text.replace("old ", "") for text in REFERENCES])
    poor = texts_measured(name, [text if i % 8 == 0 else text[: len(text) // 2] for i, text in enumerate(REFERENCES)])
    result = compare(good, poor, "base")
    assert result.difference == pytest.approx(good.value - poor.value)
    assert result.low < result.difference < result.high
    assert result.low > 0 and result.p_value < 0.01
    assert (result.wins, result.losses) == (28, 4)
    single = score(poor)
    assert single.value == pytest.approx(poor.value)
    assert 0 < single.low < single.value < single.high < 1
    assert score(poor) == single


def test_swapped_corpora_have_the_p_value_of_all_swaps() -> None:
    good = Measurement("f", ("1", "2", "3"), np.array([1.0, 0.5, 0.5]), np.array([[2, 0.0], [1, 1], [1, 1]]), share)
    poor = Measurement("f", ("1", "2", "3"), np.array([0.0, 0.5, 1.0]), np.array([[0, 2.0], [1, 3], [3, 0]]), share)
    gains = []
    for swaps in itertools.product((False, True), repeat=3):
        a = sum(p if s else g for s, g, p in zip(swaps, good.counts, poor.counts, strict=True))
        b = sum(g if s else p for s, g, p in zip(swaps, good.counts, poor.counts, strict=True))
        gains.append(abs(share(a) - share(b)))
    expected = sum(gain >= gains[0] - 1e-9 for gain in gains) / 8
    assert compare(good, poor, "base").p_value == pytest.approx(expected)


def share(counts: np.ndarray) -> float:
    return float(counts[0] / counts.sum())


def test_a_perfect_corpus_still_has_an_interval() -> None:
    perfect = texts_measured("chrf", REFERENCES)
    result = score(perfect)
    assert result.value == result.high == pytest.approx(1.0)
    assert result.low == pytest.approx(wilson(32, 32)[0])


# ------------------------------------------------------------------------------------ what is refused


def test_the_same_rows_in_the_same_order() -> None:
    mine = Measurement("m", ("a", "b"), np.array([1.0, 0.0]))
    with pytest.raises(InputError, match="item 1 is a and b"):
        compare(mine, Measurement("m", ("b", "a"), np.array([1.0, 0.0])), "base")
    with pytest.raises(InputError, match="one has items the other lacks"):
        compare(mine, Measurement("m", ("a",), np.array([1.0])), "base")
    with pytest.raises(InputError, match="two metrics"):
        compare(mine, Measurement("other", ("a", "b"), np.array([1.0, 0.0])), "base")
    with pytest.raises(InputError, match="no items"):
        compare(measured([]), measured([]), "base")
    with pytest.raises(InputError, match="not numbers"):
        compare(measured([math.nan]), measured([1.0]), "base")


# ------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize(("n", "base"), [(100, 0.5), (300, 0.8), (1000, 0.2)])
def test_minimum_detectable_gain_is_detected_four_times_in_five(n: int, base: float) -> None:
    gain = minimum_detectable(n, base)
    assert gain is not None
    random = np.random.default_rng(11)
    new = base + gain
    wins = random.binomial(n, new * (1 - base), 4000)
    losses = random.binomial(n - wins, base * (1 - new) / (1 - new * (1 - base)))
    z = (wins - losses) / np.sqrt(np.maximum(wins + losses, 1))
    assert np.mean(np.abs(z) > stats.norm.ppf(0.975)) == pytest.approx(0.8, abs=0.04)


def test_minimum_detectable_edges() -> None:
    sizes = [minimum_detectable(n, 0.5) for n in (40, 100, 1000, 10_000)]
    assert all(size is not None for size in sizes)
    assert sizes == sorted(sizes, key=lambda size: -(size or 0.0))
    assert minimum_detectable(10, 0.95) is None
    assert minimum_detectable(1000, 1.0) is None
    with pytest.raises(InputError):
        minimum_detectable(0, 0.5)
    with pytest.raises(InputError):
        minimum_detectable(10, 1.5)


def test_items_needed_grows_with_the_square() -> None:
    result = compare(*table(12, 8, 80), "base")
    shown = detectable_gain(result)
    needed = items_needed(result, 0.0)
    assert needed is not None
    assert needed == pytest.approx(100 * (shown / 0.04) ** 2, abs=1)
    assert items_needed(result, 0.04) is None
