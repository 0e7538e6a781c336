"""Confidence intervals of proportions, means, paired differences and paired ratios, from one score per item.

====================  =====================================================  ==========================================
statistic             0/1 scores                                             graded scores
====================  =====================================================  ==========================================
value                 Wilson (1927); Clopper-Pearson (1934) where fewer      BCa bootstrap (Efron 1987), never narrower
                      than ten items failed or succeeded                     than the score interval
difference to a       Tango (1998), widened to hold zero where McNemar's     the same over the paired differences,
reference             exact test does not reject                             widened where a sign-flip test does not
ratio to a reference  Nam and Blackwelder (2002)                             BCa over pairs, never narrower than the
                                                                             score interval
ratio of two sums     --                                                     BCa over items
excess of one group   the two groups' own intervals, combined by squares     the same
over another          (Newcombe 1998, method 10)
====================  =====================================================  ==========================================

One score test stands behind Wilson, Tango, Nam and Blackwelder, and the floor under the bootstrap. It asks whether
``y`` (the score minus the threshold, or the score minus r times the reference's) can have mean zero: its variance is
that of the most likely distribution on the values seen, and on the ends of the scale, that has mean zero. On 0/1
scores this is the textbook test, and where all scores are equal, where a bootstrap has no width, it still has one:
what was not seen may still occur, up to the ends of the scale. So few graded pairs show little: a rare large loss
that none of them met could undo the gain. A bootstrap of n items is too narrow by about ``sqrt((n-1)/n)`` and by the
normal quantile where Student's belongs (Hesterberg 2015), so BCa is read at the level expanded by both.

All intervals are two-sided at ``confidence``: each bound is wrong in about half of the rest. Everything random has
a fixed seed. Items are taken as independent: repeats of an item belong averaged before they come here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FEW = 10  # fewer successes or failures than this: the exact binomial interval
RESAMPLES = 9999
_LARGEST_DRAW = 1 << 23  # resampled numbers held at once: 64 MiB
_TIE = 1e-12  # differences this close count as equal; rounding must not decide
_WIDEST_RATIO = 1e6

Range = tuple[float, float]
UNIT: Range = (0.0, 1.0)


@dataclass(frozen=True)
class Interval:
    """A statistic over ``n`` items. A bound is infinite where the scores set no limit, and NaN stands for a value
    that is not defined (the ratio to a reference that scored nothing)."""

    value: float
    low: float
    high: float
    n: int
    method: str
    p_value: float | None = None


def is_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


# --- one score ---------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), without continuity correction."""
    z = z_of(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval (Clopper and Pearson 1934): each bound errs at most (1 - confidence) / 2."""
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def proportion(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval, or the exact one where a normal approximation to the count does not hold."""
    few = min(successes, n - successes) < FEW
    low, high = (clopper_pearson if few else wilson)(successes, n, confidence)
    return Interval(successes / n, low, high, n, "Clopper-Pearson" if few else "Wilson")


def mean(scores: np.ndarray, confidence: float = 0.95, limits: Range = UNIT, seed: int = 0) -> Interval:
    """The mean of (n,) scores that lie within ``limits``; infinite limits are allowed, and then scores that are all
    equal set no bound."""
    if limits == UNIT and is_binary(scores):
        return proportion(round(float(scores.sum())), len(scores), confidence)
    value = float(scores.mean())
    low, high = _mean_bounds(scores, value, confidence, limits, seed)
    return Interval(value, low, high, len(scores), "BCa bootstrap")


def _mean_bounds(values: np.ndarray, value: float, confidence: float, limits: Range, seed: int) -> tuple[float, float]:
    found = bca((values,), _mean_of, confidence, seed)
    if not all(map(math.isfinite, limits)):
        low, high = found or (-math.inf, math.inf)
        return max(low, limits[0]), min(high, limits[1])
    low, high = found or (value, value)
    z, (unique, counts) = z_of(confidence), np.unique(values, return_counts=True)

    def statistic(mu: float) -> float:
        return float(score_test(unique - mu, limits[0] - mu, limits[1] - mu, counts)[0])

    low = min(low, _where(statistic, z, value, limits[0]))
    high = max(high, _where(statistic, z, value, limits[1]))
    return max(low, limits[0]), min(high, limits[1])


def ratio_of_sums(tops: np.ndarray, bottoms: np.ndarray, confidence: float = 0.95, seed: int = 0) -> Interval:
    """``sum(tops) / sum(bottoms)`` over items, both (n,) and not negative: a rate per token, a share of n-grams."""
    total = float(bottoms.sum())
    if total <= 0.0:
        return Interval(math.nan, -math.inf, math.inf, len(tops), "none: nothing to divide by")
    low, high = bca((tops, bottoms), _ratio_of, confidence, seed) or (0.0, math.inf)
    return Interval(float(tops.sum()) / total, max(low, 0.0), high, len(tops), "BCa bootstrap")


def excess(
    scores: np.ndarray, others: np.ndarray, confidence: float = 0.95, limits: Range = UNIT, seed: int = 0
) -> Interval:
    """``mean(scores) - mean(others)`` of two groups of different items, (n,) and (m,); ``n`` counts both.

    The distances of the two groups' bounds from their means are combined as independent errors are (MOVER: Zou and
    Donner, Statistics in Medicine 27, 2008; with Wilson intervals this is Newcombe's method 10).
    """
    one, two = mean(scores, confidence, limits, seed), mean(others, confidence, limits, seed)
    value = one.value - two.value
    low = value - math.hypot(one.value - one.low, two.high - two.value)
    high = value + math.hypot(one.high - one.value, two.value - two.low)
    method = one.method if one.method == two.method else f"{one.method} and {two.method}"
    return Interval(value, low, high, one.n + two.n, f"{method}, combined")


# --- two subjects on the same items ------------------------------------------------------------------------------


def tango(wins: int, losses: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of ``(wins - losses) / n`` (Statistics in Medicine 17, 1998, 891-908).

    The bounds are the differences at which the score test, with the loss rate at its maximum likelihood under
    that difference, just reaches the normal quantile; found by bisection.
    """
    z = z_of(confidence)

    def outside(delta: float) -> bool:
        b = -wins - losses + (2 * n - wins + losses) * delta
        c = -losses * delta * (1 - delta)
        loss_rate = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * max(2 * loss_rate + delta * (1 - delta), 0.0)
        return (wins - losses - n * delta) ** 2 > z * z * variance

    def boundary(end: float) -> float:
        far, near = end, (wins - losses) / n
        for _ in range(60):
            middle = (far + near) / 2
            far, near = (middle, near) if outside(middle) else (far, middle)
        return (far + near) / 2

    return boundary(-1.0), boundary(1.0)


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact two-sided p-value: the discordant pairs against a fair coin. 1 if there are none."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def difference(
    scores: np.ndarray, reference: np.ndarray, confidence: float = 0.95, limits: Range = UNIT, seed: int = 0
) -> Interval:
    """Mean of ``scores - reference``, both (n,) on the same items. An interval that excludes zero goes with a
    p-value that does: where the exact test does not reject equality, zero is inside."""
    gains, n = scores - reference, len(scores)
    if limits == UNIT and is_binary(scores) and is_binary(reference):
        wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
        value = (wins - losses) / n
        low, high = tango(wins, losses, n, confidence)
        p_value, method = mcnemar(wins, losses), "Tango, McNemar"
    else:
        value, width = float(gains.mean()), limits[1] - limits[0]
        low, high = _mean_bounds(gains, value, confidence, (-width, width), seed)
        p_value, method = sign_flip(gains, seed), "BCa bootstrap, sign-flip test"
    if p_value > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(value, low, high, n, method, p_value)


def ratio(
    scores: np.ndarray, reference: np.ndarray, confidence: float = 0.95, limits: Range = UNIT, seed: int = 0
) -> Interval:
    """``mean(scores) / mean(reference)`` on the same items; scores must not be negative.

    ``high`` is infinite where the reference's mean cannot be told from zero.
    """
    n, below = len(scores), float(reference.mean())
    if below <= 0.0:
        return Interval(math.nan, 0.0, math.inf, n, "none: the reference scored nothing")
    value, z = float(scores.mean()) / below, z_of(confidence)
    binary = limits == UNIT and is_binary(scores) and is_binary(reference)
    found = None if binary else bca((scores, reference), _ratio_of, confidence, seed)
    if not all(map(math.isfinite, limits)):
        low, high = found or (0.0, math.inf)
    else:
        low, high = found or (value, value)
        pairs, counts = np.unique(np.stack([scores, reference]), axis=1, return_counts=True)

        def statistic(r: float) -> float:
            y, ends = pairs[0] - r * pairs[1], (limits[0] - r * limits[1], limits[1] - r * limits[0])
            return float(score_test(y, *ends, counts)[0])

        low = min(low, _where(statistic, z, value, 0.0))
        bounded = statistic(_WIDEST_RATIO) < -z
        high = max(high, _where(statistic, z, value, _WIDEST_RATIO)) if bounded else math.inf
    return Interval(value, max(low, 0.0), high, n, "Nam-Blackwelder" if binary else "BCa bootstrap")


def sign_flip(gains: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test: the mean of (n,) gains over all or many random signs."""
    from scipy.stats import permutation_test

    seen = gains[np.abs(gains) > _TIE]
    if len(seen) < 2:  # one coin falls either way: nothing can be rejected
        return 1.0
    found = permutation_test(
        (seen,),
        _mean_of,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _LARGEST_DRAW // len(seen)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


# --- what they are made of ---------------------------------------------------------------------------------------


def score_test(
    y: np.ndarray, lowest: float, highest: float, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The score test of "y has mean zero", for y of shape (..., n) within [lowest, highest].

    Returns ``(z, sd)``, both (...,): the statistic, asymptotically standard normal, and the standard deviation of one
    y under the most likely distribution with mean zero on the values seen and the two ends. ``counts``, (n,) or
    (..., n): how often each y was seen. The distribution is that of empirical likelihood (Owen, Biometrika 75, 1988):
    ``p_i = 1 / (n (1 + l y_i))``, with l from bisection. Where l reaches the limit that an end sets, the rest of the
    mass lies at that end. A y that cannot have mean zero (its range starts or ends there) gives an infinite z.
    """
    weights = np.ones(y.shape[-1]) if counts is None else counts.astype(np.float64)
    n, total = weights.sum(axis=-1), (y * weights).sum(axis=-1)
    if lowest >= 0.0 or highest <= 0.0:
        none = np.abs(total) <= _TIE * n
        return np.where(none, 0.0, np.where(total > 0, np.inf, -np.inf)), np.zeros_like(total)
    low = np.full(y.shape[:-1], -1.0 / highest)
    high = np.full(y.shape[:-1], -1.0 / lowest)
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(50):
            middle = (low + high) / 2
            more = (weights * y / (1.0 + middle[..., None] * y)).sum(axis=-1) > 0
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        tilt = (low + high) / 2
        p = weights / (np.expand_dims(n, -1) * (1.0 + tilt[..., None] * y))
        rest = np.maximum(1.0 - p.sum(axis=-1), 0.0)
        end = np.where(tilt > 0, lowest, highest)
        sd = np.sqrt((p * y * y).sum(axis=-1) + np.where(rest > 1e-9, rest * end * end, 0.0))
        z = np.where(np.abs(total) <= _TIE * n, 0.0, total / (np.sqrt(n) * sd))
    return z, sd


def bca(
    arrays: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], confidence: float, seed: int
) -> tuple[float, float] | None:
    """BCa bounds of ``statistic`` over items resampled together, at the level expanded for n items; None where the
    statistic does not vary or some resamples leave it undefined."""
    from scipy.special import ndtr, stdtrit
    from scipy.stats import bootstrap

    n = len(arrays[0])
    if n < 2 or all(np.ptp(values) <= _TIE for values in arrays):
        return None
    quantile = stdtrit(n - 1, (1 + confidence) / 2) * math.sqrt(n / (n - 1))
    level = min(2 * float(ndtr(quantile)) - 1, 1 - 1e-6)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # scipy's words for the degenerate case, whose NaN becomes None here
        found = bootstrap(
            arrays,
            statistic,
            paired=len(arrays) > 1,
            confidence_level=level,
            n_resamples=RESAMPLES,
            batch=max(1, _LARGEST_DRAW // n),
            method="BCa",
            vectorized=True,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _where(statistic: Callable[[float], float], z: float, inside: float, end: float) -> float:
    """Between ``inside``, where the statistic is zero, and ``end``: where its size reaches ``z``; else the end."""
    from scipy.optimize import brentq

    def over(place: float) -> float:
        return min(abs(statistic(place)), 10 * z) - z  # it may be infinite at the end

    return float(brentq(over, inside, end, xtol=1e-12, rtol=1e-12)) if over(end) > 0 > over(inside) else end


def _mean_of(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(values.mean(axis=axis))


def _ratio_of(tops: np.ndarray, bottoms: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(tops.sum(axis=axis) / bottoms.sum(axis=axis))


def normal_quantile(p: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(p))


def z_of(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 for 0.95."""
    return normal_quantile((1 + confidence) / 2)
