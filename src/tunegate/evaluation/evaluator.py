"""Score one subject (base, prompt or adapter) on one split, item by item.

Answers are generated through the same renderer that training used and serving will use, or, with
``answer_by: likelihood``, the most likely label is taken. The metric ``likelihood`` needs no answers: it is
exp(-loss per target token) of the reference, and the only one for plain text. Every item is written to a JSONL
file beside the record, so each number can be traced to the texts behind it.

It does not compare subjects and decides nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.config import TaskSection
from tunegate.data.pack import split_batches
from tunegate.data.render import Renderer
from tunegate.data.types import Example, Rendered
from tunegate.engine.constrain import build_constraint
from tunegate.engine.generate import Generation, Sampling, generate, score_continuations
from tunegate.engine.runner import Runner, evaluating
from tunegate.errors import InputError, Problem, TunegateError, collecting, nearest
from tunegate.evaluation.metrics import METRIC_NAMES, PYTHON_PREFIX, build_metric, check_references, score_items
from tunegate.evaluation.prompts import AS_IS, Prompt
from tunegate.evaluation.statistics import score
from tunegate.evaluation.types import Measurement, Metric
from tunegate.files import hash_json, write_jsonl
from tunegate.records import EvalRecord

LIKELIHOOD = "likelihood"
OWN_PROMPT = Prompt(AS_IS)


@dataclass(frozen=True)
class Scorer:
    """The task's metrics, built and checked before any compute. ``labels`` is the label set where there is one."""

    task: TaskSection
    metrics: tuple[Metric, ...]
    labels: tuple[str, ...] | None
    confidence: float = 0.95

    @property
    def generates(self) -> bool:
        return bool(self.metrics)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([self.task.metric, *self.task.report]))


def _is_built(name: str) -> bool:
    return name in METRIC_NAMES or name.startswith(PYTHON_PREFIX)


def _key_of(name: str, task: TaskSection) -> str:
    return "task.metric" if name == task.metric else "task.report"


def unknown_metrics(task: TaskSection) -> list[Problem]:
    """The metrics of ``task`` that there are none of."""
    known = [*METRIC_NAMES, LIKELIHOOD]
    expected = f"one of {', '.join(known)}, or {PYTHON_PREFIX}module:function"
    return [
        Problem(f"unknown metric {name!r}", _key_of(name, task), expected, fix=nearest(name, known))
        for name in dict.fromkeys([task.metric, *task.report])
        if name != LIKELIHOOD and not _is_built(name)
    ]


def build_scorer(
    task: TaskSection, labels: Sequence[str] | None, folder: Path, confidence: float, examples: Sequence[Example]
) -> Scorer:
    """Metrics by name, checked against every reference of ``examples``; all problems reported together."""
    problems = unknown_metrics(task)
    metrics = []
    for name in dict.fromkeys([task.metric, *task.report]):
        if not _is_built(name):
            continue
        key = _key_of(name, task)
        found: list[Problem] = []
        with collecting(found):
            metrics.append(
                build_metric(name, labels=labels, schema=task.json_schema, pattern=task.pattern, base_dir=folder)
            )
        problems += [p if p.where else dataclasses.replace(p, where=key) for p in found]
    if metrics and any(e.text is not None for e in examples):
        problems.append(
            Problem("plain text has no question to answer", "task.metric", LIKELIHOOD, task.metric,
                    "use task: likelihood, or examples with a prompt and an answer")
        )  # fmt: skip
    if task.answer_by == LIKELIHOOD and not labels:
        problems.append(Problem("answer_by: likelihood needs task.labels", "task.labels", "a list of answers"))
    if problems:
        raise InputError(problems)
    check_references(metrics, [e.answer for e in examples], [e.row_id for e in examples])
    return Scorer(task, tuple(metrics), tuple(labels) if labels else None, confidence)


@dataclass(frozen=True)
class Evaluation:
    record: EvalRecord
    measurements: dict[str, Measurement]

    @property
    def primary(self) -> Measurement:
        return self.measurements[self.record.primary]


