"""Rules on measures: what passes, fails or stays open, what it says, and what is corrected for the number of rules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_gate import EVIDENCE
from tunegate import records
from tunegate.config import GateSection, RuleSection
from tunegate.errors import InputError
from tunegate.evaluation.intervals import proportion
from tunegate.evaluation.measures import Measure
from tunegate.gate import Evidence, Policy, RuleSetting, decide, foreseen
from tunegate.gate.verdict import Case, correct
from tunegate.records import Decision, RuleResult

OFF = Policy(None, None, None, 0.95, None, None, None, None)
FILES = {"": "step/adapter.items.jsonl", "base": "step/base.items.jsonl"}


def rates(right: int, n: int, base: int | None = None, agree: bool = True) -> Measure:
    """``right`` of n items right; the base is right on the first ``base`` of them (or the last)."""
    mine = np.array([1.0] * right + [0.0] * (n - right))
    if base is None:
        return Measure("proportion", mine, items=FILES)
    theirs = np.array([1.0] * base + [0.0] * (n - base))
    return Measure("proportion", mine, {"base": theirs if agree else theirs[::-1].copy()}, items=FILES)


def scalar(value: float, kind: str = "scalar") -> Measure:
    return Measure(kind, value=value, items={"": "train/log.jsonl"})


def judged(rule: str | dict[str, Any], **measures: Measure) -> RuleResult:
    [result] = all_judged([rule], measures)
    return result


def all_judged(rules: list[Any], measures: dict[str, Measure], **policy: Any) -> list[RuleResult]:
    return decided(rules, measures, **policy).rules[1:]


def decided(rules: list[Any], measures: dict[str, Measure], **policy: Any) -> Decision:
    settings = tuple(RuleSetting(**r) if isinstance(r, dict) else RuleSetting(r) for r in rules)
    named = {name.replace("__", "."): measure for name, measure in measures.items()}
    return decide(replace(OFF, rules=settings, **policy), replace(EVIDENCE, measures=named))


GRADED = np.random.default_rng(0).beta(8, 2, 200)
TABLE: list[tuple[str, Measure, str, str]] = [
    # rule about safety.coherence (any name would do), measure, verdict, words of the reason
    (">= 0.85", rates(290, 300), "pass", "whole interval lies at or above 0.85"),
    (">= 0.85", rates(230, 300), "fail", "whole interval lies below 0.85"),
    (">= 0.85", rates(260, 300), "inconclusive", "items decide"),
    (">= 0.85", rates(255, 300), "inconclusive", "no number of items decides"),
    ("<= 0.1", rates(10, 300), "pass", "at or below 0.1"),
    ("<= 0.1", rates(60, 300), "fail", "above 0.1"),
    ("< 0.1", rates(25, 300), "inconclusive", "holds 0.1"),
    ("> 0.5", rates(3, 3), "inconclusive", "about 6 items decide"),
    ("vs base > 0", rates(260, 300, 200), "pass", "above 0"),
    ("vs base > 0", rates(200, 300, 260), "fail", "Shown not to exceed the base by more than 0"),
    ("vs base >= 0.02", rates(206, 300, 200), "inconclusive", "no number of items decides"),
    ("vs base >= +0.02", rates(210, 300, 200), "inconclusive", "A gain of 0.033 needs about"),
    (">= 0.95 of base", rates(200, 300, 200), "pass", "at or above 0.95 of the base"),
    (">= 0.95 of base", rates(170, 300, 200), "fail", "below 0.95 of the base"),
    (">= 0.95 of base", rates(190, 300, 200), "inconclusive", "no number of items decides"),
    (">= 0.95 of base", rates(196, 300, 200, False), "inconclusive", "items decide"),
    (">= 0.95 of base", rates(0, 300, 0), "inconclusive", "scored nothing"),
    ("<= base", rates(10, 300, 30), "pass", "at or below 0"),
    ("<= base", rates(0, 300, 0), "inconclusive", "no number of items decides"),
    ("<= base", rates(30, 300, 10), "fail", "above 0"),
    ("<= base + 0.05", rates(0, 300, 0), "pass", "at or below 0.05"),
    ("<= base + 0.05", rates(12, 300, 4), "inconclusive", "holds 0.05"),
    (">= 0.75", Measure("mean", GRADED, items=FILES), "pass", "0.75"),
    (">= 0.85", Measure("mean", GRADED, items=FILES), "fail", "0.85"),
    (">= 0.95 of base", Measure("mean", GRADED, {"base": GRADED}, items=FILES), "pass", "0.95 of the base"),
    # 200 equal pairs leave 3.84 / 203.84 = 0.0188 open
    ("vs base >= -0.018", Measure("mean", GRADED, {"base": GRADED}, items=FILES), "inconclusive", "holds -0.018"),
    ("vs base >= -0.02", Measure("mean", GRADED, {"base": GRADED}, items=FILES), "pass", "at or above -0.02"),
    (">= 4", Measure("mean", np.array([5.0] * 40 + [4.0] * 10), limits=(1.0, 5.0)), "pass", "4"),
    (">= 4", Measure("mean", np.full(50, 4.0), limits=(1.0, 5.0)), "inconclusive", "no number of items"),
    ("<= 0.2", Measure("ratio", np.arange(50.0) % 3, weights=np.full(50, 10.0)), "pass", "0.2"),
    (">= 0.9 of base", Measure("mean", GRADED - 0.9, {"base": GRADED}, limits=(-1, 1)), "inconclusive", "negative"),
    ("vs base > 0", rates(260, 300), "inconclusive", "no measurement of the base"),
]


def test_what_must_fail_is_foreseen_as_it_is_decided() -> None:
    """Rules on one number that is known; not those that only report, that pass, or that need an interval."""
    known = {"data.leaked_rows": scalar(2, "count"), "data.harmful_rows": scalar(3, "count")}
    rules = ["data.harmful_rows <= 3", "data.harmful_rows <= 2", "not data.harmful_rows > 1", "data.* <= 1",
             {"rule": "data.leaked_rows <= 1", "required": False}, "safety.coherence >= 0.9"]  # fmt: skip
    settings = tuple(RuleSetting(**r) if isinstance(r, dict) else RuleSetting(r) for r in rules)
    policy = replace(OFF, max_leaked_test_rows=0, rules=settings)
    found = foreseen(policy, {**known, "safety.coherence": rates(1, 100)})
    assert found == {"max_leaked_test_rows": "2 rows", "data.harmful_rows <= 2": "3 rows",
                     "not data.harmful_rows > 1": "3 rows", "data.harmful_rows <= 1": "3 rows",
                     "data.leaked_rows <= 1": "2 rows"}  # fmt: skip
    decision = decide(policy, replace(EVIDENCE, leaked_test_rows=2, measures=known))
    assert {rule.rule for rule in decision.rules if rule.verdict == "fail" and rule.required} == set(found)


@pytest.mark.parametrize(("rule", "measure", "verdict", "reason"), TABLE)
def test_a_rule_on_a_measure(rule: str, measure: Measure, verdict: str, reason: str) -> None:
    text = f"safety.coherence {rule}"
    result = judged(text, safety__coherence=measure)
    assert (result.verdict, result.rule) == (verdict, text.replace(">= 0.02", ">= +0.02"))
    assert reason in result.reason
    assert result.expected and result.got and result.reason.endswith(".")
    records.to_json(result)
    json.dumps(records.to_json(result), allow_nan=False)
    overall = decided([text], {"safety.coherence": measure}).verdict
    assert overall == {"pass": "ship", "fail": "hold"}.get(verdict, "inconclusive")


def test_every_number_has_its_origin() -> None:
    result = judged("safety.coherence >= 0.95 of base", safety__coherence=rates(200, 300, 200))
    assert result.items == ["step/adapter.items.jsonl", "step/base.items.jsonl"]
    assert (result.metric, result.threshold, result.n, result.method) == (
        "safety.coherence", 0.95, 300, "Nam-Blackwelder",
    )  # fmt: skip
    assert result.value == 1.0 and result.low is not None and 0.95 < result.low < 1.0 and result.confidence == 0.95
    assert result.got.startswith("1.0000 of the base (95 % interval 0.9")
    alone = judged("safety.coherence >= 0.9", safety__coherence=rates(200, 300, 200))
    assert alone.items == ["step/adapter.items.jsonl"]
    assert alone.method == "Wilson"
    whole = decide(Policy(min_score=0.5), EVIDENCE)
    assert all(rule.items for rule in whole.rules)


def test_how_many_items_would_decide_and_what_is_supported_now() -> None:
    result = judged("judge.pass_rate >= 0.8", judge__pass_rate=rates(41, 50))
    # ((1.96 sqrt(.8 .2) + .8416 sqrt(.82 .18)) / .02)^2 = 3066
    assert result.needed == pytest.approx(3066, abs=2)
    assert "about 3100 items decide" in result.reason
    assert result.low is not None
    assert f"`judge.pass_rate >= {math.floor(result.low * 1000) / 1000:g}`" in result.reason
    supported = result.reason.split("`")[1]
    assert judged(supported, judge__pass_rate=rates(41, 50)).verdict == "pass"


@pytest.mark.parametrize("rule", ["<= base", ">= 0.95 of base", "vs base >= 0.05", "<= 0.3"])
def test_the_rule_that_is_said_to_be_supported_passes(rule: str) -> None:
    measure = rates(90, 300, 88, agree=False)
    result = judged(f"safety.coherence {rule}", safety__coherence=measure)
    assert result.verdict == "inconclusive"
    assert judged(result.reason.split("`")[1], safety__coherence=measure).verdict == "pass"


def test_what_is_not_measured_says_how_to_measure_it() -> None:
    result = judged("regression.* >= 0.95 of base", safety__coherence=rates(1, 2))
    assert (result.verdict, result.got, result.rule) == (
        "inconclusive", "not measured", "regression.* >= 0.95 of base",
    )  # fmt: skip
    assert "`tunegate run TASK` provides it" in result.reason
    near = judged("regression.maths >= 0.95 of base", regression__math=rates(9, 10, 9))
    assert "Did you mean 'regression.math'" in near.reason


def test_a_pattern_makes_a_rule_of_each_measure() -> None:
    measures = {"regression.math": rates(100, 100, 100), "regression.code": rates(50, 100, 100)}
    results = all_judged(["regression.* >= 0.9 of base"], measures)
    assert [(r.rule, r.verdict) for r in results] == [
        ("regression.code >= 0.9 of base", "fail"),
        ("regression.math >= 0.9 of base", "pass"),
    ]
    assert "General ability was lost" in results[0].reason


@pytest.mark.parametrize(
    ("adapter", "base", "verdict", "reason"),
    [(60, 100, "fail", "Shown"), (98, 100, "pass", "Not shown"), (120, 100, "pass", "Not shown")],
)
def test_an_alarm_fails_only_on_proof(adapter: int, base: int, verdict: str, reason: str) -> None:
    result = judged("not train.score vs base < 0", train__score=rates(adapter, 150, base))
    assert result.verdict == verdict
    assert reason in result.reason
    assert ("the rank or the number of steps is too high" in result.reason) == (verdict == "fail")


@pytest.mark.parametrize(
    ("rule", "value", "kind", "verdict"),
    [
        ("train.loss_turn <= 0.1", 0.05, "scalar", "pass"),
        ("train.loss_turn <= 0.1", 0.3, "scalar", "fail"),
        ("not train.loss_turn > 0.1", 0.3, "scalar", "fail"),
        ("train.loss_turn <= 0.1", math.nan, "scalar", "fail"),
        ("not train.loss_turn > 0.1", math.nan, "scalar", "fail"),
        ("train.loss_ratio <= 3", math.inf, "scalar", "fail"),
        ("data.near_leaks <= 2", 2, "count", "pass"),
        ("data.valid_leaks <= 0", 1, "count", "fail"),
    ],
)
def test_one_number_has_no_interval(rule: str, value: float, kind: str, verdict: str) -> None:
    name = rule.removeprefix("not ").split(" ")[0]
    [result] = all_judged([rule], {name: scalar(value, kind)})
    assert result.verdict == verdict
    assert (result.low, result.high, result.method) == (None, None, "one number, no interval")
    assert result.items == ["train/log.jsonl"]


def test_a_measure_that_says_nothing_passes_with_its_reason() -> None:
    measure = replace(scalar(0.5), moot="Too little to say.")
    assert judged("train.loss_turn <= 0.1", train__loss_turn=measure).reason == "Too little to say."
    assert judged("train.loss_turn <= 0.1", train__loss_turn=measure).verdict == "pass"


def test_settings_of_a_rule() -> None:
    measure = {"judge.pass_rate": rates(46, 50)}
    assert all_judged(["judge.pass_rate >= 0.8"], measure)[0].verdict == "pass"
    few = all_judged([{"rule": "judge.pass_rate >= 0.8", "min_items": 60}], measure)[0]
    assert few.verdict == "inconclusive" and "50 items are too few: the rule asks for 60" in few.reason
    sure = all_judged([{"rule": "judge.pass_rate >= 0.8", "confidence": 0.999}], measure)[0]
    assert sure.verdict == "inconclusive" and "99.9 % interval" in sure.got
    fails = {"rule": "judge.pass_rate >= 0.99", "required": False}
    decision = decided([fails, "judge.pass_rate >= 0.8"], measure)
    assert [r.verdict for r in decision.rules[1:]] == ["fail", "pass"]
    assert decision.verdict == "ship"
    assert "Reported only" in decision.rules[1].reason and decision.rules[1].required is False
    # too few items never make a shown failure undone
    low = {"rule": "judge.pass_rate >= 0.99", "min_items": 60}
    assert all_judged([low], measure)[0].verdict == "fail"


def test_rules_take_the_intervals_of_the_card_at_its_confidence() -> None:
    card = EVIDENCE.adapter.score
    result = all_judged(["task >= 0.85"], {})[0]
    assert (result.low, result.high) == (card.low, card.high) and result.verdict == "pass"
    other = all_judged([{"rule": "task >= 0.85", "confidence": 0.9}], {})[0]
    assert other.verdict == "inconclusive" and "no item values" in other.reason
    items = {"task.accuracy": rates(270, 300)}
    mine = all_judged([{"rule": "task >= 0.85", "confidence": 0.9}], items)[0]
    exact = proportion(270, 300, 0.9)
    assert (mine.low, mine.high) == (exact.low, exact.high)


# --- Holm --------------------------------------------------------------------------------------------------------


def holm_by_hand(p_values: list[float], alpha: float) -> list[bool]:
    """Holm (1979) as every textbook has it, from p-values."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for step, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - step):
            break
        rejected[i] = True
    return rejected


