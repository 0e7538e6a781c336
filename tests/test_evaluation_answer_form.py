"""The form of a task's answers: what was given wins, inferred schemas hold for what they were inferred from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.config import TaskSection
from tunegate.evaluation.answer_form import find_form, infer_schema

LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-1, 1).filter(lambda x: x % 1 != 0)
    | st.text("ab", max_size=2)
)
VALUE = st.recursive(
    LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", max_size=2), v, max_size=3)
)


@given(st.lists(VALUE, max_size=6))
def test_every_value_satisfies_the_schema_inferred_from_all(values: list[Any]) -> None:
    schema = infer_schema(values)
    for value in values:
        jsonschema.validate(value, schema)


def test_a_schema_by_hand() -> None:
    rows = [{"item": "fox", "n": 1, "gift": True}, {"item": "dog", "n": 2.5, "tags": ["a"]}]
    assert infer_schema(rows) == {
        "type": "object",
        "properties": {
            "item": {"type": "string"},
            "n": {"type": "number"},
            "gift": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["item", "n"],
        "additionalProperties": False,
    }
    assert list(infer_schema(rows)["properties"]) == ["item", "n", "gift", "tags"]


def form_of(answers: list[str], labels: tuple[str, ...] | None = None, folder: Path = Path(), **task: Any) -> Any:
    found = find_form(TaskSection(**{"metric": "exact_match", **task}), labels, answers, folder)
    return None if found is None else found[0]


def test_what_the_task_states_comes_first(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    assert form_of(["a"], ("a", "b"), tmp_path, json_schema="s.json").value == '{"type": "object"}'
    assert form_of(["a"], ("a", "b"), pattern="a|b").kind == "regex"
    assert form_of(["a"], ("a", "b"), metric="accuracy").value == ("a", "b")


def test_json_answers_give_a_schema_in_their_own_style() -> None:
    loose, tight = json.dumps({"a": 1}), '{"a":1}'
    found = form_of([loose, loose, "no json"], metric="json_equal")
    assert json.loads(found.value)["required"] == ["a"] and not found.compact
    assert form_of([tight, tight, loose], metric="json_equal").compact


def test_keys_stand_in_the_usual_order_of_the_answers(tmp_path: Path) -> None:
    """A schema in alphabetical order, also inside ``oneOf`` and below a key that is itself called ``properties``."""
    inner = {"type": "object", "properties": {k: {"type": "string"} for k in ("artist", "city", "zone")}}
    first = {"type": "object", "properties": {"properties": inner, "kind": {"const": "a"}}, "required": ["kind"]}
    given = {"oneOf": [first, {"const": {"properties": {"b": 1, "a": 2}}}]}
    (tmp_path / "s.json").write_text(json.dumps(given))
    answers = [
        json.dumps({"kind": "a", "properties": slots})
        for slots in ({"zone": "z", "city": "c"}, {"zone": "z"}, {"zone": "x", "city": "y"})
    ]
    found = json.loads(form_of(answers, None, tmp_path, metric="json_equal", json_schema="s.json").value)
    assert found == given  # it means the same
    assert list(found["oneOf"][0]["properties"]) == ["kind", "properties"]
    assert list(found["oneOf"][0]["properties"]["properties"]["properties"]) == ["zone", "city", "artist"]
    assert list(found["oneOf"][1]["const"]["properties"]) == ["b", "a"]
    mixed = [json.dumps({"a": 1}), *[json.dumps({"b": 1, "a": 2})] * 3]
    assert list(json.loads(form_of(mixed, metric="json_equal").value)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["yes", "no"] * 10, ("no", "yes")),
        (["yes"] * 20, None),
        ([str(n) for n in range(20)], None),
        (["a", ""] * 9, None),
    ],
)
def test_answers_that_repeat_are_choices(answers: list[str], wanted: tuple[str, ...] | None) -> None:
    found = form_of(answers)
    assert (None if found is None else found.value) == wanted
