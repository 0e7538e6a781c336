"""``tunegate run`` from the command line on a tiny base: what it leaves, what it does not do twice, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from task import call, replace_line, write_task
from tiny import tiny_base
from tunegate.adapter.files import load_adapter
from tunegate.files import hash_file, hash_json, read_json, read_jsonl
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.pipeline.card import load_card

TRAINS = "of 39,584 parameters"  # said before the first step


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The YAML of a task that was run once. Shared: ``copy`` it before changing anything."""
    task = write_task(tmp_path_factory.mktemp("finished"), tiny_llama)
    said = call("run", task)
    assert said.code == 0, said.err
    return task


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished task to work on."""
    return Path(shutil.copytree(finished.parent, tmp_path / "copy")) / finished.name


def runs(task: Path) -> list[Path]:
    return sorted((task.parent / "runs" / "task").glob("run-*"))


def baselines(task: Path) -> list[Path]:
    return sorted((task.parent / "runs" / "task").glob("baseline-*"))


def ledger(task: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(task.parent / "runs" / "task" / "ledger.json")
    return found


def adapter(task: Path) -> Path:
    (run,) = runs(task)
    return run / "adapter"


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_every_file_is_there_and_nothing_half_written(finished: Path) -> None:
    (run,) = runs(finished)
    names = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert {"run.json", "policy.json", "check.json", "decision.json", "train/run.json", "train/log.jsonl"} <= names
    assert {"test/base.json", "test/adapter.json", "test/base.items.jsonl", "test/adapter.items.jsonl"} <= names
    assert {p.name for p in (run / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "card.json", "README.md", "manifest.json",
    }  # fmt: skip
    assert {p.stem for p in baselines(finished)[0].glob("*.json")} == {"as_is", "brief", "step"}
    assert not list(finished.parent.rglob(".tmp-*"))


def test_the_card_says_what_went_in_and_what_came_out(finished: Path, tiny_llama: Path) -> None:
    from tunegate.model.fingerprint import fingerprint_base

    folder = adapter(finished)
    card = load_card(folder)
    assert card.base["fingerprint"]["total"] == fingerprint_base(tiny_llama).total
    assert card.base["parameters"] == sum(p.numel() for p in load_model(tiny_llama, dtype=torch.float32).parameters())
    assert card.data["files"] == {"rows.jsonl": hash_file(finished.parent / "rows.jsonl")}
    assert sum(card.data["rows"].values()) == 120
    assert card.config["train"]["alpha"] == 16.0
    assert card.origins["train.alpha"] == "default 2*rank"
    assert card.origins["train.lr"].startswith("task.yaml:")
    assert card.origins["task.labels"] == "default: the 3 answers in train"
    assert card.config["task"]["labels"] == ["blue", "green", "red"]
    assert set(card.origins) >= {"base.name", "train.rank", "gate.min_test_items"}
    subjects = [e.subject for e in card.evaluations]
    assert subjects[0] == "base"
    assert subjects[-1] == "adapter"
    assert [c.reference for c in card.comparisons] == [s for s in subjects if s != "adapter"]
    assert set(card.evaluations[0].scores) == {"accuracy", "likelihood"}
    assert card.decision.verdict == "ship"
    assert {"torch", "transformers", "tunegate", "python"} <= set(card.versions)
    assert [(o["run"], o["reason"]) for o in card.test_openings] == [(card.adapter["run"], None)]
    assert card.test_openings[0]["completed"]


def test_the_cards_golden_prompts_are_what_serving_will_send(finished: Path, tiny_llama: Path) -> None:
    golden = load_card(adapter(finished)).template["golden"]
    tokenizer = load_tokenizer(tiny_llama)
    assert len(golden) == 3
    for entry in golden:
        expected = tokenizer.apply_chat_template(entry["messages"], add_generation_prompt=True, return_dict=False)
        assert entry["ids"] == expected


def test_the_manifest_comes_last_and_its_hashes_are_right(finished: Path) -> None:
    folder = adapter(finished)
    manifest = read_json(folder / "manifest.json")
    others = [p for p in folder.iterdir() if p.name != "manifest.json"]
    assert manifest == {p.name: hash_file(p) for p in others}
    assert (folder / "manifest.json").stat().st_mtime_ns >= max(p.stat().st_mtime_ns for p in others)


def test_the_policy_was_stored_before_the_first_step(finished: Path) -> None:
    (run,) = runs(finished)
    assert (run / "policy.json").stat().st_mtime_ns < (run / "train" / "log.jsonl").stat().st_mtime_ns
    assert read_json(run / "policy.json")["hash"] == load_card(run / "adapter").decision.policy_hash


def test_peft_loads_the_adapter_with_equal_logits(finished: Path, tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[5, 17, 200, 33, 9]])
    ours = load_model(tiny_llama, dtype=torch.float32)
    plain = ours(ids).logits
    load_adapter(ours, adapter(finished))
    theirs = peft.PeftModel.from_pretrained(load_model(tiny_llama, dtype=torch.float32), adapter(finished)).eval()
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
        assert not torch.allclose(ours(ids).logits, plain, atol=1e-2)


def test_the_scores_are_those_of_the_items(finished: Path) -> None:
    (run,) = runs(finished)
    for evaluation in load_card(run / "adapter").evaluations:
        rows = read_jsonl(run / evaluation.items_path)
        right = [r["prediction"] == r["reference"] for r in rows]
        assert evaluation.score.n == len(rows) == load_card(run / "adapter").data["rows"]["test"]
        assert evaluation.score.value == pytest.approx(sum(right) / len(right))
        assert evaluation.stop_rate == sum(r["stopped"] for r in rows) / len(rows)


def test_the_best_step_is_scored_identically_when_reloaded(finished: Path) -> None:
    """The kept adapter's score in training is its score when loaded from its folder."""
    (run,) = runs(finished)
    record = read_json(run / "train" / "run.json")
    name = f"step-{record['best_step']:08d}.items.jsonl"
    during = {r["row_id"]: r["prediction"] for r in read_jsonl(run / "train" / "evaluations" / name)}
    said = call("eval", finished, "--json")
    again = json.loads(said.out)
    (items,) = (finished.parent / "runs" / "task").glob("eval-*/adapter-valid.items.jsonl")
    later = {r["row_id"]: r["prediction"] for r in read_jsonl(items)}
    assert during == {row_id: later[row_id] for row_id in during}
    if len(during) == len(later):
        assert again["scores"]["accuracy"]["value"] == record["best_score"]


