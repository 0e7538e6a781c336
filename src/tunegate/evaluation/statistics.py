"""Intervals around scores, and paired comparisons of two subjects on the same items.

========================  ============================================  =====================================
scores                    interval of the value                         interval of a paired difference
========================  ============================================  =====================================
all 0 or 1                Wilson score                                  Tango score (1998)
other means               bootstrap over items, expanded percentile     the same, over the paired differences
corpus values             the same, the aggregate recomputed            the same, both aggregates recomputed
========================  ============================================  =====================================

Tango's interval inverts the score test, so it keeps its coverage with few discordant pairs and is not of zero
width when there are none; a bootstrap fails in both places. The p-value is McNemar's exact one for 0/1 scores
and a sign-flip permutation test otherwise. Where the p-value does not reject "no difference", the interval is
widened to contain zero: a report never shows an interval above zero beside a p-value that does not support it.

Everything random has a fixed seed, so the same scores give the same record. Items are taken as independent;
nothing is corrected for having compared several candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tunegate.errors import InputError
from tunegate.evaluation.types import Measurement
from tunegate.records import Comparison, Score

RESAMPLES = 4000
PERMUTATIONS = 9999
EXACT_UP_TO = 12  # so many items that differ: all 2**12 sign flips are tried instead of a sample
_BLOCK = 64  # resamples drawn at once: bounds the memory at 64 rows of item counts
_TIE = 1e-12  # differences this close count as equal; rounding must not decide a p-value


def score(measurement: Measurement, confidence: float = 0.95, seed: int = 0) -> Score:
    """A measurement's reported value with its interval; :class:`InputError` without items."""
    scores = measurement.scores
    if measurement.counts is None or measurement.aggregate is None:
        value, low, high = interval(scores, confidence, seed)
    else:
        _check_numbers(scores, confidence, measurement.metric)
        counts, aggregate = measurement.counts, measurement.aggregate
        value = measurement.value
        draws = np.array([aggregate(total) for total in _resampled_sums(counts, seed)])
        low, high = _percentiles(draws, value, len(scores), confidence, lowest=0.0)
    return Score(measurement.metric, value, len(scores), low, high, confidence)


def interval(
    scores: np.ndarray | Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """``(mean, low, high)`` of scores in [0, 1]: Wilson for 0/1 scores, else a bootstrap over items.

    The bootstrap is the percentile one with its levels expanded for small samples (Hesterberg 2015). Scores
    that are all the same get the width that Wilson gives to "0 of n differ". :class:`InputError` for no scores,
    numbers that are not finite, or a confidence outside (0, 1).
    """
    values = np.asarray(scores, dtype=np.float64)
    _check_numbers(values, confidence, "scores")
    mean = float(values.mean())
    if _is_binary(values):
        return (mean, *wilson(round(float(values.sum())), len(values), confidence))
    draws = _resampled_sums(values[:, None], seed)[:, 0] / len(values)
    return (mean, *_percentiles(draws, mean, len(values), confidence, lowest=0.0))


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), without continuity correction."""
    z = _z(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


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
        difference = candidate.value - reference.value
        low, high, p_value = _compare_aggregates(
            candidate.counts, reference.counts, candidate.aggregate, confidence, seed
        )
    elif _is_binary(candidate.scores) and _is_binary(reference.scores):
        difference = (wins - losses) / len(gains)
        low, high = tango(wins, losses, len(gains), confidence)
        p_value = mcnemar(wins, losses)
    else:
        difference = float(gains.mean())
        draws = _resampled_sums(gains[:, None], seed)[:, 0] / len(gains)
        low, high = _percentiles(draws, difference, len(gains), confidence, lowest=-1.0)
        p_value = _sign_flip_p(gains[:, None], np.sum, seed)
    if p_value > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Comparison(
        metric=candidate.metric,
        reference=reference_name,
        difference=difference,
        low=low,
        high=high,
        n=len(gains),
        p_value=p_value,
        wins=wins,
        losses=losses,
        ties=len(gains) - wins - losses,
    )


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact two-sided p-value: the discordant pairs against a fair coin. 1 if there are none."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def tango(wins: int, losses: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of ``(wins - losses) / n`` (Statistics in Medicine 17, 1998, 891-908).

    The bounds are the differences at which the score test, with the loss rate at its maximum likelihood under
    that difference, just reaches the normal quantile; found by bisection.
    """
    z = _z(confidence)

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


def minimum_detectable(n: int, base_rate: float, power: float = 0.8, confidence: float = 0.95) -> float | None:
    """The smallest gain over ``base_rate`` that ``n`` paired 0/1 items show with ``power``; None if no gain can.

    Connor's formula (Biometrics 43, 1987) for McNemar's test, with the two subjects' answers taken as
    independent. Subjects that agree more often than chance show smaller gains.
    """
    if n < 1 or not 0.0 <= base_rate <= 1.0:
        raise InputError("need n >= 1 and a base rate in [0, 1]", got=f"n={n}, base_rate={base_rate}")
    z_alpha, z_power = _z(confidence), _normal_quantile(power)

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
    z = _z(confidence)
    return (comparison.high - comparison.low) / 2 * (z + _normal_quantile(power)) / z


def items_needed(comparison: Comparison, threshold: float, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Items needed to show that the difference seen exceeds ``threshold``; None if it does not exceed it, or by so
    little (under 1e-6) that no set of items could show it."""
    excess = comparison.difference - threshold
    if excess < 1e-6:
        return None
    return math.ceil(comparison.n * (detectable_gain(comparison, confidence, power) / excess) ** 2)


def _compare_aggregates(
    candidate: np.ndarray,
    reference: np.ndarray,
    aggregate: Callable[[np.ndarray], float],
    confidence: float,
    seed: int,
) -> tuple[float, float, float]:
    """``(low, high, p_value)`` of the difference of two corpus values; both count arrays are (n, k)."""
    n, k = candidate.shape
    both = np.concatenate([candidate, reference], axis=1)

    def gain(total: np.ndarray) -> float:
        return aggregate(total[:k]) - aggregate(total[k:])

    draws = np.array([gain(total) for total in _resampled_sums(both, seed)])
    low, high = _percentiles(draws, gain(both.sum(axis=0)), n, confidence, lowest=-1.0)
    # Swapping the two subjects' answers on an item flips the sign of (candidate - reference) / 2 there.
    middle = (candidate + reference).sum(axis=0) / 2

    def swapped(half_difference: np.ndarray) -> float:
        return aggregate(middle + half_difference) - aggregate(middle - half_difference)

    return low, high, _sign_flip_p((candidate - reference) / 2, swapped, seed)


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
        z = _z(confidence)
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


def _is_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _normal_quantile(p: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(p))


def _z(confidence: float) -> float:
    return _normal_quantile((1 + confidence) / 2)
