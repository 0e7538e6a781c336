"""The steps that measure what an adapter kept: general ability (``regression``) and refusals (``safety``).

The base is asked once for the same questions and kept beside the runs of the task, like the prompt baseline; the
adapter is asked in its run. Each folder's key covers everything that can change an answer, so a finished one is read
back. A step leaves one line per item, a record that compares adapter and base, and ``measures.json`` for the gate.

It decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tunegate
from tunegate import records
from tunegate.adapter.files import adapter_hash
from tunegate.evaluation.answering import Model
from tunegate.evaluation.divergence import TextDivergence, divergence, neutral_texts
from tunegate.evaluation.measures import save_measures
from tunegate.evaluation.regression import (
    Measured,
    compare_regression,
    measure,
    read_results,
    regression_measures,
    steps,
)
from tunegate.evaluation.safety import Asked, ask, compare_safety, read_attempts, safety_measures
from tunegate.files import hash_json, read_json, write_json, write_jsonl
from tunegate.pipeline.folders import begin, finish, is_done, short
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.questions import REGRESSION, SAFETY, Regression, Safety, guard_of
from tunegate.pipeline.session import Session
from tunegate.records import JudgeRecord, RegressionRecord, SafetyRecord

Kept = Measured | Asked | RegressionRecord | SafetyRecord | JudgeRecord
BASE, ADAPTER, ITEMS, FACTS = "base", "adapter", "items.jsonl", "facts.json"


def regression(session: Session, run: Path) -> RegressionRecord | None:
    """General ability of the run's adapter beside its base's; None if the task does not ask."""
    asked = session.prepared.regression
    if asked is None:
        return None
    digest = adapter_hash(run / ADAPTER)
    return compare_ability(session, asked, run / ADAPTER, digest, run / REGRESSION)


def safety(session: Session, run: Path) -> SafetyRecord | None:
    """Refusals of the run's adapter beside its base's; None if the task does not ask."""
    asked = session.prepared.safety
    if asked is None:
        return None
    digest = adapter_hash(run / ADAPTER)
    return compare_refusals(session, asked, run / ADAPTER, digest, run / SAFETY)


# --- general ability ---------------------------------------------------------------------------------------------


def base_ability(session: Session, asked: Regression) -> tuple[Measured, Path]:
    """The base on every item, measured once for all runs of the task; and the folder that holds it."""
    prepared = session.prepared
    key = hash_json([asked.key, subject_key(prepared)])
    folder = prepared.config.run_dir / f"{REGRESSION}-{short(key)}"
    if not is_done(folder, key):
        begin(folder)
        with session.as_base():
            _save_measured(folder, _measure(session, asked, BASE))
        finish(folder, key)
    return _load_measured(folder, BASE), folder


def compare_ability(session: Session, asked: Regression, adapter: Path, digest: str, folder: Path) -> RegressionRecord:
    """Measure the adapter into ``folder`` and compare it with the base; read back if that is done."""
    base, base_folder = base_ability(session, asked)
    confidence = session.prepared.policy.confidence
    key = hash_json([asked.key, subject_key(session.prepared), digest, confidence])
    if not is_done(folder, key):
        begin(folder)
        injection = session.use_adapter(adapter, digest)
        mine = _measure(session, asked, ADAPTER)
        _save_measured(folder, mine)
        texts: list[TextDivergence] | None = None
        if asked.settings.divergence:
            neutral = neutral_texts()
            with session.reporter.progress("adapter on neutral text", len(neutral)) as advance:
                texts = divergence(_model(session), injection, neutral, advance)
            write_jsonl(folder / f"divergence.{ITEMS}", [{"row_id": t.text, **asdict(t)} for t in texts])
        files = _files(base_folder, folder)
        base, mine = replace(base, items_path=files[0]), replace(mine, items_path=files[1])
        record = compare_regression(base, mine, confidence, divergence=texts)
        records.save(folder / f"{REGRESSION}.json", record)
        where = f"{folder.name}/divergence.{ITEMS}" if texts is not None else ""
        save_measures(folder, regression_measures(base, mine, files, where))
        finish(folder, key)
    record = records.load(folder / f"{REGRESSION}.json", RegressionRecord)
    session.reporter.line(describe_ability(record))
    return record


def _measure(session: Session, asked: Regression, subject: str) -> Measured:
    """Whatever is in place, on the sets and then on the harness's tasks."""
    parts = []
    if asked.sets:
        with session.reporter.progress(f"{subject} on regression sets", steps(asked.sets)) as advance:
            parts.append(
                measure(
                    _model(session), asked.sets, subject=subject, run_code=asked.settings.run_code, progress=advance
                )
            )
    if not asked.tasks:
        return parts[0]
    from tunegate.evaluation.lm_eval import joined, measure_tasks

    given = asked.settings
    session.reporter.line(f"{subject} on lm-eval-harness: {', '.join(asked.tasks['tasks'])}")
    parts.append(
        measure_tasks(_model(session), asked.tasks, subject=subject, limit=given.items, run_code=given.run_code)
    )
    return joined(parts)


def _save_measured(folder: Path, found: Measured) -> None:
    write_jsonl(folder / f"{found.subject}.{ITEMS}", [result.row() for result in found.results])
    write_json(folder / FACTS, {"sets": found.sets, "settings": found.settings, "seconds": found.seconds})


