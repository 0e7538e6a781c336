"""Rank x epochs on the validation split: each rank is one normal run folder, trained until the decision is known.

A trial is the run that ``tunegate run`` would make with that rank: same key, same folder, same bytes, so a trial that
is there is not trained again, and the winner goes on from its own training. All epochs of a rank come from one
training run, evaluated after each. Between steps the driver asks :func:`~tunegate.evaluation.sweeping.climb`, a pure
function of what the folders hold, whether this rank's next epoch would still decide something; if not, it is stopped
with a checkpoint. A sweep that was killed therefore repeats nothing but the steps after its last checkpoint.

After each epoch the KL from the base on neutral text is measured with the adapter in place. The test split is not
opened: ``tunegate run`` does that, once, with the winner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.adapter.files import adapter_hash
from tunegate.config import Config
from tunegate.engine.schedule import StepPlan
from tunegate.engine.train import Interrupted
from tunegate.errors import InputError
from tunegate.evaluation.answering import Model
from tunegate.evaluation.divergence import TextDivergence, divergence, neutral_texts
from tunegate.evaluation.sweeping import Climb, Curve, climb
from tunegate.evaluation.types import Measurement
from tunegate.files import hash_json, read_jsonl, write_jsonl
from tunegate.pipeline import kept, planning, steps
from tunegate.pipeline.evidence import evaluations, measurement_of
from tunegate.pipeline.folders import is_done, owned, short
from tunegate.pipeline.prepare import Prepared, prepare
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.run import open_run, run_folder
from tunegate.pipeline.session import Session, adapter_spec
from tunegate.records import RunRecord, SweepRecord

RANKS = (4, 8, 16, 32)


@dataclass(frozen=True)
class SweepRequest:
    """``ranks`` in any order, ``epochs`` of each (None: the task's), at most ``max_trials`` of the ranks from below;
    ``budget`` in minutes of this call; ``ray``: all ranks at once on a Ray cluster."""

    ranks: tuple[int, ...] = RANKS
    epochs: float | None = None
    max_trials: int | None = None
    budget: float | None = None
    ray: bool = False


@dataclass(frozen=True)
class Outcome:
    """``folder`` holds sweep.json, sweep.md and, where matplotlib is installed, sweep.png. ``drawn``: it does."""

    folder: Path
    record: SweepRecord
    drawn: bool


# --- trials ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One rank of a sweep, ready to train."""

    prepared: Prepared

    @property
    def rank(self) -> int:
        return self.prepared.config.task.train.rank

    @property
    def folder(self) -> Path:
        return run_folder(self.prepared)

    @property
    def complete(self) -> bool:
        done = is_done(self.folder / "train", self.prepared.train_key)
        return done and (self.folder / "adapter").exists()

    @cached_property
    def steps(self) -> StepPlan:
        return StepPlan(self.prepared.train_rows, self.prepared.config.task.train)

    def evaluations(self) -> list[dict[str, Any]]:
        """What was evaluated so far, one event a step, in order."""
        return list({event["step"]: event for event in evaluations(self.folder)}.values())

    def items(self, step: int, kind: str = "items") -> Path:
        return self.folder / "train" / "evaluations" / f"step-{step:08d}.{kind}.jsonl"

    def curve(self) -> Curve:
        complete = self.complete  # asked first: another process may be training
        points = [self.measured(event["step"]) for event in self.evaluations()]
        if complete and not points:
            raise InputError(
                "the training log of this run holds no evaluation", where=str(self.folder / "train" / "log.jsonl"),
                fix="restore it, or remove the run's folder; the same command makes it again",
            )  # fmt: skip
        return Curve(self.rank, tuple(points), complete)

    def measured(self, step: int) -> Measurement:
        """The primary metric of the evaluation after ``step`` steps."""
        asked = self.prepared.valid[: self.prepared.config.task.train.eval_items]
        return measurement_of(self.prepared, self.items(step), asked)

    def record(self) -> RunRecord | None:
        return records.load(self.folder / "train" / "run.json", RunRecord) if self.complete else None

    def forgetting(self, step: int) -> list[TextDivergence] | None:
        """KL from the base after ``step`` steps, text by text; None if it was not measured."""
        path = self.items(step, "divergence")
        if not path.exists():
            return None
        names = TextDivergence.__dataclass_fields__
        return [TextDivergence(**{name: row[name] for name in names}) for row in read_jsonl(path)]


def trial_of(prepared: Prepared, rank: int, epochs: float | None) -> Trial:
    """The run with this rank. An alpha that the task sets stays, its default follows the rank."""
    config = prepared.config.settle("train.rank", rank, "sweep")
    if prepared.config.origins["train.alpha"].startswith("default"):
        config = config.settle("train.alpha", 2.0 * rank, "default 2*rank")
    if epochs is not None:
        config = config.settle("train.epochs", float(epochs), "sweep")
    if config.task.train.eval_every != "epoch":
        config = config.settle("train.eval_every", "epoch", "sweep")
    return Trial(replace(prepared, config=config))


def plan_trials(prepared: Prepared, request: SweepRequest) -> tuple[Trial, ...]:
    """The trials from the lowest rank up. :class:`InputError` for ranks that are none."""
    ranks = sorted(request.ranks)
    if not ranks or ranks[0] < 1 or len(set(ranks)) < len(ranks):
        raise InputError(
            "these are no ranks to sweep", where="--ranks", expected="different whole numbers from 1",
            got=",".join(map(str, request.ranks)),
        )  # fmt: skip
    return tuple(trial_of(prepared, rank, request.epochs) for rank in ranks[: request.max_trials])


# --- one trial ---------------------------------------------------------------------------------------------------


def train_trial(session: Session, trial: Trial, go_on: Callable[[], bool], stop: Callable[[], bool]) -> bool:
    """Train ``trial``, or go on; ``go_on`` is asked after each evaluation that is on disk. Returns whether it ran to
    its end. :class:`~tunegate.engine.train.Interrupted` if ``stop`` said so."""
    session.turn_to(trial.prepared)
    run, peak = open_run(trial.prepared, latest=False), planning.peak_rss()
    planned = planning.begin(trial.prepared, run, session.reporter, tested=False)
    evaluated, halted = False, False

    def watch(step: int) -> None:
        nonlocal evaluated
        evaluated = True
        measure_forgetting(session, trial.items(step, "divergence"))

    def halt() -> bool:
        nonlocal evaluated, halted
        if evaluated:
            evaluated, halted = False, not go_on()
        return halted or stop()

    try:
        record = steps.train_adapter(session, run, halt, watch)
    except Interrupted:
        if not halted:
            raise
        return False
    planning.finish(planned, run, record, peak)
    return True


def measure_forgetting(session: Session, path: Path) -> None:
    """KL(base || adapter in place) on the neutral texts, one line a text."""
    settings, texts = session.prepared.config.task.train, neutral_texts()
    model = Model(session.runner, session.prepared.base.renderer, settings.tokens_per_batch)
    with session.reporter.progress("adapter on neutral text", len(texts)) as advance:
        found = divergence(model, session.injection, texts, advance)
    write_jsonl(path, [{"row_id": one.text, **vars(one)} for one in found])


def finish_trial(session: Session, trial: Trial) -> None:
    """What a complete trial still lacks: forgetting at its kept step (a run of ``tunegate run`` has none) and, where
    the task asks for it, general ability beside the base's. What is there is not measured again."""
    record = trial.record()
    assert record is not None
    session.turn_to(trial.prepared)
    path = trial.items(record.best_step, "divergence")
    if not path.exists():
        session.use_adapter(trial.folder / "adapter", adapter_hash(trial.folder / "adapter"))
        measure_forgetting(session, path)
    kept.regression(session, trial.folder)


# --- the sweep ---------------------------------------------------------------------------------------------------


def decide(trials: Sequence[Trial]) -> Climb:
    """What the folders of ``trials`` decide."""
    return climb([trial.curve() for trial in trials], trials[0].prepared.policy.confidence)


def sweep(config: Config, reporter: Reporter, request: SweepRequest, *, stop: Callable[[], bool]) -> Outcome:
    """Train what decides, and leave the result in ``runs/NAME/sweep-KEY``."""
    from tunegate.pipeline.sweep_report import build_record, write_report

    started = time.monotonic()
    if request.ray:
        from tunegate.pipeline.sweep_ray import check_ray

        check_ray()
    prepared = prepare(config, reporter)
    trials = plan_trials(prepared, request)
    root = prepared.config.run_dir

    def over() -> bool:
        return request.budget is not None and time.monotonic() - started > 60 * request.budget

    with owned(root):
        session = Session(trials[0].prepared, reporter)
        _check_largest(session, trials)
        if request.ray:
            from tunegate.pipeline.sweep_ray import climb_on_ray

            climb_on_ray(session, trials, over, stop)
        else:
            _climb_here(session, trials, over, stop)
        folder = root / f"sweep-{short(hash_json([trial.prepared.run_key for trial in trials]))}"
        record = build_record(trials, decide(trials), folder)
        drawn = write_report(folder, record)
    return Outcome(folder, record, drawn)


def _check_largest(session: Session, trials: Sequence[Trial]) -> None:
    """Refuse a rank that does not fit base or memory before the first one is trained."""
    last = trials[-1]
    if last.complete or decide(trials).next is None:
        return
    if last.prepared.config.task.train.backend == "native":
        planning.check_fit(planning.predict(planning.plan_prepared(last.prepared, tested=False)))
    session.check_adapter(adapter_spec(last.prepared.config.task.train))


def _climb_here(session: Session, trials: Sequence[Trial], over: Callable[[], bool], stop: Callable[[], bool]) -> None:
    """One rank after another until nothing is left to decide, or the time is."""
    by_rank = {trial.rank: trial for trial in trials}
    told: set[int] = set()
    while True:
        found = decide(trials)
        for trial in trials:
            if trial.complete and trial.rank not in told and not over():
                told.add(trial.rank)
                finish_trial(session, trial)
        if found.next is None or over():
            return
        rank = found.next
        session.reporter.line(f"rank {rank}: {_where(by_rank[rank])}")

        def go_on(rank: int = rank) -> bool:
            return decide(trials).next == rank

        try:
            if not train_trial(session, by_rank[rank], go_on, lambda: stop() or over()):
                session.reporter.line(f"rank {rank}: pruned, it is not ahead of the lower rank")
        except Interrupted:
            if stop() or not over():
                raise
            session.reporter.line(f"rank {rank}: the budget is used up; the same command goes on from there")


def _where(trial: Trial) -> str:
    done = len(trial.evaluations())
    ends = len(set(trial.steps.ends))
    return f"{trial.steps.total} steps, {ends} evaluations" + (f", {done} of them done" if done else "")
