"""A sweep's trials as tasks of a Ray cluster, all ranks at once.

Each task trains one rank in its run folder, as a sweep on one machine does. The driver looks at the folders and asks
the same :func:`~tunegate.pipeline.sweep.decide`; once nothing is left to decide it tells the other tasks to stop
through an actor, and they stop after their step with a checkpoint. A task that dies is started again by Ray and goes
on from its checkpoint. A rank is pruned only once the lower one has ended.

All nodes must see the task, its data, the base and the run folder under the same paths, and have this version of
tunegate; a node that prepares another run refuses. It starts a local Ray where no cluster is found (``RAY_ADDRESS``).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tunegate.config import Config
from tunegate.engine.train import Interrupted
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.model.loading import choose_device
from tunegate.pipeline import kept
from tunegate.pipeline.folders import owned
from tunegate.pipeline.prepare import prepare
from tunegate.pipeline.reporter import Silent
from tunegate.pipeline.session import Session
from tunegate.pipeline.sweep import Trial, decide, finish_trial, train_trial, trial_of

POLL = 1.0  # seconds between looks at the folders
PATIENCE = 120.0  # seconds for tasks to write their checkpoints after they were told to stop
PASSED_ON = ("TUNEGATE_HOME", "TUNEGATE_KERNELS", "TUNEGATE_CPU_LEVEL", "GOMP_SPINCOUNT", "HF_HOME", "HF_HUB_OFFLINE")


def check_ray() -> None:
    """:class:`InputError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "a sweep on a Ray cluster needs a package that is not installed", where="--ray", got="no ray",
            fix="pip install 'tunegate[ray]', or leave --ray out: ranks are trained one after another",
        )  # fmt: skip


class Board:
    """Who is to stop; an actor of its own, so that the driver's word reaches every node."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()

    def stop(self, ranks: Sequence[int]) -> None:
        self.ranks |= set(ranks)

    def stopped(self, rank: int) -> bool:
        return rank in self.ranks


def climb_on_ray(session: Session, trials: Sequence[Trial], over: Callable[[], bool], stop: Callable[[], bool]) -> None:
    """Train every trial that may still decide something. :class:`TunegateError` with the problems of the first trial
    that fails; the others are stopped."""
    import ray

    if decide(trials).next is None:
        _finish_all(session, trials, over)
        return
    prepared, reporter = trials[0].prepared, session.reporter
    if prepared.regression is not None:  # once, here: the tasks find it done
        kept.base_ability(session, prepared.regression)
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        board = ray.remote(Board).options(num_cpus=0).remote()
        cores, asked = _share(ray.cluster_resources(), trials)
        reporter.line(f"Ray: {len(ray.nodes())} nodes, {cores:g} CPUs a trial")
        remote = ray.remote(max_retries=2)(_train)
        waiting = {}
        for trial in trials:
            if not trial.complete:
                task = remote.options(**asked).remote(
                    prepared.config, trial.rank, trial.prepared.config.task.train.epochs, trial.prepared.run_key, board,
                    int(cores), {name: os.environ[name] for name in PASSED_ON if name in os.environ},
                )  # fmt: skip
                waiting[task] = trial
        try:
            _follow(ray, waiting, trials, over, stop, reporter)
        finally:
            _stop_all(ray, board, waiting)
    finally:
        if mine:
            ray.shutdown()
    _finish_all(session, trials, over)


def _share(resources: dict[str, float], trials: Sequence[Trial]) -> tuple[float, dict[str, float]]:
    """CPUs of a trial, and what it asks of Ray."""
    train = trials[0].prepared.config.task.train
    cores = float(train.threads or max(1, int(resources.get("CPU", 1)) // len(trials)))
    gpus = 1.0 if resources.get("GPU", 0) >= 1 and choose_device(train.device) != "cpu" else 0.0
    return cores, {"num_cpus": cores, "num_gpus": gpus}


def _follow(
    ray: Any,
    waiting: dict[Any, Trial],
    trials: Sequence[Trial],
    over: Callable[[], bool],
    stop: Callable[[], bool],
    reporter: Any,
) -> None:
    """Wait for the tasks, say what they reach, and end the rest once nothing is left to decide."""
    seen = {trial.rank: len(trial.evaluations()) for trial in trials}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL)
        for task in done:
            trial = waiting.pop(task)
            _check(ray, task, trial)
        for trial in trials:
            for event in trial.evaluations()[seen[trial.rank] :]:
                seen[trial.rank] += 1
                reporter.line(f"rank {trial.rank}: step {event['step']}, score {event['score']:.4f}")
        if stop():
            raise Interrupted("stopped; the same command goes on from there")
        if over():
            reporter.line("the budget is used up; the same command goes on from there")
            return
        if decide(trials).next is None:
            return


def _stop_all(ray: Any, board: Any, waiting: dict[Any, Trial]) -> None:
    """Tell what still runs to stop, and wait for its checkpoints."""
    if waiting:
        board.stop.remote([trial.rank for trial in waiting.values()])
        _, left = ray.wait(list(waiting), num_returns=len(waiting), timeout=PATIENCE)
        for task in left:
            ray.cancel(task, force=True)


def _check(ray: Any, task: Any, trial: Trial) -> None:
    try:
        problems = ray.get(task)
    except ray.exceptions.RayError as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise TunegateError(
            f"the trial of rank {trial.rank} was lost", where=str(trial.folder), got=f"{type(error).__name__}: {text}",
            fix="the same command goes on from its last checkpoint",
        ) from None  # fmt: skip
    if problems:
        raise TunegateError([Problem(**problem) for problem in problems])


def _finish_all(session: Session, trials: Sequence[Trial], over: Callable[[], bool]) -> None:
    for trial in trials:
        if trial.complete and not over():
            finish_trial(session, trial)


def _train(
    config: Config, rank: int, epochs: float, key: str, board: Any, threads: int, environment: dict[str, str]
) -> list[dict[str, str]]:
    """One trial, in a process of Ray's. Returns its problems as plain data, none if it ended or was stopped."""
    import ray
    import torch

    os.environ.update(environment)  # the process is this task's own
    torch.set_num_threads(threads)
    asked, answer = 0.0, False

    def stopped() -> bool:
        nonlocal asked, answer
        if not answer and time.monotonic() - asked > POLL:
            asked, answer = time.monotonic(), bool(ray.get(board.stopped.remote(rank)))
        return answer

    try:
        if stopped():
            return []
        trial = trial_of(prepare(config, Silent()), rank, epochs)
        if trial.prepared.run_key != key:
            raise InputError(
                "this Ray node would train another run", where=socket.gethostname(), expected=key,
                got=trial.prepared.run_key,
                fix="the task, its data, the base and tunegate's version must be the same on all nodes",
            )  # fmt: skip
        with owned(trial.folder):
            session = Session(trial.prepared, Silent())
            if train_trial(session, trial, lambda: True, stopped):
                finish_trial(session, trial)
    except Interrupted:
        return []
    except TunegateError as error:
        return [asdict(problem) for problem in error.problems]
    return []
