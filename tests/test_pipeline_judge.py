"""A judge in ``tunegate run`` and ``tunegate eval`` on a tiny base, against a real server on 127.0.0.1.

The server's judge knows the truth: 5 for the reference answer and 2 for any other, so that every measure has an oracle
in the stored answers of the test.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from judge_server import Server, serving
from task import call, replace_line, write_task
from tunegate.data.split import position
from tunegate.errors import InputError
from tunegate.evaluation.judge.agreement import weighted_kappa
from tunegate.evaluation.judge.results import read_labels
from tunegate.files import read_json, read_jsonl, write_jsonl
from tunegate.records import JudgeRecord, load

SECRET = "sk-of-the-judge-0815"
ITEMS = 10
TRAINS = " parameters ("  # of the line before the first step
RULES = """\
  rules:
    - judge.mean >= 1
    - {rule: judge.pass_rate vs base > 0, required: false}
    - {rule: judge.win_rate >= 0.5, required: false}
    - {rule: judge.alpha >= 0.9, required: false}
    - {rule: judge.kappa >= 0.4, required: false}
"""
SECTION = """\
judge:
  provider: url
  url: URL
  model: judge-1
  items: 10
  samples: 2
  pairs: base
  rubric: {criteria: {right: it is the colour of the fox}, pass_at: 4}
