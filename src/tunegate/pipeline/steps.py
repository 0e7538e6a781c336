"""The steps of a run. Each takes what it needs, works in one folder, and leaves records there; none prints.

A step that is done for the same inputs is read back instead of run. ``train`` resumes inside its folder. ``test``
opens the test set in the ledger before its first item.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.adapter.files import adapter_hash, save_adapter
from tunegate.adapter.inject import left_out
from tunegate.data.split import in_order
from tunegate.engine.backends import find_backend
from tunegate.engine.train import Hooks, TrainResult, mean_loss
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.measures import save_measures
from tunegate.evaluation.memorised import MEMORISED, recall_measures
from tunegate.evaluation.memorised import recall as memorised
from tunegate.evaluation.prompts import AS_IS, Prompt
from tunegate.evaluation.statistics import compare
from tunegate.files import (
    explain_os_error,
    hash_json,
    read_json,
    read_jsonl,
    update_json,
    write_json,
    write_jsonl,
    write_text,
)
from tunegate.gate import Evidence, decide
from tunegate.pipeline import evidence
from tunegate.pipeline.folders import STEP, Ledger, begin, finish, is_done, short
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.session import Session, adapter_spec
from tunegate.records import Comparison, Decision, EvalRecord, RunRecord

RECALL_ROWS = 200  # training rows and validation rows asked to see what is recited
LOSS_ROWS = 200  # rows over which training and validation loss are measured for the over-fitting rule


def baseline(session: Session, folder: Path) -> dict[str, EvalRecord]:
    """The base under every candidate prompt, on validation items. Keys are prompt names, best first.

    The folder's name holds the key, so prompts scored before a kill are kept.
    """
    prepared = session.prepared
    if not is_done(folder, prepared.baseline_key):
        begin(folder, keep=True)
        with session.as_base():
            for prompt in prepared.prompts:
                if (folder / f"{prompt.name}.json").exists():
                    continue
                items = folder / f"{prompt.name}.items.jsonl"
                subject = "base" if prompt.name == AS_IS else f"prompt {prompt.name}"
                found = session.evaluate(prepared.baseline_items, subject, "valid", items, prompt)
                records.save(folder / f"{prompt.name}.json", found.record)
                session.reporter.event({"event": "baseline", "prompt": prompt.name, "score": found.record.score.value})
        finish(folder, prepared.baseline_key)
    found_records = {p.name: records.load(folder / f"{p.name}.json", EvalRecord) for p in prepared.prompts}
    return dict(sorted(found_records.items(), key=lambda pair: -pair[1].score.value))


def train_adapter(
    session: Session, run: Path, stop: Callable[[], bool], watch: Callable[[int], None] = lambda step: None
) -> RunRecord:
    """Train, or go on training, in ``run/train``; the best adapter lands in ``run/adapter``. ``watch(step)`` is called
    after each evaluation, with that step's adapter in place."""
    prepared, folder = session.prepared, run / "train"
    if is_done(folder, prepared.train_key) and (run / "adapter").exists():
        check_unchanged(run)
        return records.load(folder / "run.json", RunRecord)
    begin(folder, keep=True)
    settings = prepared.config.task.train
    injection = session.start_adapter(adapter_spec(settings), settings.seed)
    log = _Log(folder / "log.jsonl", session)

    def evaluate(step: int) -> tuple[float, dict[str, Any]]:
        items = folder / "evaluations" / f"step-{step:08d}.items.jsonl"
        examples = prepared.valid[: settings.eval_items]
        found = session.evaluate(examples, "adapter", "valid", items)
        valid_loss = mean_loss(session.runner, prepared.valid_rows[:LOSS_ROWS], settings.tokens_per_batch)
        if not math.isfinite(valid_loss):
            raise TunegateError(
                f"the validation loss is {valid_loss} at step {step}",
                where="train.lr",
                got=f"{settings.lr:g}",
                fix="lower it; the last checkpoint before this step is kept",
            )
        watch(step)
        score = found.record.score
        return score.value, {"low": score.low, "high": score.high, "n": score.n, "valid_loss": valid_loss,
                             "stop_rate": found.record.stop_rate,
                             "trainable_parameters": injection.trainable}  # fmt: skip

    total = prepared.base.parameters + injection.trainable  # a quantized base holds codes, not parameters
    session.reporter.line(
        f"training {injection.trainable:,} of {total:,} parameters "
        f"({100 * injection.trainable / total:.2f} %) in {len(injection.modules)} layers, "
        f"{len(prepared.train_rows):,} rows"
    )
    if (unreached := left_out(session.model, injection.spec)) is not None:
        session.reporter.line(unreached)
    with log:
        hooks = Hooks(evaluate, log.report, stop)
        backend = find_backend(settings.backend)
        result = backend(session.runner, injection, prepared.train_rows, settings, folder, prepared.train_key, hooks)
    save_adapter(
        run / "adapter",
        injection,
        base_name=prepared.base.resolved.name,
        revision=prepared.base.resolved.revision if prepared.base.resolved.source == "hub" else None,
    )
    session.adapter_hash = adapter_hash(run / "adapter")
    record = _run_record(session, result)
    records.save(folder / "run.json", record)
    finish(folder, prepared.train_key, adapter=session.adapter_hash)
    return record


