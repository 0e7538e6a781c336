"""One verdict a rule: find the interval of what the rule compares, and see on which side of the threshold it lies.

Every rule with an interval is one of two tests, of "it is not met" and of "it is met"; it passes if the first is
rejected and fails if the second is. Shipping needs every rule to pass, so the chance to ship an adapter that misses
some threshold is at most that of its rule alone, however many rules there are (an intersection-union test, Berger
1982): ``correction: none`` is right for that. The chance that some rule of many fails, or passes, falsely does grow
with their number. ``holm`` (Holm 1979) bounds both over all rules that have an interval: where m are undecided, each
is read at the level ``1 - (1 - confidence) / m``, and as some are decided the others' levels ease.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tunegate.evaluation import intervals
from tunegate.evaluation.intervals import Interval
from tunegate.evaluation.measures import Measure
from tunegate.evaluation.statistics import LEAST_EFFECT, items_to_decide
from tunegate.gate import words
from tunegate.gate.evidence import Evidence, check_evidence, measures_of
from tunegate.gate.policy import BOUND, FAIL, HOLD, INCONCLUSIVE, PASS, SHIP, STRICT, Clause, Policy
from tunegate.gate_rules import Rule
from tunegate.records import Comparison, Decision, RuleResult, Score

PLAIN = ("count", "scalar")  # kinds without an interval


def decide(policy: Policy, evidence: Evidence) -> Decision:
    """Apply every rule that is on. :class:`InputError` if the evidence does not belong together."""
    check_evidence(evidence, policy.confidence)
    measures = measures_of(evidence)
    cases = []
    for clause in policy.clauses():
        names = [name for name in sorted(measures) if clause.rule.matches(name)]
        cases += [Case(clause.of(name), measures[name]) for name in names] or [Case(clause, None)]
    correct(cases, policy.correction)
    results = [_finite(evidence), *(_result(case, measures, evidence) for case in cases)]
    return Decision(verdict_of(results), results, policy.hash(), policy.correction)


def verdict_of(rules: Iterable[RuleResult]) -> str:
    """What judged rules amount to."""
    verdicts = {rule.verdict for rule in rules if rule.required}
    return HOLD if FAIL in verdicts else INCONCLUSIVE if INCONCLUSIVE in verdicts else SHIP


def foreseen(policy: Policy, measures: Mapping[str, Measure]) -> dict[str, str]:
    """The required rules that fail on what is known before training, with what was found; only rules on one number."""
    return {
        clause.of(name).name: words.got(clause.rule, measure.estimate, None, None)
        for clause in policy.clauses()
        for name, measure in sorted(measures.items())
        if clause.required and measure.kind in PLAIN and clause.rule.matches(name)
        and clause.rule.reference is None and clause.rule.holds(measure.estimate) is clause.rule.negated
    }  # fmt: skip


@dataclass
class Case:
    """A clause with the measure it is about. ``share_of``: by how many the allowed error is divided."""

    clause: Clause
    measure: Measure | None
    share_of: int = 1
    found: dict[int, Interval | str] = field(default_factory=dict)

    @property
    def statistical(self) -> bool:
        """Whether an interval decides it."""
        measure = self.measure
        return self.clause.by == BOUND and measure is not None and not measure.moot and measure.kind not in PLAIN

    @property
    def confidence(self) -> float:
        return 1.0 - (1.0 - self.clause.confidence) / self.share_of if self.share_of > 1 else self.clause.confidence

    @property
    def interval(self) -> Interval | str:
        """The interval at the case's confidence, or why there is none."""
        assert self.measure is not None
        if self.share_of not in self.found:
            self.found[self.share_of] = interval_of(self.clause.rule, self.measure, self.confidence)
        return self.found[self.share_of]

    @property
    def met(self) -> bool:
        """Whether the whole interval meets the comparison. False for NaN."""
        found, rule = self.interval, self.clause.rule
        return isinstance(found, Interval) and rule.holds(found.low if rule.at_least else found.high)

    @property
    def missed(self) -> bool:
        """Whether the whole interval misses it."""
        found, rule = self.interval, self.clause.rule
        if not isinstance(found, Interval):
            return False
        far = found.high if rule.at_least else found.low
        return not math.isnan(far) and not rule.holds(far)