def test_what_a_person_sees(finished: Path) -> None:
    said = call("run", finished)
    for text in ("base", "best prompt", "adapter", "ship", "min_gain_over_prompt", "next", str(adapter(finished))):
        assert text in said.out
    for text in ("rank=8 (task.yaml:", "alpha=16.0 (default 2*rank)", "plain defaults", "warning: ", "lr=0.02"):
        assert text in said.err
    assert "method=lora" not in said.err
    assert "  pass" in said.out
    assert "(12)" not in said.err


# --- what is not done twice --------------------------------------------------------------------------------------


def test_a_second_run_redoes_nothing_and_says_the_same(copy: Path) -> None:
    first = call("run", copy)
    before = stamps(copy.parent)
    second = call("run", copy)
    assert stamps(copy.parent) == before
    assert (second.code, second.out) == (first.code, first.out)
    assert TRAINS not in second.err
    assert "loading" not in second.err


def test_rows_added_to_another_file_change_nothing(copy: Path) -> None:
    (copy.parent / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    replace_line(copy, "base:", "# a comment\nbase:")
    call("run", copy)
    assert len(runs(copy)) == 1
    assert len(ledger(copy)) == 1


def test_another_learning_rate_is_another_run_with_the_same_baseline(copy: Path) -> None:
    before = stamps(baselines(copy)[0])
    said = call("run", copy, "--set", "train.lr=0.01")
    assert len(runs(copy)) == 2
    before_training, trains, _ = said.err.partition(TRAINS)
    assert trains
    assert "on valid" not in before_training
    assert stamps(baselines(copy)[0]) == before
    assert len(baselines(copy)) == 1
    assert [e["run"] for e in ledger(copy)] == [
        r.name.removeprefix("run-") for r in sorted(runs(copy), key=lambda r: r.stat().st_ctime)
    ]
    newest = copy.parent / "runs" / "task" / read_json(copy.parent / "runs" / "task" / "latest.json")["run"]
    assert len(load_card(newest / "adapter").test_openings) == 2
    assert "2 openings of this test set" in said.out


def test_another_policy_is_another_run(copy: Path) -> None:
    said = call("run", copy, "--set", "gate.min_score=0.999", "--set", "train.max_steps=1")
    assert len(runs(copy)) == 2
    assert said.code == 1
    assert "hold" in said.out
    assert "min_score" in said.out


def test_a_changed_metric_file_is_another_run(copy: Path) -> None:
    """Files are inputs by their content: a metric that scores otherwise makes the stored scores stale."""
    schema = copy.parent / "schema.json"
    for n, text in enumerate(('{"type": "string"}', '{"type": "object"}')):
        schema.write_text(text)
        extra = ["task.report=[json_schema]", "task.json_schema=schema.json", "train.max_steps=1"]
        call("run", copy, *(a for e in extra for a in ("--set", e)))
        assert len(runs(copy)) == 2 + n


def test_train_alone_then_run_goes_on_from_there(tmp_path: Path, tiny_llama: Path, finished: Path) -> None:
    task = write_task(tmp_path, tiny_llama)
    assert call("train", task).code == 0
    assert not (task.parent / "runs" / "task" / "ledger.json").exists()
    assert not (adapter(task) / "card.json").exists()
    said = call("run", task)
    assert said.code == 0
    assert TRAINS not in said.err
    tensors = "adapter_model.safetensors"
    assert (adapter(task) / tensors).read_bytes() == (adapter(finished) / tensors).read_bytes()


def test_a_removed_adapter_is_made_again_without_opening_the_test_set(copy: Path) -> None:
    before = (adapter(copy) / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(adapter(copy))
    assert call("run", copy).code == 0
    assert (adapter(copy) / "adapter_model.safetensors").read_bytes() == before
    assert len(ledger(copy)) == 1


# --- the gate ----------------------------------------------------------------------------------------------------


def test_gate_decides_again_without_scoring(copy: Path) -> None:
    before = stamps(copy.parent)
    said = call("gate", copy, "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert found["decision"]["verdict"] == "ship"
    assert stamps(copy.parent) == before
    assert said.err == ""


def test_gate_needs_a_tested_run_with_this_policy(copy: Path) -> None:
    said = call("gate", copy, "--set", "gate.min_score=0.1")
    assert said.code == 2
    assert "a policy counts only for runs that began with it" in said.err
    assert f"the newest run, {runs(copy)[0].name}, has gate.min_score=null (here 0.1)\n" in said.err
    assert len(runs(copy)) == 1


@pytest.mark.parametrize("edit", ["threshold", "hash", "damaged"])
def test_an_edited_policy_is_refused(copy: Path, edit: str) -> None:
    path = runs(copy)[0] / "policy.json"
    stored = read_json(path)
    if edit == "threshold":
        stored["policy"]["min_test_items"] = 1
    elif edit == "hash":
        stored["hash"] = hash_json("x")
    path.write_text("{" if edit == "damaged" else json.dumps(stored))
    for command in ("run", "gate"):
        said = call(command, copy)
        assert said.code == 1
        assert "the stored gate policy was changed" in said.err


# --- the test set ------------------------------------------------------------------------------------------------


def test_the_test_set_is_opened_once(copy: Path) -> None:
    shutil.rmtree(runs(copy)[0] / "test")
    said = call("run", copy)
    assert said.code == 2
    assert "already opened by this run" in said.err
    assert "--reopen-test" in said.err
    said = call("run", copy, "--reopen-test", "the folder was lost")
    assert said.code == 0
    assert "the folder was lost" in said.out
    assert [o["reason"] for o in load_card(adapter(copy)).test_openings] == [None, "the folder was lost"]
    assert all(e["completed"] for e in ledger(copy))


def test_reopening_a_finished_run_is_recorded(copy: Path) -> None:
    assert call("run", copy, "--reopen-test", "checking").code == 0
    assert [e["reason"] for e in ledger(copy)] == [None, "checking"]
    assert call("run", copy).code == 0
    assert len(ledger(copy)) == 2


def test_a_kill_between_the_scores_and_the_ledger_is_mended(copy: Path) -> None:
    path = copy.parent / "runs" / "task" / "ledger.json"
    (entry,) = ledger(copy)
    path.write_text(json.dumps([{**entry, "completed": None}]))
    assert call("run", copy).code == 0
    assert ledger(copy)[0]["completed"]
    assert call("run", copy, "--reopen-test", "why not").code == 0
    assert [e["reason"] for e in ledger(copy)] == [None, "why not"]


def test_eval_on_the_test_split_is_an_opening_too(copy: Path) -> None:
    said = call("eval", copy, "--split", "test")
    assert said.code == 2
    assert "already opened by this run" in said.err
    assert call("eval", copy, "--split", "test", "--reopen-test", "once more").code == 0
    assert [e["reason"] for e in ledger(copy)] == [None, "once more"]
    assert call("eval", copy, "--split", "test", "--plain-base").code == 0
    assert ledger(copy)[-1]["run"] == "base"
    assert call("eval", copy, "--split", "test", "--plain-base").code == 2


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_reason_is_words(copy: Path, reason: str) -> None:
    assert call("run", copy, "--reopen-test", reason).code == 2
    assert len(ledger(copy)) == 1


# --- adapters that do not fit ------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_by_fingerprint(copy: Path, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    change = ("--set", f"base={json.dumps(str(other))}")
    said = call("eval", copy, "--adapter", adapter(copy), *change)
    assert said.code == 2
    assert "trained on another base" in said.err
    assert "(weights differ)" in said.err
    said = call("eval", copy, "--adapter", adapter(copy), *change, "--allow-base-mismatch", "--json")
    assert said.code == 0
    assert json.loads(said.out)["settings"]["base_mismatch_allowed"] is True


def test_an_adapter_of_another_template_is_refused(copy: Path) -> None:
    said = call("eval", copy, "--adapter", adapter(copy), "--set", "base.template=plain")
    assert said.code == 2
    assert "golden prompt" in said.err


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "card.json"])
def test_a_tampered_adapter_is_refused(copy: Path, name: str) -> None:
    path = adapter(copy) / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    said = call("eval", copy)
    assert said.code == 2
    assert "changed since it was published" in said.err
    assert str(path) in said.err


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "card.json", "manifest.json"])
def test_an_incomplete_adapter_is_refused(copy: Path, name: str) -> None:
    (adapter(copy) / name).unlink()
    said = call("eval", copy, "--adapter", adapter(copy))
    assert said.code == 2
    assert "missing" in said.err or "no manifest" in said.err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"card.json": "b3:0"}'])