def check_unchanged(run: Path) -> None:
    """The adapter is the one that training left."""
    expected, got = read_json(run / "train" / STEP).get("adapter"), adapter_hash(run / "adapter")
    if got != expected:
        raise InputError(
            "the adapter was changed after it was trained",
            where=str(run / "adapter"),
            expected=str(expected),
            got=got,
            fix="restore its files, or remove the folder: the same command makes it again from the last checkpoint",
        )


def _run_record(session: Session, result: TrainResult) -> RunRecord:
    prepared, state, injection = session.prepared, result.state, session.injection
    settings = prepared.config.task.train
    assert injection is not None and state.best_score is not None
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return RunRecord(
        config_hash=prepared.train_key,
        method=settings.method,
        steps=state.step,
        epochs=result.epochs,
        best_step=state.best_step,
        best_score=state.best_score,
        train_loss=mean_loss(session.runner, prepared.train_rows[:LOSS_ROWS], settings.tokens_per_batch),
        valid_loss=mean_loss(session.runner, prepared.valid_rows[:LOSS_ROWS], settings.tokens_per_batch),
        stopped_early=state.stopped_early,
        trainable_parameters=injection.trainable,
        base_parameters=prepared.base.parameters,
        tokens=state.tokens,
        computed_tokens=state.computed_tokens,
        target_tokens=state.target_tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / max(state.seconds, 1e-9),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        device=str(session.runner.device),
        compute_dtype=prepared.base.compute_dtype,
        path=session.runner.path,
    )


class _Log:
    """Training events as JSON lines and as a progress bar. Lines of a killed run after its checkpoint are dropped."""

    def __init__(self, path: Path, session: Session):
        self.path, self.session = path, session
        self.begun = False
        self.bar: Any = None
        self.advance: Callable[[int], None] | None = None

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = self.advance = None

    def report(self, event: dict[str, Any]) -> None:
        reporter = self.session.reporter
        if not self.begun:
            self.begun = True
            self._cut(event["step"] if event["event"] == "resume" else 0)
        if event["event"] == "notice":
            reporter.line(event["text"])
        if event["event"] == "resume":
            reporter.line(f"resuming after step {event['step']}")
        if event["event"] == "step":
            if self.bar is None:
                self.bar = reporter.progress("training", event["of"], event["step"] - 1)
                self.advance = self.bar.__enter__()
            assert self.advance is not None
            self.advance(1)
        if event["event"] == "evaluation":
            self._close()
            mark = "best so far" if event["best"] else "no gain"
            reporter.line(
                f"step {event['step']}: {self.session.prepared.scorer.task.metric} {event['score']:.4f} "
                f"({event['n']} items), valid loss {event['valid_loss']:.4f}, {mark}"
            )
        with explain_os_error(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event) + "\n")
        reporter.event(event)

    def _cut(self, step: int) -> None:
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the line a killed process was writing
                continue
        write_text(self.path, "".join(line + "\n" for line in kept))


def best_prompt(prepared: Prepared, baselines: dict[str, EvalRecord]) -> Prompt:
    """The prompt with the best validation score; the task's own where another is not better."""
    own = baselines[AS_IS].score.value
    name = next(iter(baselines))
    if baselines[name].score.value <= own:
        name = AS_IS
    return next(p for p in prepared.prompts if p.name == name)


