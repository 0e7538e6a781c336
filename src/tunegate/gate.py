"""Judge an adapter: a policy fixed beforehand plus the evidence gives a decision with a reason per rule.

Each rule of the policy looks at one number and says pass, fail or inconclusive. Any failure holds the adapter;
else anything inconclusive makes the decision inconclusive; else it ships. Rules about gains look at the paired
interval, not at the difference: above the threshold as a whole passes, at or below it as a whole fails, and an
interval that straddles it decides nothing, with the size of gain that so many items can show.

A pure function: it reads no file, computes no score and starts no model. A threshold of None switches its rule off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tunegate.errors import InputError, Problem
from tunegate.evaluation.statistics import detectable_gain, items_needed, minimum_detectable
from tunegate.files import hash_json
from tunegate.records import Comparison, Decision, EvalRecord, RuleResult, RunRecord

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
SHIP, HOLD = "ship", "hold"
TINY_LOSS = 0.1  # nats per token; below it the ratio of two losses says nothing about over-fitting


@dataclass(frozen=True)
class Policy:
    """Thresholds. Scores, gains and rates are in [0, 1], gains are differences of scores.

    ``min_score``: the adapter's test score reaches it; with ``strict_intervals`` its whole interval must, else the
    rule is inconclusive. ``min_gain_over_base`` and ``min_gain_over_prompt``: the gain exceeds it (0.0: better at
    all). ``max_leaked_test_rows``: exact duplicates of training rows in the test set. ``max_overfit_ratio``:
    validation loss over training loss at the kept step. Raises :class:`InputError` with every threshold that is
    not a number, and for a confidence outside (0, 1).
    """

    min_score: float | None = None
    min_gain_over_base: float | None = 0.0
    min_gain_over_prompt: float | None = 0.0
    confidence: float = 0.95
    min_test_items: int | None = 50
    min_stop_rate: float | None = 0.95
    max_leaked_test_rows: int | None = 0
    max_overfit_ratio: float | None = 3.0
    strict_intervals: bool = False

    def __post_init__(self) -> None:
        problems = [
            Problem(f"{name} is not a finite number", where="gate", got=str(value))
            for name, value in asdict(self).items()
            if value is not None and not math.isfinite(value)
        ]
        if not problems and not 0.0 < self.confidence < 1.0:
            problems = [Problem("confidence must lie between 0 and 1", "gate", got=str(self.confidence))]
        if problems:
            raise InputError(problems)

    def hash(self) -> str:
        """Hash of the thresholds by value: 0 and 0.0 are one policy."""
        values = {name: float(v) if v is not None else None for name, v in asdict(self).items()}
        return hash_json({"policy": values})


@dataclass(frozen=True)
class Evidence:
    """What the gate judges. ``comparisons`` holds adapter minus ``base`` and adapter minus ``prompt`` (the best
    prompt baseline), None or absent where not measured; their intervals are at the policy's confidence.
    ``near_leaks`` (near duplicates of training rows in the test set) is reported, not judged.
    """

    adapter: EvalRecord
    comparisons: Mapping[str, Comparison | None]
    run: RunRecord
    leaked_test_rows: int
    near_leaks: int = 0


def decide(policy: Policy, evidence: Evidence) -> Decision:
    """Apply every rule that is on. :class:`InputError` if the evidence does not belong together."""
    _check_evidence(policy, evidence)
    rules = [
        _finite(evidence),
        _test_items(policy, evidence),
        _leaks(policy, evidence),
        _score(policy, evidence),
        _gain(policy, evidence, "base", policy.min_gain_over_base),
        _gain(policy, evidence, "prompt", policy.min_gain_over_prompt),
        _stop_rate(policy, evidence),
        _overfit(policy, evidence),
    ]
    judged = [rule for rule in rules if rule is not None]
    verdicts = {rule.verdict for rule in judged}
    verdict = HOLD if FAIL in verdicts else INCONCLUSIVE if INCONCLUSIVE in verdicts else SHIP
    return Decision(verdict, judged, policy.hash())


def _check_evidence(policy: Policy, evidence: Evidence) -> None:
    adapter = evidence.adapter
    problems = []
    if adapter.primary not in adapter.scores:
        raise InputError(
            "the evaluation lacks its primary metric", expected=adapter.primary, got=str(list(adapter.scores))
        )
    if adapter.score.confidence != policy.confidence:
        problems.append(
            Problem(
                "the score's interval is not at the policy's confidence",
                expected=str(policy.confidence),
                got=str(adapter.score.confidence),
            )
        )
    for name, comparison in evidence.comparisons.items():
        if comparison is None:
            continue
        expected = f"{adapter.primary} on {adapter.score.n} items"
        got = f"{comparison.metric} on {comparison.n} items"
        if got != expected:
            problems.append(
                Problem(f"the comparison with {name} is not of this evaluation", expected=expected, got=got)
            )
    if problems:
        raise InputError(problems)


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
    )


def _test_items(policy: Policy, evidence: Evidence) -> RuleResult | None:
    if policy.min_test_items is None:
        return None
    n = evidence.adapter.score.n
    expected, got = f"at least {policy.min_test_items} test items", f"{n} items"
    if n >= policy.min_test_items:
        return RuleResult("min_test_items", PASS, expected, got, "The test set is large enough.")
    reason = f"{n} test items are too few to decide on{_what_n_can_show(policy, evidence)}."
    return RuleResult("min_test_items", INCONCLUSIVE, expected, got, reason)


def _what_n_can_show(policy: Policy, evidence: Evidence) -> str:
    """``; 40 items can show a gain of 0.22 or more over 0.61`` if the base's score is known."""
    comparison, n = evidence.comparisons.get("base"), evidence.adapter.score.n
    if comparison is None or n < 1:
        return ""
    base = evidence.adapter.score.value - comparison.difference
    if not math.isfinite(base):
        return ""
    base = min(max(base, 0.0), 1.0)
    gain = minimum_detectable(n, base, confidence=policy.confidence)
    if gain is None:
        return f"; {n} items cannot show any gain over a base at {base:.3f}"
    return f"; {n} items can show a gain of {gain:.2f} or more over a base at {base:.3f}"