def test_a_manifest_that_leaves_files_out_is_refused(copy: Path, text: str) -> None:
    (adapter(copy) / "manifest.json").write_text(text)
    said = call("eval", copy)
    assert said.code == 2
    assert "manifest is damaged" in said.err


def test_a_run_does_not_test_an_adapter_that_was_changed_after_training(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter(copy) / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t * 1.5 for name, t in tensors.items()}, path, metadata={"format": "pt"})
    said = call("run", copy)
    assert said.code == 2
    assert "changed after it was trained" in said.err
    assert len(ledger(copy)) == 1


# --- exit codes and --json ---------------------------------------------------------------------------------------


def test_run_as_json_is_one_object(copy: Path) -> None:
    said = call("run", copy, "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert said.out.count("\n") == 1
    assert found["decision"]["verdict"] == "ship"
    assert set(found["baselines"]) == {"as_is", "brief"}
    assert [e["subject"] for e in found["evaluations"]][-1] == "adapter"
    assert found["adapter"] == str(adapter(copy))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["check", "TASK"], 0),
        (["eval", "TASK", "--plain-base"], 0),
        (["gate", "TASK"], 0),
        (["show", "TASK"], 0),
        (["show", "RUN"], 0),
        (["show", "nowhere"], 2),
        (["run", "TASK", "--set", "train.rank=0"], 2),
        (["check", "TASK", "--show", "2"], 0),
    ],
)
def test_json_is_one_object_and_nothing_else(copy: Path, arguments: list[str], code: int) -> None:
    put = {"TASK": str(copy), "RUN": str(runs(copy)[0])}
    said = call(*(put.get(a, a) for a in arguments), "--json")
    assert (said.code, said.err) == (code, "")
    assert said.out.count("\n") == 1
    found = json.loads(said.out)
    if code:
        assert found["exit_code"] == code
        assert {"what", "where", "expected", "got", "fix"} <= set(found["error"][0])


