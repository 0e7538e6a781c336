"""``tunegate review`` on a run of a tiny base: what it selects and refuses, and what the gate makes of the verdicts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reviews import Client, judge
from task import call, write_task
from tunegate.errors import InputError
from tunegate.files import read_json, read_jsonl, write_jsonl
from tunegate.pipeline.card import check_complete, load_card
from tunegate.pipeline.review import open_review
from tunegate.report.review import Review

RULES = """\
  rules:
    - review.accept >= 0.7
    - {rule: review.accept vs base > 0, required: false}
    - {rule: review.preferred >= 0.5, required: false}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The YAML of a task that was run once. Shared: ``copy`` it before changing anything."""
    path = write_task(tmp_path_factory.mktemp("reviewed"), tiny_llama)
    path.write_text(path.read_text(encoding="utf-8") + RULES, encoding="utf-8")
    said = call("run", path)
    assert said.code == 1, said.err  # inconclusive: nobody has looked
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.parent, tmp_path / "copy")) / finished.name


def run_of(path: Path) -> Path:
    (found,) = (path.parent / "runs" / "task").glob("run-*")
    return found


def rules(path: Path) -> dict[str, dict[str, Any]]:
    return {rule["rule"]: rule for rule in read_json(run_of(path) / "decision.json")["rules"]}


def judge_all(review: Review, reviewer: str, adapter: str, base: str) -> None:
    """The same verdict on every item; where both answers are one text, the adapter's on both."""
    for place, item in enumerate(review.items):
        judge(review, reviewer, place, adapter, adapter if item.base == item.adapter else base)
    review.finish(reviewer)


# --- the way to a decision -----------------------------------------------------------------------------------------


def test_a_decision_waits_for_people_and_the_card_gets_it(copy: Path) -> None:
    before = rules(copy)["review.accept >= 0.7"]
    assert before["verdict"] == "inconclusive" and "`tunegate review TASK` provides it" in before["reason"]
    assert load_card(run_of(copy) / "adapter").decision.verdict == "inconclusive"
    review = open_review(copy)
    judge(review, "anna", 0, "good", "bad")
    assert call("review", copy, "--export", copy.parent / "some.jsonl").code == 0
    assert call("gate", copy).code == 1 and rules(copy)["review.accept >= 0.7"] == before  # one item is no review

    judge_all(review, "anna", "good", "bad")
    said = call("gate", copy)
    assert said.code == 0, said.err
    after = rules(copy)["review.accept >= 0.7"]
    assert (after["verdict"], after["value"], after["n"]) == ("pass", 1.0, len(review.items))
    assert after["items"] == ["review/adapter.items.jsonl"]
    assert rules(copy)["review.accept vs base > 0"]["items"] == [f"review/{s}.items.jsonl" for s in ("adapter", "base")]
    assert rules(copy)["review.preferred >= 0.5"]["value"] is not None
    folder = run_of(copy) / "adapter"
    check_complete(folder)
    card = load_card(folder)
    assert card.decision.verdict == "ship" == read_json(run_of(copy) / "decision.json")["verdict"]
    assert [r.value for r in card.decision.rules if r.rule == "review.accept >= 0.7"] == [1.0]
    assert "Decision: **ship**" in (folder / "README.md").read_text(encoding="utf-8")
    stamps = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert call("gate", copy).code == 0 and call("run", copy).code == 0  # nothing more to do
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps


def test_people_who_do_not_accept_hold_it(copy: Path) -> None:
    judge_all(open_review(copy), "anna", "partly", "bad")
    assert call("gate", copy).code == 1
    rule = rules(copy)["review.accept >= 0.7"]
    assert (rule["verdict"], rule["value"]) == ("fail", 0.0) and "review/labels.jsonl" in rule["reason"]
    assert load_card(run_of(copy) / "adapter").decision.verdict == "hold"


def test_gate_writes_no_card_for_an_adapter_that_was_changed(copy: Path) -> None:
    judge_all(open_review(copy), "anna", "good", "bad")
    tensors = run_of(copy) / "adapter" / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    said = call("gate", copy)
    assert said.code == 2 and "changed after it was trained" in said.err
    assert load_card(run_of(copy) / "adapter").decision.verdict == "inconclusive"


def test_a_review_of_other_answers_decides_nothing(copy: Path) -> None:
    judge_all(open_review(copy), "anna", "good", "bad")
    items = run_of(copy) / "test" / "adapter.items.jsonl"
    rows = read_jsonl(items)
    rows[0]["prediction"] = "another answer"
    write_jsonl(items, rows)
    for command in (["gate", copy], ["review", copy, "--export", copy.parent / "x.jsonl"]):
        said = call(*command)
        assert said.code == 2 and "no longer those that were selected for review" in said.err
    shutil.rmtree(run_of(copy) / "review")
    assert call("gate", copy).code == 1 and rules(copy)["review.accept >= 0.7"]["verdict"] == "inconclusive"


# --- the selection -------------------------------------------------------------------------------------------------