"""


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("TUNEGATE_JUDGE_KEY", SECRET)
        yield


def part(text: str, name: str) -> str:
    found = re.search(rf"(?:^|\n){name}:\n<<<(\w+)\n(.*?)\n\1>>>", text, re.DOTALL)
    assert found is not None, text
    return found[2]


def truth(body: dict[str, Any]) -> str:
    text = body["messages"][1]["content"]
    reference = part(text, "reference answer")
    if "answer B:" not in text:
        return json.dumps({"reasons": "as it is", "score": 5 if part(text, "answer") == reference else 2})
    right = [part(text, f"answer {side}") == reference for side in "AB"]
    return json.dumps({"reasons": "as they are", "better": "tie" if right[0] == right[1] else "AB"[right.index(True)]})


@pytest.fixture(scope="module")
def server(environment: None) -> Iterator[Server]:
    with serving(say=truth) as found:
        yield found


def task(folder: Path, base: Path, server: Server | None, section: str = SECTION, rules: str = RULES) -> Path:
    path = write_task(folder, base)
    url = json.dumps(server.url if server is not None else "http://127.0.0.1:9/v1")
    path.write_text(path.read_text(encoding="utf-8") + rules + section.replace("URL", url), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, server: Server) -> Path:
    """The YAML of a task that was run once. Shared: ``copy`` it before changing anything."""
    path = task(tmp_path_factory.mktemp("judged"), tiny_llama, server)
    said = call("run", path)
    assert said.code in (0, 1), said.err
    assert "judge judge-1: adapter" in said.err and "against base" in said.err
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.parent, tmp_path / "copy")) / finished.name


@pytest.fixture
def unjudged(copy: Path) -> Path:
    """The copy as it was before the judge was asked."""
    shutil.rmtree(root(copy) / "judge")
    shutil.rmtree(run_of(copy) / "judge")
    return copy


def root(path: Path) -> Path:
    return path.parent / "runs" / "task"


def run_of(path: Path) -> Path:
    (found,) = root(path).glob("run-*")
    return found


def replies(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(root(path) / "judge" / "replies.jsonl")


def rules(path: Path) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in read_json(run_of(path) / "decision.json")["rules"] if r["metric"]}


def right(path: Path, subject: str) -> dict[str, bool]:
    """What is right among the stored answers to the judged items, by row id."""
    rows = {row["row_id"]: row for row in read_jsonl(run_of(path) / "test" / f"{subject}.items.jsonl")}
    judged = [row["row_id"] for row in read_jsonl(run_of(path) / "judge" / "adapter.items.jsonl")]
    return {row_id: rows[row_id]["prediction"] == rows[row_id]["reference"] for row_id in judged}


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_scores_follow_the_stored_answers(finished: Path) -> None:
    record = load(run_of(finished) / "judge" / "judge.json", JudgeRecord)
    adapter, base = (list(right(finished, subject).values()) for subject in ("adapter", "base"))
    assert record.split == "test" and len(adapter) == ITEMS and any(adapter)
    for subject, oracle in (("adapter", adapter), ("base", base)):
        assert record.pass_rate[subject].value == sum(oracle) / ITEMS
        assert record.mean[subject].value == pytest.approx(2 + 3 * sum(oracle) / ITEMS)
    won = [0.5 + 0.5 * (a - b) for a, b in zip(adapter, base, strict=True)]
    assert record.win_rate is not None and record.win_rate.value == pytest.approx(sum(won) / ITEMS)
    assert (record.against, record.consistent, record.cost) == ("base", 1.0, None)
    assert record.comparisons["base"].wins == sum(a > b for a, b in zip(adapter, base, strict=True))
    assert all(item["score"] == 2 for item in record.worst if not right(finished, "adapter")[item["row_id"]])


def test_the_judged_items_do_not_depend_on_the_answers(finished: Path) -> None:
    from tunegate.config import load_config
    from tunegate.pipeline.reading import load_data

    tests = load_data(load_config(finished)).splits.test
    wanted = sorted(tests, key=lambda e: (position(e, "order"), e.content_hash))[:ITEMS]
    judged = [row["row_id"] for row in read_jsonl(run_of(finished) / "judge" / "adapter.items.jsonl")]
    assert judged == [e.row_id for e in wanted] and len(tests) > ITEMS


def test_rules_are_decided_from_the_items(finished: Path) -> None:
    found, adapter = rules(finished), right(finished, "adapter")
    assert found["judge.mean"]["verdict"] == "pass" and found["judge.mean"]["n"] == ITEMS
    gain = found["judge.pass_rate"]
    assert gain["value"] == pytest.approx((sum(adapter.values()) - sum(right(finished, "base").values())) / ITEMS)
    assert gain["items"] == ["judge/adapter.items.jsonl", "judge/base.items.jsonl"]
    assert found["judge.win_rate"]["items"] == ["judge/pairs.items.jsonl"]
    assert all((run_of(finished) / name).exists() for name in gain["items"])
    kappa = found["judge.kappa"]
    assert kappa["verdict"] == "inconclusive" and "`tunegate review TASK`" in kappa["reason"]


def test_every_question_is_asked_once_and_the_key_is_nowhere(finished: Path) -> None:
    lines = replies(finished)
    assert len({line["key"] for line in lines}) == len(lines)
    asked = {(line["row_id"], line["sample"], line.get("order")) for line in lines}
    pairs = [a for a in asked if a[2] is not None]
    stored = {s: read_jsonl(run_of(finished) / "test" / f"{s}.items.jsonl") for s in ("adapter", "base")}
    answers = {s: {row["row_id"]: row["prediction"] for row in rows} for s, rows in stored.items()}
    judged = {a[0] for a in asked}
    differ = [row for row in judged if answers["adapter"][row] != answers["base"][row]]
    assert len(judged) == ITEMS and len(pairs) == 4 * len(differ)
    for path in finished.parent.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_the_card_and_show_say_it(finished: Path) -> None:
    card = read_json(run_of(finished) / "adapter" / "card.json")
    assert card["config"]["judge"]["model"] == "judge-1" and card["origins"]["judge.samples"] == "task.yaml:35"
    (mean,) = [r for r in card["decision"]["rules"] if r["metric"] == "judge.mean"]
    assert mean["items"] == ["judge/adapter.items.jsonl"]
    assert "judge.mean >= 1: pass" in (run_of(finished) / "adapter" / "README.md").read_text(encoding="utf-8")
    said = call("show", run_of(finished))
    assert "judge.mean >= 1" in said.out
    assert "not judged: whether the base's general ability and refusals were kept" in said.out


# --- resuming ----------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(copy: Path, server: Server) -> None:
    before, decision = len(server.requests), read_json(run_of(copy) / "decision.json")
    assert call("run", copy).code in (0, 1)
    assert call("gate", copy).code in (0, 1)
    shutil.rmtree(run_of(copy) / "judge")  # the scores are made again from the replies
    assert call("run", copy).code in (0, 1)
    assert len(server.requests) == before and read_json(run_of(copy) / "decision.json") == decision


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_pays_nothing_twice(unjudged: Path, finished: Path, server: Server) -> None:
    def slowly(body: dict[str, Any]) -> str:
        time.sleep(0.05)
        return truth(body)

    before, server.say = len(server.requests), slowly
    try:
        command = [sys.executable, "-m", "tunegate.cli", "run", str(unjudged)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            deadline = time.monotonic() + 120
            while len(server.requests) < before + 12 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            child.kill()
    finally:
        server.say = truth
    time.sleep(0.2)  # what the server had not read yet
    kept, asked = len(replies(unjudged)), len(server.requests)
    assert child.returncode == -9 and 1 <= kept < len(replies(finished))
    assert call("run", unjudged).code in (0, 1)
    assert len(server.requests) - asked == len(replies(finished)) - kept
    for name in ("judge.json", "adapter.items.jsonl", "pairs.items.jsonl", "measures.json"):
        assert (run_of(unjudged) / "judge" / name).read_bytes() == (run_of(finished) / "judge" / name).read_bytes()


def test_the_budget_ends_the_run_and_a_larger_one_goes_on(unjudged: Path, finished: Path, server: Server) -> None:
    before, priced = len(server.requests), ["--set", "judge.price_in=1000", "--set", "judge.price_out=1000"]
    said = call("run", unjudged, *priced, "--set", "judge.budget=4")  # a reply of 120 tokens is $0.12
    assert said.code == 1 and "the judge's budget is used up" in said.err and "judge.budget" in said.err
    part_of_it = len(server.requests) - before
    assert 0 < part_of_it < len(replies(finished))
    assert 0.12 * part_of_it <= 4
    assert sum(line["cost"] for line in replies(unjudged)) == pytest.approx(0.12 * part_of_it)
    assert not (run_of(unjudged) / "judge" / "measures.json").exists()
    again = call("run", unjudged, *priced, "--set", "judge.budget=40")
    assert again.code in (0, 1) and TRAINS not in again.err, again.err
    assert len(server.requests) - before == len(replies(finished))
    record = load(run_of(unjudged) / "judge" / "judge.json", JudgeRecord)
    assert record.cost == pytest.approx(0.12 * len(replies(finished)))


def test_a_judge_that_decides_nothing_makes_no_new_run(tmp_path: Path, tiny_llama: Path, server: Server) -> None:
    path = write_task(tmp_path, tiny_llama)
    assert call("run", path).code in (0, 1)
    path.write_text(path.read_text(encoding="utf-8") + SECTION.replace("URL", server.url), encoding="utf-8")
    said = call("run", path)
    assert said.code in (0, 1) and TRAINS not in said.err and "judge judge-1: adapter" in said.err
    assert (run_of(path) / "judge" / "measures.json").exists()
    again = call("run", path, "--set", "judge.samples=1")  # asks nothing new, and judges anew
    assert again.code in (0, 1) and load(run_of(path) / "judge" / "judge.json", JudgeRecord).samples == 1


# --- people ------------------------------------------------------------------------------------------------------


def test_agreement_with_people(copy: Path, server: Server) -> None:
    judge = {s: right(copy, s) for s in ("adapter", "base")}
    labels = [
        {"row_id": row, "adapter": "partly" if n == 0 else "good" if judge["adapter"][row] else "bad",
         "base": "good" if judge["base"][row] else "bad", "preferred": "tie", "note": ""}
        for n, row in enumerate(judge["adapter"])
    ]  # fmt: skip
    labels.append({"row_id": "not judged", "adapter": "good", "base": None, "preferred": None, "note": "x"})
    (run_of(copy) / "review").mkdir()
    write_jsonl(run_of(copy) / "review" / "labels.jsonl", labels)
    before = len(server.requests)
    said = call("gate", copy)
    assert said.code in (0, 1) and len(server.requests) == before
    people = [{"good": 3, "partly": 2, "bad": 1}[label[s]] for s in judge for label in labels[:ITEMS]]
    mine = [3 if good else 1 for s in judge for good in judge[s].values()]  # 5 passes at 4; 2 is below 2.5
    kappa = rules(copy)["judge.kappa"]
    assert kappa["value"] == pytest.approx(weighted_kappa(mine, people, (1, 2, 3)))
    assert kappa["items"][-1] == "review/labels.jsonl" and kappa["verdict"] == "pass"
    assert f"judge and people: verdicts kappa {kappa['value']:.2f}" in call("run", copy).err


def test_labels_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"row_id": "a", "adapter": "good"}\n{"row_id": "b", "adapter": "great"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"labels\.jsonl:2: not a label"):
        read_labels(path)


# --- eval --judge ------------------------------------------------------------------------------------------------


def test_validation_answers_are_judged(copy: Path, server: Server) -> None:
    said = call("eval", copy, "--judge", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)["judge"]
    assert found["split"] == "valid" and set(found["mean"]) == {"adapter", "base"}
    asked = len(server.requests)
    table = call("eval", copy, "--judge")
    assert "mean of 5" in table.out and "pairs against base" in table.out and len(server.requests) == asked
    plain = json.loads(call("eval", copy, "--judge", "--plain-base", "--json").out)["judge"]
    assert plain["mean"] == {"base": found["mean"]["base"]} and len(server.requests) == asked
    assert len(read_json(root(copy) / "ledger.json")) == 1
    best = call("eval", copy, "--judge", "--set", "judge.pairs=best_prompt")
    assert best.code == 2


def test_the_test_split_is_read_and_not_opened(copy: Path, server: Server) -> None:
    before = len(server.requests)
    found = json.loads(call("eval", copy, "--judge", "--split", "test", "--json").out)["judge"]
    stored = read_json(run_of(copy) / "judge" / "judge.json")
    assert found["mean"] == stored["mean"] and len(server.requests) == before
    assert len(read_json(root(copy) / "ledger.json")) == 1
    other = call("eval", copy, "--judge", "--split", "test", "--plain-base")
    assert other.code == 2 and "the run's own test" in other.err


# --- what is wrong is said before training -----------------------------------------------------------------------


def refused(said: Any, *words: str) -> None:
    assert said.code == 2 and TRAINS not in said.err, said.err
    for word in words:
        assert word in said.err, said.err


def test_a_rule_without_a_judge(tmp_path: Path, tiny_llama: Path) -> None:
    path = task(tmp_path, tiny_llama, None, section="")
    refused(
        call("run", path), "gate.rules: judge.mean >= 1: no judge is named", "gate.rules: judge.kappa", "docs/judge.md"
    )
    assert not root(path).exists()
    refused(
        call("eval", write_task(tmp_path / "b", tiny_llama), "--judge", "--plain-base"), "--judge: no judge is named"
    )


def test_faults_of_the_section(tmp_path: Path, tiny_llama: Path) -> None:
    section = "judge: {provider: url, model: m, budget: 2, rubric: none.yaml}\n"
    path = task(tmp_path, tiny_llama, None, section)
    refused(
        call("run", path), "judge.url: the address of the server is missing", "a budget needs the model's prices",
        "no such rubric", "there are no pairs to win", "one sample cannot agree with itself",
    )  # fmt: skip
    checked = call("check", path)
    assert checked.code == 2 and "no such rubric" in checked.out
    (tmp_path / "none.yaml").write_text("criteria: {a: b}\npass_at: 9\n", encoding="utf-8")
    refused(call("run", path), "none.yaml:2: pass_at: wrong value")
    unknown = task(tmp_path / "c", tiny_llama, None, "judge: {provider: url, modle: m}\n")
    refused(call("run", unknown), "judge.modle", "'model'", "required key 'judge.model' is missing")


def test_a_key_that_is_missing(copy: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_line(copy, "  model: judge-1\n", "  model: judge-1\n  key_env: NO_SUCH_KEY\n")
    shutil.rmtree(run_of(copy))
    refused(call("run", copy), "environment: NO_SUCH_KEY: no key for the judge", "export NO_SUCH_KEY=")
    checked = call("check", copy)
    assert checked.code == 2 and "NO_SUCH_KEY" in checked.out
    monkeypatch.setenv("NO_SUCH_KEY", "there it is")
    assert call("check", copy).code == 0


def test_what_was_judged_needs_no_key(copy: Path) -> None:
    replace_line(copy, "  model: judge-1\n", "  model: judge-1\n  key_env: NO_SUCH_KEY\n")
    assert call("gate", copy).code in (0, 1)
    assert call("run", copy).code in (0, 1)


def test_a_task_without_answers(tmp_path: Path, tiny_llama: Path) -> None:
    path = task(tmp_path, tiny_llama, None, rules="")
    replace_line(path, "metric: accuracy", "metric: likelihood")
    refused(call("run", path), "judge: this task generates no answers to judge")
