"""What travels with an adapter: the card, a manifest of file hashes written last, and the checks at load.

An adapter whose card names another base fingerprint, template or golden prompt ids is refused. An explicit override
of the base check is possible and is recorded by whoever asked for it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import tunegate
from tunegate import records
from tunegate.adapter.card import (
    CARD,
    CHANGED,
    FILES,
    MANIFEST,
    README,
    AtHand,
    base_problems,
    check_complete,
    load_card,
    manifest_problems,
    template_problems,
)
from tunegate.adapter.files import adapter_hash
from tunegate.errors import InputError, Problem
from tunegate.files import explain_os_error, hash_file, read_json, write_json, write_text
from tunegate.pipeline.base import Base
from tunegate.pipeline.folders import now, short
from tunegate.pipeline.prepare import Prepared
from tunegate.records import AdapterCard, Comparison, Decision, EvalRecord, RunRecord

__all__ = ["CARD", "MANIFEST", "check_adapter", "check_complete", "load_card", "versions", "write_card"]


def versions() -> dict[str, str]:
    """Versions of what computed the adapter."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "scipy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"tunegate": tunegate.__version__, "python": platform.python_version(), **found}


def write_card(
    prepared: Prepared,
    run: Path,
    record: RunRecord,
    evaluations: list[EvalRecord],
    comparisons: list[Comparison],
    decision: Decision,
    openings: list[dict[str, Any]],
) -> AdapterCard:
    """Write card, README and manifest beside the adapter's tensors, unless they say the same already."""
    folder, begun = run / "adapter", read_json(run / "run.json")
    config, base = prepared.config, prepared.base
    card = AdapterCard(
        name=config.name,
        base=base.card(),
        adapter={"hash": adapter_hash(folder), "run": short(prepared.run_key)},
        data={
            "files": prepared.data.files,
            "test": prepared.test_hash,
            "rows": {name: len(rows) for name, rows in prepared.data.splits.as_dict().items()},
        },
        template={"hash": base.renderer.template_hash, "golden": base.renderer.golden(prepared.valid)},
        config=config.task.model_dump(mode="json"),
        origins=dict(config.origins),
        run=record,
        evaluations=evaluations,
        comparisons=comparisons,
        decision=decision,
        test_openings=openings,
        versions=begun["versions"],
        git=begun["git"],
        created=now(),
    )
    if not manifest_problems(folder):
        there = records.load(folder / CARD, AdapterCard)
        if records.to_json(replace(card, created=there.created)) == records.to_json(there):
            return there
    with explain_os_error(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
    records.save(folder / CARD, card)
    write_text(folder / README, _readme(card))
    write_json(folder / MANIFEST, {name: hash_file(folder / name) for name in FILES})
    return card


def _readme(card: AdapterCard) -> str:
    """The model card that PEFT and the Hub show."""
    rows = "\n".join(
        f"| {e.subject} | {e.settings['prompt']} | {e.score.value:.4f} | {e.score.low:.3f} to {e.score.high:.3f} |"
        for e in card.evaluations
    )
    rules = "\n".join(f"- {r.rule}: {r.verdict}. {r.reason}" for r in card.decision.rules)
    return f"""---
library_name: peft
base_model: {json.dumps(card.base["name"])}
tags: [lora, tunegate]
---

# {card.name}

Decision: **{card.decision.verdict}**. Base `{card.base["name"]}`, fingerprint `{card.base["fingerprint"]["total"]}`.

| subject | prompt | {card.evaluations[0].primary} on test | interval |
| --- | --- | --- | --- |
{rows}

{rules}

`card.json` holds the whole record: data hashes, settings with their origins, template hash and golden prompt ids.
"""


def check_adapter(folder: Path, base: Base, *, allow_base_mismatch: bool = False) -> AdapterCard:
    """The card of a complete adapter folder that belongs to ``base``.

    :class:`InputError` if a file is missing or changed since it was published, or if the adapter was made for
    another base (unless ``allow_base_mismatch``) or renders prompts differently.
    """
    check_complete(folder)
    card = load_card(folder)
    if card.adapter["hash"] != adapter_hash(folder):
        raise InputError("the card is of another adapter", where=str(folder), fix=CHANGED)
    problems: list[Problem] = []
    if not allow_base_mismatch:
        at_hand = AtHand(base.resolved.name, base.fingerprint, base.recipe)
        override = "; --allow-base-mismatch overrides this and is recorded"
        problems = base_problems(card, at_hand, str(folder), override)
    problems = problems or template_problems(card, base.renderer)
    if problems:
        raise InputError(problems)
    return card
