"""Decisions of a sweep: whether a rank goes on after an epoch, when a higher rank stops paying, what is forgotten.

* :func:`climb` starts at the lowest rank and raises it while the validation items show a significant gain. A rank
  that is not ahead of the lower one after as many epochs is pruned: one rung of successive halving (Jamieson and
  Talwalkar 2016, :func:`survivors`) on the two best scores so far. Between scores that never cross, that drops no
  better rank.
* :func:`rank_gain` compares two ranks on the same items. Its confidence is Bonferroni-corrected for the number of
  raises that were planned.
* :func:`fit_forgetting` fits ``F(x) = c * ((1 + x / b)**a - 1)`` with ``x`` = trained parameters * steps: a power law
  shifted so that no training forgets nothing. Kalajdzievski (arXiv 2401.05605) finds shifted power laws in parameters
  and steps; this one-variable form is a simplification of it, for the few points that a sweep has.
  :func:`forgetting_band` says how far those points leave it open.

It trains nothing and reads no files. The correction is for the number of raises and for nothing else: each rank is
compared by its best epoch, chosen on the same items, so the level of a comparison is nominal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunegate.errors import InputError
from tunegate.evaluation.statistics import compare
from tunegate.evaluation.types import Measurement
from tunegate.records import Comparison

FEWEST_POINTS, FEWEST_PLACES = 4, 3  # three parameters, and a point to spare
EXPONENTS = (0.01, 3.0)
_SHIFTS = (-12.0, 12.0)  # logarithm of the shift over the middle of the points
_GRID = 80  # exponents, and shifts, that the band looks at
_ZOOMS = 3  # how often it looks again, where the last look found something


def survivors(scores: Mapping[str, float], factor: int = 2) -> list[str]:
    """The best ``ceil(n / factor)`` trials, best first; a tie goes to the trial named first (the lower rank).

    :class:`InputError` for a factor below 2, no trials, or a score that is not finite.
    """
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if factor < 2 or not scores or bad:
        raise InputError(
            "cannot prune", expected="a factor of 2 or more and finite scores", got=f"{factor}, {dict(scores)}"
        )
    return sorted(scores, key=lambda name: -scores[name])[: math.ceil(len(scores) / factor)]


def rank_gain(
    higher: Measurement, lower: Measurement, lower_name: str, looks: int, confidence: float = 0.95
) -> tuple[bool, Comparison]:
    """Whether the higher rank is significantly better, and the comparison, at ``1 - (1 - confidence) / looks``."""
    if looks < 1:
        raise InputError("a comparison is at least one look", expected="looks >= 1", got=str(looks))
    level = 1 - (1 - confidence) / looks
    found = compare(higher, lower, lower_name, level)
    return found.difference > 0 and found.low > 0 and found.p_value <= 1 - level, found


# --- which rank --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A rank's validation scores after each epoch, in order. ``complete``: its training has ended by itself."""

    rank: int
    points: tuple[Measurement, ...] = ()
    complete: bool = False

    def best(self, epochs: int | None = None) -> int:
        """The place of the best of the first ``epochs`` points; a tie goes to the earlier one."""
        values = [point.value for point in self.points[:epochs]]
        return values.index(max(values))


@dataclass(frozen=True)
class Look:
    """A rank beside the lower one. ``pruned``: it was stopped after so many epochs; None if it was not."""

    rank: int
    lower: int
    raised: bool
    comparison: Comparison
    pruned: int | None = None


@dataclass(frozen=True)
class Climb:
    """``rank``: the recommended one so far, None before the lowest is complete. ``next``: the rank whose further
    training decides, None where nothing is left to decide."""

    rank: int | None
    next: int | None
    looks: tuple[Look, ...] = ()


def climb(curves: Sequence[Curve], confidence: float = 0.95) -> Climb:
    """What ``curves`` decide (at least one, lowest rank first), the same whatever the order they came in.

    A rank is pruned only while its training is incomplete; what a complete one scored is used whole.
    """
    ranks = [curve.rank for curve in curves]
    if not ranks or ranks != sorted(set(ranks)):
        raise InputError("a sweep climbs through ranks", expected="ascending ranks, each once", got=str(ranks))
    lowest, *higher = curves
    if not lowest.complete:
        return Climb(None, lowest.rank)
    best = lowest
    looks: list[Look] = []
    for curve in higher:
        pruned = None if curve.complete else _lost(curve, best)
        if not curve.complete and pruned is None:
            return Climb(best.rank, curve.rank, tuple(looks))
        mine, theirs = curve.points[curve.best(pruned)], best.points[best.best()]
        raised, found = rank_gain(mine, theirs, f"rank {best.rank}", len(higher), confidence)
        looks.append(Look(curve.rank, best.rank, raised, found, pruned))
        if not raised:
            break
        best = curve
    return Climb(best.rank, None, tuple(looks))


def _lost(higher: Curve, lower: Curve) -> int | None:
    """After how many epochs ``higher`` was first not ahead; None if it is. A lower rank that stopped early keeps its
    best score."""
    for epochs in range(1, len(higher.points) + 1):
        mine, theirs = (c.points[c.best(epochs)].value for c in (higher, lower))
        if survivors({"lower": theirs, "higher": mine}) != ["higher"]:
            return epochs
    return None


# --- what is forgotten -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForgettingCurve:
    """``scale`` in the unit of the forgetting (nats for a KL), ``shift`` in parameters * steps; ``r_squared`` of the
    fit on its own points."""

    scale: float
    shift: float
    exponent: float
    r_squared: float

    def at(self, work: float | np.ndarray) -> float | np.ndarray:
        """The forgetting at ``work`` = trained parameters * steps."""
        return self.scale * np.expm1(self.exponent * np.log1p(np.asarray(work) / self.shift))


