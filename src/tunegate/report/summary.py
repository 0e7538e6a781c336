"""What a review comes to, for people: how often each subject's answers were good, which was preferred, how far the
reviewers agree.

Agreement is Krippendorff's alpha over the verdicts (ordinal: bad, partly, good) and the preferences (base, tie,
adapter), of everyone who has finished. The shares and intervals are those that the gate computes, from the same rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tunegate.evaluation import intervals
from tunegate.evaluation.intervals import Interval
from tunegate.evaluation.judge.agreement import krippendorff_alpha
from tunegate.report.review import POINTS, SUBJECTS, VERDICTS, Log, Review, Verdict

CONFIDENCE = 0.95


def summarize(review: Review, log: Log) -> dict[str, Any] | None:
    """Counts, shares and agreement over the reviewers who have finished; None as long as nobody has."""
    if not log.finished:
        return None
    given = log.complete(finished=True)
    rows = review.combined(log, "adapter")
    accepted = {
        subject: intervals.mean(np.array([float(row["accepted"]) for row in review.combined(log, subject)]), CONFIDENCE)
        for subject in SUBJECTS
    }
    preferred = intervals.mean(np.array([row["preferred"] for row in rows]), CONFIDENCE)
    counts = {s: Counter(getattr(verdict, s) for verdict in given) for s in SUBJECTS}
    preferences = Counter(verdict.preferred for verdict in given)
    return {
        "reviewers": log.finished,
        "items": len(review.items),
        "of": review.of,
        "verdicts": {s: {name: counts[s][name] for name in VERDICTS} for s in SUBJECTS},
        "preferences": {name: preferences[name] for name in POINTS},
        "accept": {s: _interval(found) for s, found in accepted.items()},
        "preferred": _interval(preferred),
        "agreement": agreement(review, log) if len(log.finished) > 1 else None,
    }


def agreement(review: Review, log: Log) -> dict[str, float | None]:
    """Alpha of the reviewers who have finished, on each subject's verdicts and on the preferences; None where it is not
    defined: all of them said the same about everything."""
    worth = {name: float(-i) for i, name in enumerate(VERDICTS)}
    asked: dict[str, tuple[Callable[[Verdict], Any], Mapping[str, float]]] = {
        "adapter": (lambda verdict: verdict.adapter, worth),
        "base": (lambda verdict: verdict.base, worth),
        "preferred": (lambda verdict: verdict.preferred, POINTS),
    }
    found: dict[str, float | None] = {}
    for name, (read, scale) in asked.items():
        ratings = [[scale[read(log.of(r)[item.row_id])] for item in review.items] for r in log.finished]
        alpha = krippendorff_alpha(np.array(ratings))
        found[name] = None if math.isnan(alpha) else alpha
    return found


def _interval(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The summary in lines of text."""
    accept, preferred = summary["accept"], summary["preferred"]
    lines = [
        f"{subject:<9} accepted {_percent(accept[subject])}; verdicts: "
        + ", ".join(f"{n} {name}" for name, n in summary["verdicts"][subject].items())
        for subject in SUBJECTS
    ]
    counts = summary["preferences"]
    lines.append(
        f"preferred adapter {_percent(preferred)}, a tie counting half: {counts['adapter']} adapter, "
        f"{counts['tie']} tie, {counts['base']} base"
    )
    if summary["agreement"] is not None:
        told = ", ".join(f"{n} {'not defined' if a is None else f'{a:.2f}'}" for n, a in summary["agreement"].items())
        lines.append(f"agreement Krippendorff's alpha of {len(summary['reviewers'])} reviewers: {told}")
    return lines


def _percent(found: Mapping[str, float]) -> str:
    return f"{found['value']:.0%} ({found['low']:.0%} to {found['high']:.0%})"
