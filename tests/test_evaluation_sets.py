"""Built-in sets: same bytes everywhere, right answers, no repeats. User files: every problem with its line."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest

from tunegate.errors import InputError
from tunegate.evaluation.builtin import BUILT_IN, DOMAINS, build_set
from tunegate.evaluation.builtin.draw import Draw
from tunegate.evaluation.checks import check_problems, score_answer
from tunegate.evaluation.metrics_text import last_number
from tunegate.evaluation.sets import load_sets, read_set

# Taken once with Python 3.11; a changed hash means changed items, and then VERSION must be raised.
HASHES = {
    "reasoning": "b3:0bce0abfe7889ac673c16141929cb919e22a348ca3a15a826346eeee9c2b1968",
    "math": "b3:4727ff6b9c337fca9acb88affbd77b054d8cd1311c16a46747d5a8677a4f425f",
    "code": "b3:751cecbff27da327c428c551ceaab99cb0a7c986e7e42dba5cb1f345e0f85c25",
    "language": "b3:f473759a36bf424b72dc69705513210d530b4c0cbd90d04cef712440bf46f031",
    "instructions": "b3:d45209908cfa7e8433ea9cd21b7b71fc71a720e4de07c0eca5a04863aa3a0cc8",
    "formats": "b3:b36bad63cbb3d3fc7cee361cf395253db5db5f8dff9800aeb6f8d082e21bbb0c",
    "code_run": "b3:abe291a6a258e8a950fc5b63b06e3dd42215513ae3533f8664b963a07077c6cc",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_items_are_the_same_everywhere(name: str) -> None:
    assert build_set(name).hash == HASHES[name]
    assert build_set(name).hash == build_set(name).hash
    assert build_set(name, seed=1).hash != build_set(name).hash or name == "code_run"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_reference_passes_its_own_check(name: str) -> None:
    for item in build_set(name).items:
        assert check_problems(item.check, item.references) == [], item.name
        assert item.references, item.name
        if item.check.kind == "likelihood":
            assert item.references[0] in item.check.options["choices"]
        elif item.check.kind != "python":
            assert all(score_answer(item.check, r, item.references) == 1.0 for r in item.references), item.name


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_large_and_varied(name: str) -> None:
    items = build_set(name).items
    assert 60 <= len(items) <= 100
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == len(items)
    assert len({item.tags for item in items}) >= 8
    commonest = max([r for item in items for r in item.references].count(i.references[0]) for i in items)
    assert commonest <= len(items) / 5, "one answer for everything would score too much"


def test_no_constant_answer_solves_a_domain() -> None:
    for name in DOMAINS:
        items = [item for item in build_set(name).items if item.check.kind not in ("likelihood", "python")]
        for answer in ("", "Yes", "1", "I do not know.", items[0].references[0]):
            score = sum(score_answer(item.check, answer, item.references) for item in items) / len(items)
            assert score <= 0.25, (name, answer, score)


def test_a_prompt_does_not_solve_itself() -> None:
    """Repeating the question passes few items: only where the answer's words must stand in it anyway."""
    for name in DOMAINS:
        items = [item for item in build_set(name).items if item.check.kind not in ("likelihood", "python")]
        solved = [item.name for item in items if score_answer(item.check, item.prompt, item.references)]
        assert len(solved) <= len(items) / 3, (name, solved)


def test_the_printed_values_are_those_that_python_prints() -> None:
    """An oracle for the code domain: the shown code is run here."""
    tried = 0
    for item in build_set("code").items:
        if item.check.kind == "likelihood":
            continue
        code = item.prompt.split("```python\n")[1].split("\n```")[0]
        if "print(" not in code:
            code = f"print(repr({code}))"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        assert score_answer(item.check, out.getvalue().strip(), item.references) == 1.0, item.name
        tried += 1
    assert tried >= 60


