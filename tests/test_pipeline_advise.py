"""``tunegate advise`` on a tiny base: what it measures, keeps and recommends, and that ``run`` takes its bar there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from judge_server import serving
from task import Said, call, replace_line, write_task
from tunegate.files import read_json, read_jsonl

COLOURS = {"red", "green", "blue"}
ITEMS = 12


def result(said: Said) -> dict[str, Any]:
    assert said.code == 0, said.err + said.out
    found: dict[str, Any] = json.loads(said.out)
    return found


def folder_of(task: Path) -> Path:
    (found,) = (task.parent / "runs" / "task").glob("advise-*")
    return found


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The YAML of a task after `advise --curve`. Shared: ``copy`` it before changing anything."""
    task = write_task(tmp_path_factory.mktemp("advised"), tiny_llama)
    replace_line(task, "prompt_items: 8", f"prompt_items: {ITEMS}")
    result(call("advise", task, "--json", "--shots", 3, "--curve-steps", 4))
    return task


@pytest.fixture
def copy(advised: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(advised.parent, tmp_path / "copy")) / advised.name


def test_what_is_measured(advised: Path) -> None:
    folder = folder_of(advised)
    found = read_json(folder / "advice.json")
    options = {o["name"]: o for o in found["evidence"]["options"]}
    assert {"as_is", "labels", "brief", "retrieved_3", "labels_retrieved_3", "as_is_constrained"} <= set(options)
    assert {o["score"]["n"] for o in options.values()} == {ITEMS}
    assert options["as_is"]["gain"] is None and options["labels"]["gain"]["n"] == ITEMS
    assert options["labels"]["prompt_tokens"] > options["as_is"]["prompt_tokens"]
    for name in options:
        rows = read_jsonl(folder / f"{name}.items.jsonl")
        record = read_json(folder / f"{name}.json")
        assert record["settings"]["prompt_tokens"] == ITEMS * options[name]["prompt_tokens"]
        if name.endswith("_constrained"):
            assert {row["prediction"] for row in rows} <= COLOURS and all(row["stopped"] for row in rows)
    assert found["advice"]["verdict"] == "more data first"  # fewer than 500 rows, and an untrained base
    assert found["evidence"]["kind"]["kind"] == "labels"


def test_the_curve(advised: Path) -> None:
    found = read_json(folder_of(advised) / "advice.json")["evidence"]
    curve = found["trained"]["curve"]
    assert len(curve["rows"]) == 4 and curve["rows"][-1] == found["rows"] and found["trained"]["steps"] == 4
    assert {p.name for p in (folder_of(advised) / "curve").iterdir()} == {"p010", "p025", "p050", "p100"}
    last = read_json(folder_of(advised) / "curve" / "p100" / "adapter.json")
    assert last["step"] == 4 and last["scores"]["accuracy"]["value"] == pytest.approx(curve["scores"][-1])


def test_a_second_call_measures_nothing(copy: Path) -> None:
    before = stamps(folder_of(copy))
    said = call("advise", copy, "--json", "--shots", 3, "--curve-steps", 4)
    assert result(said)["advice"]["verdict"] == "more data first"
    assert stamps(folder_of(copy)) == before


def test_the_curve_is_bounded_and_goes_on(copy: Path) -> None:
    from tunegate.cli.console import Console
    from tunegate.config import load_config
    from tunegate.pipeline.advise import Extras, Request, advise

    shutil.rmtree(folder_of(copy) / "curve" / "p100")
    request, found = Request(shots=3), {}
    for minutes in (1e-9, 0.0, 10.0):
        extras = Extras(curve_steps=4, curve_minutes=minutes)
        found[minutes] = advise(load_config(copy, []), Console(json_only=True), request, extras, stop=lambda: False)
    assert "3 of 4 sizes" in found[1e-9].evidence.missing["learning curve"]
    assert any("not measured: learning curve" in w for w in found[1e-9].advice.warnings)
    assert found[0.0].evidence.trained is None and not found[0.0].evidence.missing
    assert found[10.0].evidence.trained is not None


