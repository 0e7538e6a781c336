"""The recommendation: one case per branch, and laws that hold for any evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.config import PromptSection, TaskSection
from tunegate.evaluation.advise import (
    CONSTRAIN,
    DO_NOT,
    FINE_TUNE,
    MORE_DATA,
    PROMPT,
    RETRIEVE,
    VERDICTS,
    Evidence,
    Guess,
    Option,
    Target,
    Trained,
    guess_kind,
    recommend,
)
from tunegate.evaluation.intervals import wilson
from tunegate.evaluation.learning_curve import Curve, Estimate, PowerLaw
from tunegate.records import Comparison, Score


def scored(value: float, n: int = 100) -> Score:
    low, high = wilson(round(value * n), n)
    return Score("accuracy", round(value * n) / n, n, low, high)


def compared(low: float, high: float) -> Comparison:
    return Comparison("accuracy", "as_is", (low + high) / 2, low, high, 100, 0.5, 1, 1, 98)


def option(name: str, value: float, *uses: Any, n: int = 100, gain: Comparison | None = None) -> Option:
    return Option(name, frozenset(uses), scored(value, n), 100.0 + 50 * len(uses), 5.0, 1.0, 0.1, gain)


def evidence(*options: Option, kind: Any = "skill", rows: int = 2000, target: float = 0.9, **more: Any) -> Evidence:
    return Evidence(
        Guess(kind, "why"), Target(target, "gate.min_score"), rows, options, more.pop("missing", {}), **more
    )


def trained(
    value: float, over: tuple[float, float], doubling: tuple[float, float, float], run_steps: int = 40
) -> Trained:
    flat = Estimate(value, value, value)
    curve = Curve(
        (1, 2, 3, 4), (0.1,) * 4, PowerLaw(0, 1, 0), {"1x": flat, "2x": flat, "4x": flat}, Estimate(*doubling)
    )
    return Trained(curve, scored(value), compared(*over), 40, run_steps)


OWN, SHOTS = option("as_is", 0.3), option("few_shot_8", 0.5, "shots")
HELPS, FLAT = (0.03, 0.01, 0.05), (0.001, 0.0, 0.004)

CASES = [
    (evidence(OWN, SHOTS), FINE_TUNE, "0.400 short"),
    (evidence(OWN, SHOTS, rows=499), MORE_DATA, "fewer than 500"),
    (evidence(option("as_is", 1.0)), PROMPT, "the task's own prompt already reaches"),
    (evidence(OWN, option("few_shot_8", 0.98, "shots")), PROMPT, "few_shot_8 already reaches"),
    (evidence(OWN, option("x", 1.0, "constraint"), kind="format"), CONSTRAIN, "x already reaches"),
    (evidence(OWN, option("x", 1.0, "constraint")), CONSTRAIN, "already reaches"),
    (evidence(OWN, option("x", 1.0, "passages")), RETRIEVE, "already reaches"),
    (evidence(OWN, option("gpt", 1.0, "reference")), FINE_TUNE, "short"),
    (evidence(OWN, kind="safety"), DO_NOT, "guardrails"),
    (evidence(option("as_is", 1.0), kind="safety"), DO_NOT, "guardrails"),
    (evidence(OWN, kind="format", missing={"constraint": "no library"}), CONSTRAIN, "no library"),
    (evidence(OWN, option("x", 0.6, "constraint"), kind="format"), FINE_TUNE, "keep the constraint"),
    (evidence(OWN, option("x", 0.2, "constraint"), kind="format"), FINE_TUNE, "does not help"),
    (evidence(OWN, kind="knowledge"), RETRIEVE, "no documents were given"),
    (evidence(OWN, option("x", 0.6, "passages", gain=compared(0.1, 0.4)), kind="knowledge"), RETRIEVE, "gains +0.250"),
    (
        evidence(OWN, option("x", 0.3, "passages", gain=compared(-0.1, 0.1)), kind="knowledge"),
        FINE_TUNE,
        "may not hold",
    ),
    (evidence(replace(option("as_is", 0.93), to_decide=1400)), MORE_DATA, "about 1,400 evaluation items would decide"),
    (evidence(OWN, SHOTS, trained=trained(0.8, (0.2, 0.4), HELPS)), FINE_TUNE, "against few_shot_8"),
    (evidence(option("as_is", 0.93), trained=trained(0.99, (0.02, 0.1), FLAT)), FINE_TUNE, "against as_is"),
    (evidence(OWN, SHOTS, rows=100, trained=trained(0.8, (0.2, 0.4), FLAT)), FINE_TUNE, "+0.300"),
    (evidence(OWN, SHOTS, trained=trained(0.5, (-0.1, 0.1), HELPS)), MORE_DATA, "more rows are predicted to help"),
    (evidence(OWN, SHOTS, trained=trained(0.5, (-0.1, 0.1), FLAT)), MORE_DATA, "neither these rows"),
    (evidence(OWN, SHOTS, trained=trained(0.3, (-0.3, -0.1), FLAT)), PROMPT, "stays behind the prompt"),
    (evidence(OWN, SHOTS, trained=trained(0.3, (-0.3, -0.1), HELPS)), MORE_DATA, "predicted to help"),
    (evidence(OWN, SHOTS, trained=trained(0.3, (-0.3, -0.1), FLAT, 119)), FINE_TUNE, "a run takes 119 steps"),
    (evidence(OWN, SHOTS, rows=100, trained=trained(0.3, (-0.3, -0.1), FLAT, 119)), MORE_DATA, "fewer than 500"),
    (evidence(OWN, SHOTS, trained=trained(0.8, (0.2, 0.4), FLAT, 119)), FINE_TUNE, "against few_shot_8"),
]


@pytest.mark.parametrize(("given", "verdict", "says"), CASES)
def test_each_branch(given: Evidence, verdict: str, says: str) -> None:
    found = recommend(given)
    assert found.verdict == verdict
    assert says in " ".join(found.reasons)


def test_every_verdict_has_a_case() -> None:
    assert {verdict for _, verdict, _ in CASES} == set(VERDICTS)


def test_the_plainest_option_that_is_enough_is_recommended() -> None:
    best = [
        option("as_is", 0.3),
        option("long", 1.0, "shots", "prompt"),
        option("short", 0.98, "shots"),
        option("c", 1.0, "constraint"),
    ]
    assert recommend(evidence(*best)).option == "short"


USES = st.frozensets(st.sampled_from(["prompt", "shots", "constraint", "passages", "reference"]), max_size=3)


@st.composite
def anything(draw: st.DrawFn) -> Evidence:
    n = draw(st.sampled_from([5, 40, 200]))
    own = option("as_is", draw(st.floats(0, 1)), n=n)
    pair = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)
    more = [
        option(f"o{i}", draw(st.floats(0, 1)), *draw(USES), n=n, gain=compared(*draw(pair)))
        for i in range(draw(st.integers(0, 4)))
    ]
    curve = None
    if draw(st.booleans()):
        over = sorted(draw(st.tuples(st.floats(-1, 1), st.floats(-1, 1))))
        low, value, high = sorted(draw(st.tuples(*[st.floats(0, 0.2)] * 3)))
        curve = trained(draw(st.floats(0, 1)), (over[0], over[1]), (value, low, high))
    kind = draw(st.sampled_from(["format", "labels", "knowledge", "skill", "safety"]))
    return evidence(
        own, *more, kind=kind, rows=draw(st.integers(1, 100_000)), target=draw(st.floats(0, 1)), trained=curve
    )


@given(anything())
def test_laws_of_any_recommendation(given: Evidence) -> None:
    found = recommend(given)
    said = " ".join((*found.reasons, *found.warnings))
    assert found.verdict in VERDICTS and found.reasons and found.questions
    assert (found.verdict == DO_NOT) == (given.kind.kind == "safety")
    enough = [o for o in given.options if o.own and o.score.low >= given.target.value]
    if given.kind.kind != "safety" and enough:
        assert found.verdict in (PROMPT, CONSTRAIN, RETRIEVE) and found.option in {o.name for o in enough}
    if found.verdict == FINE_TUNE:
        assert not enough
        assert given.rows >= 500 or "fewer than 500" in said
        assert given.rows >= 500 or given.trained is not None  # never on few rows without having tried
    if max(o.score.n for o in given.options) < 30:
        assert "evaluation items" in said
    assert any("guess" in q for q in found.questions) != given.kind.given


@given(anything(), st.floats(0, 1))
def test_a_lower_target_never_turns_a_prompt_into_training(given: Evidence, lower: float) -> None:
    if recommend(given).verdict == PROMPT and given.trained is None:
        easier = replace(given, target=Target(min(lower, given.target.value), "gate.min_score"))
        assert recommend(easier).verdict == PROMPT


@given(anything())
def test_a_reference_never_changes_the_verdict(given: Evidence) -> None:
    without = replace(given, options=tuple(o for o in given.options if o.own))
    assert recommend(given).verdict == recommend(without).verdict


def test_rows_that_teach_harm_are_a_warning() -> None:
    assert not any("harm" in w for w in recommend(evidence(OWN)).warnings)
    assert any(w.startswith("3 rows would teach") for w in recommend(evidence(OWN, flagged=3)).warnings)


# --- the guess ------------------------------------------------------------------------------------------------------


def guessed(
    rows: list[tuple[str, str, str]] | None = None,
    labels: Any = None,
    name: str = "t",
    flagged: float = 0.0,
    **task: Any,
) -> tuple[str, str]:
    found = guess_kind(TaskSection(**{"metric": "exact_match", **task}), name, labels, rows or [], flagged)
    return found.kind, found.reason


FACTS = [("", "who wrote Faust", "Goethe"), ("", "what is the capital of Peru?", "Lima")]
SKILL = [("", "Rewrite politely: send it now", "Could you please send it now?")] * 2


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"kind": "skill", "metric": "json_valid"}, "skill", "set by the user"),
        ({"name": "refuse-harm", "metric": "accuracy"}, "safety", "refuse"),
        ({"rows": [("Decline harmful requests.", "q", "a")]}, "safety", "harmful requests"),
        (
            {"rows": [("", "q", "I'm sorry, but I can't help with that."), ("", "q", "ok")]},
            "safety",
            "50% of the training answers",
        ),
        ({"prompts": (PromptSection(name="p", system="You are a jailbreak detector"),)}, "safety", "jailbreak"),
        ({"rows": SKILL, "flagged": 0.3}, "safety", "30% of the training rows would teach"),
        ({"rows": SKILL, "flagged": 0.1}, "skill", "open answers"),
        ({"metric": "json_equal"}, "format", "json_equal"),
        ({"pattern": "a"}, "format", "task.pattern"),
        ({"metric": "accuracy", "labels": ("a", "b")}, "labels", "2 labels"),
        ({"metric": "choice"}, "labels", "metric choice"),
        ({"documents": "d"}, "knowledge", "task.documents"),
        ({"rows": FACTS}, "knowledge", "100% of the rows"),
        ({"rows": SKILL}, "skill", "open answers"),
        ({}, "skill", "open answers"),
    ],
)
def test_the_kind_of_a_task(given: dict[str, Any], kind: str, says: str) -> None:
    task = dict(given)
    labels = task.pop("labels", None)
    found = guessed(task.pop("rows", None), labels, task.pop("name", "t"), task.pop("flagged", 0.0), **task)
    assert found[0] == kind and says in found[1]


def test_a_curve_without_spread_predicts_nothing() -> None:
    """All items wrong at every size: an interval from drawing them again has no width, and is not shown."""
    shown = {}
    for doubling in ((0.0, 0.0, 0.0), (0.0, -0.01, 0.01)):
        advice = recommend(evidence(option("as_is", 0.1), trained=trained(0.0, (-0.2, 0.1), doubling)))
        shown[doubling] = " ".join(advice.reasons)
    assert "twice the rows" not in shown[0.0, 0.0, 0.0] and "tells nothing about more rows" in shown[0.0, 0.0, 0.0]
    assert "twice the rows" in shown[0.0, -0.01, 0.01]
