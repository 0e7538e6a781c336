"""Scores with intervals, paired comparisons of two subjects on the same items, and how many items would decide.

Single scores and paired differences of them are ``intervals``' work. This module makes records of it, and adds the
values that are not means of item scores: a corpus value (BLEU, chrF, micro F1) is recomputed from resampled
counts, with percentile bounds at the expanded level, and its p-value is that of a test that swaps answers.

Where the p-value does not reject "no difference", the interval is widened to contain zero: a report never shows an
interval above zero beside a p-value that does not support it. Everything random has a fixed seed, so the same
scores give the same record. Items are taken as independent; nothing is corrected for having compared several
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tunegate.errors import InputError
from tunegate.evaluation.intervals import Interval, difference, mean, normal_quantile, score_test, z_of
from tunegate.evaluation.types import Measurement
from tunegate.records import Comparison, Score

RESAMPLES = 4000
CORPUS = "bootstrap of the corpus value"
PERMUTATIONS = 9999
EXACT_UP_TO = 12  # so many items that differ: all 2**12 sign flips are tried instead of a sample
_BLOCK = 64  # resamples drawn at once: bounds the memory at 64 rows of item counts
LEAST_EFFECT = 1e-6  # an effect smaller than this is no effect: no set of items could show it
_TIE = 1e-12  # differences this close count as equal; rounding must not decide a p-value


def score(measurement: Measurement, confidence: float = 0.95, seed: int = 0) -> Score:
    """A measurement's reported value with its interval; :class:`InputError` without items."""
    scores = measurement.scores
    _check_numbers(scores, confidence, measurement.metric)
    if measurement.counts is None or measurement.aggregate is None:
        found = mean(scores, confidence, seed=seed)
        value, low, high, method = found.value, found.low, found.high, found.method
    else:
        counts, aggregate = measurement.counts, measurement.aggregate
        value = measurement.value
        draws = np.array([aggregate(total) for total in _resampled_sums(counts, seed)])
        low, high = _percentiles(draws, value, len(scores), confidence, lowest=0.0)
        method = CORPUS
    return Score(measurement.metric, value, len(scores), low, high, confidence, method)


