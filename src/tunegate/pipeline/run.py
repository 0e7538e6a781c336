"""The steps in order: check, baseline, train, test, decide, card.

Before the first training step the run folder holds the gate policy with its hash; the policy is part of the run's
key, so another policy is another run. Every step is resumable and none is redone unless its inputs changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.config import Config
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.judge.providers import open_provider
from tunegate.files import canonical_json, hash_json, read_json, update_json, write_json
from tunegate.gate import Policy, foreseen
from tunegate.pipeline import evidence, judging, kept, planning, steps
from tunegate.pipeline.bar import settle_bar
from tunegate.pipeline.card import MANIFEST, check_adapter, versions, write_card
from tunegate.pipeline.folders import STEP, Ledger, git_state, is_done, newest_differs, now, owned, short
from tunegate.pipeline.prepare import Prepared, prepare
from tunegate.pipeline.questions import JUDGE, REGRESSION, SAFETY, Judge, load_regression, load_safety, switch_on
from tunegate.pipeline.registering import enter, open_for
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.session import Session, adapter_spec
from tunegate.records import AdapterCard, Comparison, Decision, EvalRecord, RunRecord


@dataclass(frozen=True)
class Outcome:
    """A finished run. ``card`` holds records, comparisons and the decision; ``version`` is what it is called in the
    registry that the task names."""

    folder: Path
    adapter: Path
    card: AdapterCard
    baselines: dict[str, EvalRecord]
    version: str | None = None

    @property
    def decision(self) -> Decision:
        return self.card.decision


def run_folder(prepared: Prepared) -> Path:
    return prepared.config.run_dir / f"run-{short(prepared.run_key)}"


def open_run(prepared: Prepared, *, latest: bool = True) -> Path:
    """Create the run's folder with its policy and settings, or check that the stored policy is this one. ``latest``:
    it becomes the task's newest run.

    ``run.json`` says what the run began with, code included, and is not changed afterwards.
    """
    folder, config = run_folder(prepared), prepared.config
    if (folder / "policy.json").exists():
        check_policy(prepared, folder)
    else:
        write_json(folder / "policy.json", {"policy": asdict(prepared.policy), "hash": prepared.policy.hash()})
    if not (folder / "run.json").exists():
        begun = {
            "key": prepared.run_key,
            "task": config.task.model_dump(mode="json"),
            "origins": dict(config.origins),
            "base": prepared.base.card(),
            "data": prepared.data.files,
            "versions": versions(),
            "git": git_state(config.folder),
            "folder": str(config.folder),
            "begun": now(),
        }
        write_json(folder / "run.json", begun)
    update_json(folder / "check.json", prepared.report.to_json())
    if latest:
        update_json(config.run_dir / "latest.json", {"run": folder.name})
    return folder


def check_policy(prepared: Prepared, folder: Path) -> None:
    """:class:`TunegateError` if the policy that was stored before training is not the one of this run."""
    stored, expected = folder / "policy.json", prepared.policy.hash()
    try:
        found = read_json(stored)
        same = found["hash"] == expected and Policy(**found["policy"]).hash() == expected
    except (OSError, ValueError, KeyError, TypeError, InputError):
        same = False
    if not same:
        raise TunegateError(
            "the stored gate policy was changed after this run began",
            where=str(stored),
            expected=f"the policy with hash {expected}",
            fix="restore the file, or change `gate:` in the task file: another policy makes a new run",
        )


def run(config: Config, reporter: Reporter, *, reopen: str | None = None, stop: Callable[[], bool]) -> Outcome:
    """Everything from the task file to the card. ``stop`` is asked between training steps."""
    prepared = _prepared(config, reporter)
    need_test(prepared)
    registry = open_for(prepared)  # what would keep the adapter out is said before hours of training
    if prepared.judge is not None and not (run_folder(prepared) / JUDGE / STEP).exists():
        open_provider(prepared.judge.model)  # its key is there, before hours of training
    with owned(prepared.config.run_dir):
        session = Session(prepared, reporter)
        run, peak = open_run(prepared), planning.peak_rss()
        planned = planning.begin(prepared, run, reporter, tested=True)
        if not is_done(run / "train", prepared.train_key):
            session.check_adapter(adapter_spec(prepared.config.task.train))  # before minutes of baselines
        baselines = measure_baselines(session)
        bar = settle_bar(prepared, run, baselines, reporter)
        record = steps.train_adapter(session, run, stop)
        ledger = Ledger(prepared.config.run_dir)
        evaluated, comparisons = steps.test(session, run, bar, ledger, reopen)
        steps.recall(session, run)
        kept.regression(session, run)
        kept.safety(session, run)
        judging.judge_run(prepared, run, reporter)
        card = _publish(prepared, run, record, evaluated, comparisons)
        planning.finish(planned, run, record, peak)
        version = enter(registry, run / "adapter", reporter) if registry else None
    return Outcome(run, run / "adapter", card, baselines, version)


def _publish(
    prepared: Prepared,
    run: Path,
    record: RunRecord,
    evaluated: dict[str, EvalRecord],
    comparisons: dict[str, Comparison],
) -> AdapterCard:
    """Decide from what lies in ``run``, and write the card beside the adapter."""
    decision = steps.judge(prepared, run, record, evaluated["adapter"], comparisons)
    openings = Ledger(prepared.config.run_dir).of(prepared.test_hash)
    return write_card(prepared, run, record, list(evaluated.values()), list(comparisons.values()), decision, openings)


def _prepared(config: Config, reporter: Reporter) -> Prepared:
    """The task ready to run; says what its settings are and what the check found."""
    reporter.line("checking data and base")
    prepared = prepare(config, reporter)
    for line in describe_settings(prepared.config):
        reporter.line(line)
    for finding in prepared.report.findings:
        if finding.level == "warning":
            reporter.line(f"warning: {finding.message}")
    failing = foreseen(prepared.policy, evidence.of_data(prepared))
    if failing:
        rules = ", ".join(f"{rule} ({got})" for rule, got in failing.items())
        reporter.line(f"warning: the gate will hold this run, whatever it learns: {rules}; `tunegate check` lists them")
    return prepared


def need_test(prepared: Prepared) -> None:
    if not prepared.data.splits.test:
        raise InputError(
            "there are no test rows, and the decision needs some",
            where="data.test_fraction",
            fix="name a file as `data.test`, or raise test_fraction above 0; `tunegate train` trains without",
        )


def describe_settings(config: Config) -> list[str]:
    """What was set or worked out, with its origin, a line per section; plain defaults are counted."""
    told: dict[str, list[str]] = {}
    defaults = 0
    for key, value, origin in config.items():
        section, _, name = key.rpartition(".")
        if origin == "default":
            defaults += 1
        else:
            told.setdefault(section or "task file", []).append(f"{name}={_short_value(value)} ({origin})")
    lines = [f"{section}: {' '.join(settings)}" for section, settings in told.items()]
    return [*lines, f"{defaults} more settings are plain defaults; `tunegate show` with the task file lists them"]


def _short_value(value: Any) -> str:
    if isinstance(value, (list, dict)) and len(canonical_json(value)) > 40:
        return f"({len(value)} of them)"
    text = value if isinstance(value, str) and value else canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def measure_baselines(session: Session) -> dict[str, EvalRecord]:
    prepared = session.prepared
    return steps.baseline(session, prepared.config.run_dir / f"baseline-{short(prepared.baseline_key)}")


def train_only(config: Config, reporter: Reporter, *, stop: Callable[[], bool]) -> tuple[Path, RunRecord]:
    """Check and train; no baseline, no test. ``run`` goes on from here."""
    prepared = _prepared(config, reporter)
    with owned(prepared.config.run_dir):
        session = Session(prepared, reporter)
        folder, peak = open_run(prepared), planning.peak_rss()
        planned = planning.begin(prepared, folder, reporter, tested=False)
        record = steps.train_adapter(session, folder, stop)
        planning.finish(planned, folder, record, peak)
        return folder, record


def decide_again(config: Config, reporter: Reporter) -> tuple[Path, Decision]:
    """Apply the run's stored policy to its stored records, those of a review included, and write the card anew if the
    decision is another; nothing is scored."""
    prepared = prepare(config, reporter)
    folder = run_folder(prepared)
    if not (folder / "test" / STEP).exists():
        raise InputError(
            "there is no tested run of this task with these settings and this gate policy",
            where=str(folder),
            got=newest_differs(prepared.config.run_dir, prepared.config.task.model_dump(mode="json")),
            fix="`tunegate run` makes it; a policy counts only for runs that began with it",
        )
    with owned(prepared.config.run_dir):
        check_policy(prepared, folder)
        steps.check_unchanged(folder)
        record = records.load(folder / "train" / "run.json", RunRecord)
        return folder, _publish(prepared, folder, record, *steps.tested(folder)).decision


@dataclass(frozen=True)
class EvalRequest:
    """What ``eval`` scores: the run's own adapter unless ``adapter`` names a folder or ``plain_base`` is set."""

    adapter: Path | None = None
    plain_base: bool = False
    split: str = "valid"
    reopen: str | None = None
    allow_base_mismatch: bool = False


