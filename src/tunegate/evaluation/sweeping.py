"""Decisions of a sweep: which trials go on after an epoch, when a higher rank has stopped paying, what is forgotten.

* :func:`survivors` is one rung of successive halving (Jamieson and Talwalkar 2016).
* :func:`rank_gain` compares two ranks on the same validation items. The confidence is Bonferroni-corrected for all
  the looks that were planned, so the chance of any rank raised without cause is at most ``1 - confidence``.
* :func:`fit_forgetting` fits ``F(x) = c * ((1 + x / b)**a - 1)`` with ``x`` = trained parameters * steps. That is a
  power law shifted so that no training forgets nothing. Kalajdzievski (arXiv 2401.05605) finds shifted power laws in
  parameters and steps; this one-variable form is a simplification of it, for the few points that a sweep has.

It trains nothing, reads no files, and does not correct for the pruning that came before a comparison.
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

FEWEST_POINTS = 4  # three parameters and one to spare
EXPONENTS = (0.01, 3.0)


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

    :class:`InputError` for fewer than :data:`FEWEST_POINTS` different ``work``, or numbers that are not finite, not
    positive in ``work`` or all zero in ``forgetting``.
    """
    from scipy.optimize import least_squares

    x, y = np.asarray(work, dtype=np.float64), np.asarray(forgetting, dtype=np.float64)
    usable = x.shape == y.shape and np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()
    if not usable or len(np.unique(x)) < FEWEST_POINTS or not (y @ y > 0):
        raise InputError(
            "a forgetting curve cannot be fitted",
            expected=f"{FEWEST_POINTS} different amounts of training with a finite, not all zero forgetting",
            got=f"{len(x)} and {len(y)} values",
            fix="train more ranks or epochs",
        )
    middle, size = float(np.exp(np.log(x).mean())), float(np.sqrt(y @ y))
    u, v = x / middle, y / size

    def shape(p: np.ndarray) -> tuple[np.ndarray, float]:
        basis = np.expm1(p[1] * np.log1p(u / np.exp(p[0])))
        return basis, max(float(basis @ v) / float(basis @ basis), 0.0)

    def residual(p: np.ndarray) -> np.ndarray:
        basis, scale = shape(p)
        return scale * basis - v

    starts = [(s, a) for s in (-4.0, 0.0, 4.0) for a in (0.2, 0.7, 1.5)]
    bounds = ([-12.0, EXPONENTS[0]], [12.0, EXPONENTS[1]])
    best = min(
        (least_squares(residual, s, bounds=bounds, xtol=1e-12, ftol=1e-12) for s in starts), key=lambda r: r.cost
    )
    spread = float(((v - v.mean()) ** 2).sum())
    r_squared = 1 - 2 * float(best.cost) / spread if spread > 0 else math.nan
    return ForgettingCurve(shape(best.x)[1] * size, float(np.exp(best.x[0])) * middle, float(best.x[1]), r_squared)