@dataclass(frozen=True)
class Evaluator:
    """A model, the renderer of its prompts and the task's scorer."""

    runner: Runner
    renderer: Renderer
    scorer: Scorer
    max_tokens: int

    def evaluate(
        self,
        examples: Sequence[Example],
        *,
        subject: str,
        split: str,
        items_path: Path,
        hashes: dict[str, str],
        prompt: Prompt = OWN_PROMPT,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Evaluation:
        """Score ``examples``, at least one, and write the items file (the record names it with its folder)."""
        started = time.perf_counter()
        task = self.scorer.task
        rows: list[dict[str, Any]] = [{"row_id": e.row_id, "reference": e.answer} for e in examples]
        scores: list[dict[str, float]] = [{} for _ in examples]
        measurements: dict[str, Measurement] = {}
        generated, read, stopped = 0, 0, 1.0
        if self.scorer.generates:
            predictions, answers, read = self._answer(examples, prompt, progress)
            scores, measurements = score_items(self.scorer.metrics, predictions, [e.answer for e in examples], examples)
            for row, text, answer in zip(rows, predictions, answers, strict=True):
                row.update(prediction=text, stopped=answer.stopped)
            generated = sum(len(a.ids) for a in answers)
            stopped = sum(a.stopped for a in answers) / len(answers)
        if LIKELIHOOD in self.scorer.names:
            measurements[LIKELIHOOD] = self._likelihood(examples, progress if not self.scorer.generates else _silent)
            for one, value in zip(scores, measurements[LIKELIHOOD].scores, strict=True):
                one[LIKELIHOOD] = float(value)
        for row, one in zip(rows, scores, strict=True):
            row["scores"] = one
        write_jsonl(items_path, rows)
        record = EvalRecord(
            subject=subject,
            split=split,
            primary=task.metric,
            scores={name: score(measurements[name], self.scorer.confidence) for name in self.scorer.names},
            stop_rate=stopped,
            items_path=f"{items_path.parent.name}/{items_path.name}",
            hashes={**hashes, "prompt": prompt.hash, "items": hash_json([e.content_hash for e in examples])},
            settings={
                "prompt": prompt.name,
                "answer_by": task.answer_by,
                "max_new_tokens": task.max_new_tokens,
                "temperature": task.temperature,
                "top_p": task.top_p,
                "prompt_tokens": read,
                "form": prompt.form.kind if prompt.form is not None else None,
                "unreadable": {n: m.unreadable for n, m in measurements.items() if m.unreadable is not None},
            },
            seconds=time.perf_counter() - started,
            generated_tokens=generated,
        )
        return Evaluation(record, measurements)

    def _answer(
        self, examples: Sequence[Example], prompt: Prompt, progress: Callable[[int], None]
    ) -> tuple[list[str], list[Generation], int]:
        """Answers as text and as ids, and the number of tokens of all prompts."""
        prompts = [self.renderer.prompt_ids(prompt.messages(e), e.tools) for e in examples]
        read = sum(len(ids) for ids in prompts)
        if self.scorer.task.answer_by == LIKELIHOOD:
            return *self._most_likely(prompts, progress), read
        task = self.scorer.task
        assert task.max_new_tokens is not None
        sampling = Sampling(task.max_new_tokens, self.renderer.stop_ids, task.temperature, task.top_p)
        constraint = None
        if prompt.form is not None:
            constraint = build_constraint(prompt.form, self.renderer.tokenizer, self.renderer.stop_ids)
        answers = generate(self.runner, prompts, sampling, progress, constraint)
        return [self.renderer.decode(a.ids).strip() for a in answers], answers, read

    def _most_likely(
        self, prompts: Sequence[Sequence[int]], progress: Callable[[int], None]
    ) -> tuple[list[str], list[Generation]]:
        assert self.scorer.labels is not None
        encode = self.renderer.tokenizer
        tails = [
            [*encode(label, add_special_tokens=False)["input_ids"], self.renderer.end_of_turn_id]
            for label in self.scorer.labels
        ]
        picked = []
        for ids in prompts:
            picked.append(int(np.argmax(score_continuations(self.runner, ids, tails))))
            progress(1)
        answers = [Generation(tuple(tails[i][:-1]), True) for i in picked]
        return [self.scorer.labels[i] for i in picked], answers

    def _likelihood(self, examples: Sequence[Example], progress: Callable[[int], None]) -> Measurement:
        rendered = []
        for row in self.renderer.render_many(examples):
            if isinstance(row, Problem):
                raise InputError(row)
            rendered.append(row)
        unique = [Rendered(str(n), row.ids, row.target) for n, row in enumerate(rendered)]
        values = np.zeros(len(unique))
        with evaluating(self.runner.model):
            for batch in split_batches(unique, self.max_tokens, share_prefix=self.runner.shares_prefix):
                found = self.runner.log_probs(batch)
                for number, row_id in enumerate(batch.row_ids):
                    mean = float(found[batch.target_rows == number].mean())
                    if math.isnan(mean):
                        raise TunegateError(
                            "the likelihood is NaN: the model diverged", where=examples[int(row_id)].row_id
                        )
                    values[int(row_id)] = min(1.0, math.exp(mean))
                progress(len(batch.row_ids))
        return Measurement(LIKELIHOOD, tuple(e.row_id for e in examples), values)


def _silent(n: int) -> None:
    del n
