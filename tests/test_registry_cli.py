"""``tunegate registry`` as it is typed, and a run that goes into a registry, out of it again and is reproduced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from registry_folders import adapter_folder, fingerprint, peft_folder, run_folder
from task import Said, call, replace_line, write_task
from tiny import tiny_base
from tunegate.adapter.card import check_complete
from tunegate.files import hash_file, read_json
from tunegate.registry import tables
from tunegate.registry.opening import open_registry


def typed(folder: Path, *arguments: object) -> Said:
    return call("registry", *arguments, "--registry", folder / "registry", "--by", "ann")


def told(folder: Path, *arguments: object) -> dict[str, Any]:
    said = typed(folder, *arguments, "--json")
    assert said.code == 0, said.out + said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_the_whole_life_of_two_adapters(tmp_path: Path) -> None:
    one, two = run_folder(tmp_path / "runs", 1), run_folder(tmp_path / "runs", 2, ("red", "red"), verdict="hold")
    assert typed(tmp_path, "list").code == 2 and not (tmp_path / "registry").exists()
    assert told(tmp_path, "add", one)["ref"] == "support:1"
    assert told(tmp_path, "add", two)["ref"] == "support:2"
    assert told(tmp_path, "add", peft_folder(tmp_path / "p", 3), "--name", "found")["state"] == "unverified"
    assert typed(tmp_path, "promote", "support:1", "--to", "production", "--why", "good").code == 0
    refused = typed(tmp_path, "promote", "support:2", "--why", "good")
    assert refused.code == 2 and "the gate says hold" in refused.err
    assert typed(tmp_path, "promote", "support:2", "--why", "good", "--override", "they wait").code == 0
    listed = typed(tmp_path, "list")
    for part in ("support:1", "@production", "OVERRIDE:", "unverified"):
        assert part in listed.out
    shown = typed(tmp_path, "show", "support:2")
    for part in ("OVERRIDE: they wait", "min_score", "ann (good)", fingerprint(0).total):
        assert part in shown.out
    found = told(tmp_path, "diff", "support:1", "support:2")
    assert found["compared"] == 2 and len(found["items"]) == 1
    shown = typed(tmp_path, "diff", "support:1", "support:2").out
    assert "1 of 2 test items answered differently" in shown and "0 and 1" in shown
    shown = typed(tmp_path, "diff", "support:1", "found:1").out
    assert "data: not known of found:1" in shown and "items: not compared" in shown
    shown = typed(tmp_path, "lineage", "support:1").out
    assert "trained on" in shown and "adapter support:1" in shown
    assert len(told(tmp_path, "lineage", "support:1", "support:2")["way"]) == 2
    assert told(tmp_path, "alias", "support@canary", "support:2")["aliases"] == ["canary"]
    assert told(tmp_path, "verify")["ok"] is True
    assert told(tmp_path, "gc")["objects"] == 0
    assert typed(tmp_path, "pull", "support@canary", "-o", tmp_path / "out").code == 0
    check_complete(tmp_path / "out")
    assert typed(tmp_path, "push", "support@production", tmp_path / "published").code == 0
    assert (tmp_path / "published" / "support" / "production.json").exists()
    assert typed(tmp_path, "retire", "support:2", "--why", "worse").code == 0
    assert [v["ref"] for v in told(tmp_path, "list", "support")["versions"]] == ["support:1"]
    assert len(told(tmp_path, "list", "support", "--all")["versions"]) == 2


def test_verify_says_which_byte_and_fails(tmp_path: Path) -> None:
    told(tmp_path, "add", adapter_folder(tmp_path / "a", 1))
    path = next(p for p in (tmp_path / "registry" / "blobs").rglob("*") if p.is_file())
    path.write_bytes(b"x" + path.read_bytes()[1:])
    said = typed(tmp_path, "verify")
    assert said.code == 1 and "support:1" in said.err and "changed" in said.err
    said = typed(tmp_path, "verify", "--json")
    assert said.code == 1 and json.loads(said.out)["ok"] is False


def test_bases(tmp_path: Path, tiny_llama: Path) -> None:
    told(tmp_path, "add", adapter_folder(tmp_path / "a", 1))
    new = told(tmp_path, "base", "add", tiny_llama, "--name", "llama")
    assert new["new"] and not told(tmp_path, "base", "add", tiny_llama, "--name", "llama")["new"]
    other = tiny_base(tmp_path / "other", "llama", seed=1)
    said = typed(tmp_path, "base", "add", other, "--name", "llama")
    assert said.code == 2 and "another base has this name" in said.err and ": --name NAME" in said.err
    flagged = told(tmp_path, "base", "supersede", "tiny", "llama", "--why", "a better one")["flagged"]
    assert [v["ref"] for v in flagged] == ["support:1"]
    again = ("--name", "llama-2", "--why", "again")
    assert told(tmp_path, "base", "supersede", tiny_llama, other, *again)["flagged"] == []
    listed = typed(tmp_path, "base", "list")
    assert "superseded by" in listed.out
    by = {b["base"]["name"]: b for b in told(tmp_path, "base", "list")["bases"]}
    assert by["tiny"]["superseded_by"] == new["fingerprint"] and by["llama-2"]["names"] == ["llama", "llama-2", "tiny"]
    said = typed(tmp_path, "pull", "support:1", "-o", tmp_path / "out")
    assert said.code == 2 and "a better one" in said.err and not (tmp_path / "out").exists()
    assert "INCOMPATIBLE" in typed(tmp_path, "list").out


def test_names_that_mean_nothing_are_told_with_what_there_is(tmp_path: Path) -> None:
    assert typed(tmp_path, "init").code == 0
    assert "no adapter yet" in typed(tmp_path, "list").out
    told(tmp_path, "add", adapter_folder(tmp_path / "a", 1))
    for arguments, says in (
        (("list", "suport"), ("no adapter has this name", "did you mean 'support'?")),
        (("show", "support"), ("which version of it?", "support:NUMBER", "support:1 (candidate)")),
        (("show", "tinny"), ("no such base or adapter", "did you mean 'tiny'?")),
        (("show", "support:2"), ("no such version", "support:1 (candidate)")),
        (("push", "support:1", "published"), ("not a place to publish to", "./published")),
    ):
        said = typed(tmp_path, *arguments)
        assert said.code == 2 and all(part in said.err for part in says), said.err
    assert typed(tmp_path, "retire", "support:1", "--why", "old").code == 0
    assert "--all" in typed(tmp_path, "list", "support").out and "support:1" in typed(tmp_path, "list", "--all").out


def test_a_clock_that_was_ahead_is_forgiven_with_a_reason(tmp_path: Path) -> None:
    told(tmp_path, "add", adapter_folder(tmp_path / "a", 1))
    said = typed(tmp_path, "clock", "--why", "to be sure")
    assert said.code == 2 and "nothing to go on from" in said.err
    late = "2999-01-01T00:00:00.000000+00:00"
    with open_registry(str(tmp_path / "registry")).database.writing() as connection:
        connection.execute(tables.events.update().values(at=late))
    said = typed(tmp_path, "promote", "support:1", "--why", "good")
    assert said.code == 1 and "the clock is behind" in said.err and "tunegate registry clock --why" in said.err
    for reason in ((), ("--why",), ("--why", " ")):
        said = typed(tmp_path, "clock", *reason)
        assert said.code == 2 and "--why" in said.err
    assert [e["what"] for e in told(tmp_path, "show", "support:1")["events"]] == ["added as candidate"]
    assert told(tmp_path, "clock", "--why", "the battery was empty") == {"ahead": late}
    assert typed(tmp_path, "promote", "support:1", "--why", "good").code == 0
    events = told(tmp_path, "show", "support:1")["events"]
    assert [(e["what"], e["why"]) for e in events] == [
        ("added as candidate", ""),
        (f"dated {late} by a clock that was ahead", "the battery was empty"),
        ("approved", "good"),
    ]
    assert events[0]["at"] == late > events[2]["at"] >= events[1]["at"]


# --- with a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The folder of a task that was run into ``registry`` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    task = write_task(folder, tiny_llama)
    task.write_text(task.read_text() + "registry: registry\n")
    said = call("run", task, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["version"] == "task:1"
    return folder


def test_a_run_adds_its_adapter_once(finished: Path) -> None:
    (version,) = told(finished, "list")["versions"]
    assert (version["ref"], version["state"], version["verdict"]) == ("task:1", "candidate", "ship")
    assert call("run", finished / "task.yaml").code == 0
    (again,) = told(finished, "list")["versions"]
    assert again == version
    kinds = {e["kind"] for e in told(finished, "lineage", "task:1")["entities"].values()}
    assert kinds == {"base", "dataset", "run", "eval", "decision", "adapter"}
    (adapter,) = (finished / "runs" / "task").glob("run-*/adapter")
    assert told(finished, "add", adapter)["new"] is False


def test_reproduced_to_the_byte(finished: Path, tmp_path: Path) -> None:
    found = told(finished, "reproduce", "task:1", "-o", tmp_path / "again")
    assert found["same"] is True and found["versions"] == {}
    assert all(then == now for then, now in found["scores"].values())
    (adapter,) = (finished / "runs" / "task").glob("run-*/adapter")
    name = "adapter_model.safetensors"
    assert hash_file(Path(found["adapter"]) / name) == hash_file(adapter / name)


def test_an_imported_adapter_is_evaluated_and_only_then_promoted(finished: Path, tmp_path: Path) -> None:
    """The trained adapter without its card, as if from elsewhere: the same scores, another version."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (adapter,) = (copy / "runs" / "task").glob("run-*/adapter")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, foreign / name)
    assert told(copy, "add", foreign, "--name", "found")["state"] == "unverified"
    assert typed(copy, "promote", "found:1", "--why", "x", "--override", "y").code == 2
    task = copy / "task.yaml"
    task.write_text(task.read_text().replace("registry: registry\n", "") + "output: elsewhere\n")
    found = told(copy, "evaluate", "found:1", task)
    assert found["version"] == "found:2" and found["decision"]["verdict"] == "ship"
    shown = told(copy, "show", "found:2")
    ours, theirs = told(copy, "show", "task:1")["body"]["card"], shown["body"]["card"]
    assert [e["scores"] for e in ours["evaluations"]] == [e["scores"] for e in theirs["evaluations"]]
    assert theirs["run"]["steps"] == 0 and ours["adapter"]["hash"] == theirs["adapter"]["hash"]
    assert theirs["config"]["train"]["rank"] == 8 and "imported" in theirs["origins"]["train.lr"]
    assert {e["role"] for e in told(copy, "lineage", "found:2", "found:1")["way"]} == {"evaluated from"}
    assert typed(copy, "promote", "found:2", "--why", "x").code == 0
    said = typed(copy, "reproduce", "found:2", "-o", tmp_path / "again")
    assert said.code == 2 and "imported" in said.err
    said = typed(copy, "evaluate", "found:2", task)
    assert said.code == 2 and "only an unverified" in said.err


