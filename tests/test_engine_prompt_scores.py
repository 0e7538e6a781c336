"""A prompt's own log-probabilities: transformers', however the prompt was cut, cached or computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from test_engine_scheduler import GREEDY, answers, loaded, prompts, row
from tiny import tiny_base
from tunegate.engine.prompt_scores import PromptReader, PromptScores
from tunegate.engine.runner import Runner
from tunegate.engine.sampling import Chooser
from tunegate.engine.scheduler import Row, Scheduler
from tunegate.kernels import cross_entropy
from tunegate.model.loading import load_model

TOP = 3


@pytest.fixture(scope="module")
def runner(tiny_llama: Path) -> Runner:
    return loaded(tiny_llama)[1]


def scored(prompt: list[int], new: int = 4) -> tuple[Row, PromptScores]:
    scores = PromptScores(prompt, TOP)
    return Row(list(prompt), new, Chooser(GREEDY, prompt), frozenset(), reader=scores.reader), scores


def check(scores: PromptScores, prompt: list[int], folder: Path) -> None:
    wanted = load_model(folder, dtype=torch.float32)(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    assert [c.token for c in scores.found] == prompt[1:]
    for place, c in enumerate(scores.found):
        assert c.logprob == pytest.approx(float(wanted[place, c.token]), abs=2e-5)
        top = wanted[place].topk(TOP)
        assert [t for t, _ in c.top] == top.indices.tolist()
        assert [v for _, v in c.top] == pytest.approx(top.values.tolist(), abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_as_transformers_gives_them(tmp_path: Path, family: str) -> None:
    extra = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    folder = tiny_base(tmp_path, family, **extra)
    _, runner = loaded(folder)
    asked = [*prompts(5), [7]]
    rows, scores = zip(*(scored(p) for p in asked), strict=True)
    answers(Scheduler(runner, 200, page_tokens=4, step_tokens=11), list(rows))
    for prompt, found in zip(asked, scores, strict=True):
        check(found, prompt, folder)


def test_known_pages_are_not_taken_and_answers_stay(runner: Runner, tiny_llama: Path) -> None:
    prompt = prompts(1, shared=30)[0]
    scheduler = Scheduler(runner, 100, page_tokens=4)
    plain = answers(scheduler, [row(prompt, new=4)])
    read, scores = scored(prompt)
    after = row(prompt, new=4)
    assert answers(scheduler, [read]) == plain and answers(scheduler, [after]) == plain
    assert read.cached == 0 and after.cached > 0
    check(scores, prompt, tiny_llama)


def test_rows_that_gave_their_pages_back_are_read_once(runner: Runner, tiny_llama: Path) -> None:
    asked = [p for p in prompts(9, shared=9) if len(p) > 12]
    rows, scores = zip(*(scored(p, new=12) for p in asked), strict=True)
    scheduler = Scheduler(runner, 16, page_tokens=4, most_rows=8, step_tokens=16)
    answers(scheduler, list(rows))
    assert scheduler.counters.preempted > 0
    for prompt, found in zip(asked, scores, strict=True):
        check(found, prompt, tiny_llama)


def test_logits_come_in_chunks(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 400 * 16)  # 16 rows, the least
    seen: list[tuple[int, int]] = []
    prompt = prompts(1, shared=50)[0]
    reader = PromptReader(len(prompt), lambda first, logits: seen.append((first, len(logits))))
    answers(Scheduler(runner, 100), [row(prompt, reader=reader)])
    assert max(count for _, count in seen) <= 16 and sum(count for _, count in seen) == len(prompt) - 1
    assert [first for first, _ in seen] == [sum(count for _, count in seen[:n]) for n in range(len(seen))]