def _load_measured(folder: Path, subject: str) -> Measured:
    facts = read_json(folder / FACTS)
    results = read_results(folder / f"{subject}.{ITEMS}")
    return Measured(subject, facts["sets"], results, facts["settings"], facts["seconds"])


def describe_ability(record: RegressionRecord) -> str:
    """One line: the ratio of right answers in all and in the worst domain, likelihood, divergence."""
    total = record.accuracy["total"]
    parts = [f"{_share(total.candidate)} right in all, {_share(total.reference)} with the base ({total.n} items)"]
    domains = [r for name, r in record.accuracy.items() if name != "total" and r.value is not None]
    if domains:
        worst = min(domains, key=lambda r: r.value or 0.0)
        parts.append(f"worst domain {worst.name}: {_share(worst.candidate)} against {_share(worst.reference)}")
    if "total" in record.likelihood and record.likelihood["total"].value is not None:
        parts.append(f"likelihood {record.likelihood['total'].value:.2f} of the base's")
    if record.divergence is not None:
        parts.append(f"KL {record.divergence['kl']:.3g} nats a token on neutral text")
    return f"regression: {'; '.join(parts)}"


# --- refusals ----------------------------------------------------------------------------------------------------


def base_refusals(session: Session, asked: Safety) -> tuple[Asked, Path]:
    """The base asked every request, once for all runs of the task; and the folder that holds it."""
    prepared = session.prepared
    key = hash_json([asked.key, subject_key(prepared)])
    folder = prepared.config.run_dir / f"{SAFETY}-{short(key)}"
    if not is_done(folder, key):
        begin(folder)
        with session.as_base():
            _save_asked(folder, _ask(session, asked, BASE))
        finish(folder, key)
    return _load_asked(folder, BASE), folder


def compare_refusals(session: Session, asked: Safety, adapter: Path, digest: str, folder: Path) -> SafetyRecord:
    """Ask the adapter into ``folder`` and compare it with the base; read back if that is done."""
    base, base_folder = base_refusals(session, asked)
    confidence = session.prepared.policy.confidence
    key = hash_json([asked.key, subject_key(session.prepared), digest, confidence])
    if not is_done(folder, key):
        begin(folder)
        session.use_adapter(adapter, digest)
        mine = _ask(session, asked, ADAPTER)
        _save_asked(folder, mine)
        files = _files(base_folder, folder)
        record = compare_safety(replace(base, items_path=files[0]), replace(mine, items_path=files[1]), confidence)
        records.save(folder / f"{SAFETY}.json", record)
        save_measures(folder, safety_measures(mine, files))
        finish(folder, key)
    record = records.load(folder / f"{SAFETY}.json", SafetyRecord)
    session.reporter.line(describe_refusals(record))
    return record


def _ask(session: Session, asked: Safety, subject: str) -> Asked:
    total = sum(len(one.probes) for one in asked.sets) * asked.asking.attempts
    with session.reporter.progress(f"{subject} on safety requests", total) as advance:
        return ask(
            _model(session),
            asked.sets,
            asked.asking,
            subject=subject,
            guard=guard_of(asked.settings),
            progress=advance,
        )


def _save_asked(folder: Path, found: Asked) -> None:
    write_jsonl(folder / f"{found.subject}.{ITEMS}", [attempt.row() for attempt in found.attempts])
    facts = {"sets": found.sets, "settings": found.settings, "per_probe": found.per_probe,
             "judged_by": found.judged_by, "seconds": found.seconds}  # fmt: skip
    write_json(folder / FACTS, facts)


def _load_asked(folder: Path, subject: str) -> Asked:
    facts = read_json(folder / FACTS)
    attempts = read_attempts(folder / f"{subject}.{ITEMS}")
    return Asked(
        subject, facts["sets"], attempts, facts["per_probe"], facts["judged_by"], facts["settings"], facts["seconds"]
    )


def describe_refusals(record: SafetyRecord) -> str:
    """One line: the three rates with the base's."""
    parts = []
    for name in ("bypass_rate", "over_refusal", "coherence"):
        found = record.measure(name)
        if found is not None:
            was, of = _share(found.reference.value), found.candidate.n
            label = name.replace("_", " ")
            parts.append(f"{label} {_share(found.candidate.value)}, {was} with the base ({of} requests)")
    return f"safety: {'; '.join(parts)}"


# --- both --------------------------------------------------------------------------------------------------------


def subject_key(prepared: Prepared) -> list[Any]:
    """What a free answer of the base depends on, apart from the question."""
    base, renderer = prepared.base, prepared.base.renderer
    stops: Sequence[int] = renderer.stop_ids
    return [
        base.fingerprint.total, renderer.template_hash, list(stops), base.compute_dtype, base.recipe,
        tunegate.__version__,
    ]  # fmt: skip


def _files(base: Path, adapter: Path) -> tuple[str, str]:
    """The items of both, relative to the folder that the adapter's lie in."""
    there = os.path.relpath(base, adapter.parent)
    return Path(there, f"{BASE}.{ITEMS}").as_posix(), f"{adapter.name}/{ADAPTER}.{ITEMS}"


def _model(session: Session) -> Model:
    settings = session.prepared.config.task.train
    return Model(session.runner, session.prepared.base.renderer, settings.tokens_per_batch)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
