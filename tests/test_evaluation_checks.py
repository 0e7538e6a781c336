"""Checks of answers: what passes, what does not, and what is refused before anyone is asked."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.evaluation.checks import KINDS, Check, check_problems, literal, score_answer, unfenced
from tunegate.evaluation.constraints import RULES, constraint_problems, plain, satisfies, sentences, words

PASSES: list[tuple[str, dict[str, Any], str, str, bool]] = [
    ("exact", {}, " Paris ", "Paris", True),
    ("exact", {}, "paris", "Paris", False),
    ("normalised", {}, "**Paris**.", "paris", True),
    ("normalised", {}, "Paris, France", "paris", False),
    ("contains", {}, "The capital is Paris.", "paris", True),
    ("contains", {}, "The capital is Parisian.", "paris", False),
    ("contains", {}, "don’t", "don't", True),
    ("mention", {"among": ["Tom", "Ann"]}, "Ann, because Tom is shorter", "Ann", True),
    ("mention", {"among": ["Tom", "Ann"]}, "Tom is shorter than Ann", "Ann", False),
    ("mention", {"among": ["Tom", "Ann"]}, "Anna", "Ann", False),
    ("mention", {"among": ["red", "red wine"]}, "red wine", "red wine", True),
    ("number", {}, "It is 1,200 in all.", "1200", True),
    ("number", {}, "7 and then 8", "7", False),
    ("number", {}, "none", "7", False),
    ("choice", {}, "(b) because", "B", True),
    ("choice", {}, "A cat", "A", False),
    ("regex", {"pattern": r"\d{4}-\d\d"}, " 2024-01 ", "2024-01", True),
    ("regex", {"pattern": r"\d{4}-\d\d"}, "on 2024-01", "2024-01", False),
    ("literal", {}, "```python\n[1, 2]\n```", "[1,2]", True),
    ("literal", {}, "`'a'`", '"a"', True),
    ("literal", {}, "1", "True", False),
    ("literal", {}, "1.0", "1", False),
    ("literal", {}, "[1, True]", "[1, 1]", False),
    ("literal", {}, "__import__('os')", "1", False),
    ("json_valid", {}, '{"a": 1}', "", True),
    ("json_valid", {}, 'Here: {"a": 1}', "", False),
    ("json_equal", {}, '{"b": 2, "a": 1.0}', '{"a": 1, "b": 2}', True),
    ("json_equal", {}, '{"a": true}', '{"a": 1}', False),
    ("json_schema", {"schema": {"type": "array"}}, "[1]", "[]", True),
    ("json_schema", {"schema": {"type": "array"}}, "{}", "[]", False),
]


@pytest.mark.parametrize(("kind", "options", "answer", "reference", "passes"), PASSES)
def test_what_passes(kind: str, options: dict[str, Any], answer: str, reference: str, passes: bool) -> None:
    check = Check(kind, options)
    assert check_problems(check, (reference,)) == []
    assert score_answer(check, answer, (reference,)) == float(passes)


def test_any_of_several_references_is_enough() -> None:
    assert score_answer(Check("contains"), "a tiny one", ("small", "tiny")) == 1.0


RULED = [
    ({"rule": "words", "max": 3}, "one two three", "one two three four"),
    ({"rule": "words", "min": 2, "max": 2}, "well-known don't", "one"),
    ({"rule": "sentences", "min": 2, "max": 2}, "One is 3.5 high. Two!", "One. Two. Three."),
    ({"rule": "lines", "max": 2}, "a\n\nb", "a\nb\nc"),
    ({"rule": "starts_with", "text": "Once"}, "  once upon", "At once"),
    ({"rule": "ends_with", "text": "end."}, "the END. ", "the end"),
    ({"rule": "contains", "items": ["red", "blue"]}, "Blue and red", "bluered"),
    ({"rule": "contains", "items": ["red", "blue"], "at_least": 1}, "blue", "green"),
    ({"rule": "excludes", "items": ["tree"]}, "trees", "the tree."),
    ({"rule": "without_letter", "letter": "E"}, "a dog", "apple"),
    ({"rule": "case", "is": "upper"}, "ALL 3 LOUD!", "ALL bUT"),
    ({"rule": "case", "is": "lower"}, "quiet 3", "Quiet"),
    ({"rule": "case", "is": "title"}, "A Good Day", "A good Day"),
    ({"rule": "case", "is": "upper"}, "A", "123"),
    ({"rule": "times", "text": "ha", "times": 2}, "Ha, ha", "haha ha ha ha"),
    ({"rule": "matches", "pattern": r"\Aab"}, "abc", "cab"),
]


@pytest.mark.parametrize(("rule", "good", "bad"), RULED)
def test_rules_on_texts(rule: dict[str, Any], good: str, bad: str) -> None:
    assert constraint_problems([rule]) == []
    assert satisfies(good, [rule])
    assert not satisfies(bad, [rule])
    assert not satisfies("  ", [rule])


def test_every_rule_is_tried_above() -> None:
    assert {rule["rule"] for rule, _, _ in RULED} == set(RULES)
    assert {kind for kind, *_ in PASSES} | {"likelihood", "constraints", "python"} == set(KINDS)


def test_all_rules_must_hold() -> None:
    rules = [{"rule": "words", "max": 3}, {"rule": "starts_with", "text": "a"}]
    assert satisfies("a b c", rules)
    assert not satisfies("b c", rules)


@pytest.mark.parametrize(
    ("kind", "options", "references", "says"),
    [
        ("exactly", {}, ("a",), "did you mean 'exact'"),
        ("exact", {}, (), "needs an answer"),
        ("exact", {"case": 1}, ("a",), "unknown option 'case'"),
        ("number", {}, ("none",), "no number"),
        ("choice", {}, ("maybe",), "no choice letter"),
        ("mention", {}, ("a",), "needs the option 'among'"),
        ("mention", {"among": ["b", "c"]}, ("a",), "not in 'among'"),
        ("likelihood", {"choices": ["a", "a"]}, ("a",), "stands twice"),
        ("likelihood", {"choices": ["a", "b"]}, ("c",), "not one of the choices"),
        ("regex", {"pattern": "("}, ("a",), "not valid"),
        ("regex", {"pattern": "b"}, ("a",), "does not pass its own check"),
        ("literal", {}, ("f(x)",), "not a Python literal"),
        ("json_equal", {}, ("{",), "not JSON"),
        ("json_schema", {"schema": {"type": "nothing"}}, (), "schema is not valid"),
        ("constraints", {"rules": []}, (), "at least one"),
        ("constraints", {"rules": [{"rule": "word", "max": 1}]}, (), "did you mean 'words'"),
        ("constraints", {"rules": [{"rule": "words"}]}, (), "'min' or 'max' is missing"),
        ("constraints", {"rules": [{"rule": "words", "max": "3"}]}, (), "whole number"),
        ("constraints", {"rules": [{"rule": "case", "is": "loud"}]}, (), "upper, lower or title"),
        ("constraints", {"rules": [{"rule": "words", "max": 1}]}, ("two words",), "own check"),
        ("constraints", {"rules": [{"rule": "times", "text": "a"}]}, (), "'times' is missing"),
        ("python", {"tests": []}, (), "at least one"),
        ("python", {"tests": ["assert ("]}, (), "not Python"),
        ("python", {"tests": ["pass"], "timeout": 0}, (), "timeout"),
    ],
)
def test_what_is_refused(kind: str, options: dict[str, Any], references: tuple[str, ...], says: str) -> None:
    assert any(says in text for text in check_problems(Check(kind, options), references))


def test_kinds_that_text_does_not_settle_say_so() -> None:
    with pytest.raises(ValueError, match="not settled by text"):
        score_answer(Check("likelihood", {"choices": ["a", "b"]}), "a", ("a",))


@given(st.text(max_size=200), st.sampled_from(sorted(set(KINDS) - {"likelihood", "python"})))
def test_no_answer_breaks_a_check(answer: str, kind: str) -> None:
    options: dict[str, Any] = {
        "mention": {"among": ["a", "1"]},
        "regex": {"pattern": "[a1]*"},
        "json_schema": {"schema": {"type": "integer"}},
        "constraints": {"rules": [dict(rule) for rule, _, _ in RULED]},
    }.get(kind, {})
    assert score_answer(Check(kind, options), answer, ("1",)) in (0.0, 1.0)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner), max_leaves=8))
def test_a_literal_is_what_python_reads(value: Any) -> None:
    assert literal(repr(value)) == ast.literal_eval(repr(value))
    assert score_answer(Check("literal"), f"```\n{value!r}\n```", (repr(value),)) == 1.0


@pytest.mark.parametrize("text", ["[" * 300 + "]" * 300, "9" * 5000, "", "a = 1", "[" * 30 + "]" * 30])
def test_literals_out_of_bounds_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        literal(text)


def test_helpers_on_texts() -> None:
    assert plain("  **“Hello”,  World** ") == "“hello”, world"
    assert words("It's a well-known fact, no. 7!") == ["It's", "a", "well-known", "fact", "no", "7"]
    assert sentences('He said "Go." Then he left.') == ['He said "Go.', "Then he left."]
    assert unfenced("see\n```python\nx = 1\n```\nok") == "x = 1\n"
    assert unfenced("```\nx") == "x"
    assert unfenced("x") == "x"
