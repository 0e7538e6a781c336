"""The report: each finding appears for the fault it names, and not without it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tunegate.data.check import CheckReport, Finding, check_examples, looks_like_labels
from tunegate.data.forms import load_examples
from tunegate.data.types import Example
from tunegate.files import write_jsonl


def row(text: str, answer: str, line: int, source: str = "train", group: str | None = None) -> Example:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
    return Example(source, line, messages=messages, group=group)


def data(n: int, source: str = "train", labels: tuple[str, ...] = ("yes", "no"), seed: int = 0) -> list[Example]:
    """``n`` rows of random letters with labels in turn: nothing to find."""
    rng = random.Random(f"{source}{seed}")
    texts = [" ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(6)) for _ in range(n)]
    return [row(text, labels[i % len(labels)], i + 1, source) for i, text in enumerate(texts)]


def found(report: CheckReport) -> dict[str, Finding]:
    assert len({finding.code for finding in report.findings}) == len(report.findings)
    return {finding.code: finding for finding in report.findings}


def test_clean_data_has_no_findings() -> None:
    report = check_examples({"train": data(500), "valid": data(60, "valid"), "test": data(60, "test")})
    assert report.findings == [] and report.ok
    assert report.stats["rows"] == {"train": 500, "valid": 60, "test": 60}
    assert report.stats["labels"]["train"] == {"yes": 250, "no": 250}
    assert report.stats["majority"] == {"label": "yes", "share": 0.5}
    assert report.stats["leaks"]["test in train"] == {"exact": 0, "near": 0}


def test_report_takes_findings_and_becomes_json() -> None:
    report = CheckReport()
    report.add(Finding("note", "n", "a note"))
    assert report.ok
    report.add(Finding("error", "e", "an error", 2, ["f:1", "f:2"]))
    assert not report.ok
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == {
        "ok": False,
        "findings": [
            {"level": "note", "code": "n", "message": "a note", "count": 0, "examples": []},
            {"level": "error", "code": "e", "message": "an error", "count": 2, "examples": ["f:1", "f:2"]},
        ],
        "stats": {},
    }
    with pytest.raises(ValueError, match="unknown level"):
        Finding("fatal", "x", "x")


def test_size_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    few = found(check_examples({"train": data(499)}))["few_rows"]
    assert few.level == "warning" and few.count == 499 and "try prompts first" in few.message
    monkeypatch.setattr("tunegate.data.check.MOST", 500)
    assert found(check_examples({"train": data(501)}))["many_rows"].level == "note"
    assert "many_rows" not in found(check_examples({"train": data(500)}))
    assert found(check_examples({"train": data(500), "test": []}))["empty_split"].message == "the test split is empty"
    assert {"few_rows", "empty_split"} <= set(found(check_examples({"train": []})))
    assert check_examples({}).findings == []


def test_bad_rows_stop_or_warn(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    bad = [{"prompt": "q", "completion": ""}, {"prompt": "q"}, {"prompt": "q", "completion": " "}]
    write_jsonl(tmp_path / "a.jsonl", [good, *bad])
    stopped = load_examples(["a.jsonl"], base_dir=tmp_path)
    report = check_examples({"train": stopped.examples}, [stopped])
    finding = found(report)["bad_rows"]
    assert not report.ok and finding.level == "error" and finding.count == 3
    assert "on_bad_row: skip" in finding.message and finding.examples[0].startswith("a.jsonl:2: the answer is empty")
    assert report.stats["problems"] == {"the answer is empty": 2, "completion is missing": 1}
    assert report.stats["read"] == {"rows": 4, "bad_rows": 3, "form": "prompt_completion"}
    assert report.stats["files"] == stopped.files
    skipped = load_examples(["a.jsonl"], base_dir=tmp_path, on_bad_row="skip")
    report = check_examples({"train": skipped.examples}, [skipped])
    assert report.ok and found(report)["bad_rows"].level == "warning"


def test_problems_of_one_kind_count_together(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}] * i + [{"role": "boss", "content": "a"}]} for i in (1, 2, 3)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_examples(["a.jsonl"], base_dir=tmp_path)
    assert check_examples({}, [loaded]).stats["problems"] == {"unknown role in message N of messages": 3}


def test_duplicates_and_leaks_are_found_and_named() -> None:
    train, test = data(500), data(60, "test")
    train.append(row(train[0].messages[0]["content"].upper(), train[0].answer, 501))
    train.append(row(train[1].messages[0]["content"] + "s", train[1].answer, 502))
    test.append(row(train[2].messages[0]["content"], train[2].answer, 61, "test"))
    test.append(row(train[3].messages[0]["content"] + "s", train[3].answer, 62, "test"))
    report = check_examples({"train": train, "test": test})
    findings = found(report)
    assert set(findings) == {"duplicates_exact", "duplicates_near", "leak_exact", "leak_near"}
    assert findings["duplicates_exact"].examples == ["train:1 = train:501"]
    assert findings["duplicates_near"].examples[0].startswith("train:2 ~ train:502")
    assert findings["leak_exact"].examples == ["test:61 = train:3"]
    assert findings["leak_near"].examples[0].startswith("test:62 ~ train:4")
    assert "1 of 62 test inputs are also in train" in findings["leak_exact"].message
    assert report.ok  # warnings: the gate decides, not the check


def test_a_leak_between_valid_and_test_is_found() -> None:
    valid = data(50, "valid")
    test = [*data(50, "test"), row(valid[0].messages[0]["content"], "yes", 51, "test")]
    report = check_examples({"train": data(500), "valid": valid, "test": test})
    assert report.stats["leaks"]["test in valid"]["exact"] == 1
    assert found(report)["leak_exact"].examples == ["test:51 = valid:1"]


def test_groups_over_splits() -> None:
    train = [*data(500), row("some unlike text", "yes", 501, group="g")]
    test = [*data(50, "test"), row("words without likeness", "no", 51, "test", group="g")]
    finding = found(check_examples({"train": train, "test": test}))["group_leak"]
    assert finding.count == 1 and finding.examples == ["'g' in test, train"]


def test_conflicts_name_both_answers_and_rows() -> None:
    train = data(500)
    test = [row(train[0].messages[0]["content"], "no", 1, "test"), *data(50, "test")[1:]]
    finding = found(check_examples({"train": train, "test": test}))["conflicts"]
    assert finding.count == 1
    assert "'yes' (train:1)" in finding.examples[0] and "'no' (test:1)" in finding.examples[0]


def test_label_findings() -> None:
    train = data(490, labels=("a",)) + [row(f"rare {i} {chr(97 + i) * 9}", "b", 490 + i) for i in range(3)]
    train += [row(f"other {i} {chr(97 + i) * 9}", "card_lost", 500 + i) for i in range(7)]
    test = data(30, "test", labels=("a", "new"))
    test.append(row("something quite unlike", "Card lost", 31, "test"))
    findings = found(check_examples({"train": train, "test": test}))
    assert "98% of the training rows" in findings["imbalance"].message
    assert findings["rare_labels"].examples == ["'b': 3"]
    assert findings["unseen_labels"].count == 2 and "'new': 15 rows" in findings["unseen_labels"].examples
    assert findings["label_spelling"].examples == ["'Card lost' / 'card_lost'"]
    assert "one_label" in found(check_examples({"train": data(500, labels=("a",))}))


def test_free_text_is_not_taken_for_labels() -> None:
    train = data(500, labels=tuple(f"answer number {i}" for i in range(400)))
    test = data(50, "test", labels=tuple(f"unseen {i}" for i in range(50)))
    report = check_examples({"train": train, "test": test})
    assert "labels" not in report.stats and "unseen_labels" not in found(report)
    texts = [Example("train", i, text=f"{e.messages[0]['content']}") for i, e in enumerate(train)]
    assert check_examples({"train": texts}).findings == []


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["a", "b"] * 2, True),
        (["a", "b", "c"], False),
        ([str(i) for i in range(201)] * 10, True),
        ([str(i) for i in range(201)] * 9, False),
        (["x" * 65] * 50, False),
        (["two\nlines"] * 50, False),
        (["", "a"] * 50, False),
        ([], False),
    ],
)
def test_looks_like_labels(answers: list[str], expected: bool) -> None:
    from collections import Counter

    assert (bool(answers) and looks_like_labels(Counter(answers))) is expected