def test_the_target_is_what_the_gate_asks_for(copy: Path) -> None:
    replace_line(
        copy,
        "  min_test_items: 5",
        "  min_test_items: 5\n  min_score: 0.3\n"
        "  rules: [task.accuracy >= 0.65, task.stop_rate >= 0.99, task vs base >= 0.7]",
    )
    found = result(call("advise", copy, "--json", "--shots", 3, "--no-curve"))["evidence"]
    assert found["target"] == {"value": 0.65, "reason": "gate.rules: task.accuracy >= 0.65"}
    assert any(o["to_decide"] for o in found["options"])


def test_only_what_is_new_is_measured(copy: Path) -> None:
    before = stamps(folder_of(copy))
    result(call("advise", copy, "--json", "--shots", 2, "--no-curve"))
    after = stamps(folder_of(copy))
    assert {name for name in after if name not in before and name.endswith("2.json")} >= {"retrieved_2.json"}
    assert all(
        after[name] == before[name]
        for name in before
        if name.startswith(("as_is.", "labels.", "retrieved_3.", "curve/p"))
    )


# --- the bar of a run -----------------------------------------------------------------------------------------------


def test_a_run_has_to_beat_the_best_way_to_ask(copy: Path) -> None:
    best = read_json(folder_of(copy) / "best.json")
    assert best["prompt"].endswith("_constrained")  # a random base answers no label by itself
    ran = call("run", copy, "--json")
    assert ran.code in (0, 1), ran.err
    (run,) = (copy.parent / "runs" / "task").glob("run-*")
    bar = read_json(run / "bar.json")
    assert (bar["from"], bar["prompt"], bar["hash"]) == ("advise", best["prompt"], best["hash"])
    tested = read_json(run / "test" / "prompt.json")
    assert tested["settings"]["form"] == "choices" and tested["hashes"]["prompt"] == best["hash"]
    assert {row["prediction"] for row in read_jsonl(run / "test" / "prompt.items.jsonl")} <= COLOURS
    before = stamps(run)
    assert call("run", copy, "--json").code == ran.code
    assert stamps(run) == before


def test_advice_that_comes_later_does_not_move_the_bar(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama)
    first = call("run", task, "--json")
    (run,) = (tmp_path / "runs" / "task").glob("run-*")
    assert read_json(run / "bar.json")["from"] == "baseline"
    result(call("advise", task, "--json", "--shots", 2, "--no-curve"))
    again = call("run", task, "--json")
    assert again.code == first.code and json.loads(again.out)["decision"] == json.loads(first.out)["decision"]
    (run / "bar.json").unlink()  # a run from before bars were written
    assert call("run", task, "--json").code == first.code and not (run / "bar.json").exists()


# --- documents, a reference, other metrics --------------------------------------------------------------------------


def test_passages_come_before_training_for_knowledge(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama, rows=60)
    replace_line(task, "metric: accuracy", "metric: exact_match\n  kind: knowledge")
    said = result(call("advise", task, "--json", "--shots", 2))
    assert said["advice"]["verdict"] == "use retrieval" and "no documents" in said["advice"]["reasons"][-1]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "foxes.md").write_text("question 1 is about a fox. " * 20)
    flags = ["--no-curve", "--shots", 2, "--passages", 1, "--passage-tokens", 20, "--documents", tmp_path / "docs"]
    said = result(call("advise", task, "--json", *flags))
    names = {o["name"] for o in said["evidence"]["options"]}
    assert "as_is_passages_1" in names and "as_is_passages_1_constrained" in names
    assert not said["evidence"]["missing"]


