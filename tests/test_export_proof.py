"""What merges and exports are asked beside golden prompts: validation items, and the task's metric on them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from task import call, replace_line, write_task
from test_export_merge import peft_adapter
from tunegate.config import load_config
from tunegate.data.types import Example
from tunegate.errors import TunegateError
from tunegate.export import parity
from tunegate.export.parity import InRunner, Limits, Parity, Questions
from tunegate.files import hash_file, hash_json, read_json, write_json
from tunegate.pipeline import proof
from tunegate.pipeline.prepare import Prepared, prepare
from tunegate.pipeline.proof import Items, ItemsProof, Proof, Wanted, find_exam
from tunegate.pipeline.reporter import Silent
from tunegate.pipeline.session import Session
from tunegate.records import Comparison


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A task that was run on 4 bits."""
    made = write_task(tmp_path_factory.mktemp("proof"), tiny_llama)
    said = call("run", made, "--set", "base.quantization=nf4")
    assert said.code == 0, said.err
    return made


@pytest.fixture
def moved(task: Path, tmp_path: Path) -> Path:
    """The adapter in a copy of the task's folder that may be spoiled."""
    shutil.copytree(task.parent, tmp_path / "moved")
    return adapter_of(tmp_path / "moved" / "task.yaml")


def adapter_of(task: Path) -> Path:
    (found,) = (task.parent / "runs" / "task").glob("run-*/adapter")
    return found


def change_card(adapter: Path, key: str, name: str, value: Any) -> None:
    """``key`` of the card's settings, or the card's own ``base``."""
    card = read_json(adapter / "card.json")
    (card if key == "base" else card["config"])[key][name] = value
    write_json(adapter / "card.json", card)
    manifest = read_json(adapter / "manifest.json")
    write_json(adapter / "manifest.json", {**manifest, "card.json": hash_file(adapter / "card.json")})


# --- the commands -------------------------------------------------------------------------------------------------


def test_a_merge_is_compared_on_validation_items_and_by_the_task(task: Path, tmp_path: Path) -> None:
    prepared = prepare(load_config(task), Silent())
    said = call("merge", adapter_of(task), "-o", tmp_path / "out")
    assert said.code == 0, said.err
    report = read_json(tmp_path / "out" / "merge.json")
    (items,) = report["items"]
    assert items["prompts"] == len(prepared.data.splits.valid) > 5 and report["items_absent"] == []
    assert items["positions"] > 10 * items["prompts"] and items["max_kl"] < 1e-4
    assert items["metric"] == "accuracy" and items["scores"][0] == items["scores"][1] > 0.5
    by = items["comparison"]
    assert by["ties"] == items["prompts"] and by["low"] < 0 < by["high"]
    assert "accuracy" in said.out and "validation rows of its run" in said.out


def test_the_items_are_those_of_the_gate_and_never_the_test_set(task: Path) -> None:
    prepared, adapter = prepare(load_config(task), Silent()), adapter_of(task)
    exam = find_exam(Questions(((1,),), (), 4), [adapter], prepared.base.renderer, Wanted(count=5))
    (items,) = exam.items
    assert [e.content_hash for e in items.examples] == [e.content_hash for e in prepared.valid[:5]]
    test = {e.content_hash for e in prepared.data.splits.test}
    assert test and not test & {e.content_hash for e in items.examples}
    assert items.asked.new_tokens == 6  # the task's, so that whole answers are scored


def test_an_export_is_compared_on_them_too(task: Path, tmp_path: Path) -> None:
    said = call("export", adapter_of(task), "--to", "gguf", "-o", tmp_path / "out", "--items", 7, "--reader", "gguf")
    assert said.code == 0, said.err
    (items,) = read_json(tmp_path / "out" / "export.json")["items"]
    assert items["prompts"] == 7 and items["comparison"]["difference"] == 0


def test_both_ways_of_a_4_bit_adapter_are_measured(task: Path, tmp_path: Path) -> None:
    found = {}
    for onto in ("trained", "original"):
        limits = ("--max-kl", 10, "--min-agreement", 0)
        said = call("merge", adapter_of(task), "-o", tmp_path / onto, "--onto", onto, *limits)
        assert said.code == 0, said.err
        found[onto] = read_json(tmp_path / onto / "merge.json")
    assert found["trained"]["onto"].startswith("weights as nf4") and found["original"]["onto"] == "original weights"
    for told in ({k: r["parity"] for k, r in found.items()}, {k: r["items"][0] for k, r in found.items()}):
        assert told["trained"]["mean_kl"] < 1e-6 < 1e-4 < told["original"]["mean_kl"]