def test_a_run_that_is_there_is_not_taken_for_the_new_one(finished: Path, tmp_path: Path) -> None:
    for out in (finished / "runs", finished):
        said = typed(finished, "reproduce", "task:1", "-o", out)
        assert said.code == 2 and "holds something else" in said.err


def test_what_cannot_be_reproduced(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    rows = copy / "rows.jsonl"
    rows.write_text(rows.read_text().replace("question 0:", "question zero:"))
    said = typed(finished, "reproduce", "task:1", "-o", tmp_path / "again", "--folder", copy)
    assert said.code == 2 and "the data has changed" in said.err and not (tmp_path / "again").exists()
    told(tmp_path, "add", peft_folder(tmp_path / "p", 3), "--name", "found")
    said = typed(tmp_path, "reproduce", "found:1", "-o", tmp_path / "again")
    assert said.code == 2 and "no card" in said.err


def test_merge_by_reference_and_not_on_a_flagged_base(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    registry = copy / "registry"
    assert typed(copy, "promote", "task:1", "--to", "production", "--why", "x").code == 0
    said = call("merge", "task@production", "-o", tmp_path / "merged", "--registry", registry)
    assert said.code == 0, said.err
    assert read_json(tmp_path / "merged" / "merge.json")["verified"] is True
    base = next(b for b in told(copy, "base", "list")["bases"])["base"]
    other = tiny_base(tmp_path / "other", "llama", seed=1)
    assert told(copy, "base", "supersede", base["id"], other, "--why", "new")["flagged"]
    (adapter,) = (copy / "runs" / "task").glob("run-*/adapter")
    for text in ("task@production", adapter):
        said = call("merge", text, "-o", tmp_path / "no", "--registry", registry)
        assert said.code == 2 and "superseded" in said.err
    assert not (tmp_path / "no").exists()
    # and a run on the old base is refused before it begins
    replace_line(copy / "task.yaml", "rank: 8", "rank: 4")
    said = call("run", copy / "task.yaml")
    assert said.code == 2 and "superseded" in said.err
    assert len(list((copy / "runs" / "task").glob("run-*"))) == 1


def test_a_registry_that_a_run_cannot_use_is_said_first(finished: Path, tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path / "t", tiny_llama)
    text = task.read_text()
    for where, says in (
        ("postgresql+psycopg://user:secret@127.0.0.1/x", "password"),
        ("nonsense://x", "not a registry"),
    ):
        task.write_text(f"{text}registry: {where}\n")
        said = call("run", task)
        assert said.code == 2 and says in said.err and "secret" not in said.err
    assert not (tmp_path / "t" / "runs").exists()
