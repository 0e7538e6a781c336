"""The language of rules: what it says, what it prints, and what it says of a text that is none."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.errors import InputError
from tunegate.gate_rules import FAMILIES, KEYWORDS, OPERATORS, REFERENCES, Rule, known_metrics, parse_rule

TABLE = {
    "task.exact_match >= 0.85": Rule("task.exact_match", ">=", 0.85),
    "task vs best_prompt >= +0.02": Rule("task", ">=", 0.02, "gain", "best_prompt"),
    "task vs base > 0": Rule("task", ">", 0.0, "gain", "base"),
    "regression.* >= 0.95 of base": Rule("regression.*", ">=", 0.95, "share", "base"),
    "regression.math >= 0.95 of base": Rule("regression.math", ">=", 0.95, "share", "base"),
    "judge.mean >= 4": Rule("judge.mean", ">=", 4.0),
    "judge.pass_rate >= 0.8": Rule("judge.pass_rate", ">=", 0.8),
    "safety.bypass_rate <= base": Rule("safety.bypass_rate", "<=", 0.0, "offset", "base"),
    "safety.over_refusal <= base + 0.05": Rule("safety.over_refusal", "<=", 0.05, "offset", "base"),
    "task >= base - 0.02": Rule("task", ">=", -0.02, "offset", "base"),
    "review.accept >= 0.9": Rule("review.accept", ">=", 0.9),
    "train.loss_ratio <= 3": Rule("train.loss_ratio", "<=", 3.0),
    "data.leaked_rows <= 0": Rule("data.leaked_rows", "<=", 0.0),
    "task vs base >= -0.02": Rule("task", ">=", -0.02, "gain", "base"),
    "not train.score vs base < 0": Rule("train.score", "<", 0.0, "gain", "base", True),
    "regression.lm_eval:arc-easy.5 > 1e-07": Rule("regression.lm_eval:arc-easy.5", ">", 1e-7),
}


@pytest.mark.parametrize("text", TABLE)
def test_what_a_rule_says(text: str) -> None:
    assert parse_rule(text) == TABLE[text]
    assert str(TABLE[text]) == text


@pytest.mark.parametrize(
    ("spelt", "canonical"),
    [
        ("  task>=.5 ", "task >= 0.5"),
        ("task\tvs base>+0.020", "task vs base > +0.02"),
        ("safety.over_refusal <= base+0.05", "safety.over_refusal <= base + 0.05"),
        ("safety.over_refusal <= base-0.05", "safety.over_refusal <= base - 0.05"),
        ("safety.over_refusal <= base + 0", "safety.over_refusal <= base"),
        ("task vs base >= -0", "task vs base >= 0"),
        ("judge.mean >= 4.0", "judge.mean >= 4"),
        ("regression.* >= +0.95 of base", "regression.* >= 0.95 of base"),
    ],
)
def test_other_spellings(spelt: str, canonical: str) -> None:
    assert str(parse_rule(spelt)) == canonical


ERRORS = [
    # text, column, what was expected, the way out
    ("", 1, "a metric", "task vs base > 0"),
    ("task", 5, ">=, >, <=, <", "'task >= 0.9'"),
    ("task vs base", 13, ">=, >, <=, <", "'task vs base > 0'"),
    ("task == 0.5", 6, ">=, >, <=, <", ""),
    ("task >= ", 8, "a number, or one of base, best_prompt", ""),
    ("task >= bass", 9, "one of base, best_prompt", "did you mean 'base'?"),
    ("task vs bestprompt > 0", 9, "one of base, best_prompt", "best_prompt"),
    ("task >= 90%", 9, "a number", "write a share, 0.9 for 90 %"),
    ("task >= 0.9 0.8", 13, "the end of the rule", ""),
    ("task >= base + x", 16, "a number", ""),
    ("task >= base + 0.1 of base", 20, "the end of the rule", ""),
    ("task vs base >= 0.9 of base", 21, "the end of the rule", "'vs' or 'of', not both"),
    ("task vs base >= best_prompt", 17, "a number: the gain", "stands after 'vs'"),
    ("regression.math >= 0 of base", 20, "a share above 0", ""),
    ("regression.math >= -1 of base", 20, "a share above 0", ""),
    ("task >= 1e999", 9, "a finite number", ""),
    ("task >= 1.2.3", 9, "a number", ""),
    ("base >= 0.5", 1, "a metric", ""),
    ("not not task > 1", 5, "a metric", ""),
    ("saftey.bypass_rate <= base", 1, "a metric of task, regression", "'safety.bypass_rate'"),
    ("safety.bypassrate <= base", 1, "safety.bypass_rate", "'safety.bypass_rate'"),
    ("judge.men >= 4", 1, "one of judge.mean", "'judge.mean'"),
    ("judge >= 4", 1, "one of judge.mean", ""),
    ("train.loss_ration <= 3", 1, "one of train.loss_ratio", "'train.loss_ratio'"),
    ("task.* * >= 1", 8, ">=, >, <=, <", ""),
    ("💥 >= 1", 1, "a metric", ""),
]


@pytest.mark.parametrize(("text", "column", "expected", "fix"), ERRORS)
def test_what_is_wrong_and_where(text: str, column: int, expected: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_rule(text)
    [problem] = caught.value.problems
    assert f"at column {column} of {text!r}" in problem.what
    assert expected in problem.expected
    assert fix in problem.fix


segments = st.from_regex(r"[A-Za-z_][A-Za-z0-9_:]{0,8}(-[a-z]{1,3})?", fullmatch=True)
metrics = st.one_of(
    st.sampled_from(known_metrics()),
    st.builds(
        lambda family, rest: ".".join([family, *rest]),
        st.sampled_from([name for name, family in FAMILIES.items() if family.names is None]),
        st.lists(segments | st.just("*"), min_size=1, max_size=3),
    ),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    form = draw(st.sampled_from(["value", "gain", "share", "offset"]))
    number = draw(numbers.filter(lambda x: x > 0) if form == "share" else numbers)
    reference = None if form == "value" else draw(st.sampled_from(REFERENCES))
    return Rule(draw(metrics), draw(st.sampled_from(OPERATORS)), number, form, reference, draw(st.booleans()))


@given(rules())
def test_a_printed_rule_is_read_back(rule: Rule) -> None:
    again = parse_rule(str(rule))
    assert again == rule
    assert str(again) == str(rule).replace("-0", "0") if rule.number == 0 else str(again) == str(rule)


words = st.sampled_from(
    ["task", "regression.*", "base", "of", "vs", "not", ">=", "<", "+", "-", "0.5", "1e3", ".", "%"]
)


@given(st.text(max_size=30) | st.lists(words, max_size=8).map(" ".join) | st.lists(words, max_size=8).map("".join))
def test_any_text_is_a_rule_or_a_problem_with_a_place(text: str) -> None:
    try:
        rule = parse_rule(text)
    except InputError as error:
        [problem] = error.problems
        column = int(problem.what.split("column ")[1].split(" ")[0])
        assert 1 <= column <= len(text) + 1
        assert problem.expected
    else:
        assert math.isfinite(rule.number)
        assert parse_rule(str(rule)) == rule


def test_patterns_match_whole_parts() -> None:
    rule = parse_rule("regression.* >= 0.9")
    assert rule.matches("regression.math") and rule.matches("regression.math.hard")
    assert not rule.matches("regression") and not rule.matches("regressionmath") and not rule.matches("task.math")
    middle = parse_rule("regression.*.hard >= 0.9")
    assert middle.matches("regression.math.hard") and not middle.matches("regression.hard")
    assert not parse_rule("task.a >= 1").matches("taskxa")


def test_every_family_says_how_it_is_measured() -> None:
    for name, family in FAMILIES.items():
        assert family.command.startswith("tunegate ") and name not in KEYWORDS