def test_adapters_of_different_quantizations_meet_on_the_original(task: Path, moved: Path, tmp_path: Path) -> None:
    change_card(moved, "base", "recipe", None)
    command = ("merge", adapter_of(task), moved, "-o", tmp_path / "out", "--weights", 0.5, 0.5)
    said = call(*command)
    assert said.code == 2 and "different quantizations" in said.err and "--onto original" in said.err
    said = call(*command, "--onto", "original")
    assert said.code == 0, said.err
    report = read_json(tmp_path / "out" / "merge.json")
    assert report["onto"] == "original weights" and report["parity"]["mean_kl"] < 1e-6


def test_a_mixture_onto_the_original_is_compared_with_the_one_that_was_trained(task: Path, tmp_path: Path) -> None:
    limits = ("--max-kl", 10, "--min-agreement", 0)
    said = call("merge", adapter_of(task), "-o", tmp_path / "out", "--weights", 0.9, "--onto", "original", *limits)
    assert said.code == 0, said.err
    assert read_json(tmp_path / "out" / "merge.json")["parity"]["mean_kl"] > 1e-4


def test_a_merge_that_does_the_task_worse_leaves_nothing(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = Items.measure, []

    def worse(self: Items, subject: Any, reading: Any) -> Any:
        found = measure(self, subject, reading)
        seen.append(found)
        return found if len(seen) == 1 else replace(found, scores=np.zeros_like(found.scores))

    monkeypatch.setattr(Items, "measure", worse)
    said = call("merge", adapter_of(task), "-o", tmp_path / "out")
    assert said.code == 1 and "does not do the task" in said.err and "accuracy within noise" in said.err
    assert len(seen) == 2 and not list(tmp_path.iterdir())


def test_without_items_the_report_says_why(task: Path, tiny_llama: Path, tmp_path: Path) -> None:
    bare = peft_adapter(tiny_llama, tmp_path / "bare")
    alone = Path(shutil.copytree(adapter_of(task), tmp_path / "alone"))
    cases = [
        ((bare, "--base", tiny_llama), "without a card"),
        ((alone,), "not to be found from here"),
        ((adapter_of(task), "--items", 0), "none were asked for"),
    ]
    for number, (arguments, reason) in enumerate(cases):
        said = call("merge", *arguments, "-o", tmp_path / f"out{number}")
        assert said.code == 0, said.err
        report = read_json(tmp_path / f"out{number}" / "merge.json")
        assert report["items"] == [] and len(report["items_absent"]) == 1 and reason in report["items_absent"][0]
        assert reason in said.out


def test_changed_data_are_not_asked(moved: Path, tmp_path: Path) -> None:
    rows = moved.parents[3] / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace("question", "Question"), encoding="utf-8")
    assert call("merge", moved, "-o", tmp_path / "out").code == 0
    (reason,) = read_json(tmp_path / "out" / "merge.json")["items_absent"]
    assert "have changed since the run" in reason
    said = call("merge", moved, "-o", tmp_path / "again", "--data", rows.parent)  # named: then it is an error
    assert said.code == 2 and "have changed since the run" in said.err and not (tmp_path / "again").exists()


def test_code_of_the_tasks_folder_runs_only_if_that_folder_is_named(moved: Path, tmp_path: Path) -> None:
    folder = moved.parents[3]
    mark, module = tmp_path / "ran", f"own_metric_{abs(hash(tmp_path))}"  # modules stay imported
    code = f"open({str(mark)!r}, 'w').close()\ndef score(p, r, e):\n    return p == r\n"
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    change_card(moved, "task", "metric", f"python:{module}:score")
    assert call("merge", moved, "-o", tmp_path / "out").code == 0
    (reason,) = read_json(tmp_path / "out" / "merge.json")["items_absent"]
    assert "code of the task's folder" in reason and not mark.exists()
    said = call("merge", moved, "-o", tmp_path / "named", "--data", folder)
    assert said.code == 0, said.err
    assert mark.exists() and read_json(tmp_path / "named" / "merge.json")["items"][0]["metric"].startswith("python:")


