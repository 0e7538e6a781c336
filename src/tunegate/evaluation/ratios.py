"""Candidate over reference on the same items: ratios and shifts with paired bootstrap intervals.

Items are drawn with replacement, both subjects' scores of an item together, and the ratio of the two sums is taken
in every draw. A draw in which the reference scores nothing has no ratio: it counts as 0 for the lower bound and as
unbounded for the upper one, so a set that the reference hardly solves gives a wide interval and not a lucky one.
The percentiles are read at the level expanded for small samples (Hesterberg 2015). Where no item differs at all, the
bounds are those of "0 of n differ" (Wilson): n equal answers do not prove that all are equal.

It knows no domain and decides nothing.
"""

from __future__ import annotations

import math

import numpy as np

from tunegate.errors import InputError
from tunegate.records import Ratio

RESAMPLES = 4000
_BLOCK = 64  # draws at once
_TIE = 1e-12


def ratio(name: str, candidate: np.ndarray, reference: np.ndarray, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """Mean of ``candidate`` over mean of ``reference``, both (n,) in [0, 1] on the same items."""
    _check(candidate, reference, confidence)
    n = len(reference)
    mine, theirs = float(candidate.mean()), float(reference.mean())
    value = mine / theirs if theirs > 0 else None
    high: float | None
    if np.abs(candidate - reference).max() <= _TIE:
        share = _unseen_share(n, confidence)
        low = max(0.0, mine - share) / theirs if theirs > 0 else 0.0
        high = min(1.0, mine + share) / theirs if theirs > 0 else None
    else:
        sums = _resampled_sums(np.stack([candidate, reference], axis=1), seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)
        tail = _tail(n, confidence)
        low = float(np.quantile(np.where(np.isnan(draws), 0.0, draws), tail, method="lower"))
        top = float(np.quantile(np.where(np.isnan(draws), np.inf, draws), 1 - tail, method="higher"))
        high = top if math.isfinite(top) else None
    if value is not None:
        low, high = min(low, value), None if high is None else max(high, value)
    return Ratio(name, value, low, high, mine, theirs, n, confidence)


def likelihood_ratio(
    name: str, candidate: np.ndarray, reference: np.ndarray, confidence: float = 0.95, seed: int = 0
) -> Ratio:
    """Ratio of geometric mean probabilities per token: exp of the mean difference of (n,) log-likelihoods in nats.

    Below 1 the candidate finds the references less likely; 1 / value is the ratio of perplexities.
    """
    _check(candidate, reference, confidence)
    bounds = mean_interval(candidate - reference, confidence, seed)
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(bound)) for bound in bounds)
    return Ratio(
        name,
        value if math.isfinite(value) else None,
        low if math.isfinite(low) else float(np.finfo(float).max),
        high if math.isfinite(high) else None,
        float(np.exp(candidate.mean())),
        float(np.exp(reference.mean())),
        len(candidate),
        confidence,
    )


def mean_interval(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """``(mean, low, high)`` of (n,) finite numbers in any unit, by the bootstrap; equal numbers have no spread."""
    if not len(values) or not np.isfinite(values).all():
        raise InputError("no finite numbers to take the mean of", got=f"{len(values)} values")
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) <= _TIE:
        return mean, mean, mean
    draws = _resampled_sums(values[:, None], seed)[:, 0] / len(values)
    tail = _tail(len(values), confidence)
    low, high = (float(bound) for bound in np.quantile(draws, [tail, 1 - tail]))
    return mean, min(low, mean), max(high, mean)


def _check(candidate: np.ndarray, reference: np.ndarray, confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise InputError("confidence must lie between 0 and 1", got=str(confidence))
    if candidate.shape != reference.shape or candidate.ndim != 1 or not len(candidate):
        raise InputError(
            "the two subjects need scores on the same items, at least one",
            expected=str(reference.shape),
            got=str(candidate.shape),
        )
    if not (np.isfinite(candidate).all() and np.isfinite(reference).all()):
        raise InputError("a score is not a finite number")


def _tail(n: int, confidence: float) -> float:
    """The percentile that makes a bootstrap of n items as wide as Student's interval."""
    from scipy.special import ndtr, stdtrit

    if n < 2:
        return (1 - confidence) / 2
    return float(ndtr(-stdtrit(n - 1, (1 + confidence) / 2) * math.sqrt(n / (n - 1))))


def _unseen_share(n: int, confidence: float) -> float:
    """Upper bound of the share of items that differ when 0 of n do (Wilson)."""
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))
    return z * z / (n + z * z)


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
