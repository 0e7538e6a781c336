"""A few optimizer steps of the real task on the real machine, through the pipeline's own objects.

Three steps, and more where three are over in moments. The first one warms up: buffers, packed weights, the loss's
memory. The others are timed, and the run's time is the warm-up plus its operations at their rate. The evaluator answers
a few validation items, which gives the time of the run's evaluations. For the peak, which is the process's, the run's
other phases are gone through as well: its largest batch of a loss and, before training as for its baselines and
afterwards as in its test, as many prompts side by side, with the first tokens of their answers. What the run adds to
these by the estimate (a larger batch, longer answers) is added. The measurement is kept, so that the next prediction on
this machine begins from it.

Nothing of it lands in a run folder, and the test set stays closed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunegate.config import Config
from tunegate.data.pack import split_batches
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.runner import evaluating
from tunegate.engine.schedule import StepPlan
from tunegate.engine.train import Hooks, train
from tunegate.errors import InputError
from tunegate.evaluation.evaluator import OWN_PROMPT
from tunegate.pipeline.planning import (
    Prediction,
    TaskPlan,
    check_budget,
    check_fit,
    largest_loss,
    peak_rss,
    plan_prepared,
    predict,
)
from tunegate.pipeline.prepare import Prepared, prepare
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.session import Session, adapter_spec
from tunegate.plan import calibrate
from tunegate.plan.devices import this_machine
from tunegate.plan.memory import PlanInputs, estimate
from tunegate.plan.time import Workload, operations_per_token

LEAST, MOST = 3, 24  # steps
SECONDS = 20.0  # of steps, by the estimate: a moment says little on a machine that does other things as well
ITEMS = 16  # validation items that are answered
TOKENS = 2  # of each answer in the test's place: with the second one, all rows are in memory at once
NEVER = 10**9


@dataclass(frozen=True)
class Probed:
    """What the steps showed. ``prediction`` is the whole run's; ``seconds`` of its training steps, ``answer_seconds``
    of its evaluations, ``bytes`` its peak."""

    plan: TaskPlan
    prediction: Prediction
    bytes: int
    seconds: float
    answer_seconds: float
    step_seconds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "seconds": self.seconds,
            "answer_seconds": self.answer_seconds,
            "step_seconds": list(self.step_seconds),
        }


def probe(config: Config, reporter: Reporter) -> Probed:
    """Take the steps; :class:`InputError` for a task of another trainer's, or one with fewer steps."""
    if config.task.train.backend != "native":
        raise InputError("a probe measures tunegate's own steps", where="train.backend", expected="native",
                         got=config.task.train.backend)  # fmt: skip
    prepared = prepare(config, reporter)
    plan = plan_prepared(prepared)
    if plan.workload.steps < LEAST:
        raise InputError(
            "the run is shorter than a probe",
            where="train.epochs",
            expected=f"at least {LEAST} steps",
            got=str(plan.workload.steps),
            fix="start the run: it takes no longer",
        )
    check_budget(plan, config.task.train.memory)
    prediction = predict(plan)
    check_fit(prediction)
    session = Session(prepared, reporter)
    prompts, few = _prompts(prepared, plan), Sampling(TOKENS, ())
    generate(session.runner, prompts, few)
    times, answering = _take_steps(prepared, session, how_many(plan.workload.steps, prediction.corrected.seconds))
    generate(session.runner, prompts, few)
    return _conclude(prepared, plan, times, answering)


def how_many(steps: int, seconds: float) -> int:
    """Steps to take of a run of ``steps`` that is estimated to take ``seconds``."""
    return min(steps, MOST, max(LEAST, math.ceil(SECONDS * steps / max(seconds, 1e-9))))