def test_a_users_own_items(task: Path, tiny_llama: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    rows = [{"prompt": f"question {n}: the blue fox", "completion": "blue"} for n in range(900, 909)]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    alone = Path(shutil.copytree(adapter_of(task), tmp_path / "alone"))
    said = call("merge", alone, "-o", tmp_path / "out", "--data", own)
    assert said.code == 0, said.err
    (items,) = read_json(tmp_path / "out" / "merge.json")["items"]
    assert items["prompts"] == 9 and items["metric"] == "accuracy" and items["data"] == str(own)
    bare = peft_adapter(tiny_llama, tmp_path / "bare")
    said = call("merge", bare, "--base", tiny_llama, "-o", tmp_path / "bare-out", "--data", own, "--items", 4)
    assert said.code == 0, said.err
    (items,) = read_json(tmp_path / "bare-out" / "merge.json")["items"]
    assert items["prompts"] == 4 and items["metric"] == "likelihood"
    said = call("merge", alone, "-o", tmp_path / "no", "--data", task.parent / "rows.jsonl")
    assert said.code == 2 and "may hold its test rows" in said.err
    assert call("merge", alone, "-o", tmp_path / "no", "--data", tmp_path / "nowhere").code == 2


def test_a_version_of_the_registry_knows_where_its_items_lie(task: Path, tmp_path: Path) -> None:
    registry = ("--registry", tmp_path / "registry")
    assert call("registry", "add", adapter_of(task), *registry).code == 0
    said = call("merge", "task:1", "-o", tmp_path / "out", *registry)
    assert said.code == 0, said.err
    assert len(read_json(tmp_path / "out" / "merge.json")["items"]) == 1


# --- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "more", "text"),
    [
        ("accuracy", "", False), ("accuracy", "\n  answer_by: likelihood", False), ("likelihood", "", False),
        ("likelihood", "", True),
    ],
)  # fmt: skip
def test_scores_are_the_evaluators(metric: str, more: str, text: bool, tiny_llama: Path, tmp_path: Path) -> None:
    made = write_task(tmp_path, tiny_llama, 60)
    replace_line(made, "metric: accuracy\n  report: likelihood", f"metric: {metric}{more}")
    if text:
        rows = [{"text": f"question {n}: the red fox and the dog"} for n in range(60)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        replace_line(made, "  prompts:\n    - name: brief\n      system: Answer with one word.\n", "")
    prepared: Prepared = prepare(load_config(made), Silent())
    session = Session(prepared, Silent())
    evaluation = session.evaluate(prepared.valid, "base", "valid", tmp_path / "items.jsonl")
    renderer, task = prepared.base.renderer, prepared.scorer.task
    prompts = tuple(proof._prompt(example, renderer) for example in prepared.valid)
    asked = Questions(prompts, renderer.stop_ids, task.max_new_tokens or 4)
    items = Items("it", "rows", tuple(prepared.valid), asked, prepared.scorer, renderer)
    subject = InRunner(session.runner)
    found = items.measure(subject, parity.read(subject, asked))
    assert found.row_ids == evaluation.primary.row_ids
    np.testing.assert_allclose(found.scores, evaluation.primary.scores, rtol=1e-5)
    assert len(set(found.scores.tolist())) > 0 and proof.Exam(asked, (items,)).longest >= max(map(len, prompts)) + 4


def test_distributions_are_kept_of_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        def answers(self, prompts: Any, stop_ids: Any, new_tokens: int) -> list[list[int]]:
            return [[7] for _ in prompts]

        def log_probs(self, row: Any, last: int = 0) -> torch.Tensor:
            return torch.log_softmax(torch.arange(4.0), 0).expand(len(row), 4)

    monkeypatch.setattr(parity, "ROWS", 2)
    first = parity.read(Counting(), Questions(((1,), (1, 2), (1, 2, 3)), (), 1))
    found = parity.compare(first, first)
    assert (found.prompts, found.positions, found.same_answers) == (3, 5, 1.0)


def test_a_report_says_how_near_a_tie_answers_part() -> None:
    even, clear = torch.tensor([0.4, 0.35, 0.15, 0.1]).log(), torch.tensor([0.1, 0.7, 0.15, 0.05]).log()
    one = torch.stack([even, clear])  # after the prompt, and after the answer's only token

    def parted(*second: int) -> float | None:
        found = [parity.Reading(((9, 0),), (one,), (answer,)) for answer in ((0,), second)]
        return parity.compare(*found).parted

    assert parted(0) is None
    assert parted(1) == pytest.approx(float(even[0] - even[1]))
    assert parted(0, 2) == pytest.approx(float(clear[1] - clear[2]))  # the first ended, the second goes on
    assert parted() == pytest.approx(float(even[0] - even[1]))  # the second ended at once


def an_item_proof(prompts: float = 1.0, low: float = -0.1, high: float = 0.1) -> Proof:
    fine = Parity(3, 9, 0.0, 0.0, 1.0, 1.0)
    example = Example("rows", 1)
    items = Items("it", "rows", (example,), Questions((), (), 1), None, None)  # type: ignore[arg-type]
    comparison = Comparison("accuracy", "adapter", (low + high) / 2, low, high, 9, 0.5, 0, 0, 9)
    return Proof(fine, (ItemsProof(items, replace(fine, agreement=prompts), (0.5, 0.5), comparison),), ())


def test_each_limit_holds_for_items() -> None:
    proof.require(an_item_proof(), Limits(), "it", "here")
    for spoiled, says in (
        (an_item_proof(prompts=0.9), "90.0% of"), (an_item_proof(low=-0.2, high=-0.1), "does not do the task"),
        (an_item_proof(low=0.1, high=0.2), "does not do the task"),
    ):  # fmt: skip
        with pytest.raises(TunegateError, match=says):
            proof.require(spoiled, Limits(), "it", "here")
    assert hash_json(an_item_proof().to_json())  # plain JSON