def test_items_are_the_runs_answers_with_their_prompts(copy: Path) -> None:
    run = run_of(copy)
    review = open_review(copy, 6)
    rows = {
        subject: {r["row_id"]: r for r in read_jsonl(run / "test" / f"{subject}.items.jsonl")}
        for subject in ("base", "adapter")
    }
    texts = [json.loads(line) for line in (copy.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(review.items) == 6 and review.of == len(rows["base"])
    for item in review.items:
        line = int(item.row_id.rsplit(":")[-1])
        assert item.prompt[-1]["content"] == texts[line - 1]["prompt"]
        assert item.reference == item.kind == texts[line - 1]["completion"]
        assert (item.base, item.adapter) == tuple(rows[s][item.row_id]["prediction"] for s in ("base", "adapter"))
        assert item.adapter_score == rows["adapter"][item.row_id]["scores"]["accuracy"]


def test_the_same_run_gives_the_same_items_and_each_way_leads_to_it(copy: Path, finished: Path) -> None:
    first = open_review(copy, 6)
    assert open_review(copy) == open_review(copy.parent / "runs" / "task") == open_review(run_of(copy)) == first
    shutil.rmtree(first.folder)
    again = open_review(Path(os.path.relpath(run_of(copy))), 6)  # the run's folder alone, and the data beside it
    assert again.items == first.items and again.key != first.key
    assert open_review(copy, 6, 1).items != first.items  # nobody has judged yet: another selection
    judge(open_review(copy), "anna", 0, "good", "bad")
    with pytest.raises(InputError, match="other settings") as found:
        open_review(copy, 6, 2)
    assert "--items 6 --seed 1" in found.value.problems[0].expected


def test_a_review_that_was_begun_needs_no_data(copy: Path) -> None:
    first = open_review(copy)
    (copy.parent / "rows.jsonl").unlink()
    assert open_review(copy) == first


def test_rows_that_changed_are_seen(copy: Path) -> None:
    path = copy.parent / "rows.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("question", "problem"), encoding="utf-8")
    with pytest.raises(InputError, match="not those that the run answered"):
        open_review(copy)
    path.unlink()
    with pytest.raises(InputError, match="data cannot be read"):
        open_review(copy)


def test_a_run_in_another_place_remembers_where_its_data_lie(copy: Path, tmp_path: Path) -> None:
    run = run_of(copy)
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    assert call("review", moved, "--export", tmp_path / "labels.jsonl").code == 0


@pytest.mark.parametrize("place", ["missing", "moved", "untested"])
def test_where_there_is_nothing_to_review(copy: Path, tmp_path: Path, place: str) -> None:
    run = run_of(copy)
    if place == "missing":
        path, says = tmp_path / "nowhere", "no such folder"
    elif place == "moved":
        path, says = Path(shutil.move(run, tmp_path / "elsewhere")), "tunegate review TASK"
        begun = {**read_json(path / "run.json"), "folder": str(tmp_path / "gone")}
        (path / "run.json").write_text(json.dumps(begun), encoding="utf-8")
    else:
        (run / "test" / "step.json").unlink()
        path, says = copy, "no tested run"
    said = call("review", path, "--export", tmp_path / "labels.jsonl")
    assert said.code == 2 and says in said.err and not (tmp_path / "labels.jsonl").exists()


# --- the command ---------------------------------------------------------------------------------------------------


def test_export_writes_the_labels_and_says_what_they_come_to(copy: Path, tmp_path: Path) -> None:
    review = open_review(copy, 5)
    judge_all(review, "anna", "good", "bad")
    judge(review, "ben", 0, "bad", "bad")
    said = call("review", copy, "--export", tmp_path / "labels.jsonl", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["reviewers"] == {"anna": {"judged": 5, "finished": True}, "ben": {"judged": 1, "finished": False}}
    assert found["summary"]["accept"]["adapter"]["value"] == 1.0
    assert read_jsonl(tmp_path / "labels.jsonl") == read_jsonl(review.folder / "labels.jsonl")
    assert len(read_jsonl(tmp_path / "labels.jsonl")) == 6
    text = call("review", copy, "--export", tmp_path / "labels.jsonl").out
    assert "anna: 5 of 5 judged, finished" in text and "tunegate gate" in text


@pytest.mark.parametrize(
    "flags", [["--items", "0"], ["--items", "x"], ["--port", "70000"], ["--seed", "-1"], ["--reviewer", "\t"]]
)
def test_wrong_flags(copy: Path, flags: list[str]) -> None:
    assert call("review", copy, "--no-browser", *flags).code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process")
def test_the_page_from_the_command_line(copy: Path) -> None:
    """A link on standard error, a page behind it, Ctrl-C, and one object on standard output."""
    command = [
        sys.executable,
        "-m",
        "tunegate.cli",
        "review",
        str(copy),
        "--items",
        "2",
        "--no-browser",
        "--reviewer",
        "Zoë",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        link = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/\?reviewer=(\S+)", process.stderr.readline())
        assert link is not None
        client = Client(int(link[1]), link[2])
        state = client.state(link[3])
        assert state["reviewer"] == "Zoë" and len(state["items"]) == 2
        assert client.click("Zoë", 1, {"left": "good", "right": None, "preferred": None, "note": ""}) in (200, 422)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(out)["summary"] is None and out.count("\n") == 1
