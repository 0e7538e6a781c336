"""How far judges agree: Krippendorff's alpha for any number of raters with gaps, weighted kappa for two.

Both are 1 for full agreement and 0 for what chance gives. Alpha (Krippendorff, Content Analysis, 2004, chapter 11)
compares the observed disagreement within items with that between all ratings; scores of 1 to 5 are ``ordinal``.
Kappa (Cohen 1968) is here for comparison with papers that report it; weights grow with the distance of two scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunegate.errors import InputError

LEVELS = ("nominal", "ordinal", "interval")


def krippendorff_alpha(ratings: np.ndarray, level: str = "ordinal") -> float:
    """Alpha of (raters, items) ratings, NaN where a rater has not rated. NaN if it is not defined: no item has two
    ratings, or all ratings are the same. :class:`InputError` for an unknown ``level``."""
    if level not in LEVELS:
        raise InputError("unknown level of measurement", expected=f"one of {', '.join(LEVELS)}", got=level)
    values = np.asarray(ratings, dtype=np.float64)
    rated = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    categories = np.unique(rated[~np.isnan(rated)])
    if len(categories) < 2:
        return math.nan
    coincidences = np.zeros((len(categories), len(categories)))
    for item in rated.T:
        counts = (item[~np.isnan(item)][:, None] == categories).sum(axis=0).astype(np.float64)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1)
    totals = coincidences.sum(axis=1)
    distance = _distances(categories, totals, level)
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    return 1.0 - float((coincidences * distance).sum() / (expected * distance).sum())


def _distances(categories: np.ndarray, totals: np.ndarray, level: str) -> np.ndarray:
    """Squared distances of categories, (k, k); ordinal: by how many ratings lie from one to the other."""
    if level == "nominal":
        return 1.0 - np.eye(len(categories))
    if level == "interval":
        return np.asarray((categories[:, None] - categories) ** 2)
    middle = np.cumsum(totals) - totals / 2
    return np.asarray((middle[:, None] - middle) ** 2)


def weighted_kappa(
    a: Sequence[float], b: Sequence[float], categories: Sequence[float] = (1, 2, 3, 4, 5), weights: str = "quadratic"
) -> float:
    """Cohen's weighted kappa of two raters' scores of the same items; NaN if both gave one and the same score to all.
    ``weights``: linear or quadratic. :class:`InputError` for scores outside ``categories`` or other lengths."""
    if weights not in ("linear", "quadratic"):
        raise InputError("unknown weights", expected="linear or quadratic", got=weights)
    places = {float(category): i for i, category in enumerate(categories)}
    unknown = sorted({float(x) for x in (*a, *b)} - set(places))
    if len(a) != len(b) or not len(a) or unknown:
        got = f"{len(a)} and {len(b)} scores" + (f"; {unknown[0]:g} is no category" if unknown else "")
        raise InputError("two raters' scores of the same items are needed", expected=str(tuple(categories)), got=got)
    table = np.zeros((len(places), len(places)))
    for x, y in zip(a, b, strict=True):
        table[places[float(x)], places[float(y)]] += 1.0 / len(a)
    steps = np.abs(np.subtract.outer(np.arange(len(places)), np.arange(len(places)))).astype(np.float64)
    distance = steps if weights == "linear" else steps**2
    by_chance = float((np.outer(table.sum(axis=1), table.sum(axis=0)) * distance).sum())
    return 1.0 - float((table * distance).sum()) / by_chance if by_chance > 0.0 else math.nan