def _leaks(policy: Policy, evidence: Evidence) -> RuleResult | None:
    if policy.max_leaked_test_rows is None:
        return None
    leaked, near = evidence.leaked_test_rows, evidence.near_leaks
    passed = leaked <= policy.max_leaked_test_rows
    reason = "The test set is apart from the training set."
    if leaked:
        reason = f"Also in the training set: {_rows(leaked)} of the test set. The score is partly recall" + (
            ", within what the policy allows." if passed else "; remove them from training."
        )
    if near:
        reason += f" {_rows(near)} more nearly equal a training row (reported, not judged)."
    return RuleResult(
        "max_leaked_test_rows",
        PASS if passed else FAIL,
        f"at most {_rows(policy.max_leaked_test_rows)} of the test set in the training set",
        _rows(leaked),
        reason,
    )


def _rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n} rows"


def _score(policy: Policy, evidence: Evidence) -> RuleResult | None:
    if policy.min_score is None:
        return None
    score, least = evidence.adapter.score, policy.min_score
    verdict = PASS if score.value >= least else FAIL
    reason = f"The {score.metric} score {'reaches' if verdict == PASS else 'is below'} {least:g}."
    if policy.strict_intervals and verdict == PASS and not score.low >= least:
        verdict = INCONCLUSIVE
        reason = (
            f"The score reaches {least:g}, but its {_percent(score.confidence)} interval goes down to "
            f"{score.low:.3f} and strict_intervals is on."
        )
    got = f"{score.value:.4f} ({score.low:.3f} to {score.high:.3f}, {score.n} items)"
    return RuleResult("min_score", verdict, f"{score.metric} of at least {least:g}", got, reason)