def correct(cases: list[Case], correction: str) -> None:
    """Set each statistical case's level. Holm's procedure, once for what is met and once for what is missed."""
    if correction != "holm":
        return
    family = [case for case in cases if case.statistical]
    met, open_for_met = _step_down(family, lambda case: case.met)
    missed, open_for_missed = _step_down(family, lambda case: case.missed)
    for case in family:  # one that neither decides is shown at the stricter of the two last levels
        case.share_of = met.get(id(case)) or missed.get(id(case)) or max(open_for_met, open_for_missed)


def _step_down(family: list[Case], test: Callable[[Case], bool]) -> tuple[dict[int, int], int]:
    """By how many the error was divided when a case was decided, for each that was; and for those left over."""
    decided: dict[int, int] = {}
    while True:
        open_ = [case for case in family if id(case) not in decided]
        for case in open_:
            case.share_of = len(open_)
        new = {id(case): len(open_) for case in open_ if test(case)}
        if not new:
            return decided, len(open_)
        decided |= new


def interval_of(rule: Rule, measure: Measure, confidence: float) -> Interval | str:
    """The interval of what ``rule`` compares with its number (value, gain or ratio), or why there is none."""
    if rule.reference is None:
        return _value(measure, confidence)
    name = words.subject(rule.reference)
    given, reference = measure.comparisons.get(rule.reference), measure.references.get(rule.reference)
    if rule.form != "share" and given is not None and _at(given, confidence, measure):
        return Interval(given.difference, given.low, given.high, given.n, given.method or "as reported", given.p_value)
    if given is None and reference is None:
        return f"There is no measurement of {name} to compare with"
    if reference is None or measure.values is None:
        return _no_items(confidence)
    if measure.kind == "ratio":
        return "A ratio of two sums has no paired test against a reference; compare its value with a number"
    if rule.form != "share":
        return intervals.difference(measure.values, reference, confidence, measure.limits)
    if measure.limits[0] < 0.0:
        return f"A share of {name} means nothing where scores can be negative; use 'vs {rule.reference}'"
    found = intervals.ratio(measure.values, reference, confidence, measure.limits)
    return f"On these items {name} scored nothing, so there is no ratio to it" if math.isnan(found.value) else found


def _value(measure: Measure, confidence: float) -> Interval | str:
    given = measure.score
    if given is not None and _at(given, confidence, measure):
        return Interval(given.value, given.low, given.high, given.n, given.method or "as reported")
    if measure.values is None:
        return _no_items(confidence)
    if measure.others is not None:
        return intervals.excess(measure.values, measure.others, confidence, measure.limits)
    if measure.weights is not None:
        return intervals.ratio_of_sums(measure.values, measure.weights, confidence)
    return intervals.mean(measure.values, confidence, measure.limits)


def _at(given: Score | Comparison, confidence: float, measure: Measure) -> bool:
    """Whether an interval that was taken earlier is at this confidence (a comparison's is its score's)."""
    own = given.confidence if isinstance(given, Score) else measure.score.confidence if measure.score else None
    return own is not None and math.isclose(own, confidence, abs_tol=1e-12)


def _no_items(confidence: float) -> str:
    return (
        f"Its interval was taken at gate.confidence, and there are no item values to find the one at "
        f"{words.percent(confidence)} from (a corpus value is no mean of items); let the rule use gate.confidence"
    )


def _finite(evidence: Evidence) -> RuleResult:
    numbers: dict[str, float | None] = {
        "score": evidence.adapter.score.value,
        "score's lower bound": evidence.adapter.score.low,
        "score's upper bound": evidence.adapter.score.high,
        "stop rate": evidence.adapter.stop_rate,
        "test loss": evidence.adapter.loss,
        "training loss": evidence.run.train_loss,
        "validation loss": evidence.run.valid_loss,
        "best validation score": evidence.run.best_score,
    }
    for name, comparison in evidence.comparisons.items():
        if comparison is not None:
            numbers[f"gain over {name}"] = comparison.difference
            numbers[f"lower bound of the gain over {name}"] = comparison.low
            numbers[f"upper bound of the gain over {name}"] = comparison.high
    bad = [f"{name} is {value}" for name, value in numbers.items() if value is not None and not math.isfinite(value)]
    return RuleResult(
        "finite_numbers",
        FAIL if bad else PASS,
        "every score and loss is a finite number",
        "; ".join(bad) or "all finite",
        "The run or its evaluation diverged." if bad else "Nothing diverged.",
        items=[evidence.adapter.items_path, "train/run.json"],
    )