def _take_steps(prepared: Prepared, session: Session, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and of one answered validation item."""
    settings = prepared.config.task.train.model_copy(
        update={"max_steps": steps, "eval_every": NEVER, "checkpoint_every": NEVER}
    )
    injection = session.start_adapter(adapter_spec(settings), settings.seed)
    runner = session.runner
    stamps, answering = [0.0], [0.0]

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            stamps.append(time.perf_counter())

    def evaluate(step: int) -> tuple[float, dict[str, Any]]:
        del step
        items = prepared.valid[:ITEMS]
        began = time.perf_counter()
        session.evaluate(items, "adapter", "valid", folder / "items.jsonl")
        answering[0] = (time.perf_counter() - began) / len(items)
        _largest_loss(prepared, session)
        return 0.0, {}

    with tempfile.TemporaryDirectory(prefix="tunegate-probe-") as name:
        folder = Path(name)
        stamps[0] = time.perf_counter()
        train(runner, injection, prepared.train_rows, settings, folder / "train", "probe", Hooks(evaluate, report))
    return [after - before for before, after in itertools.pairwise(stamps)], answering[0]


@torch.no_grad()
def _largest_loss(prepared: Prepared, session: Session) -> None:
    """The loss of the most tokens that the run computes at once without training on them."""
    runner, tokens = session.runner, prepared.config.task.train.tokens_per_batch
    batch = largest_loss(prepared.train_rows, prepared.valid_rows, tokens, share_prefix=runner.shares_prefix)
    with evaluating(runner.model):
        runner.loss_sum(batch)


def _prompts(prepared: Prepared, plan: TaskPlan) -> list[list[int]]:
    """As many as the run answers side by side; training rows', as the test set stays closed."""
    evaluation, renderer = plan.inputs.evaluation, prepared.base.renderer
    assert evaluation is not None
    items = prepared.data.splits.train[: evaluation.rows]
    return [renderer.prompt_ids(OWN_PROMPT.messages(item), item.tools) for item in items]


def _conclude(prepared: Prepared, plan: TaskPlan, times: list[float], answering: float) -> Probed:
    taken = [_step_work(prepared, plan, step) for step in range(len(times))]
    rate = sum(work for work, _ in taken[1:]) / sum(times[1:])
    whole = operations(plan.inputs, plan.workload)
    warm_up = max(0.0, times[0] - taken[0][0] / rate)
    seconds = whole / rate + warm_up
    seen = dataclasses.replace(plan.inputs, tokens=max(t for _, t in taken))
    assert seen.evaluation is not None
    evaluation = dataclasses.replace(
        seen.evaluation,
        rows=min(seen.evaluation.rows, len(prepared.data.splits.train)),
        valid_rows=min(seen.evaluation.valid_rows, ITEMS),
        new=min(seen.evaluation.new, TOKENS),
    )
    seen = dataclasses.replace(seen, loss_tokens=min(seen.loss_tokens, seen.tokens), evaluation=evaluation)
    raw = predict(plan)
    more = max(0, raw.raw_bytes - estimate(seen).total)
    peak = peak_rss() + more
    calibrate.observe(
        this_machine(),
        calibrate.Observation(
            kind=calibrate.kind_of(plan.inputs),
            tokens=plan.inputs.tokens,
            predicted_bytes=raw.raw_bytes,
            measured_bytes=peak if plan.device.kind == "cpu" else None,
            predicted_seconds=raw.raw_seconds,
            measured_seconds=seconds,
            source="probe",
            when=calibrate.now(),
        ),
    )
    return Probed(plan, predict(plan), peak, seconds, answering * plan.answers.items, tuple(times))


def operations(p: PlanInputs, w: Workload) -> float:
    """Operations of all steps of a run."""
    return sum(operations_per_token(p, w).values()) * w.tokens * w.computed


def _step_work(prepared: Prepared, plan: TaskPlan, step: int) -> tuple[float, int]:
    """(operations of one step, its most computed tokens at once)."""
    settings = prepared.config.task.train
    rows = StepPlan(prepared.train_rows, settings).rows(step)
    batches = split_batches(rows, settings.tokens_per_batch, share_prefix=settings.share_prefix)
    computed, whole = sum(b.layout.tokens for b in batches), sum(b.row_tokens for b in batches)
    reached = sum(b.n_targets for b in batches)
    work = Workload(tuple(len(row) for row in rows), 1.0, 1, computed / whole, reached / whole)
    return operations(plan.inputs, work), max(b.layout.tokens for b in batches)