def _adapter_of(prepared: Prepared, request: EvalRequest) -> tuple[Path, AdapterCard]:
    """The folder and card of the adapter that ``request`` is about."""
    adapter = request.adapter or run_folder(prepared) / "adapter"
    if not (adapter / MANIFEST).exists() and request.adapter is None:
        raise InputError(
            "there is no finished adapter of this task with these settings", where=str(adapter),
            got=newest_differs(prepared.config.run_dir, prepared.config.task.model_dump(mode="json")),
            fix="`tunegate run` makes one; --adapter names another, --plain-base scores the base",
        )  # fmt: skip
    return adapter, check_adapter(adapter, prepared.base, allow_base_mismatch=request.allow_base_mismatch)


def evaluate_kept(
    config: Config, reporter: Reporter, request: EvalRequest, families: Sequence[str]
) -> dict[str, tuple[Path, kept.Kept]]:
    """Measure ``families`` (regression, safety, judge) on an adapter beside its base, or on the base alone; where a
    section of the task is off, at its defaults. Each comes with the folder that holds its items."""
    prepared = prepare(config, reporter)
    asking = prepared.config
    for family in families:
        asking = switch_on(asking, family, f"--{family}")
    ability = load_regression(asking) if REGRESSION in families else None
    refusals = load_safety(asking) if SAFETY in families else None
    asked_judge = prepared.judge if JUDGE in families else None
    if asked_judge is not None:
        open_provider(asked_judge.model)
    root, session = prepared.config.run_dir, Session(prepared, reporter)
    found: dict[str, tuple[Path, kept.Kept]] = {}
    with owned(root):
        if request.plain_base:
            if ability is not None:
                measured, folder = kept.base_ability(session, ability)
                found[REGRESSION] = folder, measured
            if refusals is not None:
                asked, folder = kept.base_refusals(session, refusals)
                found[SAFETY] = folder, asked
            if asked_judge is not None:
                found[JUDGE] = _judged(session, asked_judge, request, None, "")
            return found
        adapter, card = _adapter_of(prepared, request)
        digest, told = card.adapter["hash"], {"base_mismatch_allowed": request.allow_base_mismatch}
        if ability is not None:
            folder = root / f"eval-{short(hash_json([ability.key, digest]))}"
            kept_ability = kept.compare_ability(session, ability, adapter, digest, folder)
            found[REGRESSION] = folder, replace(kept_ability, settings={**kept_ability.settings, **told})
        if refusals is not None:
            folder = root / f"eval-{short(hash_json([refusals.key, digest]))}"
            kept_refusals = kept.compare_refusals(session, refusals, adapter, digest, folder)
            found[SAFETY] = folder, replace(kept_refusals, settings={**kept_refusals.settings, **told})
        if asked_judge is not None:
            folder, judged = _judged(session, asked_judge, request, adapter, digest)
            found[JUDGE] = folder, replace(judged, settings={**judged.settings, **told})
    for family, (folder, record) in found.items():
        records.save(folder / f"{family}.json", record)
    return found