def _result(case: Case, measures: dict[str, Measure], evidence: Evidence) -> RuleResult:
    clause, measure = case.clause, case.measure
    if measure is None:
        return words.absent(clause, measures, evidence)
    if measure.moot:
        return words.result(clause, measure, PASS, measure.moot)
    if not case.statistical:
        return _by_estimate(case, measure, evidence)
    found = case.interval
    if isinstance(found, str):
        return words.undefined(clause, measure, found)
    if math.isnan(found.value):
        return words.result(clause, measure, FAIL, "It is not a number: the run or its evaluation diverged.", found)
    met, missed, needed = case.met, case.missed, None
    verdict = PASS if met else FAIL if missed else INCONCLUSIVE
    if clause.rule.negated:
        verdict = FAIL if met else PASS
    if verdict == INCONCLUSIVE:
        needed = items_needed_for(clause.rule, measure, found, case.confidence)
    reason = words.reason(clause, verdict, found, needed, case.confidence)
    if verdict == PASS and clause.min_items is not None and found.n < clause.min_items:
        verdict, reason = INCONCLUSIVE, f"{found.n} items are too few: the rule asks for {clause.min_items}. {reason}"
    return words.result(clause, measure, verdict, reason, found, case.confidence, needed)


def _by_estimate(case: Case, measure: Measure, evidence: Evidence) -> RuleResult:
    """A number without an interval, or a rule that looks at the number only."""
    clause, value = case.clause, measure.estimate
    holds = not math.isnan(value) and clause.rule.holds(value) is not clause.rule.negated
    verdict = PASS if holds else clause.shortfall
    reason = words.plain(clause, measure, verdict, evidence)
    found = case.interval if measure.kind not in PLAIN else None
    if not isinstance(found, Interval):
        return words.result(clause, measure, verdict, reason)
    if clause.by == STRICT and verdict == PASS and not case.met:
        verdict, reason = INCONCLUSIVE, words.not_whole(clause, found)
    return words.result(clause, measure, verdict, reason, found, clause.confidence)


def items_needed_for(rule: Rule, measure: Measure, found: Interval, confidence: float) -> int | None:
    """About how many items like these decide the rule with 80 % power, if what was seen is true; None if no number
    does, because it lies at the threshold."""
    values, (lowest, highest) = measure.values, measure.limits
    reference = measure.references.get(rule.reference) if rule.reference else None
    if values is None or measure.kind in ("ratio", "excess") or (rule.reference and reference is None):
        half, excess = (found.high - found.low) / 2, abs(found.value - rule.number)
        if excess < LEAST_EFFECT or not math.isfinite(half):
            return None
        z = intervals.z_of(confidence)
        return math.ceil(found.n * (half * (z + intervals.normal_quantile(0.8)) / z / excess) ** 2)
    if reference is None:
        y, low, high = values - rule.number, lowest - rule.number, highest - rule.number
    elif rule.form == "share":
        y = values - rule.number * reference
        low, high = lowest - rule.number * highest, highest - rule.number * lowest
    else:
        y = values - reference - rule.number
        low, high = lowest - highest - rule.number, highest - lowest - rule.number
    needed = items_to_decide(np.asarray(y), low, high, confidence)
    if needed is None or reference is not None or measure.kind != "proportion":
        return needed
    return _until_it_clears(rule, found.value, needed, confidence)


def _until_it_clears(rule: Rule, rate: float, n: int, confidence: float) -> int:
    """At least n items, and as many as the exact interval asks for where few of them succeed or fail."""
    above = rate > rule.number
    for _ in range(200):
        interval = intervals.proportion(round(rate * n), n, confidence)
        if interval.low > rule.number if above else interval.high < rule.number:
            break
        n += max(1, n // 50)
    return n
