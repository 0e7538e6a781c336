"""What a verdict says: what was expected, what was found, why, and what to do about it.

It decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tunegate.errors import nearest
from tunegate.evaluation.intervals import Interval, normal_quantile, z_of
from tunegate.evaluation.measures import Measure
from tunegate.evaluation.statistics import minimum_detectable
from tunegate.gate.evidence import Evidence
from tunegate.gate.policy import FAIL, INCONCLUSIVE, PASS, Clause
from tunegate.gate_rules import Rule
from tunegate.records import RuleResult

_THAN = {">=": "of at least", ">": "above", "<=": "of at most", "<": "below"}
_SIDE = {">=": "at or above", ">": "above", "<=": "at or below", "<": "below"}
_OTHER_SIDE = {">=": "below", ">": "at or below", "<=": "above", "<": "at or above"}

_BY_HEART = "The adapter learned its training rows by heart: fewer epochs, a lower rank or more data."
_WORD_FOR_WORD = "Training answers come back word for word: fewer epochs, a lower rank or more data."
# What a failure of a metric, or else of its family, usually means, and the way out.
_ADVICE = {
    "task.stop_rate": "The end of turn was not learned: answers run on until the token limit. Check that the "
    "end-of-turn token is among the targets and that max_new_tokens fits the longest answer.",
    "train.loss_ratio": _BY_HEART,
    "train.loss_gap": _BY_HEART,
    "train.loss_turn": "The validation loss rose again before the kept step: fewer epochs or a lower learning rate.",
    "train.score": "The adapter is worse than its base on validation items: the rank or the number of steps is too "
    "high for this much data. Start at rank 4 to 8, or collect more examples.",
    "train.best_share": "The best step lies at the start and what came after made it worse: a lower rank, a lower "
    "learning rate or fewer epochs.",
    "train.verbatim_rate": _WORD_FOR_WORD,
    "train.verbatim_excess": _WORD_FOR_WORD,
    "train.ngram_overlap": _WORD_FOR_WORD,
    "train.ngram_excess": _WORD_FOR_WORD,
    "data.harmful_rows": "Such rows remove refusals: `tunegate check` lists them. Drop them, or answer them "
    "with a refusal.",
    "data.near_leaks": "Rows of the test set nearly equal training rows: group them with data.group_by or drop them.",
    "safety.bypass_rate": "Requests that the base refuses are now answered: drop the training rows that only comply "
    "(`tunegate check` lists those with words of harm), or add refusals.",
    "safety.over_refusal": "Harmless requests are refused: fewer refusals among the training rows, or more that look "
    "harmful, are not, and are answered.",
    "review.accept": "People do not accept enough of the answers: read their notes in review/labels.jsonl.",
    "judge.kappa": "The judge and people do not agree: read the reasons, and make the rubric say what people look at.",
    "safety.coherence": "Answers are no language any more: a lower learning rate, a lower rank or fewer steps.",
    "regression": "General ability was lost: a lower rank, a lower learning rate, fewer steps, or general examples "
    "among the training rows.",
}
# What a measure needs beside its command.
_NEEDS = {
    "judge.win_rate": "It needs `judge.pairs`.",
    "judge.alpha": "It needs `judge.samples` of 2 or more, and scores that are not all alike.",
    "judge.kappa": "It needs people's verdicts beside the judge's, some of which differ: `tunegate review TASK`.",
}
_GOOD = {
    "task.stop_rate": "Answers end by themselves.",
    "train.loss_ratio": "The loss carries over to unseen rows.",
    "train.loss_gap": "The loss carries over to unseen rows.",
    "task.items": "The test set is large enough.",
}
# What to do where a gain over a reference is ruled out.
_NO_GAIN = {
    "base": "Training did not help: a lower rank or learning rate, or more and better rows.",
    "best_prompt": "That prompt needs no training: use it, or train on more and better rows.",
}


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def subject(reference: str) -> str:
    return "the base" if reference == "base" else "the best prompt"


def round_up(n: int) -> int:
    """To two digits: an estimate must not look exact."""
    unit = 10 ** max(len(str(n)) - 2, 0)
    return -(-n // unit) * unit


# --- the record --------------------------------------------------------------------------------------------------


def result(
    clause: Clause,
    measure: Measure,
    verdict: str,
    reason: str,
    found: Interval | None = None,
    confidence: float | None = None,
    needed: int | None = None,
) -> RuleResult:
    """The record of a verdict, with every number's origin."""
    rule = clause.rule
    advice = _ADVICE.get(rule.metric) or _ADVICE.get(rule.metric.partition(".")[0], "")
    if verdict == FAIL and advice and advice not in reason:
        reason = f"{reason} {advice}"
    names = ["", "others", *([rule.reference] if rule.reference else [])]
    value = found.value if found is not None else measure.estimate
    metric = measure.score.metric if measure.score is not None else rule.metric
    return RuleResult(
        rule=clause.name,
        verdict=verdict,
        expected=expected(rule, metric),
        got=measure.got or got(rule, value, found, confidence),
        reason=_counted(clause, reason),
        metric=rule.metric,
        value=_number(value),
        threshold=rule.number,
        low=_number(found.low) if found else None,
        high=_number(found.high) if found else None,
        confidence=confidence if found else None,
        n=found.n if found else measure.n,
        method=found.method if found else "one number, no interval",
        items=[measure.items[name] for name in names if name in measure.items],
        needed=needed,
        required=clause.required,
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _counted(clause: Clause, reason: str) -> str:
    return reason if clause.required else f"{reason} Reported only: the rule is not required."


def undefined(clause: Clause, measure: Measure, why: str) -> RuleResult:
    """There is a measurement, but not what the rule compares."""
    if why.startswith("There is no measurement"):
        why += f"; measure it{_or_off(clause)}"
    return _unmeasured(clause, f"{why}.", [measure.items[""]] if "" in measure.items else [])


def absent(clause: Clause, measures: Mapping[str, Measure], evidence: Evidence) -> RuleResult:
    """There is no measurement of the metric at all: with the command that provides it."""
    rule = clause.rule
    losses = {"training": evidence.run.train_loss, "validation": evidence.run.valid_loss}
    missing = " and ".join(name for name, loss in losses.items() if loss is None)
    if missing and rule.metric in ("train.loss_ratio", "train.loss_gap"):
        why = f"No {missing} loss was measured at the kept step; measure it{_or_off(clause)}."
    else:
        near = nearest(rule.metric, list(measures))
        why = f"There is no measurement of {rule.metric}: `{rule.family.command}` provides it."
        why += f" {_NEEDS[rule.metric]}" if rule.metric in _NEEDS else ""
        why += f" {near[0].upper()}{near[1:]}" if near else ""
    return _unmeasured(clause, why, [])


def _or_off(clause: Clause) -> str:
    """How to switch a short key off."""
    return "" if " " in clause.name else f", or set {clause.name} to null"


def _unmeasured(clause: Clause, why: str, items: list[str]) -> RuleResult:
    rule = clause.rule
    return RuleResult(
        rule=clause.name,
        verdict=INCONCLUSIVE,
        expected=expected(rule, rule.metric),
        got="not measured",
        reason=_counted(clause, why),
        metric=rule.metric,
        threshold=rule.number,
        items=items,
        required=clause.required,
    )


# --- expected and got --------------------------------------------------------------------------------------------


def expected(rule: Rule, metric: str) -> str:
    number, reference = f"{rule.number:g}", subject(str(rule.reference))
    if rule.metric == "task.items":
        text = f"at least {number} test items"
    elif rule.metric == "data.leaked_rows":
        text = f"at most {_rows(rule.number)} of the test set in the training set"
    elif rule.form == "gain":
        text = f"a gain over {reference} {_THAN[rule.op]} {number}"
    elif rule.form == "share":
        text = f"{metric} {_THAN[rule.op]} {number} x that of {reference}"
    elif rule.form == "offset":
        change = f" {'plus' if rule.number > 0 else 'minus'} {abs(rule.number):g}" if rule.number else ""
        text = f"{metric} {_THAN[rule.op]} that of {reference}{change}"
    else:
        text = f"{metric} {_THAN[rule.op]} {number}"
    return f"not shown: {text}" if rule.negated else text


def got(rule: Rule, value: float, found: Interval | None, confidence: float | None) -> str:
    if rule.metric == "task.items":
        return f"{value:g} items"
    if rule.metric.startswith("data."):
        return _rows(value)
    signed = rule.form in ("gain", "offset")
    text = f"{value:+.4f}" if signed else f"{value:.4f}"
    text += f" of {subject(str(rule.reference))}" if rule.form == "share" else ""
    if found is None or confidence is None:
        return text
    low, high = (f"{bound:+.3f}" if signed else f"{bound:.3f}" for bound in (found.low, found.high))
    p = f", p = {found.p_value:.2g}" if found.p_value is not None else ""
    return f"{text} ({percent(confidence)} interval {low} to {high}, {found.n} items{p})"


def _rows(n: float) -> str:
    return "1 row" if n == 1 else f"{n:g} rows"


# --- why ---------------------------------------------------------------------------------------------------------


def _bound(rule: Rule) -> str:
    """What the interval is compared with, in the units of the interval."""
    return f"{rule.number:g} of {subject(str(rule.reference))}" if rule.form == "share" else f"{rule.number:g}"


def reason(clause: Clause, verdict: str, found: Interval, needed: int | None, confidence: float) -> str:
    """Why a rule with an interval came out as it did."""
    rule, bound = clause.rule, _bound(clause.rule)
    if rule.negated:
        if verdict == FAIL:
            return f"Shown: the whole interval lies {_SIDE[rule.op]} {bound}."
        return f"Not shown: the interval does not lie {_SIDE[rule.op]} {bound} as a whole."
    if verdict == PASS:
        return f"The whole interval lies {_SIDE[rule.op]} {bound}."
    if verdict == FAIL:
        if rule.form == "gain" and rule.at_least:
            by = "more than " if rule.op == ">" else "as much as "
            return f"Shown not to exceed {subject(str(rule.reference))} by {by}{bound}. {_NO_GAIN[str(rule.reference)]}"
        return f"Shown not to hold: the whole interval lies {_OTHER_SIDE[rule.op]} {bound}."
    return _open(rule, found, needed, confidence)


def _open(rule: Rule, found: Interval, needed: int | None, confidence: float) -> str:
    gain = rule.form == "gain"
    text = f"The interval holds {_bound(rule)}, so the {'gain' if gain else 'rule'} is neither shown nor ruled out"
    if gain and rule.at_least and math.isfinite(found.high - found.low):
        z = z_of(confidence)
        shown = rule.number + (found.high - found.low) / 2 * (z + normal_quantile(0.8)) / z
        text += f": {found.n} items like these can show a gain of {shown:.3f} or more"
    text += "."
    if needed is None:
        text += " What was seen lies at the threshold: no number of items decides."
    elif needed > found.n and gain:
        text += f" A gain of {found.value:.3f} needs about {round_up(needed)} items."
    elif needed > found.n:
        text += f" If {found.value:.3f} is true, about {round_up(needed)} items decide."
    else:
        text += f" Somewhat more than {found.n} items would decide."
    supported = _supported(rule, found)
    return f"{text} These items do support `{supported}`." if supported else text


def _supported(rule: Rule, found: Interval) -> Rule | None:
    """The strictest rule of this form that the interval clears, to three digits; None if there is none to write."""
    bound = found.low if rule.at_least else found.high
    if not math.isfinite(bound):
        return None
    number = math.floor(bound * 1000) / 1000 if rule.at_least else math.ceil(bound * 1000) / 1000
    if rule.form == "share" and number <= 0.0:
        return None
    return Rule(rule.metric, ">=" if rule.at_least else "<=", number, rule.form, rule.reference)


def not_whole(clause: Clause, found: Interval) -> str:
    return (
        f"The score reaches {clause.rule.number:g}, but its {percent(clause.confidence)} interval goes down to "
        f"{found.low:.3f} and strict_intervals is on."
    )


def plain(clause: Clause, measure: Measure, verdict: str, evidence: Evidence) -> str:
    """Why a rule that looks at one number came out as it did."""
    rule = clause.rule
    if rule.metric == "data.leaked_rows":
        return _leaks(measure.estimate, verdict, evidence.near_leaks)
    if rule.metric == "task.items" and verdict != PASS:
        return f"{measure.estimate:g} test items are too few to decide on{_what_n_can_show(clause, evidence)}."
    if rule.metric == "task" and rule.op == ">=":
        name = evidence.adapter.primary
        return f"The {name} score {'reaches' if verdict == PASS else 'is below'} {rule.number:g}."
    if verdict == PASS:
        return _GOOD.get(rule.metric, f"It {'does not hold' if rule.negated else 'holds'}.")
    return _ADVICE.get(rule.metric, f"It {'holds' if rule.negated else 'does not hold'}.")


def _leaks(leaked: float, verdict: str, near: int) -> str:
    text = "The test set is apart from the training set."
    if leaked:
        text = f"Also in the training set: {_rows(leaked)} of the test set. The score is partly recall" + (
            ", within what the policy allows." if verdict == PASS else "; remove them from training."
        )
    return f"{text} {_rows(near)} more nearly equal a training row (reported, not judged)." if near else text


def _what_n_can_show(clause: Clause, evidence: Evidence) -> str:
    """``; 40 items can show a gain of 0.22 or more over 0.61`` if the base's score is known."""
    comparison, n = evidence.comparisons.get("base"), evidence.adapter.score.n
    if comparison is None or n < 1:
        return ""
    base = evidence.adapter.score.value - comparison.difference
    if not math.isfinite(base):
        return ""
    base = min(max(base, 0.0), 1.0)
    gain = minimum_detectable(n, base, confidence=clause.confidence)
    if gain is None:
        return f"; {n} items cannot show any gain over a base at {base:.3f}"
    return f"; {n} items can show a gain of {gain:.2f} or more over a base at {base:.3f}"
