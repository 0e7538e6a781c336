"""Forms: what each becomes, how a form is found, and what a bad row is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.data.forms import FORMS, detect_form, load_examples, to_example
from tunegate.data.messages import SHAREGPT_ROLES
from tunegate.data.rows import RawRow
from tunegate.data.types import Example
from tunegate.errors import InputError, Problem
from tunegate.files import hash_file, write_jsonl

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def make(value: dict[str, Any], form: str = "chat", **settings: Any) -> Example:
    made = to_example(RawRow("f.jsonl", 7, value), form, **settings)
    assert isinstance(made, Example), made
    assert made.row_id == "f.jsonl:7"
    return made


def problems(value: dict[str, Any], form: str = "chat", **settings: Any) -> list[Problem]:
    made = to_example(RawRow("f.jsonl", 7, value), form, **settings)
    assert isinstance(made, list), made
    assert made and all(problem.where == "f.jsonl:7" for problem in made)
    return made


def turns(example: Example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        ("chat", {"messages": [USER, ANSWER]}, QA),
        ("chat", {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, [("system", "s"), *QA]),
        ("chat", {"messages": [USER, ANSWER], "system": "s"}, [("system", "s"), *QA]),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, QA),
        ("prompt_completion", {"prompt": "q", "completion": 3}, [("user", "q"), ("assistant", "3")]),
        ("prompt_completion", {"prompt": "q", "completion": 1.5}, [("user", "q"), ("assistant", "1.5")]),
        ("prompt_completion", {"prompt": "q", "completion": True}, [("user", "q"), ("assistant", "True")]),
        ("prompt_completion", {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, QA * 2),
        ("prompt_completion", {"prompt": [USER], "completion": "a"}, QA),
        ("alpaca", {"instruction": "q", "output": "a"}, QA),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, QA),
        ("alpaca", {"instruction": "q", "input": "in", "output": "a", "system": ""},
         [("user", "q\n\nin"), ("assistant", "a")]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ("sharegpt", {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "bard", "value": "a"}]},
         [("system", "s"), *QA]),
        ("labelled", {"text": "q", "label": "a"}, QA),
        ("labelled", {"prompt": "q", "label": 0}, [("user", "q"), ("assistant", "0")]),
    ],
)  # fmt: skip
def test_forms(form: str, value: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    example = make(value, form)
    assert turns(example) == expected
    assert example.text is None and example.answer == expected[-1][1]
    assert detect_form([value]) == form


def test_text_form() -> None:
    example = make({"text": " once ", "id": 3}, "text")
    assert (example.text, example.messages, example.meta) == (" once ", (), {"id": 3})
    assert problems({"text": " \n"}, "text")[0].what == "the text is empty"
    assert problems({"text": 3}, "text")[0].what == "text has the wrong type"
    assert detect_form([{"text": "a"}]) == "text"


def test_the_system_setting_stands_where_the_row_has_none() -> None:
    own = {"role": "system", "content": "own"}
    assert turns(make(chat(USER, ANSWER), system="s")) == [("system", "s"), *QA]
    assert turns(make(chat(own, USER, ANSWER), system="s")) == [("system", "own"), *QA]
    assert turns(make({"prompt": "q", "completion": "a", "system": "own"}, "prompt_completion", system="s"))[0] == (
        "system",
        "own",
    )
    assert problems({**chat(own, USER, ANSWER), "system": "field"})[0].what == "two system texts"


def test_tool_calls_take_one_shape() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for call in (
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}, "extra": None},
    ):
        asked = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "content": "", "tool_call_id": "1"}
        example = make({**chat(USER, asked, result, result, ANSWER), "tools": tools})
        assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]}
        assert example.messages[2] == result
        assert example.tools == tuple(tools)
    flat = make(chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}))
    assert flat.messages[-1]["tool_calls"] == [CALL]
    assert flat.answer == ""


def test_sharegpt_calls_and_observations() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    }
    example = make(value, "sharegpt")
    assert [m["role"] for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [CALL]
    assert example.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ({"name": "f", "arguments": "{not json"}, "not valid JSON"),
        ({"name": "f", "arguments": '{"x": 1, "x": 2}'}, "stands twice"),
        ({"name": "f", "arguments": [1]}, "must be a JSON object"),
        ({"arguments": {}}, "without a name"),
        ("f", "without a name"),
    ],
)
def test_bad_tool_calls(call: Any, what: str) -> None:
    assert what in problems(chat(USER, {"role": "assistant", "tool_calls": [call]}))[0].what


def test_content_parts_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns(make(chat({"role": "user", "content": parts}, ANSWER)))[0] == ("user", "ab")
    image = {"type": "image_url", "image_url": {"url": "x"}}
    (problem,) = problems(chat({"role": "user", "content": [*parts, image]}, ANSWER))
    assert "not text" in problem.what and problem.got == "image_url"


def test_nulls_of_columnar_files_are_absent_keys() -> None:
    value = {"messages": [{**USER, "tool_calls": None, "name": None}, ANSWER], "tools": None, "text": None}
    example = make(value)
    assert example.messages == (USER, ANSWER) and example.tools == ()
    assert detect_form([value]) == "chat"


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([USER, {"role": "assistant", "content": " \n"}], "the answer is empty"),
        ([USER, {"role": "assistant"}], "the answer is empty"),
        ([USER, {"role": "assistant", "content": ""}, USER, ANSWER], "the answer is empty"),
        ([{"role": "user", "content": " "}, ANSWER], "the user's text is empty"),
        ([USER], "does not end with an answer"),
        ([USER, ANSWER, USER], "does not end with an answer"),
        ([ANSWER], "wrong order"),
        ([USER, USER, ANSWER], "wrong order"),
        ([USER, ANSWER, ANSWER], "wrong order"),
        ([USER, {"role": "system", "content": "s"}, ANSWER], "wrong order"),
        ([{"role": "system", "content": "s"}, ANSWER], "wrong order"),
        ([{"role": "system", "content": "s"}] * 2 + [USER, ANSWER], "wrong order"),
        ([USER, ANSWER, {"role": "tool", "content": "r"}, ANSWER], "wrong order"),
        ([USER, {"role": "tool", "content": "r"}, ANSWER], "wrong order"),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}, ANSWER], "wrong order"),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "r"}], "end with an answer"),
        ([USER, {"role": "asistant", "content": "a"}], "unknown role"),
        ([USER, {"role": ["user"], "content": "a"}], "unknown role"),
        ([USER, {"content": "a"}], "unknown role"),
        ([USER, {"role": "assistant", "content": 3}], "wrong type"),
        ([USER, "a"], "wrong type"),
        ([USER, {**ANSWER, "weight": 0}], "weight"),
        ([{**USER, "tool_calls": [CALL]}, ANSWER], "tool_calls of message 1|tool_calls in message 1"),
        ([], "wrong type"),
        ("text", "wrong type"),
    ],
)
def test_bad_chats(messages: Any, what: str) -> None:
    whats = [problem.what for problem in problems({"messages": messages})]
    assert any(any(part in found for part in what.split("|")) for found in whats), whats


def test_messages_are_counted_from_one_whatever_system_is_set() -> None:
    (problem,) = problems(chat(USER, USER, ANSWER), system="s")
    assert problem.got == "message 2 is 'user', after 'user'"
    assert problem.expected == "assistant after 'user'"
    assert problems(chat(USER, {"role": "asistant", "content": "a"}))[0].fix == "did you mean 'assistant'?"


def test_all_problems_of_a_row_come_together() -> None:
    found = problems({**chat({"role": "usr", "content": "q"}, {"role": "assistant", "content": 1}), "tools": 3})
    assert len(found) == 3
    found = problems({"prompt": 3}, "prompt_completion", group_by="customer")
    assert [p.what for p in found] == ["completion is missing", "group_by (column 'customer') is missing"]


def test_sharegpt_problems() -> None:
    (problem,) = problems(
        {"conversations": [{"from": "humann", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"
    )
    assert "unknown sender in message 1" in problem.what and "'human'" in problem.fix
    assert set(SHAREGPT_ROLES.values()) == {"system", "user", "assistant", "tool"}


@pytest.mark.parametrize("empty", [None, "", "  "])
@pytest.mark.parametrize("form", ["alpaca", "prompt_completion", "labelled"])
def test_missing_and_empty_answers(form: str, empty: Any) -> None:
    value = {"instruction": "q", "prompt": "q", "output": empty, "completion": empty, "label": empty}
    what = problems(value, form)[0].what
    assert what.endswith("is null") if empty is None else what == "the answer is empty"


def test_an_object_is_not_an_answer() -> None:
    (problem,) = problems({"prompt": "q", "completion": {"a": 1}}, "prompt_completion")
    assert (problem.what, problem.expected) == ("completion has the wrong type", "text")
    assert problem.got == "an object: {'a': 1}"


def test_group_and_meta() -> None:
    value = {"prompt": "q", "completion": "a", "customer": 12, "when": object(), "score": 0.5, "bad": math.inf}
    example = make(value, "prompt_completion", group_by="customer")
    assert example.group == "12"
    assert example.meta == {"customer": 12, "score": 0.5}  # only what JSON can hold
    assert "wrong type" in problems({**value, "customer": []}, "prompt_completion", group_by="customer")[0].what


def test_a_row_that_could_not_be_read_keeps_its_problem() -> None:
    problem = Problem("not valid JSON", "f.jsonl:7")
    assert to_example(RawRow("f.jsonl", 7, None, problem), "chat") == [problem]


def test_columns() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    value = {"question": "q", "answer": "a", "prompt": "own", "text": "rendered"}
    assert detect_form([value], columns) == "prompt_completion"
    example = make(value, "prompt_completion", columns=columns)
    assert turns(example) == QA
    assert example.meta == {"prompt": "own", "text": "rendered"}
    (problem,) = problems({"question": "q", "anwser": "a"}, "prompt_completion", columns=columns)
    assert problem.what == "completion (column 'answer') is missing"
    assert problem.fix == "did you mean 'anwser'?"
    assert detect_form([{"review": "q", "stars": 3, "id": 1}], {"text": "review", "label": "stars"}) == "labelled"


def test_detection_prefers_the_structured_form() -> None:
    assert detect_form([{"instruction": "q", "input": "", "output": "a", "text": "rendered"}]) == "alpaca"
    assert detect_form([{"prompt": "q", "messages": [USER, ANSWER], "label": "x"}]) == "chat"
    rows: list[dict[str, Any]] = [{"text": "t"}] * 3 + [{"prompt": "q", "completion": "a"}] * 4
    assert detect_form(rows) == "prompt_completion"
    assert detect_form([{"text": "t", "label": 1}, {"text": "t", "label": None}]) == "labelled"


def test_text_with_a_label_and_more_is_not_guessed() -> None:
    with pytest.raises(InputError, match=r"not clear(.|\n)*form: labelled"):
        detect_form([{"text": "t", "label": 1, "id": 3}])


def test_no_form_lists_keys_and_wants() -> None:
    with pytest.raises(InputError) as caught:
        detect_form([{"question": "q", "answer": "a"}])
    text = str(caught.value)
    assert "keys question, answer" in text
    assert all(f"{name}: " in text for name in FORMS)
    assert "columns: {prompt: question, completion: answer}" in text
    with pytest.raises(InputError):
        detect_form([])


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    write_jsonl(folder / name, rows)
    return name


def test_load(tmp_path: Path) -> None:
    a = write(tmp_path, "a.jsonl", [chat(USER, ANSWER), chat(USER), chat(USER, ANSWER)])
    b = write(tmp_path, "b.jsonl", [{"instruction": "i", "output": "o"}])
    loaded = load_examples([a, b], base_dir=tmp_path)
    assert [e.row_id for e in loaded.examples] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1"]
    assert [p.where for p in loaded.bad] == ["a.jsonl:2"]
    assert (loaded.rows, loaded.bad_rows, loaded.form) == (4, 1, "chat+alpaca")
    assert loaded.files == {name: hash_file(tmp_path / name) for name in (a, b)}


def test_bad_rows_are_raised_on_request_with_the_way_out(tmp_path: Path) -> None:
    name = write(tmp_path, "a.jsonl", [chat(USER, ANSWER)] + [chat(USER)] * 30)
    loaded = load_examples([name], base_dir=tmp_path)
    with pytest.raises(InputError) as caught:
        loaded.raise_bad_rows()
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "30 of 31 rows cannot be used" in text and "on_bad_row: skip" in text
    assert "a.jsonl:2: the row does not end with an answer" in text and "more of 31" in text
    assert len(caught.value.problems) == 31  # none is lost, though not all are shown
    skipping = load_examples([name], base_dir=tmp_path, on_bad_row="skip")
    skipping.raise_bad_rows()
    assert len(skipping.bad) == 30 and len(skipping.examples) == 1
    load_examples([write(tmp_path, "good.jsonl", [chat(USER, ANSWER)])], base_dir=tmp_path).raise_bad_rows()


def test_a_file_of_unreadable_rows_is_loaded_as_problems(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense\n[1]\n")
    loaded = load_examples(["a.jsonl"], base_dir=tmp_path)
    assert (loaded.rows, loaded.form, [p.where for p in loaded.bad]) == (2, "unknown", ["a.jsonl:1", "a.jsonl:2"])


def test_csv_and_parquet_load_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_text("text,label\nhello,1\nbye,0\n")
    pq.write_table(pa.table({"text": ["hello", "bye"], "label": [1, 0]}), tmp_path / "a.parquet")
    loaded = [load_examples([f"a.{ending}"], base_dir=tmp_path) for ending in ("csv", "parquet")]
    assert [turns(e) for e in loaded[0].examples] == [turns(e) for e in loaded[1].examples]
    assert loaded[0].form == loaded[1].form == "labelled"
    assert [e.line for e in loaded[0].examples] == [2, 3] and [e.line for e in loaded[1].examples] == [1, 2]


def test_settings_are_checked_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_examples(["a.jsonl", "a.jsonl"], base_dir=tmp_path, form="chatt", columns={"promt": "x"}, system=" ",
                      on_bad_row="drop")  # fmt: skip
    text = str(caught.value)
    for words in ("named twice", "did you mean 'chat'", "did you mean 'prompt'", "`system` is empty", "error | skip"):
        assert words in text
    with pytest.raises(InputError, match="no source named"):
        load_examples([], base_dir=tmp_path)


def test_file_errors_come_together(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [{"question": "q", "answer": "a"}])
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_examples(["a.jsonl", "b.jsonl", "c.jsonl"], base_dir=tmp_path)
    assert [p.where for p in caught.value.problems] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    name = write(tmp_path, "a.jsonl", [{"question": "q", "answer": "a", "client": 1}])
    with pytest.raises(InputError) as caught:
        load_examples(
            [name],
            base_dir=tmp_path,
            columns={"prompt": "qestion", "completion": "answer"},
            group_by="clients",
        )
    text = str(caught.value)
    assert "no column 'qestion'" in text and "did you mean 'question'" in text and "'client'" in text


def test_system_does_not_go_with_text(tmp_path: Path) -> None:
    name = write(tmp_path, "a.jsonl", [{"text": "t"}])
    with pytest.raises(InputError, match="does not go with"):
        load_examples([name], base_dir=tmp_path, system="s")


VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", " ", "user", "assistant", "gpt", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
KEYS = st.sampled_from(
    [
        "messages",
        "tools",
        "system",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "conversations",
        "text",
        "label",
    ]
)


@given(st.dictionaries(KEYS, VALUE, max_size=5), st.sampled_from(list(FORMS)))
@settings(max_examples=200)
def test_any_row_is_an_example_or_problems(value: dict[str, Any], form: str) -> None:
    made = to_example(RawRow("f", 1, value), form, system=None if form == "text" else "s", group_by="label")
    if isinstance(made, Example):
        assert made.input_hash and made.content_hash  # hashable means JSON
        json.dumps([made.messages, made.tools, made.meta], allow_nan=False)
        assert made.text is not None or made.messages[-1]["role"] == "assistant"
    else:
        assert made and all(isinstance(problem, Problem) and problem.what for problem in made)


def test_rows_of_no_known_form_are_told_how_to_name_their_columns() -> None:
    with pytest.raises(InputError, match="no known form") as caught:
        detect_form([{"question": "q", "intent": "a", "customer": 1}])
    (problem,) = caught.value.problems
    assert "data.columns: {prompt: question, completion: intent}" in problem.fix
    assert "\n" not in problem.expected and all(f"{name}: " in problem.expected for name in FORMS)