def test_a_reference_model(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_REFERENCE_KEY", "sk-secret")

    def colour(body: dict[str, Any]) -> str:
        return next(c for c in COLOURS if c in body["messages"][-1]["content"])

    task = write_task(tmp_path, tiny_llama, rows=60)
    with serving(say=colour) as server:
        flags = ["--no-curve", "--shots", 2, "--reference", server.url, "--reference-model", "big"]
        flags += ["--price-in", 2, "--price-out", 10, "--hour-price", 1]
        said = result(call("advise", task, "--json", *flags))
        asked = len(server.requests)
    (own, *_) = [o for o in said["evidence"]["options"] if "reference" in o["uses"]]
    assert own["name"] == "big (as_is)" and own["score"]["value"] == 1.0 and own["prompt_tokens"] == 100
    assert said["cost_per_1000"]["big (as_is)"] == pytest.approx((100 * 2 + 20 * 10) / 1000)
    assert said["cost_per_1000"]["as_is"] > 0
    assert said["advice"]["verdict"] != "prompt is enough"  # a reference is no option of the base
    assert asked in (own["score"]["n"], 2 * own["score"]["n"])
    everything = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    assert "sk-secret" not in everything
    again = result(call("advise", task, "--json", *flags))  # the service is gone: nothing is asked again
    assert again["advice"] == said["advice"]


def test_answers_that_were_paid_for_are_kept(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama, rows=60)
    with serving(*["good"] * 5, "status 400", say=lambda body: "red") as server:
        flags = ["--no-curve", "--shots", 2, "--reference", server.url, "--reference-model", "big"]
        said = call("advise", task, *flags)
        assert said.code == 2 and "status 400" in said.err
        (path,) = folder_of(task).glob("*.answers.jsonl")
        kept = len(read_jsonl(path))
        assert kept == len(server.requests) - 1 >= 5
        path.write_bytes(path.read_bytes()[:-9])  # and a process that was killed while it wrote
        result(call("advise", task, "--json", *flags))
        assert len({json.loads(line)["key"] for line in path.read_text().splitlines() if line.endswith("}")}) == 8
        (plain,) = (o for o in server.requests[-1:])
        assert plain["max_tokens"] == 2 * 6 + 16


def test_a_service_that_does_not_count_has_no_cost(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama, rows=60)
    answer = json.dumps({"choices": [{"message": {"content": "red"}, "finish_reason": "stop"}]})
    with serving(*[f"raw {answer}"] * 16) as server:
        flags = ["--no-curve", "--shots", 2, "--reference", server.url, "--reference-model", "big"]
        said = result(call("advise", task, "--json", *flags, "--price-in", 2, "--price-out", 10))
    assert said["cost_per_1000"]["big (as_is)"] is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--reference", "http://127.0.0.1:9/v1"], "--reference-model"),
        (["--price-in", "1"], "--price-out"),
        (["--kind", "poem"], "invalid choice"),
        (["--shots", "0"], "not a whole number of 1 or more"),
    ],
)
def test_wrong_flags(advised: Path, flags: list[str], says: str) -> None:
    said = call("advise", advised, *flags)
    assert said.code == 2 and says in said.err


def test_a_metric_without_answers_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama, rows=30)
    replace_line(task, "metric: accuracy\n  report: likelihood", "metric: likelihood")
    said = call("advise", task)
    assert said.code == 2 and "scores none" in said.err


def test_wrong_input_is_said_before_anything_is_measured(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama, rows=60)
    for flags in (["--documents", tmp_path / "none"], ["--reference", "ftp://x/v1", "--reference-model", "m"]):
        assert call("advise", task, *flags).code == 2
        assert not (tmp_path / "runs").exists()


def test_a_form_that_cannot_be_enforced_is_no_option_and_said(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama, rows=60)
    replace_line(task, "metric: accuracy\n  report: likelihood", "metric: regex\n  pattern: '(?=r)red|blue|green'")
    found = result(call("advise", task, "--json", "--shots", 2, "--no-curve"))
    assert "cannot be enforced" in found["evidence"]["missing"]["constraint"]
    assert not any("constraint" in o["uses"] for o in found["evidence"]["options"])
    assert found["advice"]["verdict"] == "constrain the output"  # a format task, and it could not be tried


def test_a_prompt_with_a_name_of_ours_is_refused(copy: Path) -> None:
    replace_line(copy, "name: brief", "name: as_is_constrained")
    said = call("advise", copy, "--no-curve")
    assert said.code == 2 and "rename the prompt" in said.err


def test_what_a_person_sees(advised: Path) -> None:
    said = call("advise", advised, "--shots", 3, "--curve-steps", 4, "--hour-price", "0.5")
    assert said.code == 0, said.err
    for text in (
        "labels task: 3 labels",
        "form      choices: the 3 labels",
        "more data first",
        "predicted",
        "cost",
        "ask",
    ):
        assert text in said.out
