"""Would more examples help? A power law through scores at several numbers of training rows.

The error ``1 - score`` is fitted as ``a * rows**-b + c`` with a, c >= 0 (Hestness et al. 2017, arXiv:1712.00409;
Rosenfeld et al. 2020, arXiv:1909.12673). For a fixed b the best a and c have a closed form, so b is searched alone and
no start value is needed. The interval comes from drawing the evaluation items with replacement, the same ones at
every size, and fitting again.

Four sizes hold little about a curve of three numbers: the interval covers the noise of the items, not that of another
training run, and not a curve of another shape. It does not train; see ``pipeline.advise``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunegate.errors import InputError

DRAWS = 1000
EXPONENTS = np.geomspace(0.02, 3.0, 120)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; all in the metric's unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """``score(rows) = 1 - a * rows**-b - c``."""

    a: float
    b: float
    c: float

    def score(self, rows: float) -> float:
        return float(np.clip(1 - self.a * rows**-self.b - self.c, 0.0, 1.0))


@dataclass(frozen=True)
class Curve:
    """``rows`` and the ``scores`` seen there, the law through them, what it predicts at multiples of all rows, and
    the gain of twice the rows over the ones there are, predicted at both ends."""

    rows: tuple[int, ...]
    scores: tuple[float, ...]
    law: PowerLaw
    predicted: dict[str, Estimate]
    doubling: Estimate

    @property
    def flat(self) -> bool:
        """Every size scores alike in every draw, such as 0 on each item: the prediction's interval has no width, which
        is no knowledge."""
        return all(e.high - e.low < 1e-9 for e in (self.doubling, *self.predicted.values()))

    @property
    def more_rows_help(self) -> bool:
        """Twice the rows give a gain that the interval separates from none, of at least half a point."""
        return self.doubling.low > 0.0 and self.doubling.value >= 0.005


def fit_law(rows: Sequence[float], scores: Sequence[float]) -> PowerLaw:
    """The least-squares law; at least three different sizes. Equal scores give a flat law (a = 0)."""
    sizes, errors = np.asarray(rows, dtype=np.float64), 1.0 - np.asarray(scores, dtype=np.float64)
    _check(sizes, errors)
    parameters = _fit(sizes, errors[None], EXPONENTS)[0]
    for _ in range(3):  # the neighbourhood of the best exponent, finer each time
        near = np.linspace(parameters[1] * 0.9, parameters[1] * 1.1, 41)
        parameters = min(parameters, _fit(sizes, errors[None], near)[0], key=lambda p: _loss(sizes, errors, p))
    return PowerLaw(*(float(p) for p in parameters))


def fit_curve(rows: Sequence[int], items: np.ndarray, confidence: float = 0.95, seed: int = 0) -> Curve:
    """The curve of ``items``, (sizes, n) scores in [0, 1] of the same n items after training on ``rows[i]`` rows."""
    items = np.asarray(items, dtype=np.float64)
    if items.ndim != 2 or len(items) != len(rows) or not items.shape[1]:
        raise InputError(
            "scores of the same items at every size are needed", got=f"{items.shape} for {len(rows)} sizes"
        )
    means = items.mean(axis=1)
    law = fit_law(rows, means)
    sizes, full = np.asarray(rows, dtype=np.float64), float(max(rows))
    drawn = np.random.default_rng(seed).integers(0, items.shape[1], (DRAWS, items.shape[1]))
    laws = _fit(sizes, 1.0 - np.stack([one[drawn].mean(axis=1) for one in items], axis=1), EXPONENTS)

    def at(multiple: float) -> np.ndarray:
        return np.clip(1 - laws[:, 0] * (multiple * full) ** -laws[:, 1] - laws[:, 2], 0.0, 1.0)

    def estimate(value: float, draws: np.ndarray) -> Estimate:
        low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Estimate(value, min(float(low), value), max(float(high), value))

    predicted = {f"{m}x": estimate(law.score(m * full), at(m)) for m in (1, 2, 4)}
    gain = estimate(law.score(2 * full) - law.score(full), at(2) - at(1))
    return Curve(tuple(int(r) for r in rows), tuple(float(m) for m in means), law, predicted, gain)


def _check(sizes: np.ndarray, errors: np.ndarray) -> None:
    if len(set(sizes.tolist())) < 3 or len(sizes) != len(errors) or not (sizes > 0).all():
        raise InputError("a learning curve needs scores at three sizes or more", got=f"sizes {sizes.tolist()}")
    if not ((errors >= 0) & (errors <= 1)).all():
        raise InputError("the scores of a learning curve lie between 0 and 1", got=str((1 - errors).tolist()))


def _fit(sizes: np.ndarray, errors: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """(draws, 3) best a, b, c for (draws, sizes) errors, over the given exponents.

    With x = (rows / most rows)**-b the law is a line in x; its non-negative least squares is the free line where both
    of its numbers are non-negative, else the better of a constant and a line through the origin.
    """
    best: np.ndarray = np.full(len(errors), np.inf)
    found = np.zeros((len(errors), 3))
    most = sizes.max()
    for b in exponents:
        x = (sizes / most) ** -b
        centred = x - x.mean()
        slope = errors @ centred / (centred @ centred)
        level = errors.mean(axis=1) - slope * x.mean()
        through = np.maximum(errors @ x / (x @ x), 0.0)
        flat = errors.mean(axis=1)
        zero = np.zeros_like(flat)
        free = (slope >= 0) & (level >= 0)
        for a, c, valid in ((slope, level, free), (through, zero, True), (zero, flat, True)):
            loss = ((errors - a[:, None] * x - c[:, None]) ** 2).sum(axis=1)
            better = valid & (loss < best - 1e-15)
            best = np.where(better, loss, best)
            found[better] = np.stack([a * most**b, np.full_like(a, b), c], axis=1)[better]
    return found


def _loss(sizes: np.ndarray, errors: np.ndarray, parameters: np.ndarray) -> float:
    a, b, c = parameters
    return float(((errors - a * sizes**-b - c) ** 2).sum())