def _gain(policy: Policy, evidence: Evidence, against: str, threshold: float | None) -> RuleResult | None:
    if threshold is None:
        return None
    rule, name = f"min_gain_over_{against}", "the base" if against == "base" else "the best prompt"
    expected = f"a gain over {name} above {threshold:g}"
    comparison = evidence.comparisons.get(against)
    if comparison is None:
        reason = f"There is no measurement of {name} to compare with; measure it, or set {rule} to null."
        return RuleResult(rule, INCONCLUSIVE, expected, "not measured", reason)
    got = (
        f"{comparison.difference:+.4f} ({_percent(policy.confidence)} interval {comparison.low:+.3f} to "
        f"{comparison.high:+.3f}, {comparison.n} items, p = {comparison.p_value:.2g})"
    )
    if comparison.low > threshold:
        return RuleResult(rule, PASS, expected, got, f"The whole interval lies above {threshold:g}.")
    if comparison.low <= threshold < comparison.high:
        return RuleResult(rule, INCONCLUSIVE, expected, got, _why_open(policy, comparison, threshold))
    # Reached by an interval at or below the threshold, and by NaN, which compares as false everywhere.
    return RuleResult(rule, FAIL, expected, got, f"Shown not to exceed {name} by more than {threshold:g}.")


def _why_open(policy: Policy, comparison: Comparison, threshold: float) -> str:
    shown = threshold + detectable_gain(comparison, policy.confidence)
    text = (
        f"The interval holds {threshold:g}, so the gain is neither shown nor ruled out: "
        f"{comparison.n} items like these can show a gain of {shown:.3f} or more."
    )
    needed = items_needed(comparison, threshold, policy.confidence)
    if needed is not None and needed > comparison.n:
        text += f" A gain of {comparison.difference:.3f} needs about {_round_up(needed)} items."
    return text


def _round_up(n: int) -> int:
    """To two digits: an estimate must not look exact."""
    unit = 10 ** max(len(str(n)) - 2, 0)
    return -(-n // unit) * unit


def _stop_rate(policy: Policy, evidence: Evidence) -> RuleResult | None:
    if policy.min_stop_rate is None:
        return None
    rate = evidence.adapter.stop_rate
    passed = rate >= policy.min_stop_rate
    reason = (
        "Answers end by themselves."
        if passed
        else "The end of turn was not learned: answers run on until the token limit. Check that the end-of-turn "
        "token is among the targets and that max_new_tokens fits the longest answer."
    )
    expected = f"at least {_percent(policy.min_stop_rate)} of the answers end with the end-of-turn token"
    return RuleResult("min_stop_rate", PASS if passed else FAIL, expected, f"{100 * rate:.1f} %", reason)


def _overfit(policy: Policy, evidence: Evidence) -> RuleResult | None:
    if policy.max_overfit_ratio is None:
        return None
    rule, expected = "max_overfit_ratio", f"validation loss at most {policy.max_overfit_ratio:g} x training loss"
    train, valid = evidence.run.train_loss, evidence.run.valid_loss
    if train is None or valid is None:
        missing = " and ".join(n for n, v in (("training", train), ("validation", valid)) if v is None)
        reason = f"No {missing} loss was measured at the kept step; measure it, or set {rule} to null."
        return RuleResult(rule, INCONCLUSIVE, expected, "not measured", reason)
    got = f"validation {valid:.3f}, training {train:.3f}"
    if valid <= TINY_LOSS:
        reason = f"Both are judged only above {TINY_LOSS} nats per token; below it their ratio says nothing."
        return RuleResult(rule, PASS, expected, got, reason)
    if valid <= policy.max_overfit_ratio * train:
        return RuleResult(rule, PASS, expected, got, "The loss carries over to unseen rows.")
    reason = "The adapter learned its training rows by heart: fewer epochs, a lower rank or more data."
    return RuleResult(rule, FAIL, expected, got, reason)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