@cache
def one_sided_levels(right: int, n: int, threshold: float) -> float:
    """The smallest two-sided error at which the proportion's interval clears the threshold from above."""
    low, high = 1e-12, 1.0 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if proportion(right, n, 1 - middle).low >= threshold else (middle, high)
    return high


@given(st.lists(st.integers(40, 60), min_size=1, max_size=6))
def test_holm_is_holm(counts: list[int]) -> None:
    policy = replace(OFF, rules=tuple(RuleSetting(f"regression.d{i} >= 0.75") for i in range(len(counts))))
    cases = [Case(clause, rates(k, 60)) for clause, k in zip(policy.clauses(), counts, strict=True)]
    correct(cases, "holm")
    p_values = [one_sided_levels(k, 60, 0.75) for k in counts]
    assert [case.met for case in cases] == holm_by_hand(p_values, 0.05)


def test_a_correction_makes_borderline_passes_and_fails_open() -> None:
    # 66 of 75 clears 0.78 at 95 %, and misses 0.95 at 95 %; neither at 98.75 %
    measures = {f"regression.d{i}": rates(66, 75) for i in range(4)}
    for rule, plain in (("regression.* >= 0.78", "pass"), ("regression.* >= 0.95", "fail")):
        assert {r.verdict for r in all_judged([rule], measures)} == {plain}
        holm = decided([rule], measures, correction="holm")
        assert {r.verdict for r in holm.rules[1:]} == {"inconclusive"}
        assert [r.confidence for r in holm.rules[1:]] == [pytest.approx(0.9875)] * 4
        assert holm.correction == "holm"


