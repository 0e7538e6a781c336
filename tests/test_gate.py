"""The gate as a table: one row per rule and edge, and the law that a stricter policy is never kinder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.errors import InputError
from tunegate.gate import Evidence, Policy, decide
from tunegate.records import Comparison, Decision, EvalRecord, RunRecord, Score

RUN = RunRecord(
    config_hash="b3:0",
    method="lora",
    steps=100,
    epochs=2.0,
    best_step=80,
    best_score=0.9,
    train_loss=0.5,
    valid_loss=0.8,
    stopped_early=False,
    trainable_parameters=10,
    base_parameters=1000,
    tokens=1,
    target_tokens=1,
    computed_tokens=1,
    seconds=1.0,
    tokens_per_second=1.0,
    peak_rss_bytes=1,
    device="cpu",
    compute_dtype="float32",
    path="plain",
)
SCORE = Score("accuracy", 0.9, 300, 0.86, 0.93)
ADAPTER = EvalRecord(
    subject="adapter",
    split="test",
    primary="accuracy",
    scores={"accuracy": SCORE},
    stop_rate=1.0,
    items_path="items.jsonl",
    hashes={},
    settings={},
    seconds=1.0,
    generated_tokens=1,
)
GAIN = Comparison("accuracy", "base", 0.3, 0.25, 0.35, 300, 1e-9, 100, 10, 190)
# Every rule passes on this evidence with this policy.
POLICY = Policy(min_score=0.85)
EVIDENCE = Evidence(ADAPTER, {"base": GAIN, "prompt": replace(GAIN, reference="prompt")}, RUN, 0)


def adapter(n: int = 300, stop_rate: float = 1.0, loss: float | None = None, **score: float) -> dict[str, Any]:
    changed = replace(SCORE, n=n, **score)
    return {"adapter": replace(ADAPTER, scores={"accuracy": changed}, stop_rate=stop_rate, loss=loss)}


def gain(against: str, difference: float, low: float, high: float, n: int = 300) -> dict[str, Any]:
    changed = replace(GAIN, difference=difference, low=low, high=high, n=n)
    return {"comparisons": {**EVIDENCE.comparisons, against: changed}}


def missing(against: str) -> dict[str, Any]:
    return {"comparisons": {**EVIDENCE.comparisons, against: None}}


def run(**losses: float | None) -> dict[str, Any]:
    return {"run": replace(RUN, **losses)}


def small(n: int) -> dict[str, Any]:
    comparisons = {name: replace(GAIN, n=n) for name in ("base", "prompt")}
    return {**adapter(n=n), "comparisons": comparisons}


def rule(decision: Decision, name: str) -> Any:
    return next((r for r in decision.rules if r.rule == name), None)


TABLE: list[tuple[str, dict[str, Any], dict[str, Any], str | None, str]] = [
    # rule, policy, evidence, its verdict (None: off), words of its reason
    ("min_score", {"min_score": None}, adapter(value=0.1), None, ""),
    ("min_score", {"min_score": 0.9}, {}, "pass", "reaches 0.9"),
    ("min_score", {"min_score": 0.9001}, {}, "fail", "below 0.9001"),
    ("min_score", {"min_score": 0.9, "strict_intervals": True}, {}, "inconclusive", "0.860"),
    ("min_score", {"min_score": 0.86, "strict_intervals": True}, {}, "pass", "reaches"),
    ("min_score", {"min_score": 0.92, "strict_intervals": True}, {}, "fail", "below"),
    ("min_score", {}, adapter(value=math.nan), "fail", ""),
    ("min_gain_over_base", {"min_gain_over_base": None}, missing("base"), None, ""),
    ("min_gain_over_base", {}, missing("base"), "inconclusive", "no measurement of the base"),
    ("min_gain_over_base", {}, gain("base", 0.02, 0.001, 0.04), "pass", "above 0"),
    ("min_gain_over_base", {}, gain("base", 0.02, 0.0, 0.04), "inconclusive", "300 items like these can show"),
    ("min_gain_over_base", {}, gain("base", 0.02, -0.02, 0.06), "inconclusive", "A gain of 0.020 needs about"),
    ("min_gain_over_base", {}, gain("base", -0.02, -0.04, 0.0), "fail", "not to exceed the base"),
    ("min_gain_over_base", {}, gain("base", -0.02, -0.04, 0.001), "inconclusive", "neither shown nor ruled out"),
    ("min_gain_over_base", {"min_gain_over_base": 0.25}, {}, "inconclusive", "holds 0.25"),
    ("min_gain_over_base", {"min_gain_over_base": 0.24}, {}, "pass", "above 0.24"),
    ("min_gain_over_base", {"min_gain_over_base": 0.35}, {}, "fail", "by more than 0.35"),
    ("min_gain_over_base", {"min_gain_over_base": -0.05}, gain("base", 0.0, -0.04, 0.04), "pass", "above -0.05"),
    ("min_gain_over_base", {}, gain("base", math.nan, math.nan, math.nan), "fail", ""),
    ("min_gain_over_prompt", {"min_gain_over_prompt": None}, missing("prompt"), None, ""),
    ("min_gain_over_prompt", {}, missing("prompt"), "inconclusive", "no measurement of the best prompt"),
    ("min_gain_over_prompt", {}, {"comparisons": {"base": GAIN}}, "inconclusive", "no measurement"),
    ("min_gain_over_prompt", {}, gain("prompt", -0.1, -0.2, -0.05), "fail", "the best prompt"),
    ("min_test_items", {"min_test_items": None}, small(2), None, ""),
    ("min_test_items", {}, small(49), "inconclusive", "49 items can show a gain of 0.26 or more over a base at 0.600"),
    ("min_test_items", {}, {**small(4), "comparisons": {}}, "inconclusive", "too few"),
    ("min_test_items", {}, small(50), "pass", ""),
    ("min_stop_rate", {"min_stop_rate": None}, adapter(stop_rate=0.0), None, ""),
    ("min_stop_rate", {}, adapter(stop_rate=0.95), "pass", ""),
    ("min_stop_rate", {}, adapter(stop_rate=0.949), "fail", "end of turn was not learned"),
    ("min_stop_rate", {}, adapter(stop_rate=math.nan), "fail", ""),
    ("max_leaked_test_rows", {"max_leaked_test_rows": None}, {"leaked_test_rows": 9}, None, ""),
    ("max_leaked_test_rows", {}, {"leaked_test_rows": 1}, "fail", "partly recall"),
    ("max_leaked_test_rows", {"max_leaked_test_rows": 1}, {"leaked_test_rows": 1}, "pass", "the policy allows"),
    ("max_leaked_test_rows", {}, {"near_leaks": 4}, "pass", "4 rows more nearly equal"),
    ("max_overfit_ratio", {"max_overfit_ratio": None}, run(valid_loss=9.0), None, ""),
    ("max_overfit_ratio", {}, run(train_loss=0.1, valid_loss=2.3), "fail", "by heart"),
    ("max_overfit_ratio", {}, run(train_loss=0.5, valid_loss=1.5), "pass", "carries over"),
    ("max_overfit_ratio", {}, run(train_loss=0.01, valid_loss=0.1), "pass", "says nothing"),
    ("max_overfit_ratio", {}, run(train_loss=0.0, valid_loss=0.11), "fail", ""),
    ("max_overfit_ratio", {}, run(train_loss=None), "inconclusive", "No training loss"),
    ("max_overfit_ratio", {}, run(train_loss=None, valid_loss=None), "inconclusive", "training and validation"),
    ("max_overfit_ratio", {}, run(valid_loss=math.nan), "fail", ""),
    ("finite_numbers", {}, {}, "pass", ""),
    ("finite_numbers", {}, adapter(value=math.nan), "fail", "diverged"),
    ("finite_numbers", {}, adapter(loss=math.inf), "fail", ""),
    ("finite_numbers", {}, run(train_loss=math.inf), "fail", ""),
    ("finite_numbers", {}, run(best_score=math.nan), "fail", ""),
    ("finite_numbers", {}, gain("prompt", math.nan, 0.1, 0.2), "fail", ""),
]


@pytest.mark.parametrize(("name", "policy", "evidence", "verdict", "reason"), TABLE)
def test_rule(name: str, policy: dict[str, Any], evidence: dict[str, Any], verdict: str | None, reason: str) -> None:
    decision = decide(replace(POLICY, **policy), replace(EVIDENCE, **evidence))
    result = rule(decision, name)
    assert (result.verdict if result else None) == verdict
    if result:
        assert reason in result.reason
        assert result.expected and result.got and result.reason.endswith(".")
    verdicts = {r.verdict for r in decision.rules}
    expected = "hold" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "ship"
    assert decision.verdict == expected
    if verdict == "fail":
        assert decision.verdict == "hold"


def test_everything_in_order_ships() -> None:
    decision = decide(POLICY, EVIDENCE)
    assert decision.verdict == "ship"
    assert [r.rule for r in decision.rules] == [
        "finite_numbers",
        "min_test_items",
        "max_leaked_test_rows",
        "min_score",
        "min_gain_over_base",
        "min_gain_over_prompt",
        "min_stop_rate",
        "max_overfit_ratio",
    ]
    assert decision.policy_hash == POLICY.hash()


def test_a_failure_outweighs_what_is_open() -> None:
    evidence = replace(EVIDENCE, **missing("prompt"), leaked_test_rows=1)
    decision = decide(POLICY, evidence)
    assert {r.verdict for r in decision.rules} == {"pass", "fail", "inconclusive"}
    assert decision.verdict == "hold"


def test_all_rules_off_still_refuses_what_diverged() -> None:
    off = Policy(None, None, None, 0.95, None, None, None, None)
    assert [r.rule for r in decide(off, EVIDENCE).rules] == ["finite_numbers"]
    assert decide(off, EVIDENCE).verdict == "ship"
    assert decide(off, replace(EVIDENCE, **run(valid_loss=math.nan))).verdict == "hold"


def test_reasons_name_numbers() -> None:
    result = rule(decide(POLICY, replace(EVIDENCE, **gain("base", 0.02, -0.02, 0.06))), "min_gain_over_base")
    # Half width 0.04 at 1.96 standard errors; 80 % power takes 0.8416 more: 0.04 * 2.8016 / 1.96 = 0.057
    assert "300 items like these can show a gain of 0.057 or more" in result.reason
    # (0.0572 / 0.02)^2 * 300 = 2451, rounded up to two digits
    assert "A gain of 0.020 needs about 2500 items." in result.reason
    assert result.got == "+0.0200 (95 % interval -0.020 to +0.060, 300 items, p = 1e-09)"


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        (gain("base", 0.1, 0.0, 0.2, n=299), "comparison with base"),
        ({"comparisons": {"prompt": replace(GAIN, metric="bleu")}}, "bleu on 300 items"),
        (adapter(confidence=0.9), "policy's confidence"),
        ({"adapter": replace(ADAPTER, primary="bleu")}, "primary metric"),
    ],
)
def test_evidence_that_does_not_belong_together(evidence: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        decide(POLICY, replace(EVIDENCE, **evidence))


def test_policy_hash_is_by_value() -> None:
    assert Policy().hash() == Policy(min_gain_over_base=0, min_test_items=50).hash()
    changed = [
        {"min_score": 0.0},
        {"min_gain_over_base": None},
        {"min_gain_over_prompt": 0.01},
        {"confidence": 0.9},
        {"min_test_items": 51},
        {"min_stop_rate": None},
        {"max_leaked_test_rows": 1},
        {"max_overfit_ratio": 2.0},
        {"strict_intervals": True},
    ]
    hashes = {Policy(**change).hash() for change in changed}  # type: ignore[arg-type]
    assert len(hashes | {Policy().hash()}) == len(changed) + 1


def test_a_policy_of_nonsense_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        Policy(min_score=math.nan, max_overfit_ratio=math.inf)
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match="confidence"):
        Policy(confidence=95)


RANK = {"hold": 0, "inconclusive": 1, "ship": 2}
unit = st.floats(0, 1)


@st.composite
def pieces_of_evidence(draw: Any) -> Evidence:
    low, value, high = sorted(draw(st.tuples(unit, unit, unit)))
    n = draw(st.integers(1, 200))
    comparisons: dict[str, Comparison | None] = {}
    for name in ("base", "prompt"):
        lower, middle, upper = sorted(draw(st.tuples(*[st.floats(-1, 1)] * 3)))
        some = replace(GAIN, difference=middle, low=lower, high=upper, n=n)
        comparisons[name] = draw(st.sampled_from([some, some, None]))
    losses = st.none() | st.floats(0, 5)
    return Evidence(
        adapter(n=n, stop_rate=draw(unit), value=value, low=low, high=high)["adapter"],
        comparisons,
        replace(RUN, train_loss=draw(losses), valid_loss=draw(losses)),
        draw(st.integers(0, 3)),
    )


@given(pieces_of_evidence(), st.data())
def test_a_stricter_policy_is_never_kinder(evidence: Evidence, data: Any) -> None:
    at_least = {
        "min_score": unit,
        "min_gain_over_base": st.floats(-1, 1),
        "min_gain_over_prompt": st.floats(-1, 1),
        "min_test_items": st.integers(1, 200),
        "min_stop_rate": unit,
        "strict_intervals": st.booleans(),
    }
    at_most = {"max_leaked_test_rows": st.integers(0, 3), "max_overfit_ratio": st.floats(0.1, 10)}
    mild: dict[str, Any] = {}
    strict: dict[str, Any] = {}
    for names, first, second in ((at_least, mild, strict), (at_most, strict, mild)):
        for name, values in names.items():
            first[name], second[name] = sorted(data.draw(st.tuples(values, values)))
    for name in mild:
        if name != "strict_intervals" and data.draw(st.booleans()):
            mild[name] = None  # off is the mildest
    verdicts = [decide(Policy(**values), evidence).verdict for values in (mild, strict)]
    assert RANK[verdicts[1]] <= RANK[verdicts[0]]
