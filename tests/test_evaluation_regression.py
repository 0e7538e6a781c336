"""Regression on a tiny random model: an adapter of zeros changes nothing, another one is seen, the gate reads both."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import adapt, adapt_plain, all_log_probs, tiny_subject
from tunegate.adapter.inject import disabled
from tunegate.errors import InputError
from tunegate.evaluation import intervals
from tunegate.evaluation.answering import Model
from tunegate.evaluation.builtin import build_set
from tunegate.evaluation.checks import Check
from tunegate.evaluation.divergence import divergence, neutral_texts
from tunegate.evaluation.measures import load_measures, save_measures
from tunegate.evaluation.regression import (
    ItemResult,
    Measured,
    check_sets,
    compare_regression,
    measure,
    metric_name,
    read_results,
    regression_measures,
    steps,
)
from tunegate.evaluation.sets import ItemSet, SetItem
from tunegate.gate_rules import parse_rule
from tunegate.model.loading import load_model
from tunegate.records import RegressionRecord, load, save

SETS = [build_set(name).first(6) for name in ("reasoning", "math")]


@pytest.fixture
def model(tiny_llama: Path) -> Model:
    return tiny_subject(tiny_llama)


def untouched(folder: Path) -> Any:
    """The model of transformers, by its own code."""
    return load_model(folder, dtype=torch.float32)


def item(name: str, prompt: str, answer: str, check: Check | None = None, domain: str = "d") -> SetItem:
    message = {"role": "user", "content": prompt}
    return SetItem(name, "own", domain, (message,), (answer,), check or Check("contains"), max_new_tokens=4)


def test_an_adapter_of_zeros_gives_ratio_one_and_no_divergence(model: Model) -> None:
    base = measure(model, SETS, subject="base")
    injection = adapt(model, size=0.0)
    with torch.no_grad():
        texts = divergence(model, injection, neutral_texts()[:4])
    adapter = measure(model, SETS, subject="adapter")
    assert [r.prediction for r in adapter.results] == [r.prediction for r in base.results]
    assert [r.log_likelihood for r in adapter.results] == [r.log_likelihood for r in base.results]
    record = compare_regression(base, adapter, divergence=texts)
    for name in ("total", "reasoning", "math"):
        assert record.likelihood[name].value == 1.0
        assert record.accuracy[name].value in (1.0, None)  # None: the random base solves nothing
        assert (record.comparisons[name].wins, record.comparisons[name].losses) == (0, 0)
    assert record.divergence is not None
    assert record.divergence["kl"] == record.divergence["largest_kl"] == 0.0
    assert record.divergence["log_likelihood_change"] == 0.0
    assert record.worst == []


def test_another_adapter_is_seen_and_the_base_below_it_is_the_same(model: Model) -> None:
    base = measure(model, SETS, subject="base")
    injection = adapt(model, size=0.5)
    adapter = measure(model, SETS, subject="adapter")
    with disabled(injection):
        again = measure(model, SETS, subject="base")
    assert again.results == base.results
    record = compare_regression(base, adapter, divergence=divergence(model, injection, neutral_texts()[:4]))
    assert record.likelihood["total"].value != 1.0
    assert record.divergence is not None and record.divergence["kl"] > 0.01
    changes = [worst["log_likelihood_change"] for worst in record.worst]
    assert changes and changes == sorted(changes) and changes[0] < 0


def test_likelihood_is_that_of_the_model_s_own_logits(model: Model, tiny_llama: Path) -> None:
    plain = untouched(tiny_llama)
    one = ItemSet("own", (item("a", "question", "red fox"), item("b", "another one", "blue")), "test")
    found = measure(model, [one], subject="base").results
    for result, asked in zip(found, one.items, strict=True):
        renderer = model.renderer
        prompt = renderer.prompt_ids(asked.messages)
        ids = [*prompt, *renderer.tokenizer(asked.references[0], add_special_tokens=False)["input_ids"], 2]
        logs = all_log_probs(plain, ids)[len(prompt) - 1 :]
        expected = float(logs.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).mean())
        assert result.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert result.likelihood == pytest.approx(math.exp(expected), rel=1e-4)


def test_divergence_is_the_sum_over_the_vocabulary(model: Model, tiny_llama: Path) -> None:
    plain = untouched(tiny_llama)
    texts = neutral_texts()[:2]
    ids = [list(row.ids) for row in model.renderer.render_many(texts)]
    before = [all_log_probs(plain, row) for row in ids]
    adapt_plain(plain, size=0.5)
    injection = adapt(model, size=0.5)
    found = divergence(model, injection, texts)
    for one, row, p in zip(found, ids, before, strict=True):
        q = all_log_probs(plain, row)
        kl = (p.exp() * (p - q)).sum(-1)[-one.tokens :]
        assert one.kl == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-6)
    assert divergence(model, None, texts)[0].kl == 0.0


def test_a_choice_is_the_likeliest_continuation(model: Model, tiny_llama: Path) -> None:
    plain = untouched(tiny_llama)
    choices = ["red", "blue fox", "charged twice"]
    check = Check("likelihood", {"choices": choices})
    one = ItemSet("own", (item("a", "which", "red", check),), "test")
    prompt = model.renderer.prompt_ids(one.items[0].messages)
    totals = []
    for choice in choices:
        ids = [*prompt, *model.renderer.tokenizer(choice, add_special_tokens=False)["input_ids"], 2]
        logs = all_log_probs(plain, ids)[len(prompt) - 1 :]
        totals.append(float(logs.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum()))
    (result,) = measure(model, [one], subject="base").results
    assert result.prediction == choices[int(np.argmax(totals))]


def test_progress_counts_all_steps_and_items_can_be_read_back(model: Model, tmp_path: Path) -> None:
    counted: list[int] = []
    found = measure(model, SETS, subject="base", items_path=tmp_path / "base.items.jsonl", progress=counted.append)
    assert sum(counted) == steps(SETS)
    assert read_results(tmp_path / "base.items.jsonl") == found.results


# --- comparing: values by hand -----------------------------------------------------------------------------------


def measured(subject: str, scores: list[float], logs: list[float | None], domains: str = "") -> Measured:
    results = [
        ItemResult(f"own/{n}", (domains or "d" * len(scores))[n], "r", str(score), score, log_likelihood=log)
        for n, (score, log) in enumerate(zip(scores, logs, strict=True))
    ]
    return Measured(subject, {"own": "b3:1"}, tuple(results), {})


def test_ratios_by_hand() -> None:
    base = measured("base", [1, 1, 1, 0], [-1.0, -2.0, 0.0, None], "ddee")
    adapter = measured("adapter", [1, 0, 1, 0], [-2.0, -2.0, 0.0, None], "ddee")
    record = compare_regression(base, adapter)
    assert record.accuracy["total"].value == pytest.approx(2 / 3)
    assert record.accuracy["d"].value == 0.5 and record.accuracy["e"].value == 1.0
    expected = (math.exp(-2) * 2 + 1) / (math.exp(-1) + math.exp(-2) + 1)
    assert record.likelihood["total"].value == pytest.approx(expected)
    assert record.likelihood["e"].n == 1
    assert record.comparisons["d"].difference == -0.5
    assert [worst["item"] for worst in record.worst] == ["own/1", "own/0"]  # a lost answer before a lost likelihood
    own = intervals.ratio(np.array([1.0, 0, 1, 0]), np.array([1.0, 1, 1, 0]))
    assert (record.accuracy["total"].low, record.accuracy["total"].high) == (own.low, own.high)


def test_a_base_that_solves_nothing_has_no_ratio() -> None:
    nothing = measured("base", [0, 0], [None, None])
    record = compare_regression(nothing, dataclasses.replace(nothing, subject="adapter"))
    assert record.accuracy["total"].value is None and record.accuracy["total"].high is None
    assert record.likelihood == {}


def test_other_items_are_refused() -> None:
    base = measured("base", [1, 0], [None, None])
    with pytest.raises(InputError, match="not measured on the same items"):
        compare_regression(base, measured("adapter", [1], [None]))
    other = dataclasses.replace(base, subject="adapter", sets={"own": "b3:2"})
    with pytest.raises(InputError, match="not measured on the same items"):
        compare_regression(base, other)


def test_a_record_is_read_back(tmp_path: Path) -> None:
    base = measured("base", [1, 0, 1], [-1.0, -1.0, -2.0])
    record = compare_regression(base, dataclasses.replace(base, subject="adapter"))
    save(tmp_path / "r.json", record)
    assert load(tmp_path / "r.json", RegressionRecord) == record


def test_the_gate_reads_what_was_measured(tmp_path: Path) -> None:
    base = measured("base", [1, 1, 1, 0], [-1.0, -2.0, -0.5, None], "ddee")
    adapter = measured("adapter", [1, 0, 1, 1], [-2.0, -2.0, -0.5, None], "ddee")
    folder = tmp_path / "run" / "regression"
    folder.mkdir(parents=True)
    (tmp_path / "base").mkdir()
    from tunegate.files import write_jsonl

    write_jsonl(tmp_path / "base" / "base.items.jsonl", [r.row() for r in base.results])
    write_jsonl(folder / "adapter.items.jsonl", [r.row() for r in adapter.results])
    write_jsonl(folder / "divergence.items.jsonl", [{"row_id": "a", "kl": 0.5}, {"row_id": "b", "kl": 1.5}])
    files = ("../base/base.items.jsonl", "regression/adapter.items.jsonl")
    save_measures(folder, regression_measures(base, adapter, files, "regression/divergence.items.jsonl"))
    found = load_measures(tmp_path / "run")
    assert set(found) == {
        "regression.total", "regression.d", "regression.e", "regression.likelihood.total", "regression.likelihood.d",
        "regression.likelihood.e", "regression.divergence",
    }  # fmt: skip
    assert found["regression.d"].estimate == 0.5 and found["regression.d"].references["base"].tolist() == [1.0, 1.0]
    assert found["regression.total"].kind == "proportion"
    assert found["regression.likelihood.e"].estimate == pytest.approx(math.exp(-0.5))
    assert found["regression.divergence"].estimate == 1.0


def test_domains_are_named_as_rules_can_write_them() -> None:
    assert [metric_name(d) for d in ("math", "lm_eval:arc_easy", "my sums", "a.b-c")] == [
        "math", "lm_eval:arc_easy", "my_sums", "a_b_c",
    ]  # fmt: skip


def test_a_star_stands_for_the_domains_and_not_for_other_measures() -> None:
    domains, likelihoods = parse_rule("regression.* >= 0.95 of base"), parse_rule("regression.likelihood.* > 0")
    names = ["regression.total", "regression.math", "regression.lm_eval:arc_easy"]
    others = ["regression.likelihood.math", "regression.likelihood.total"]
    assert [n for n in (*names, *others, "regression.divergence") if domains.matches(n)] == names
    assert [n for n in (*names, *others, "regression.divergence") if likelihoods.matches(n)] == others
    assert parse_rule("regression.divergence <= 1").matches("regression.divergence")
    assert parse_rule("regression.lm_eval:arc_easy >= 0.9 of base").matches("regression.lm_eval:arc_easy")


def test_sets_that_cannot_be_scored_are_named_together() -> None:
    code = build_set("code_run")
    reserved = ItemSet("own", (item("a", "q", "r", domain="likelihood"),), "test")
    with pytest.raises(InputError) as caught:
        check_sets([code, reserved, ItemSet("empty", (), "test")], run_code=False)
    text = str(caught.value)
    assert "run_code: true" in text and "'likelihood' is reserved" in text and "no items" in text
    check_sets([code], run_code=True)
    with pytest.raises(InputError, match="no sets"):
        check_sets([], run_code=False)


def test_code_is_run_and_scored(model: Model) -> None:
    one = build_set("code_run").first(1)
    assert measure(model, [one], subject="base", run_code=True).rates()["total"] in (0.0, 1.0)


def test_a_part_of_a_set_has_every_kind() -> None:
    whole = build_set("math")
    part = whole.first(26)
    assert len(part.items) == 26 and part.hash != whole.hash
    assert {i.tags for i in part.items} == {i.tags for i in whole.items}
    assert whole.first(None) is whole and whole.first(1000) is whole
    places = [whole.items.index(i) for i in part.items]
    assert places == sorted(places)