def test_clear_results_ease_the_others() -> None:
    measures = {f"regression.d{i}": rates(75, 75) for i in range(3)} | {"regression.z": rates(66, 75)}
    results = all_judged(["regression.* >= 0.78"], measures, correction="holm")
    assert [r.verdict for r in results] == ["pass"] * 4
    assert [r.confidence for r in results] == [pytest.approx(0.9875)] * 3 + [0.95]


def test_numbers_without_interval_are_no_part_of_the_family() -> None:
    measures = {"judge.pass_rate": rates(66, 75), "train.loss_turn": scalar(0.0)}
    results = all_judged(["judge.pass_rate >= 0.78", "train.loss_turn <= 0.1"], measures, correction="holm")
    assert [r.verdict for r in results] == ["pass", "pass"] and results[0].confidence == 0.95


# --- policies ----------------------------------------------------------------------------------------------------


def test_a_policys_hash_follows_its_rules() -> None:
    plain = Policy()
    spelt = [Policy(rules=(RuleSetting(text),)) for text in ("task>=.9", "task >= 0.90")]
    assert spelt[0].hash() == spelt[1].hash() != plain.hash()
    others = [
        Policy(correction="holm"),
        Policy(rules=(RuleSetting("task >= 0.9", confidence=0.9),)),
        Policy(rules=(RuleSetting("task >= 0.9", min_items=9),)),
        Policy(rules=(RuleSetting("task >= 0.9", required=False),)),
        Policy(rules=(RuleSetting("task >= 0.9"), RuleSetting("task >= 0.8"))),
        Policy(rules=(RuleSetting("not task >= 0.9"),)),
    ]
    assert len({p.hash() for p in [plain, *spelt, *others]}) == len(others) + 2


