"""lm-eval-harness on the engine against the harness's own HFLM, on a tiny model and tasks made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval-harness is not installed")

from models import adapt, tiny_subject
from tunegate.errors import InputError
from tunegate.evaluation.answering import Model
from tunegate.evaluation.lm_eval import EngineLM, joined, load_tasks, measure_tasks
from tunegate.evaluation.regression import ItemResult, Measured, compare_regression
from tunegate.model.loading import load_model, load_tokenizer

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """\
task: tiny_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["\\n", "zz"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices[0]}}}}"
metric_list:
  - metric: word_perplexity
"""
ROWS = [
    {
        "question": f"where is order number {n}",
        "choices": ["in the box", "a blue fox", "lost"][: 2 + n % 2],
        "label": n % 2,
    }
    for n in range(9)
]


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def model(tiny_llama: Path) -> Model:
    return tiny_subject(tiny_llama)


@pytest.fixture
def oracle(tiny_llama: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=load_model(tiny_llama, dtype=torch.float32),
        tokenizer=load_tokenizer(tiny_llama),
        batch_size=1,
        max_length=512,
    )


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_log_likelihoods_equal_the_harness_s_own(model: Model, oracle: Any) -> None:
    pairs = [
        ("Where is it?\nAnswer:", " in the box"),
        ("Where is it?\nAnswer: ", "in the box"),  # white space goes to the continuation
        ("", "a text without a context"),
        ("a " * 40, " b"),
        ("question", " zwölf Boxkämpfer"),
    ]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    for mine, theirs in zip(EngineLM(model).loglikelihood(requests), oracle.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3) and mine[1] == theirs[1]


def test_rolling_log_likelihoods_equal_the_harness_s_own(model: Model, oracle: Any) -> None:
    texts = ["the quick brown fox", "Where is my order? " * 60, "x"]
    requests = [request("loglikelihood_rolling", text) for text in texts]
    mine, theirs = EngineLM(model).loglikelihood_rolling(requests), oracle.loglikelihood_rolling(requests)
    assert mine == pytest.approx(theirs, abs=5e-2)
    assert mine[0] == pytest.approx(theirs[0], abs=1e-3)


def test_greedy_answers_equal_the_harness_s_own(model: Model, oracle: Any) -> None:
    settings = {"until": ["\n", "fo"], "max_gen_toks": 40, "do_sample": False}
    requests = [request("generate_until", f"question {n}:", settings) for n in range(4)]
    assert EngineLM(model).generate_until(requests) == oracle.generate_until(requests)


def test_whole_tasks_score_as_the_harness_does(model: Model, oracle: Any, manager: Any) -> None:
    from lm_eval.evaluator import evaluate

    names = ["lm_eval:tiny_choice", "lm_eval:tiny_generate"]
    found = measure_tasks(model, load_tasks(names, manager), subject="base")
    result: Any = evaluate(oracle, load_tasks(names, manager), bootstrap_iters=0)["results"]
    assert found.rates()["lm_eval:tiny_choice"] == pytest.approx(result["tiny_choice"]["acc,none"])
    assert found.rates()["lm_eval:tiny_generate"] == pytest.approx(result["tiny_generate"]["exact_match,none"])
    assert len(found.results) == 2 * len(ROWS) and set(found.sets) == set(names)
    assert found.settings["lm_eval"]["metrics"]["lm_eval:tiny_choice"] == "acc"


def test_an_adapter_is_compared_with_its_base(model: Model, manager: Any) -> None:
    tasks = load_tasks(["lm_eval:tiny_choice"], manager)
    base = measure_tasks(model, tasks, subject="base", limit=6)
    adapt(model, size=0.0)
    same = measure_tasks(model, tasks, subject="adapter", limit=6)
    assert len(base.results) == 6
    record = compare_regression(base, same)
    comparison = record.comparisons["lm_eval:tiny_choice"]
    assert (comparison.wins, comparison.losses) == (0, 0)


def test_a_task_without_a_score_per_item_is_refused(model: Model, manager: Any) -> None:
    with pytest.raises(InputError, match="no score from 0 to 1"):
        measure_tasks(model, load_tasks(["tiny_rolling"], manager), subject="base")


def test_unknown_tasks_and_settings_are_named(model: Model, manager: Any) -> None:
    with pytest.raises(InputError, match="no such task") as caught:
        load_tasks(["lm_eval:tiny_choise"], manager)
    assert "tiny_choice" in caught.value.problems[0].fix
    wrong = request("generate_until", "q", {"until": [], "num_beams": 4})
    with pytest.raises(InputError, match="num_beams"):
        EngineLM(model).generate_until([wrong])


def test_parts_of_one_subject_are_joined() -> None:
    own = Measured("base", {"own": "b3:1"}, (ItemResult("own/1", "own", "r"),), {"a": 1})
    other = Measured("base", {"lm_eval:x": "b3:2"}, (ItemResult("x/1", "lm_eval:x", "r"),), {"b": 2})
    both = joined([own, other])
    assert both.sets == {"own": "b3:1", "lm_eval:x": "b3:2"} and both.settings == {"a": 1, "b": 2}
    with pytest.raises(InputError, match="different sets of one subject"):
        joined([own, own])


def test_tasks_stand_beside_own_sets_in_a_run(tiny_llama: Path, manager: Any, tmp_path: Path) -> None:
    from task import write_task
    from tunegate.config import RegressionSection, load_config
    from tunegate.evaluation.builtin import build_set
    from tunegate.pipeline import kept
    from tunegate.pipeline.prepare import prepare
    from tunegate.pipeline.questions import Regression
    from tunegate.pipeline.reporter import Silent
    from tunegate.pipeline.session import Session

    session = Session(prepare(load_config(write_task(tmp_path, tiny_llama)), Silent()), Silent())
    asked = Regression(
        RegressionSection(sets=("math", "lm_eval:tiny_choice"), items=4),
        (build_set("math").first(4),),
        load_tasks(["lm_eval:tiny_choice"], manager),
    )
    first, folder = kept.base_ability(session, asked)
    assert set(first.rates()) == {"total", "math", "lm_eval:tiny_choice"} and len(first.results) == 8
    stamp = (folder / "step.json").stat().st_mtime_ns
    again, _ = kept.base_ability(session, asked)
    assert again == first and (folder / "step.json").stat().st_mtime_ns == stamp
