"""Scores of a subject against a plain transformers model: same answers, same likelihoods, every item on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunegate.config import TaskSection
from tunegate.data.render import Renderer
from tunegate.data.types import Example, Rendered
from tunegate.engine.runner import Runner
from tunegate.errors import InputError
from tunegate.evaluation.evaluator import LIKELIHOOD, Evaluation, Evaluator, build_scorer
from tunegate.evaluation.prompts import Prompt
from tunegate.files import read_jsonl
from tunegate.model.loading import load_model, load_tokenizer

LABELS = ["red", "green", "blue fox", "yes"]
EXAMPLES = [
    Example(
        "rows.jsonl",
        n + 1,
        messages=(
            {"role": "user", "content": f"question {n}: the {label} fox" + " over" * (n % 4)},
            {"role": "assistant", "content": label},
        ),
    )
    for n, label in enumerate(LABELS * 3)
]
TEXTS = [Example("texts.jsonl", n + 1, text=f"The fox {n} jumps" + " over" * n) for n in range(4)]


@pytest.fixture(scope="module")
def runner(tiny_llama: Path) -> Runner:
    return Runner(load_model(tiny_llama, dtype=torch.float32))


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(load_tokenizer(tiny_llama))


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path) -> Any:
    """The same base, untouched."""
    return load_model(tiny_llama, dtype=torch.float32)


def evaluator(runner: Runner, renderer: Renderer, examples: list[Example], **task: Any) -> Evaluator:
    section = TaskSection(**{"max_new_tokens": 5, **task})
    return Evaluator(runner, renderer, build_scorer(section, LABELS, Path(), 0.9, examples), 64)


def evaluate(one: Evaluator, examples: list[Example], folder: Path, **more: Any) -> Evaluation:
    path = folder / "valid" / "base.items.jsonl"
    return one.evaluate(examples, subject="base", split="valid", items_path=path, hashes={"base": "b3:1"}, **more)


@torch.no_grad()
def log_probs(model: Any, ids: list[int]) -> Tensor:
    """Log-probability of every token but the first, by full logits, in fp64."""
    logits = model(torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def greedy(model: Any, ids: list[int], stops: tuple[int, ...], limit: int) -> tuple[list[int], bool]:
    new: list[int] = []
    while len(new) < limit:
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            return new, True
        new.append(token)
    return new, False


def test_generated_answers_are_those_of_the_plain_model(
    runner: Runner, renderer: Renderer, oracle: Any, tmp_path: Path
) -> None:
    told: list[int] = []
    found = evaluate(
        evaluator(runner, renderer, EXAMPLES, metric="exact_match"), EXAMPLES, tmp_path, progress=told.append
    )
    wanted = [greedy(oracle, renderer.prompt_ids(e.prompt), renderer.stop_ids, 5) for e in EXAMPLES]
    rows = read_jsonl(tmp_path / found.record.items_path)
    assert [r["row_id"] for r in rows] == [e.row_id for e in EXAMPLES]
    assert [r["prediction"] for r in rows] == [renderer.decode(ids).strip() for ids, _ in wanted]
    assert [r["stopped"] for r in rows] == [stopped for _, stopped in wanted]
    assert [r["reference"] for r in rows] == [e.answer for e in EXAMPLES]
    record = found.record
    assert record.stop_rate == sum(stopped for _, stopped in wanted) / len(EXAMPLES)
    assert record.generated_tokens == sum(len(ids) for ids, _ in wanted)
    assert record.items_path == "valid/base.items.jsonl"
    assert sum(told) == len(EXAMPLES)


def test_the_record_says_what_was_scored(runner: Runner, renderer: Renderer, tmp_path: Path) -> None:
    one = evaluator(runner, renderer, EXAMPLES, metric="exact_match", report=("token_f1", LIKELIHOOD))
    first = evaluate(one, EXAMPLES, tmp_path).record
    other = evaluate(one, EXAMPLES[:-1], tmp_path).record
    asked = evaluate(one, EXAMPLES, tmp_path, prompt=Prompt("labels", suffix="Answer with a colour.")).record
    assert list(first.scores) == ["exact_match", "token_f1", LIKELIHOOD]
    assert {s.n for s in first.scores.values()} == {len(EXAMPLES)}
    assert {s.confidence for s in first.scores.values()} == {0.9}
    assert first.hashes["base"] == "b3:1"
    assert first.hashes["items"] != other.hashes["items"]
    assert first.hashes["items"] == asked.hashes["items"]
    assert first.hashes["prompt"] != asked.hashes["prompt"]
    assert (first.settings["prompt"], asked.settings["prompt"]) == ("as_is", "labels")
    rows = read_jsonl(tmp_path / asked.items_path)
    assert set(rows[0]["scores"]) == set(first.scores)
    for name in first.scores:
        assert asked.scores[name].value == pytest.approx(sum(r["scores"][name] for r in rows) / len(rows))


def test_the_most_likely_label_is_that_of_brute_force(
    runner: Runner, renderer: Renderer, oracle: Any, tmp_path: Path
) -> None:
    one = evaluator(runner, renderer, EXAMPLES, metric="accuracy", answer_by=LIKELIHOOD, labels=tuple(LABELS))
    found = evaluate(one, EXAMPLES, tmp_path)
    expected = []
    for example in EXAMPLES:
        prompt = renderer.prompt_ids(example.prompt)
        totals = {}
        for label in LABELS:
            tail = [*renderer.tokenizer(label, add_special_tokens=False)["input_ids"], renderer.end_of_turn_id]
            totals[label] = float(log_probs(oracle, prompt + tail)[-len(tail) :].sum())
        expected.append(max(totals, key=lambda label: totals[label]))
    rows = read_jsonl(tmp_path / found.record.items_path)
    assert [r["prediction"] for r in rows] == expected
    assert found.record.score.value == sum(p == e.answer for p, e in zip(expected, EXAMPLES, strict=True)) / 12
    assert found.record.stop_rate == 1.0
    assert found.record.settings["unreadable"] == {"accuracy": 0}


@pytest.mark.parametrize("examples", [EXAMPLES, TEXTS], ids=["chat", "text"])
def test_likelihood_is_that_of_full_logits(
    runner: Runner, renderer: Renderer, oracle: Any, tmp_path: Path, examples: list[Example]
) -> None:
    found = evaluate(evaluator(runner, renderer, examples, metric=LIKELIHOOD), examples, tmp_path)
    expected = []
    for row in renderer.render_many(examples):
        assert isinstance(row, Rendered)
        per_token = log_probs(oracle, list(row.ids))
        expected.append(math.exp(float(per_token[torch.tensor(row.target[1:])].mean())))
    assert found.primary.scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert found.record.score.value == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found.record.generated_tokens == 0
    assert [
        r["scores"][LIKELIHOOD] for r in read_jsonl(tmp_path / found.record.items_path)
    ] == found.primary.scores.tolist()


def test_scoring_twice_gives_the_same_file(runner: Runner, renderer: Renderer, tmp_path: Path) -> None:
    one = evaluator(runner, renderer, EXAMPLES, metric="accuracy", report=("chrf", LIKELIHOOD), labels=tuple(LABELS))
    found = [evaluate(one, EXAMPLES, tmp_path / name).record for name in "ab"]
    assert found[0].scores == found[1].scores
    first, second = ((tmp_path / name / r.items_path).read_bytes() for name, r in zip("ab", found, strict=True))
    assert first == second


# --- what is refused before any compute --------------------------------------------------------------------------


def refused(examples: list[Example] = EXAMPLES, labels: list[str] | None = LABELS, **task: Any) -> str:
    with pytest.raises(InputError) as error:
        build_scorer(TaskSection(**task), labels, Path(), 0.95, examples)
    return str(error.value)


def test_plain_text_is_refused_for_metrics_that_need_an_answer() -> None:
    said = refused(TEXTS, metric="exact_match")
    assert "plain text has no question to answer" in said
    assert "task: likelihood" in said


def test_unknown_metrics_are_named_with_the_nearest() -> None:
    said = refused(metric="acuracy", report=("liklihood", "rouge"))
    assert "task.metric: unknown metric 'acuracy'" in said
    assert "'accuracy'" in said
    assert "task.report: unknown metric 'liklihood'" in said
    assert "did you mean 'likelihood'?" in said
    assert "'rouge1'" in said


def test_everything_a_metric_lacks_is_reported_together() -> None:
    said = refused(labels=None, metric="regex", report=("json_schema", "accuracy"), answer_by=LIKELIHOOD)
    for key in ("task.pattern", "task.json_schema", "task.labels"):
        assert key in said


def test_references_that_cannot_be_scored_against_are_named() -> None:
    said = refused(labels=["red", "green"], metric="accuracy")
    assert "rows.jsonl:3" in said