def test_a_policy_without_rules_has_the_hash_it_always_had() -> None:
    assert Policy().hash() == "b3:" + HASH_OF_DEFAULTS


HASH_OF_DEFAULTS = "937173e384147895b57d0080b1a4129c2ff5ab0005f90feea3bc11ba1a5dfd7e"


def test_a_policy_survives_its_file() -> None:
    section = GateSection(rules=(RuleSection(rule="task>=0.9", min_items=3),), correction="holm")
    policy = Policy(**section.model_dump())
    stored = json.loads(json.dumps(records.dataclasses.asdict(policy)))
    assert Policy(**stored).hash() == policy.hash()
    assert Policy(**stored).rules == policy.rules


def test_all_wrong_rules_are_told_together() -> None:
    with pytest.raises(InputError) as caught:
        Policy(rules=(RuleSetting("task >"), RuleSetting("x >= 1", confidence=2.0)), correction="bonferroni")
    assert [p.what.split(",")[0] for p in caught.value.problems] == [
        "not a rule", "not a rule", "confidence of 'x >= 1' must lie between 0 and 1", "unknown correction",
    ]  # fmt: skip


# --- laws --------------------------------------------------------------------------------------------------------

RANK = {"fail": 0, "inconclusive": 1, "pass": 2}


@given(
    st.integers(1, 80), st.data(), st.sampled_from(["{} of base", "base + {}", "{}"]), st.floats(0.05, 1.2),
    st.floats(0.05, 1.2),
)  # fmt: skip
def test_a_higher_bar_is_never_easier(n: int, data: Any, bound: str, one: float, two: float) -> None:
    mine = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)))
    theirs = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)))
    measure = Measure("proportion", mine, {"base": theirs})
    mild, strict = (
        judged(f"safety.coherence >= {bound.format(repr(x))}", safety__coherence=measure).verdict
        for x in sorted((one, two))
    )
    assert RANK[strict] <= RANK[mild]
    high, low = (
        judged(f"safety.coherence <= {bound.format(repr(x))}", safety__coherence=measure).verdict
        for x in sorted((one, two), reverse=True)
    )
    assert RANK[low] <= RANK[high]


def test_evidence_keeps_its_default() -> None:
    assert Evidence(EVIDENCE.adapter, {}, EVIDENCE.run, 0).measures == {}