def _judged(
    session: Session, asked: Judge, request: EvalRequest, adapter: Path | None, digest: str
) -> tuple[Path, records.JudgeRecord]:
    """The judge on new answers to validation items, or on those that the run's test left."""
    if request.split == "valid":
        return judging.judge_valid(session, asked, adapter, digest)
    if request.adapter is not None or request.plain_base:
        fix = "leave out --adapter and --plain-base, or --split test"
        raise InputError("the judge reads the answers that the run's own test left", where="--split test", fix=fix)
    run = run_folder(session.prepared)
    record = judging.judge_run(session.prepared, run, session.reporter)
    assert record is not None
    return run / JUDGE, record


def evaluate_only(config: Config, reporter: Reporter, request: EvalRequest) -> tuple[Path, EvalRecord]:
    """Score one subject on one split; the test split goes through the ledger like any other opening."""
    prepared = prepare(config, reporter)
    if request.split == "test":
        need_test(prepared)
    root = prepared.config.run_dir
    session = Session(prepared, reporter)
    subject, run_id, digest = "base", "base", ""
    with owned(root):
        if not request.plain_base:
            adapter, card = _adapter_of(prepared, request)
            digest = card.adapter["hash"]
            subject, run_id = "adapter", card.adapter["run"]
        items = prepared.data.splits.test if request.split == "test" else prepared.valid
        ledger = Ledger(root)
        if request.split == "test":
            ledger.open(run_id, prepared.test_hash, request.reopen)
        if not request.plain_base:
            session.use_adapter(adapter, digest)
        task = prepared.scorer.task.model_dump(mode="json")
        key = hash_json([prepared.base_key, task, digest, request.split, [e.content_hash for e in items]])
        folder = root / f"eval-{short(key)}"
        found = session.evaluate(items, subject, request.split, folder / f"{subject}-{request.split}.items.jsonl")
        settings = {**found.record.settings, "base_mismatch_allowed": request.allow_base_mismatch}
        record = replace(found.record, settings=settings)
        records.save(folder / f"{subject}-{request.split}.json", record)
        if request.split == "test":
            ledger.close(run_id, prepared.test_hash)
    return folder, record
