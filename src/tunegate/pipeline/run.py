"""The steps in order: check, baseline, train, test, decide, card.

Before the first training step the run folder holds the gate policy with its hash; the policy is part of the run's
key, so another policy is another run. Every step is resumable and none is redone unless its inputs changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tunegate import records
from tunegate.config import Config
from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_json, read_json, write_json
from tunegate.gate import Policy
from tunegate.pipeline import steps
from tunegate.pipeline.card import MANIFEST, check_adapter, write_card
from tunegate.pipeline.folders import Ledger, owned, short
from tunegate.pipeline.prepare import Prepared, prepare
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.session import Session
from tunegate.records import AdapterCard, Decision, EvalRecord, RunRecord


@dataclass(frozen=True)
class Outcome:
    """A finished run. ``card`` holds records, comparisons and the decision."""

    folder: Path
    adapter: Path
    card: AdapterCard
    baselines: dict[str, EvalRecord]

    @property
    def decision(self) -> Decision:
        return self.card.decision


def run_folder(prepared: Prepared) -> Path:
    return prepared.config.run_dir / f"run-{short(prepared.run_key)}"


def open_run(prepared: Prepared) -> Path:
    """Create the run's folder with its settings and policy, or check that the stored policy is this one."""
    folder = run_folder(prepared)
    policy = {"policy": asdict(prepared.policy), "hash": prepared.policy.hash()}
    stored = folder / "policy.json"
    if stored.exists():
        if (
            read_json(stored)["hash"] != policy["hash"]
            or Policy(**read_json(stored)["policy"]).hash() != policy["hash"]
        ):
            raise TunegateError(
                "the stored gate policy was changed after this run began",
                where=str(stored),
                fix="restore it, or delete the run folder; a new policy makes a new run",
            )
    else:
        write_json(stored, policy)
    config = prepared.config
    write_json(
        folder / "run.json",
        {
            "key": prepared.run_key,
            "task": config.task.model_dump(mode="json"),
            "origins": dict(config.origins),
            "base": prepared.base.card(),
            "data": prepared.data.files,
        },
    )
    write_json(folder / "check.json", prepared.report.to_json())
    write_json(config.run_dir / "latest.json", {"run": folder.name})
    return folder


def run(config: Config, reporter: Reporter, *, reopen: str | None = None, stop: Callable[[], bool]) -> Outcome:
    """Everything from the task file to the card. ``stop`` is asked between training steps."""
    reporter.line("checking data and base")
    prepared = prepare(config, reporter)
    show_check(prepared, reporter)
    with owned(prepared.config.run_dir):
        session = Session(prepared, reporter)
        run = open_run(prepared)
        baselines = measure_baselines(session)
        record = steps.train_adapter(session, run, stop)
        ledger = Ledger(prepared.config.run_dir)
        evaluated, comparisons = steps.test(session, run, steps.best_prompt(prepared, baselines), ledger, reopen)
        decision = steps.judge(prepared, run, record, evaluated["adapter"], comparisons)
        card = write_card(
            prepared,
            run,
            record,
            list(evaluated.values()),
            list(comparisons.values()),
            decision,
            ledger.of(prepared.test_hash),
        )
    return Outcome(run, run / "adapter", card, baselines)


def show_check(prepared: Prepared, reporter: Reporter) -> None:
    """Say what the check found; errors stop the run."""
    errors = [f for f in prepared.report.findings if f.level == "error"]
    for finding in prepared.report.findings:
        if finding.level == "warning":
            reporter.line(f"warning: {finding.message} ({finding.count})")
    if errors:
        raise InputError(
            "; ".join(f"{f.message} ({f.count})" for f in errors), where="data", fix="`tunegate check` shows the rows"
        )


def measure_baselines(session: Session) -> dict[str, EvalRecord]:
    prepared = session.prepared
    return steps.baseline(session, prepared.config.run_dir / f"baseline-{short(prepared.baseline_key)}")


def train_only(config: Config, reporter: Reporter, *, stop: Callable[[], bool]) -> tuple[Path, RunRecord]:
    """Check and train; no baseline, no test. ``run`` goes on from here."""
    prepared = prepare(config, reporter)
    show_check(prepared, reporter)
    with owned(prepared.config.run_dir):
        session = Session(prepared, reporter)
        folder = open_run(prepared)
        return folder, steps.train_adapter(session, folder, stop)


def decide_again(config: Config, reporter: Reporter) -> tuple[Path, Decision]:
    """Apply the run's stored policy to its stored records; nothing is scored."""
    prepared = prepare(config, reporter)
    folder = run_folder(prepared)
    if not (folder / "test" / "step.json").exists():
        raise InputError(
            "there is no tested run of this task with these settings and this gate policy",
            where=str(folder),
            fix="`tunegate run` makes it; a policy counts only for runs that began with it",
        )
    open_run(prepared)
    evaluated = records.load(folder / "test" / "adapter.json", EvalRecord)
    compared = {name: records.Comparison(**c) for name, c in read_json(folder / "test" / "comparisons.json").items()}
    record = records.load(folder / "train" / "run.json", RunRecord)
    return folder, steps.judge(prepared, folder, record, evaluated, compared)


@dataclass(frozen=True)
class EvalRequest:
    """What ``eval`` scores: the run's own adapter unless ``adapter`` names a folder or ``plain_base`` is set."""

    adapter: Path | None = None
    plain_base: bool = False
    split: str = "valid"
    reopen: str | None = None
    allow_base_mismatch: bool = False


def evaluate_only(config: Config, reporter: Reporter, request: EvalRequest) -> tuple[Path, EvalRecord]:
    """Score one subject on one split; the test split goes through the ledger like any other opening."""
    prepared = prepare(config, reporter)
    root = prepared.config.run_dir
    session = Session(prepared, reporter)
    subject, run_id, digest = "base", "base", ""
    with owned(root):
        if not request.plain_base:
            adapter = request.adapter or run_folder(prepared) / "adapter"
            if not (adapter / MANIFEST).exists() and request.adapter is None:
                raise InputError(
                    "this task has no finished adapter yet", where=str(adapter),
                    fix="`tunegate run` makes one; --adapter names another, --plain-base scores the base",
                )  # fmt: skip
            card = check_adapter(adapter, prepared.base, allow_base_mismatch=request.allow_base_mismatch)
            digest = card.adapter["hash"]
            subject, run_id = "adapter", card.adapter["run"]
            session.use_adapter(adapter, digest)
        items = prepared.data.splits.test if request.split == "test" else prepared.valid
        ledger = Ledger(root)
        if request.split == "test":
            ledger.open(run_id, prepared.test_hash, request.reopen)
        key = hash_json([prepared.base_key, prepared.scorer.task.model_dump(mode="json"), digest, request.split])
        folder = root / f"eval-{short(key)}"
        found = session.evaluate(items, subject, request.split, folder / f"{subject}-{request.split}.items.jsonl")
        settings = {**found.record.settings, "base_mismatch_allowed": request.allow_base_mismatch}
        record = replace(found.record, settings=settings)
        records.save(folder / f"{subject}-{request.split}.json", record)
        if request.split == "test":
            ledger.close(run_id, prepared.test_hash)
    return folder, record