def test(
    session: Session, run: Path, prompt: Prompt, ledger: Ledger, reopen: str | None
) -> tuple[dict[str, EvalRecord], dict[str, Comparison]]:
    """Base, best prompt and adapter on the same test items; returns records and adapter-minus-reference."""
    prepared, folder = session.prepared, run / "test"
    digest = adapter_hash(run / "adapter")
    key = hash_json([prepared.run_key, digest, prompt.hash, prepared.test_hash])
    run_id = short(prepared.run_key)
    subjects = {"base": Prompt(AS_IS), "prompt": prompt, "adapter": Prompt(AS_IS)}
    if prompt.name == AS_IS:
        del subjects["prompt"]
    if is_done(folder, key):
        ledger.close(run_id, prepared.test_hash)  # a kill may have come between the scores and this line
    if not is_done(folder, key) or reopen:
        ledger.open(run_id, prepared.test_hash, reopen)
        begin(folder)
        measured = {}
        for subject, wanted in subjects.items():
            items = folder / f"{subject}.items.jsonl"
            session.use_adapter(run / "adapter", digest)
            if subject == "adapter":
                found = session.evaluate(prepared.data.splits.test, subject, "test", items, wanted)
            else:
                with session.as_base():
                    found = session.evaluate(prepared.data.splits.test, subject, "test", items, wanted)
            measured[subject] = found
            records.save(folder / f"{subject}.json", found.record)
        confidence = prepared.policy.confidence
        compared = {
            name: compare(measured["adapter"].primary, measured[name].primary, name, confidence)
            for name in subjects
            if name != "adapter"
        }
        write_json(folder / "comparisons.json", {name: asdict(c) for name, c in compared.items()})
        finish(folder, key)
        ledger.close(run_id, prepared.test_hash)
    return tested(run)


def tested(run: Path) -> tuple[dict[str, EvalRecord], dict[str, Comparison]]:
    """What the test of ``run`` left; no prompt where none was better than the task's own."""
    folder = run / "test"
    subjects = [name for name in ("base", "prompt", "adapter") if (folder / f"{name}.json").exists()]
    evaluated = {name: records.load(folder / f"{name}.json", EvalRecord) for name in subjects}
    return evaluated, {name: Comparison(**c) for name, c in read_json(folder / "comparisons.json").items()}


def recall(session: Session, run: Path) -> None:
    """Ask the adapter training prompts and measure what it recites, if a rule of the policy is about that."""
    prepared, folder = session.prepared, run / "recall"
    rules = [rule.parsed for rule in prepared.policy.rules]
    if not any(rule.matches(f"train.{name}") for rule in rules for name in MEMORISED):
        return
    if not prepared.scorer.generates:
        raise InputError(
            "a rule is about recited answers, and this task generates none",
            where="gate.rules",
            got=prepared.scorer.task.metric,
        )
    digest = adapter_hash(run / "adapter")
    key = hash_json([prepared.run_key, digest, RECALL_ROWS])
    if is_done(folder, key):
        return
    begin(folder)
    session.use_adapter(run / "adapter", digest)
    heard = {}
    train = in_order(prepared.data.splits.train)
    for split, examples in (("train", train), ("valid", prepared.valid)):
        session.evaluate(examples[:RECALL_ROWS], "adapter", split, folder / f"{split}.answers.jsonl")
        rows = read_jsonl(folder / f"{split}.answers.jsonl")
        found = memorised([row["prediction"] for row in rows], [row["reference"] for row in rows])
        heard[split] = len(found.rows)
        write_jsonl(
            folder / f"{split}.items.jsonl",
            [
                {"row_id": f"{i}:{rows[i]['row_id']}", "verbatim": verbatim, "overlap": overlap}
                for i, verbatim, overlap in zip(
                    found.rows, found.verbatim.tolist(), found.overlap.tolist(), strict=True
                )
            ],
        )
    save_measures(folder, recall_measures(heard))
    finish(folder, key)


def judge(
    prepared: Prepared, run: Path, record: RunRecord, adapter: EvalRecord, comparisons: dict[str, Comparison]
) -> Decision:
    """Apply the policy that was stored before training. The prompt is the base where no better prompt was found."""
    leaks = prepared.report.stats["leaks"]["test in train"]
    prompt = comparisons.get("prompt", comparisons["base"])
    decision = decide(
        prepared.policy,
        Evidence(
            adapter=adapter,
            comparisons={"base": comparisons["base"], "prompt": prompt},
            run=record,
            leaked_test_rows=leaks["exact"],
            near_leaks=leaks["near"],
            measures=evidence.collect(prepared, run, record, adapter),
        ),
    )
    update_json(run / "decision.json", records.to_json(decision))
    return decision