def test_a_held_adapter_is_exit_code_1(copy: Path) -> None:
    said = call("run", copy, "--set", "gate.min_score=0.9999", "--set", "train.max_steps=1", "--json")
    assert said.code == 1
    assert json.loads(said.out)["decision"]["verdict"] == "hold"


def test_a_held_run_names_the_items_of_the_rules_that_failed(copy: Path) -> None:
    said = call("run", copy, "--set", "gate.max_overfit_ratio=0.001", "--set", "train.max_steps=1")
    (line,) = [line for line in said.out.splitlines() if line.startswith("next ")]
    assert said.code == 1 and "max_overfit_ratio" in line and line.endswith("train/run.json")


def test_what_the_gate_will_hold_anyway_is_said_before_training(copy: Path) -> None:
    said = call("train", copy, "--set", "data.test=rows.jsonl", "--set", "train.max_steps=1")
    before = said.err.partition("loading")[0]
    assert re.search(r"the gate will hold this run, whatever it learns: max_leaked_test_rows \(\d+ rows\); ", before)
    assert "the gate will hold" not in call("train", copy, "--set", "train.max_steps=1").err


def test_an_interrupt_is_exit_code_130(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunegate.cli import commands

    def interrupted(*arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "gate", interrupted)
    said = call("gate", copy)
    assert said.code == 130
    assert "the same command goes on from there" in said.err
    assert json.loads(call("gate", copy, "--json").out)["exit_code"] == 130


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "tokens_per_batch"),
        (OSError(5, "Input/output error", "/some/file"), "/some/file: the system refuses: Input/output error"),
        (ZeroDivisionError("division by zero\nmore"), "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_happens_there_is_no_traceback(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    from tunegate.cli import commands

    def fails(*arguments: Any) -> int:
        raise error

    monkeypatch.setattr(commands, "gate", fails)
    said = call("gate", copy)
    assert (said.code, said.out) == (1, "")
    assert says in said.err
    assert "Traceback" not in said.err
    debug = call("gate", copy, "--debug")
    assert debug.code == 1
    assert "Traceback" in debug.err


# --- show, init, check -------------------------------------------------------------------------------------------


def test_show_a_task_a_run_and_an_adapter(finished: Path) -> None:
    task = call("show", finished)
    assert task.code == 0
    assert "default 2*rank" in task.out
    assert f"{runs(finished)[0].name}: ship" in task.out
    places = (adapter(finished), runs(finished)[0], runs(finished)[0].parent)
    shown = [call("show", place) for place in places]
    assert {s.code for s in shown} == {0}
    assert len({s.out for s in shown}) == 1
    assert "ship" in shown[0].out
    said = call("show", finished.parent)
    assert said.code == 2
    assert "nothing to show" in said.err


def test_init_writes_a_file_that_loads_and_does_not_overwrite(tmp_path: Path) -> None:
    from tunegate.config import Task, load_config

    path = tmp_path / "new" / "task.yaml"
    said = call("init", path, "--data", "rows: odd.jsonl", "--metric", "accuracy")
    assert said.code == 0
    config = load_config(path)
    assert (config.task.data.train, config.task.task.metric) == (("rows: odd.jsonl",), "accuracy")
    text = path.read_text()
    assert all(f"#   {name}:" in text for name in Task.model_fields["train"].annotation.model_fields)  # type: ignore[union-attr]
    assert all(f"\n# {name}:" in text for name in Task.model_fields)
    assert '#   schedule: "linear"   # linear | cosine | constant\n' in text
    said = call("init", path)
    assert said.code == 2
    assert "the file exists" in said.err
    assert path.read_text() == text


def test_check_a_task(finished: Path) -> None:
    said = call("check", finished)
    assert said.code == 0
    assert "rows     train 86, valid 22, test 12" in said.out
    assert "labels   3: " in said.out
    assert "tokens   median" in said.out
    assert "█" in said.out
    assert "no errors" in said.out


def test_check_data_files(tmp_path: Path) -> None:
    rows = [{"prompt": f"is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(40)]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps(r) + "\n" for r in [*rows, *rows[:3]]))
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n{"prompt": "c"}\n')
    said = call("check", good)
    assert said.code == 0
    assert "3 rows repeat another row, input and answer\n" in said.out
    said = call("check", good, bad)
    assert said.code == 2
    assert f"{bad}:2" in said.out
    assert f"{bad}:3" in said.out
    assert "the data has errors" in said.out
    said = call("check", tmp_path / "none.jsonl", tmp_path / "neither.jsonl")
    assert said.code == 2
    assert "none.jsonl" in said.err
    assert "neither.jsonl" in said.err


def test_check_shows_rows_as_tokens(finished: Path, tiny_llama: Path) -> None:
    said = call("check", finished, "--show", "2")
    assert said.code == 0
    assert said.out.count(" tokens, ") == 2
    assert "<|im_end|>│" in said.out
    alone = call("check", finished.parent / "rows.jsonl", "--base", tiny_llama, "--show", "1")
    assert alone.code == 0
    assert "rows.jsonl:1" in alone.out
    assert call("check", finished, "--show", "-1").code == 2


def test_check_finds_what_the_metric_cannot_score(copy: Path) -> None:
    said = call("check", copy, "--set", "task.labels=[red, green]")
    assert said.code == 2
    assert "the metric cannot be used" in said.out


def test_long_rows_can_be_cut(copy: Path) -> None:
    """``on_long_row`` is asked before long rows are an error."""
    longest = call("check", copy).out.split("longest ")[1].split(";")[0]
    short = ("--set", f"data.max_tokens={int(longest) - 1}", "--set", "train.max_steps=1")
    said = call("train", copy, *short)
    assert said.code == 2
    assert "on_long_row: truncate" in said.err
    said = call("train", copy, *short, "--set", "data.on_long_row=truncate")
    assert said.code == 0, said.err
