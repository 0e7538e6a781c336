"""``merge``: find the base that a card names, prove that it is that base, merge, prove parity, publish.

The adapter is read on its base before the merged folder is written, and the merged folder after; only one model lies
in memory at a time. A mixture of several adapters is compared with the same mixture formed in memory, unrounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunegate.engine.runner import Runner
from tunegate.errors import TunegateError
from tunegate.export import merge as streaming
from tunegate.export.deltas import ONE, Mix
from tunegate.export.parity import InRunner, Limits
from tunegate.export.plan import Plan, plan_merge
from tunegate.files import growing
from tunegate.model.loading import load_model
from tunegate.pipeline import proof
from tunegate.pipeline.adapted import (
    Reference,
    Source,
    compute_dtype,
    find_source,
    made_from,
    read_adapter,
    read_mixture,
)
from tunegate.pipeline.proof import Proof, Wanted
from tunegate.pipeline.reporter import Reporter


@dataclass(frozen=True)
class MergeRequest:
    """``base`` is needed where there is no card. ``onto``: ``trained`` is the base as the adapter saw it (dequantized
    NF4 for a QLoRA adapter), ``original`` the checkpoint's own weights."""

    adapters: tuple[Path, ...]
    out: Path
    weights: tuple[float, ...] = (1.0,)
    method: str = "linear"
    density: float = 1.0
    seed: int = 0
    base: str | None = None
    onto: str = "trained"
    limits: Limits = field(default_factory=Limits)
    allow_base_mismatch: bool = False
    items: Wanted = field(default_factory=Wanted)

    @property
    def mix(self) -> Mix:
        return Mix(self.method, self.weights, self.density, self.seed)


def merge(request: MergeRequest, reporter: Reporter) -> dict[str, Any]:
    """Merge and publish; returns the report that lies in the folder as ``merge.json``."""
    source = find_source(
        request.adapters, request.base, request.allow_base_mismatch, reporter, request.items, request.onto
    )
    recipe = source.recipe if request.onto == "trained" else None
    plan = plan_merge(source.folder, request.adapters, request.out, request.mix, recipe=recipe)
    with growing(plan.out):
        try:
            return _merge(request, source, plan, reporter)
        except BaseException as error:
            kept = streaming.keep_finished(plan)
            if isinstance(error, KeyboardInterrupt):
                shards = f"{kept} of {len(plan.files)} shards are kept, the same command goes on from there"
                raise KeyboardInterrupt(shards if kept else "nothing was written") from None
            raise


def _merge(request: MergeRequest, source: Source, plan: Plan, reporter: Reporter) -> dict[str, Any]:
    reference = _before(request, source, plan, reporter)
    with reporter.progress("merging, bytes", sum(p.stat().st_size for p in plan.files)) as advance:
        done = streaming.write_merged(plan, advance, source.template)
    reporter.line("reading the merged model on the same prompts")
    try:
        merged = InRunner(Runner(load_model(plan.partial, dtype=compute_dtype())))
        answered = proof.sit(source.exam, merged, reference.answered)
        found = proof.compare(source.exam, reference.answered, answered, reference.plain)
        proof.require(found, request.limits, "the merged model", str(request.out))
    except TunegateError:  # the same merge would come out the same
        streaming.discard(plan)
        raise
    report = made_from(source, request.adapters, request.weights, plan.partial) | _report(
        request, source, done, found, plan.recipe
    )
    streaming.finish(plan, report)
    return report


def _before(request: MergeRequest, source: Source, plan: Plan, reporter: Reporter) -> Reference:
    """What the merged model has to answer: on the weights of training, whatever it is merged onto."""
    if request.mix == ONE:
        return read_adapter(source, request.adapters[0], reporter)[0]
    if plan.recipe != source.recipe:
        plan = plan_merge(plan.base, request.adapters, plan.out, plan.mix, recipe=source.recipe, checkpoint=False)
    return read_mixture(source, plan, reporter)


def _report(
    request: MergeRequest, source: Source, done: streaming.Merged, found: Proof, recipe: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "onto": "original weights" if recipe is None else f"weights as {recipe['format']} gives them back",
        "verified": source.verified,
        "base_mismatch_allowed": request.allow_base_mismatch,
        "method": request.method,
        "density": request.density,
        "seed": request.seed,
        "modules": done.modules,
        "changed": done.changed,
        "bytes": done.bytes,
        **found.to_json(),
        "limits": asdict(request.limits),
    }
