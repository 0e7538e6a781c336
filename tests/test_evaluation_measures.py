"""Measures of a run: values read from items files, matched by row, and everything that can be wrong with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunegate.errors import InputError
from tunegate.evaluation.measures import FILE, SCHEMA, Measure, Source, load_measures, save_measures
from tunegate.files import write_json, write_jsonl


def items(run: Path, name: str, values: list[Any], **fields: list[Any]) -> str:
    rows = [{"row_id": f"r{i}", "scores": {"f1.macro": v}} for i, v in enumerate(values)]
    for key, column in fields.items():
        for row, value in zip(rows, column, strict=True):
            row[key] = value
    write_jsonl(run / name, rows)
    return name


def wrong(run: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_measures(run)
    return [str(problem) for problem in caught.value.problems]


def test_values_come_from_the_items_in_their_order(tmp_path: Path) -> None:
    mine = items(tmp_path, "regression/adapter.items.jsonl", [1, 0, True], domain=["math", "code", "math"])
    rows = [{"row_id": f"r{i}", "domain": d, "scores": {"f1.macro": v}} for i, d, v in
            ((2, "math", 0), (1, "code", 1), (0, "math", 1))]  # fmt: skip
    write_jsonl(tmp_path / "regression/base.items.jsonl", rows)
    source = Source("proportion", mine, "scores.f1.macro", where={"domain": "math"},
                    references={"base": "regression/base.items.jsonl"})  # fmt: skip
    save_measures(tmp_path / "regression", {"regression.math": source})
    found = load_measures(tmp_path)["regression.math"]
    assert found.values is not None and found.values.tolist() == [1.0, 1.0]
    assert found.references["base"].tolist() == [1.0, 0.0]  # matched by row_id, not by line
    assert found.items == {"": mine, "base": "regression/base.items.jsonl"}
    assert (found.n, found.estimate, found.kind) == (2, 1.0, "proportion")


def test_repeats_of_an_item_count_once(tmp_path: Path) -> None:
    name = items(tmp_path, "safety/a.jsonl", [1, 0, 1, 1], prompt=["p", "p", "q", "q"])
    save_measures(
        tmp_path / "safety", {"safety.bypass_rate": Source("proportion", name, "scores.f1.macro", group="prompt")}
    )
    found = load_measures(tmp_path)["safety.bypass_rate"]
    assert found.values is not None and found.values.tolist() == [0.5, 1.0]
    assert found.kind == "mean"


def test_other_kinds(tmp_path: Path) -> None:
    name = items(tmp_path, "judge/a.jsonl", [2, 3], size=[4, 6])
    other = items(tmp_path, "judge/b.jsonl", [1, 0, 0])
    save_measures(
        tmp_path / "judge",
        {
            "judge.mean": Source("mean", name, "scores.f1.macro", limits=[1.0, 5.0]),
            "regression.nats": Source("mean", name, "scores.f1.macro", limits=[0.0, None]),
            "regression.share": Source("ratio", name, "scores.f1.macro", weights="size"),
            "train.ngram_excess": Source("excess", name, "scores.f1.macro", others=other, limits=[0.0, 3.0]),
            "train.loss_gap": Source("scalar", "train/run.json", value=0.25),
        },
    )
    found = load_measures(tmp_path)
    assert found["judge.mean"].limits == (1.0, 5.0)
    assert found["regression.nats"].limits == (0.0, math.inf)
    assert found["regression.share"].estimate == 0.5
    assert found["train.ngram_excess"].estimate == pytest.approx(2.5 - 1 / 3)
    assert found["train.loss_gap"].estimate == 0.25 and found["train.loss_gap"].n is None


def test_items_that_do_not_fit(tmp_path: Path) -> None:
    good = items(tmp_path, "step/good.jsonl", [1, 0])
    three = items(tmp_path, "step/three.jsonl", [1, 0, 1])
    bad = {
        "regression.other": Source("mean", good, "scores.f1.macro", references={"base": three}),
        "regression.null": Source("mean", items(tmp_path, "step/null.jsonl", [1, None]), "scores.f1.macro"),
        "regression.text": Source("mean", items(tmp_path, "step/text.jsonl", ["1", 0]), "scores.f1.macro"),
        "regression.field": Source("mean", good, "scores.bleu"),
        "regression.empty": Source("mean", good, "scores.f1.macro", where={"domain": "x"}),
        "regression.scale": Source("mean", items(tmp_path, "step/scale.jsonl", [1, 2]), "scores.f1.macro"),
        "regression.half": Source("proportion", items(tmp_path, "step/half.jsonl", [1, 0.5]), "scores.f1.macro"),
        "regression.away": Source("mean", "../../etc/passwd", "scores.f1.macro"),
        "regression.gone": Source("mean", "step/gone.jsonl", "scores.f1.macro"),
        "regression.kind": Source("median", good, "scores.f1.macro"),
        "regression.ratio": Source("ratio", good, "scores.f1.macro"),
        "regression.none": Source("scalar", good),
    }  # fmt: skip
    twice = tmp_path / "step/twice.jsonl"
    twice.write_text('{"row_id": "a", "v": 1}\n{"row_id": "a", "v": 0}\n', encoding="utf-8")
    bad["regression.twice"] = Source("mean", "step/twice.jsonl", "v")
    save_measures(tmp_path / "step", bad)
    told = wrong(tmp_path)
    expected = [
        "r2 is in one of them only", "no number in 'scores.f1.macro'", "no number", "no number in 'scores.bleu'",
        "no items to measure", "leave their scale", "of a proportion are 0 or 1", "outside the task's run folder",
        "cannot read the items", "unknown kind of measure", "needs the weights", "without a number",
        "a row_id of its own",
    ]  # fmt: skip
    assert len(told) == len(expected)
    for text, words in zip(told, expected, strict=True):
        assert words in text


def test_a_name_is_measured_once(tmp_path: Path) -> None:
    for step in ("one", "two"):
        name = items(tmp_path, f"{step}/a.jsonl", [1, 0])
        save_measures(tmp_path / step, {"regression.math": Source("mean", name, "scores.f1.macro")})
    [problem] = wrong(tmp_path)
    assert "regression.math is measured twice" in problem and "one" in problem


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"schema": "Measures/9", "measures": {}}, "Measures/9"),
        ([1], "not a file of measures"),
        ({"schema": SCHEMA, "measures": {"a.b": {"kind": "mean"}}}, "items"),
        ({"schema": SCHEMA, "measures": {"a.b": {"kind": "mean", "items": "x", "fields": "y"}}}, "fields"),
        ({"schema": SCHEMA, "measures": {"a.b": {"kind": "scalar", "items": "x", "value": "1"}}}, "value"),
        ({"schema": SCHEMA}, "measures.json"),
    ],
)
def test_files_of_another_shape(tmp_path: Path, content: Any, says: str) -> None:
    write_json(tmp_path / "step" / FILE, content)
    assert says in "\n".join(wrong(tmp_path))


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / FILE).write_text("{", encoding="utf-8")
    assert "cannot read the measures" in wrong(tmp_path)[0]


def test_a_run_without_measures(tmp_path: Path) -> None:
    assert load_measures(tmp_path) == {}


def test_written_measures_are_plain_json(tmp_path: Path) -> None:
    save_measures(tmp_path, {"judge.mean": Source("mean", "judge/a.jsonl", "score", limits=[1.0, 5.0])})
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    assert json.loads(text)["measures"]["judge.mean"]["limits"] == [1.0, 5.0]


def test_series_must_fit() -> None:
    with pytest.raises(InputError, match="do not fit"):
        Measure("mean", np.zeros(3), {"base": np.zeros(2)})
    with pytest.raises(InputError, match="not all finite"):
        Measure("mean", np.array([0.0, math.nan]))
    with pytest.raises(InputError, match="one value"):
        Measure("count", np.zeros(3))
