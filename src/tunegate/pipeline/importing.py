"""An imported adapter, evaluated like one that was trained here: baselines, sealed test, gate, card.

The unverified version's tensors take the place of training; the task says data, base and thresholds. What comes out is
a new version with a card, a candidate, made from the unverified one. Its run record counts no steps; the training
settings on the card are the adapter's own where its config tells them, and are marked as not used where it does not.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from pathlib import Path

from tunegate import records
from tunegate.adapter.files import CONFIG, TENSORS, adapter_hash, read_spec
from tunegate.config import Config
from tunegate.engine.train import mean_loss
from tunegate.errors import InputError
from tunegate.files import write_bytes
from tunegate.pipeline import kept, steps
from tunegate.pipeline.bar import settle_bar
from tunegate.pipeline.card import write_card
from tunegate.pipeline.folders import Ledger, owned
from tunegate.pipeline.prepare import prepare
from tunegate.pipeline.registering import check_fits, enter
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.run import Outcome, measure_baselines, need_test, open_run
from tunegate.pipeline.session import Session
from tunegate.records import RunRecord
from tunegate.registry.entries import UNVERIFIED, resolve
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import materialize


def evaluate_import(
    registry: Registry, reference: str, config: Config, reporter: Reporter, *, reopen: str | None = None
) -> Outcome:
    """Evaluate the unverified version on the task and add the result. :class:`InputError` if its tensors do not fit the
    task's base."""
    with registry.database.reading() as connection:
        version = resolve(connection, reference)
    if version.state != UNVERIFIED:
        raise InputError("only an unverified version is evaluated here", where=version.ref, got=version.state)
    there = materialize(registry, version.adapter)
    digest = adapter_hash(there)
    prepared = dataclasses.replace(prepare(config, reporter), imported=digest)
    prepared = dataclasses.replace(prepared, config=_told(prepared.config, there, version.ref))
    need_test(prepared)
    check_fits(registry, prepared)
    with owned(prepared.config.run_dir):
        session, run = Session(prepared, reporter), open_run(prepared)
        for name in (TENSORS, CONFIG):
            write_bytes(run / "adapter" / name, (there / name).read_bytes())
        session.use_adapter(run / "adapter", digest)  # before minutes of baselines: it must fit the base
        baselines = measure_baselines(session)
        bar = settle_bar(prepared, run, baselines, reporter)
        session.use_adapter(run / "adapter", digest)
        record = _record(session, run)
        ledger = Ledger(prepared.config.run_dir)
        evaluated, comparisons = steps.test(session, run, bar, ledger, reopen)
        steps.recall(session, run)
        kept.regression(session, run)
        kept.safety(session, run)
        decision = steps.judge(prepared, run, record, evaluated["adapter"], comparisons)
        openings = ledger.of(prepared.test_hash)
        scored, compared = list(evaluated.values()), list(comparisons.values())
        card = write_card(prepared, run, record, scored, compared, decision, openings)
        entered = enter(registry, run / "adapter", reporter, version)
    return Outcome(run, run / "adapter", card, baselines, entered)


def _told(config: Config, adapter: Path, ref: str) -> Config:
    """The task's settings with the adapter's own where it tells them; the other training settings were not used."""
    spec = read_spec(adapter)
    method = "dora" if spec.use_dora else "rslora" if spec.use_rslora else "lora"
    unused = {key: f"not used: {ref} was imported" for key, _, _ in config.items() if key.startswith("train.")}
    config = dataclasses.replace(config, origins={**config.origins, **unused})
    for key, value in (("method", method), ("rank", spec.rank), ("alpha", float(spec.alpha))):
        config = config.settle(f"train.{key}", value, f"as {ref} was imported")
    return config


def _record(session: Session, run: Path) -> RunRecord:
    """What training left elsewhere, as far as it can be measured here; read back if it was measured before."""
    path, prepared, injection = run / "train" / "run.json", session.prepared, session.injection
    if path.exists():
        return records.load(path, RunRecord)
    assert injection is not None
    settings = prepared.config.task.train
    items = run / "train" / "valid.items.jsonl"
    found = session.evaluate(prepared.valid[: settings.eval_items], "adapter", "valid", items)
    record = RunRecord(
        config_hash=prepared.train_key,
        method=settings.method,
        steps=0,
        epochs=0.0,
        best_step=0,
        best_score=found.record.score.value,
        train_loss=mean_loss(session.runner, prepared.train_rows[: steps.LOSS_ROWS], settings.tokens_per_batch),
        valid_loss=mean_loss(session.runner, prepared.valid_rows[: steps.LOSS_ROWS], settings.tokens_per_batch),
        stopped_early=False,
        trainable_parameters=injection.trainable,
        base_parameters=prepared.base.parameters,
        tokens=0,
        computed_tokens=0,
        target_tokens=0,
        seconds=0.0,
        tokens_per_second=0.0,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        device=str(session.runner.device),
        compute_dtype=prepared.base.compute_dtype,
        path=session.runner.path,
    )
    records.save(path, record)
    return record