def fit_forgetting(work: Sequence[float], forgetting: Sequence[float]) -> ForgettingCurve:
    """Least squares over shift and exponent; the scale is linear given those and is solved for exactly.

    :class:`InputError` for fewer than :data:`FEWEST_POINTS` points at :data:`FEWEST_PLACES` different ``work``, or
    numbers that are not finite, not positive in ``work`` or all zero in ``forgetting``.
    """
    from scipy.optimize import least_squares

    u, v, middle, size = _scaled(work, forgetting)

    def residual(p: np.ndarray) -> np.ndarray:
        basis, scale = _shape(u, v, p)
        return scale * basis - v

    starts = [(s, a) for s in (-4.0, 0.0, 4.0) for a in (0.2, 0.7, 1.5)]
    bounds = ([_SHIFTS[0], EXPONENTS[0]], [_SHIFTS[1], EXPONENTS[1]])
    best = min(
        (least_squares(residual, s, bounds=bounds, xtol=1e-12, ftol=1e-12) for s in starts), key=lambda r: r.cost
    )
    spread = float(((v - v.mean()) ** 2).sum())
    r_squared = 1 - 2 * float(best.cost) / spread if spread > 0 else math.nan
    scale = _shape(u, v, best.x)[1] * size
    return ForgettingCurve(scale, float(np.exp(best.x[0])) * middle, float(best.x[1]), r_squared)


def _scaled(work: Sequence[float], forgetting: Sequence[float]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Both (n,) over their size, and those sizes."""
    x, y = np.asarray(work, dtype=np.float64), np.asarray(forgetting, dtype=np.float64)
    usable = x.shape == y.shape and np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()
    few = len(x) < FEWEST_POINTS or len(np.unique(x)) < FEWEST_PLACES
    if not usable or few or not (y @ y > 0):
        raise InputError(
            "a forgetting curve cannot be fitted",
            expected=f"{FEWEST_POINTS} points at {FEWEST_PLACES} amounts of training, finite and not all zero",
            got=f"{len(y)} at {len(np.unique(x))} amounts",
            fix="train more ranks or epochs",
        )
    middle, size = float(np.exp(np.log(x).mean())), float(np.sqrt(y @ y))
    return x / middle, y / size, middle, size


def _shape(u: np.ndarray, v: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, float]:
    basis = np.expm1(p[1] * np.log1p(u / np.exp(p[0])))
    return basis, max(float(basis @ v) / float(basis @ basis), 0.0)


@dataclass(frozen=True)
class Band:
    """What the points leave open at ``confidence``: the exponent, None where a bound of the search was met, and (k,)
    bounds of the curve."""

    confidence: float
    exponent_low: float | None
    exponent_high: float | None
    low: np.ndarray
    high: np.ndarray


def forgetting_band(
    work: Sequence[float], forgetting: Sequence[float], at: Sequence[float], confidence: float = 0.95
) -> Band:
    """The profile interval of the exponent, and of the curve at each of ``at``.

    All curves whose squared residuals stay within ``1 + t^2 / (n - 3)`` times the least belong (Bates and Watts 1988,
    chapter 6, for one function of the parameters), found on a grid of shifts and exponents with the scale in closed
    form. Residuals are taken as independent and alike; those of one training run are neither quite.
    """
    from scipy.special import stdtrit

    u, v, middle, size = _scaled(work, forgetting)
    best = fit_forgetting(work, forgetting)
    spare = len(u) - 3
    t = float(stdtrit(spare, (1 + confidence) / 2))
    least = float((((best.at(np.asarray(work)) - np.asarray(forgetting)) / size) ** 2).sum())
    allowed = least * (1 + t * t / spare) + 1e-15
    edges = (*EXPONENTS, *_SHIFTS)
    for _ in range(_ZOOMS):
        exponents = np.append(np.linspace(*edges[:2], _GRID), best.exponent)
        shifts = np.append(np.linspace(*edges[2:], _GRID), math.log(best.shift / middle))
        a, log_b = (grid.ravel() for grid in np.meshgrid(exponents, shifts))
        basis = np.expm1(a[:, None] * np.log1p(u / np.exp(log_b)[:, None]))  # (grid, n)
        norms = (basis * basis).sum(axis=1)
        scale = np.maximum(basis @ v / norms, 0.0)
        room = allowed - ((scale[:, None] * basis - v) ** 2).sum(axis=1)
        a, log_b, scale, slack = (x[room >= 0] for x in (a, log_b, scale, np.sqrt(np.maximum(room, 0.0) / norms)))
        edges = (*_around(a, exponents, EXPONENTS), *_around(log_b, shifts, _SHIFTS))
    curves = np.expm1(a[:, None] * np.log1p(np.asarray(at) / middle / np.exp(log_b)[:, None]))  # (inside, k)
    low = (np.maximum(scale - slack, 0.0)[:, None] * curves).min(axis=0) * size
    high = ((scale + slack)[:, None] * curves).max(axis=0) * size
    bottom, top = float(a.min()), float(a.max())
    return Band(
        confidence,
        None if bottom <= EXPONENTS[0] else bottom,
        None if top >= EXPONENTS[1] else top,
        low,
        high,
    )


def _around(inside: np.ndarray, grid: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
    """The range of ``inside`` and one step of ``grid`` more, within ``bounds``."""
    step = float(np.ptp(grid)) / (_GRID - 1)
    return max(float(inside.min()) - step, bounds[0]), min(float(inside.max()) + step, bounds[1])