def interval(
    scores: np.ndarray | Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """``(mean, low, high)`` of scores in [0, 1]. :class:`InputError` for no scores, numbers that are not finite, or a
    confidence outside (0, 1)."""
    values = np.asarray(scores, dtype=np.float64)
    _check_numbers(values, confidence, "scores")
    found = mean(values, confidence, seed=seed)
    return found.value, found.low, found.high


def compare(
    candidate: Measurement,
    reference: Measurement,
    reference_name: str,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Candidate minus reference, item by item.

    ``difference`` is that of the reported values; wins, losses and ties count items by their own score.
    :class:`InputError` if the metrics differ, or the rows are not the same rows in the same order.
    """
    _check_same_items(candidate, reference)
    _check_numbers(candidate.scores, confidence, candidate.metric)
    _check_numbers(reference.scores, confidence, reference.metric)
    gains = candidate.scores - reference.scores
    wins, losses = int((gains > _TIE).sum()), int((gains < -_TIE).sum())
    if candidate.counts is not None and reference.counts is not None and candidate.aggregate is not None:
        found = _compare_aggregates(candidate, reference, candidate.aggregate, confidence, seed)
    else:
        found = difference(candidate.scores, reference.scores, confidence, seed=seed)
    return Comparison(
        metric=candidate.metric,
        reference=reference_name,
        difference=found.value,
        low=found.low,
        high=found.high,
        n=len(gains),
        p_value=found.p_value if found.p_value is not None else 1.0,
        wins=wins,
        losses=losses,
        ties=len(gains) - wins - losses,
        method=found.method,
    )


def minimum_detectable(n: int, base_rate: float, power: float = 0.8, confidence: float = 0.95) -> float | None:
    """The smallest gain over ``base_rate`` that ``n`` paired 0/1 items show with ``power``; None if no gain can.

    Connor's formula (Biometrics 43, 1987) for McNemar's test, with the two subjects' answers taken as
    independent. Subjects that agree more often than chance show smaller gains.
    """
    if n < 1 or not 0.0 <= base_rate <= 1.0:
        raise InputError("need n >= 1 and a base rate in [0, 1]", got=f"n={n}, base_rate={base_rate}")
    z_alpha, z_power = z_of(confidence), normal_quantile(power)

    def shown(gain: float) -> bool:
        new = base_rate + gain
        discordant = base_rate * (1 - new) + new * (1 - base_rate)
        spread = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(max(discordant - gain * gain, 0.0))
        return n * gain * gain >= spread * spread

    low, high = 0.0, 1.0 - base_rate
    if high <= 0.0 or not shown(high):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def detectable_gain(comparison: Comparison, confidence: float = 0.95, power: float = 0.8) -> float:
    """The difference that items as many and as spread out as these show with ``power``, from the interval."""
    z = z_of(confidence)
    return (comparison.high - comparison.low) / 2 * (z + normal_quantile(power)) / z


def items_needed(comparison: Comparison, threshold: float, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Items needed to show that the difference seen exceeds ``threshold``; None if it does not exceed it, or by so
    little (under 1e-6) that no set of items could show it."""
    excess = comparison.difference - threshold
    if excess < LEAST_EFFECT:
        return None
    return math.ceil(comparison.n * (detectable_gain(comparison, confidence, power) / excess) ** 2)


def items_to_decide(
    y: np.ndarray, lowest: float, highest: float, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Items like these (n,) needed to show, with ``power``, on which side of zero the mean of y lies; None if it lies
    on it. The score test's sample size ``((z_c s0 + z_p s1) / mean)^2``, with s0 the standard deviation under "the
    mean is zero" and s1 the one seen (Fleiss, Levin and Paik 2003, chapter 4)."""
    seen = float(y.mean())
    if abs(seen) < LEAST_EFFECT:
        return None
    null = float(score_test(y, lowest, highest)[1])
    spread = z_of(confidence) * null + normal_quantile(power) * float(y.std())
    return max(2, math.ceil((spread / seen) ** 2))


def _compare_aggregates(
    candidate: Measurement,
    reference: Measurement,
    aggregate: Callable[[np.ndarray], float],
    confidence: float,
    seed: int,
) -> Interval:
    """The difference of two corpus values, from both (n, k) count arrays."""
    assert candidate.counts is not None and reference.counts is not None
    mine, theirs = candidate.counts, reference.counts
    n, k = mine.shape

    def gain(total: np.ndarray) -> float:
        return aggregate(total[:k]) - aggregate(total[k:])

    both = np.concatenate([mine, theirs], axis=1)
    draws = np.array([gain(total) for total in _resampled_sums(both, seed)])
    low, high = _percentiles(draws, gain(both.sum(axis=0)), n, confidence, lowest=-1.0)
    # Swapping the two subjects' answers on an item flips the sign of (candidate - reference) / 2 there.
    middle = (mine + theirs).sum(axis=0) / 2

    def swapped(half_difference: np.ndarray) -> float:
        return aggregate(middle + half_difference) - aggregate(middle - half_difference)

    p_value = _sign_flip_p((mine - theirs) / 2, swapped, seed)
    if p_value > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(candidate.value - reference.value, low, high, n, f"{CORPUS}, swap test", p_value)


def _sign_flip_p(differences: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int) -> float:
    """Two-sided p-value of ``statistic(sum of differences)`` over random signs of the (n, k) differences.

    All signs are tried for up to :data:`EXACT_UP_TO` non-zero rows; else a sample, which counts itself (the
    observed signs are one of the ways they can fall).
    """
    rows = differences[np.abs(differences).max(axis=1) > _TIE]
    if not len(rows):
        return 1.0
    observed = abs(float(statistic(rows.sum(axis=0)))) - _TIE
    exact = len(rows) <= EXACT_UP_TO
    signs = _all_signs(len(rows)) if exact else _random_signs(len(rows), seed)
    extreme = sum(abs(float(statistic(total))) >= observed for block in signs for total in block @ rows)
    return extreme / 2 ** len(rows) if exact else (extreme + 1) / (PERMUTATIONS + 1)


def _all_signs(n: int) -> Iterator[np.ndarray]:
    codes = np.arange(2**n)[:, None] >> np.arange(n) & 1
    yield codes * 2.0 - 1.0


def _random_signs(n: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    for start in range(0, PERMUTATIONS, _BLOCK):
        yield random.integers(0, 2, (min(_BLOCK, PERMUTATIONS - start), n)) * 2.0 - 1.0


def _resampled_sums(values: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES, k) sums over items drawn with replacement from the (n, k) values."""
    n = len(values)
    random = np.random.default_rng(seed)
    sums = []
    for start in range(0, RESAMPLES, _BLOCK):
        rows = min(_BLOCK, RESAMPLES - start)
        drawn = random.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append(times.astype(np.float64) @ values)
    return np.concatenate(sums)


def _percentiles(draws: np.ndarray, value: float, n: int, confidence: float, lowest: float) -> tuple[float, float]:
    """The interval of a value in [lowest, 1] from its bootstrap draws.

    A bootstrap of n items is too narrow by about sqrt((n-1)/n) and by the normal quantile where Student's
    belongs; reading it at the expanded level mends both. Where nothing varies, at most a share
    ``z^2 / (n + z^2)`` of all items can differ from those seen (Wilson for 0 of n), by as much as the unit allows.
    """
    from scipy.special import ndtr, stdtrit

    low = high = value
    if n > 1 and np.ptp(draws) > _TIE:
        quantile = stdtrit(n - 1, (1 + confidence) / 2) * math.sqrt(n / (n - 1))
        tail = float(ndtr(-quantile))
        low, high = (float(bound) for bound in np.quantile(draws, [tail, 1 - tail]))
    if high - low <= _TIE:
        z = z_of(confidence)
        share = z * z / (n + z * z)
        low, high = value - share * (value - lowest), value + share * (1 - value)
    return max(min(low, value), lowest), min(max(high, value), 1.0)


def _check_numbers(scores: np.ndarray, confidence: float, name: str) -> None:
    if not 0.0 < confidence < 1.0:
        raise InputError("confidence must lie between 0 and 1", got=str(confidence))
    if scores.ndim != 1 or not len(scores):
        raise InputError("no items to score", where=name, expected="at least one item")
    bad = np.flatnonzero(~((scores >= 0.0) & (scores <= 1.0)))
    if len(bad):
        raise InputError(
            f"{len(bad)} of {len(scores)} scores are not numbers from 0 to 1",
            where=name,
            got=f"{scores[bad[0]]} at item {bad[0] + 1}",
        )


def _check_same_items(candidate: Measurement, reference: Measurement) -> None:
    if candidate.metric != reference.metric:
        raise InputError("two metrics cannot be compared", expected=candidate.metric, got=reference.metric)
    mine, theirs = candidate.row_ids, reference.row_ids
    if mine == theirs and len(mine) == len(candidate.scores) == len(reference.scores):
        return
    pairs = enumerate(zip(mine, theirs, strict=False), start=1)
    first = next((f"item {i} is {a} and {b}" for i, (a, b) in pairs if a != b), "one has items the other lacks")
    raise InputError(
        "the subjects were not scored on the same items in the same order",
        where=candidate.metric,
        expected=f"{len(mine)} items",
        got=f"{len(theirs)} items; {first}",
    )
