"""How often the gate errs: ships at the boundary, where the truth just misses the threshold, and at a distance.

A rule is a two-sided test at 95 %, so each kind may pass in 2.5 % of the cases at its boundary; none may in more than
5 %, the few-items corners included. Rules on 0/1 scores are summed over all outcomes, exactly; graded ones are
simulated with fixed seeds, those where a rare large loss hides among small changes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from test_gate import EVIDENCE
from tunegate.evaluation import intervals
from tunegate.evaluation.intervals import bca, excess, mcnemar, mean, score_test, sign_flip, tango, z_of
from tunegate.evaluation.measures import Measure
from tunegate.evaluation.statistics import items_to_decide
from tunegate.gate import Policy, RuleSetting, decide

ALLOWED = 0.05
Z = z_of(0.95)


# --- one rate: exact ---------------------------------------------------------------------------------------------


@cache
def rate_bounds(n: int) -> tuple[np.ndarray, np.ndarray]:
    found = [intervals.proportion(k, n) for k in range(n + 1)]
    return np.array([f.low for f in found]), np.array([f.high for f in found])


@pytest.mark.parametrize("n", [5, 20, 50, 100, 300])
@pytest.mark.parametrize("p", [0.005, 0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_a_rate_at_its_threshold_ships_rarely(n: int, p: float) -> None:
    low, high = rate_bounds(n)
    chance = stats.binom.pmf(np.arange(n + 1), n, p)
    assert chance[low >= p].sum() <= ALLOWED  # task >= p
    assert chance[high <= p].sum() <= ALLOWED  # safety.bypass_rate <= p


@pytest.mark.parametrize(("n", "truth", "threshold", "least"), [
    (100, 0.95, 0.8, 0.95), (300, 0.9, 0.8, 0.95), (50, 0.95, 0.8, 0.7), (1000, 0.88, 0.85, 0.7),
])  # fmt: skip
def test_a_rate_well_above_ships_mostly(n: int, truth: float, threshold: float, least: float) -> None:
    low, _ = rate_bounds(n)
    assert stats.binom.pmf(np.arange(n + 1), n, truth)[low >= threshold].sum() >= least


# --- a paired difference: exact ----------------------------------------------------------------------------------


@cache
def paired_bounds(wins: int, losses: int, n: int) -> tuple[float, float]:
    low, high = tango(wins, losses, n)
    return (min(low, 0.0), max(high, 0.0)) if mcnemar(wins, losses) > 0.05 else (low, high)


def chance_of(passes: Callable[[int, int], bool], n: int, win: float, loss: float) -> float:
    """The probability that ``passes(wins, losses)``; outcomes under 1e-7 are passed over."""
    wins, losses = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    inside = wins + losses <= n
    wins, losses = wins[inside], losses[inside]
    counts = np.stack([wins, losses, n - wins - losses], axis=-1)
    chance = stats.multinomial.pmf(counts, n, [win, loss, 1 - win - loss])
    outcomes = zip(wins, losses, chance, strict=True)
    return float(sum(c for won, lost, c in outcomes if c > 1e-7 and passes(int(won), int(lost))))


@pytest.mark.parametrize("n", [20, 50, 100])
@pytest.mark.parametrize("least", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05, 0.2])
def test_a_gain_at_its_threshold_ships_rarely(n: int, least: float, loss: float) -> None:
    loss = loss + max(-least, 0.0)
    win = loss + least
    # task vs base >= least; mirrored it is safety.x <= base + c
    assert chance_of(lambda won, lost: paired_bounds(won, lost, n)[0] >= least, n, win, loss) <= ALLOWED


def test_a_clear_gain_ships_mostly() -> None:
    assert chance_of(lambda won, lost: paired_bounds(won, lost, 100)[0] > 0, 100, 0.2, 0.04) >= 0.8
    assert chance_of(lambda won, lost: paired_bounds(won, lost, 100)[0] >= -0.05, 100, 0.02, 0.01) >= 0.6


# --- a share of the base: exact in the counts, by the test that the interval inverts -------------------------------


def share_passes(counts: np.ndarray, r: float) -> np.ndarray:
    """Whether tables (..., 4) of both, wins, losses and neither pass ``>= r of base``."""
    y = np.array([1 - r, 1.0, -r, 0.0])
    z, _ = score_test(np.broadcast_to(y, counts.shape), -r, 1.0, counts)
    return (z >= Z) & (counts[..., 0] + counts[..., 2] > 0)


SHARES = [(n, base, loss) for n in (20, 50, 100, 300) for base in (0.3, 0.6, 0.9, 0.99) for loss in (0.05, 0.1, 0.3)]


@pytest.mark.parametrize(("n", "base", "loss"), SHARES)
def test_a_share_at_its_threshold_ships_rarely(n: int, base: float, loss: float) -> None:
    r = 0.95
    lost = max(loss * base, (1 - r) * base)
    won = lost - (1 - r) * base  # so that the adapter's rate is r times the base's
    if won > 1 - base:
        pytest.skip("the adapter cannot win back that many")
    cells = [base - lost, won, lost, 1 - base - won]
    counts = np.random.default_rng(n).multinomial(n, cells, 20_000)
    assert share_passes(counts, r).mean() <= ALLOWED


def test_the_share_interval_is_that_test() -> None:
    random = np.random.default_rng(0)
    for cells in random.multinomial(60, [0.6, 0.05, 0.08, 0.27], 30):
        both, wins, losses, neither = (int(c) for c in cells)
        mine = np.array([1.0] * (both + wins) + [0.0] * (losses + neither))
        theirs = np.array([1.0] * both + [0.0] * wins + [1.0] * losses + [0.0] * neither)
        found = intervals.ratio(mine, theirs)
        for r in (0.8, 0.9, 0.95):
            assert (found.low >= r) == bool(share_passes(cells, r))


def test_an_unharmed_share_ships_mostly() -> None:
    counts = np.random.default_rng(1).multinomial(
        200, [0.85, 0.01, 0.01, 0.13], 5000
    )  # 100 items do in half of the cases
    assert share_passes(counts, 0.95).mean() >= 0.75


# --- graded scores: simulated ------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], np.ndarray]
GRADED: dict[str, tuple[Draw, float]] = {
    "even": (lambda random, n: random.beta(2, 2, n), 0.5),
    "high": (lambda random, n: random.beta(8, 1, n), 8 / 9),
    "low": (lambda random, n: random.beta(0.5, 4, n), 0.5 / 4.5),
    "mostly right": (lambda random, n: np.where(random.random(n) < 0.9, 1.0, random.random(n) * 0.5), 0.925),
    "rarely right": (lambda random, n: np.where(random.random(n) < 0.05, 1.0, 0.1), 0.145),
    "judge": (lambda random, n: random.choice([0, 0.25, 0.5, 0.75, 1], n, p=[0.02, 0.03, 0.1, 0.5, 0.35]), 0.7825),
}


def passes_above(values: np.ndarray, threshold: float, seed: int) -> bool:
    """Whether ``>= threshold`` passes on scores in [0, 1]: both bounds of the rule's interval, each at its cheapest."""
    z, _ = score_test(values - threshold, -threshold, 1 - threshold)
    if float(z) < Z:
        return False
    found = bca((values,), intervals._mean_of, 0.95, seed)
    return found is None or found[0] >= threshold