def test_sums_are_right() -> None:
    """An oracle for plain arithmetic: the expression in the question is evaluated here."""
    tried = 0
    for item in build_set("math").items:
        text = item.prompt.split("?")[0].removeprefix("What is ").replace(" x ", " * ").replace(" times ", " * ")
        with contextlib.suppress(SyntaxError, ValueError):
            if all(
                isinstance(node, (ast.Expression, ast.BinOp, ast.Constant, ast.operator))
                for node in ast.walk(ast.parse(text, mode="eval"))
            ):
                assert eval(text) == last_number(item.references[0]), item.name
                tried += 1
    assert tried >= 15


def test_draws_do_not_depend_on_the_library_beyond_random() -> None:
    draw = Draw("a seed")
    assert [draw.below(1000) for _ in range(5)] == [397, 37, 765, 400, 873]
    assert sorted(Draw("x").shuffled(range(9))) == list(range(9))
    assert all(2 <= Draw(str(n)).between(2, 4) <= 4 for n in range(50))


# --- user files --------------------------------------------------------------------------------------------------


def write(folder: Path, *rows: object) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "own.jsonl").write_text(text, encoding="utf-8")
    return "own.jsonl"


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {"prompt": "2+2?", "answer": 4, "check": "number", "category": "sums", "id": "a"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answers": ["x", "y"]},
        {"prompt": "p", "check": {"kind": "constraints", "rules": [{"rule": "words", "max": 2}]}, "tags": ["t"]},
        {"prompt": "f", "answer": "[1]", "answer_type": "python_literal", "subset": "s", "max_new_tokens": 5},
    )
    one = read_set(name, base_dir=tmp_path)
    assert [i.id for i in one.items] == ["a", "2", "3", "4"]
    assert [i.check.kind for i in one.items] == ["number", "normalised", "constraints", "literal"]
    assert [i.category for i in one.items] == ["sums", "own", "own", "own"]
    assert one.items[0].references == ("4",)
    assert one.items[1].messages[0]["role"] == "system"
    assert one.items[1].references == ("x", "y")
    assert one.items[3].max_new_tokens == 5
    assert one.items[0].name == "own/a"
    assert [s.name for s in load_sets(["math", name], base_dir=tmp_path)] == ["math", "own"]


def test_the_hash_covers_what_is_scored(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "a", "id": "1"}
    hashes = set()
    for change in ({}, {"prompt": "q"}, {"answer": "b"}, {"check": "exact"}, {"category": "c"}, {"max_new_tokens": 9}):
        hashes.add(read_set(write(tmp_path, {**row, **change}), base_dir=tmp_path).hash)
    assert len(hashes) == 6


def test_every_problem_of_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {"prompt": "ok", "answer": "a", "id": "1"},
        {"prompt": "", "answer": "a"},
        "{not json",
        {"prompt": "p", "answer": "a", "answers": ["a"]},
        {"prompt": "p", "answer": "none", "check": "number"},
        {"prompt": "p", "anwser": "a"},
        {"prompt": "p", "answer": "a", "id": "1"},
        {"messages": [{"role": "assistant", "content": "x"}], "answer": "a"},
        {"prompt": "p", "answer": "a", "max_new_tokens": 0},
        {"prompt": "p", "answer": "a", "check": 3},
    )
    with pytest.raises(InputError) as error:
        read_set(name, base_dir=tmp_path)
    told = "\n".join(str(p) for p in error.value.problems)
    for line, says in {
        2: "no question",
        3: "not valid JSON",
        4: "both answer and answers",
        5: "no number",
        6: "unknown field 'anwser'",
        7: "used before",
        8: "user's turn",
        9: "max_new_tokens",
        10: "check must be a name",
    }.items():
        assert any(p.where == f"own.jsonl:{line}" and says in p.what for p in error.value.problems), (line, told)
    assert not any(p.where == "own.jsonl:1" for p in error.value.problems)


def test_names_that_are_no_sets_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_sets(["maths", "none.jsonl", "lm_eval:arc_easy"], base_dir=tmp_path)
    assert len(error.value.problems) == 3
    assert "did you mean 'math'" in str(error.value)
    assert [s.name for s in load_sets(["regression"])] == list(DOMAINS)
    with pytest.raises(InputError, match="no built-in set"):
        build_set("mathematics")