def graded_rate(name: str, n: int, runs: int) -> tuple[float, float]:
    draw, truth = GRADED[name]
    random = np.random.default_rng(len(name) * 1000 + n)
    above = below = 0
    for _ in range(runs):
        values = draw(random, n)
        above += passes_above(values, truth, 0)
        below += passes_above(1 - values, 1 - truth, 0)
    return above / runs, below / runs


@pytest.mark.parametrize("n", [15, 60])
@pytest.mark.parametrize("name", GRADED)
def test_a_mean_at_its_threshold_ships_rarely(name: str, n: int) -> None:
    assert max(graded_rate(name, n, 300)) <= ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 15, 30, 60, 200])
@pytest.mark.parametrize("name", GRADED)
def test_a_mean_at_its_threshold_ships_rarely_at_length(name: str, n: int) -> None:
    assert max(graded_rate(name, n, 4000)) <= ALLOWED


def test_that_shortcut_is_the_interval() -> None:
    random = np.random.default_rng(9)
    for name, (draw, truth) in GRADED.items():
        for _ in range(4):
            values = draw(random, 40)
            assert (mean(values).low >= truth) == passes_above(values, truth, 0), name


def paired_graded(random: np.random.Generator, n: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Base scores and adapter scores whose expected difference is exactly ``shift`` (between -0.1 and 0.1)."""
    theirs = random.uniform(0.3, 0.7, n)
    return theirs + shift + random.choice([-0.2, -0.05, 0.05, 0.2], n), theirs


def graded_gains(n: int, shift: float, least: float, runs: int) -> float:
    random = np.random.default_rng(n)
    passed = 0
    for _ in range(runs):
        mine, theirs = paired_graded(random, n, shift)
        gains = mine - theirs
        z, _ = score_test(gains - least, -1.0 - least, 1.0 - least)
        if float(z) < Z:
            continue
        found = bca((gains,), intervals._mean_of, 0.95, 0)
        clears = found is None or found[0] >= least
        passed += clears and (least < 0 or sign_flip(gains) <= 0.05)
    return passed / runs


@pytest.mark.parametrize(("n", "least"), [(12, 0.0), (60, 0.0), (60, -0.05), (60, 0.05)])
def test_a_graded_gain_at_its_threshold_ships_rarely(n: int, least: float) -> None:
    assert graded_gains(n, least, least, 300) <= ALLOWED


@pytest.mark.parametrize("n", [50, 100, 200])
@pytest.mark.parametrize("rare", [0.02, 0.05])
def test_rare_large_losses_do_not_slip_through(n: int, rare: float) -> None:
    random, passed, truth = np.random.default_rng(n), 0, -0.5 * rare
    for _ in range(400):
        gains = random.uniform(-0.02, 0.02, n) - 0.5 * (random.random(n) < rare)
        z, _ = score_test(gains - truth, -1.0 - truth, 1.0 - truth)
        if float(z) >= Z:
            found = bca((gains,), intervals._mean_of, 0.95, 0)
            passed += found is None or found[0] >= truth
    assert passed / 400 <= ALLOWED


def test_a_clear_graded_gain_ships_mostly() -> None:
    assert graded_gains(100, 0.06, 0.0, 60) >= 0.9


@pytest.mark.parametrize("n", [20, 60])
def test_a_graded_share_at_its_threshold_ships_rarely(n: int) -> None:
    random, passed, r = np.random.default_rng(n), 0, 0.95
    for _ in range(300):
        theirs = random.beta(6, 2, n)
        mine = np.clip(theirs * random.choice([0.85, 0.95, 1.05], n), 0.0, 1.0)
        y = mine - r * theirs  # the clip takes a little off: the truth lies at or under the threshold
        z, _ = score_test(y, -r, 1.0)
        if float(z) >= Z:
            found = bca((mine, theirs), intervals._ratio_of, 0.95, 0)
            passed += found is None or found[0] >= r
    assert passed / 300 <= ALLOWED


@pytest.mark.parametrize("n", [30, 100])
def test_a_ratio_of_sums_at_its_threshold_ships_rarely(n: int) -> None:
    random, passed = np.random.default_rng(n), 0
    for _ in range(300):
        sizes = random.integers(20, 200, n)
        hits = random.binomial(sizes, random.beta(2, 18, n))  # items differ: more spread than one rate has
        passed += intervals.ratio_of_sums(hits.astype(float), sizes.astype(float)).high <= 0.1
    assert passed / 300 <= ALLOWED


@pytest.mark.parametrize(("n", "m"), [(20, 20), (50, 100)])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.6])
def test_an_excess_of_nothing_alarms_rarely(n: int, m: int, p: float) -> None:
    low, high = rate_bounds(n), rate_bounds(m)
    mine, theirs = np.arange(n + 1) / n, np.arange(m + 1) / m
    bound = mine[:, None] - theirs - np.hypot((mine - low[0])[:, None], high[1] - theirs)
    chance = np.outer(stats.binom.pmf(np.arange(n + 1), n, p), stats.binom.pmf(np.arange(m + 1), m, p))
    assert chance[bound > 0].sum() <= ALLOWED
    k, j = n // 3, m // 4
    scores = [np.array([1.0] * hits + [0.0] * (size - hits)) for hits, size in ((k, n), (j, m))]
    assert excess(*scores).low == pytest.approx(bound[k, j])


# --- sample sizes and whole decisions ------------------------------------------------------------------------------


@pytest.mark.parametrize(("truth", "threshold"), [(0.9, 0.85), (0.97, 0.9), (0.6, 0.5), (0.7, 0.8)])
def test_the_number_of_items_that_would_decide_decides(truth: float, threshold: float) -> None:
    seen = np.array([1.0] * round(1000 * truth) + [0.0] * round(1000 * (1 - truth)))
    n = items_to_decide(seen - threshold, -threshold, 1 - threshold)
    assert n is not None
    low, high = rate_bounds(n)
    chance = stats.binom.pmf(np.arange(n + 1), n, truth)
    decided = chance[low >= threshold].sum() if truth > threshold else chance[high < threshold].sum()
    assert decided == pytest.approx(0.8, abs=0.07)


def test_the_number_of_pairs_that_would_decide_decides() -> None:
    cells = [0.80, 0.03, 0.04, 0.13]  # both, wins, losses, neither: 0.988 of the base
    y = np.repeat([0.05, 1.0, -0.95, 0.0], [80, 3, 4, 13])
    n = items_to_decide(y, -0.95, 1.0)
    assert n is not None
    counts = np.random.default_rng(2).multinomial(n, cells, 5000)
    assert share_passes(counts, 0.95).mean() == pytest.approx(0.8, abs=0.06)


OFF = Policy(None, None, None, 0.95, None, None, None, None)


def shipped(rates: list[float], n: int, runs: int, correction: str, any_pass: bool = False) -> float:
    """How often rules ``>= 0.8`` on as many rates ship together (or any of them passes)."""
    rules = tuple(RuleSetting(f"regression.d{i} >= 0.8") for i in range(len(rates)))
    policy = replace(OFF, rules=rules, correction=correction)
    random, hits = np.random.default_rng(7), 0
    known: dict[Any, bool] = {}
    for counts in random.binomial(n, rates, (runs, len(rates))):
        key = tuple(sorted(counts)) if len(set(rates)) == 1 else tuple(counts)
        if key not in known:
            measures = {
                f"regression.d{i}": Measure("proportion", np.array([1.0] * k + [0.0] * (n - k)))
                for i, k in enumerate(counts)
            }
            decision = decide(policy, replace(EVIDENCE, measures=measures))
            passed = [rule.verdict == "pass" for rule in decision.rules[1:]]
            known[key] = any(passed) if any_pass else decision.verdict == "ship"
        hits += known[key]
    return hits / runs


def test_one_missed_threshold_among_many_ships_rarely() -> None:
    assert shipped([0.8, 0.99, 0.99, 0.99], 100, 1500, "none") <= ALLOWED


def test_holm_bounds_the_chance_that_any_of_many_passes() -> None:
    plain = shipped([0.8] * 5, 60, 600, "none", any_pass=True)
    holm = shipped([0.8] * 5, 60, 600, "holm", any_pass=True)
    assert holm <= ALLOWED < plain + 0.03
    assert holm < plain


def test_a_good_adapter_ships_mostly() -> None:
    assert shipped([0.95, 0.95, 0.95], 100, 300, "none") >= 0.9
