"""``merge``: find the base that a card names, prove that it is that base, merge, prove parity, publish.

The adapter is read on its base before the merged folder is written, and the merged folder after; only one model lies
in memory at a time. A mixture of several adapters has no model to be compared with: its report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunegate.adapter.files import adapter_hash, load_adapter
from tunegate.adapter.inject import disabled
from tunegate.engine.runner import Runner
from tunegate.errors import InputError
from tunegate.export import merge as streaming
from tunegate.export import parity
from tunegate.export.deltas import Mix
from tunegate.export.parity import Limits, Parity, Reading
from tunegate.model.fingerprint import fingerprint_base
from tunegate.model.loading import choose_dtype, load_model, load_tokenizer
from tunegate.model.resolve import resolve_base
from tunegate.pipeline.card import CARD, check_complete, load_card
from tunegate.pipeline.reporter import Reporter

NEW_TOKENS = 16
PLAIN_PROMPTS = ("The", "A short answer:", "1, 2, 3,")


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


@dataclass(frozen=True)
class _Source:
    folder: Path
    name: str
    fingerprint: str
    recipe: dict[str, Any] | None
    prompts: list[list[int]]
    verified: bool


def merge(request: MergeRequest, reporter: Reporter) -> dict[str, Any]:
    """Merge and publish; returns the report that lies in the folder as ``merge.json``."""
    source = _source(request, reporter)
    recipe = source.recipe if request.onto == "trained" else None
    mix = Mix(request.method, request.weights, request.density, request.seed)
    plan = streaming.plan_merge(source.folder, request.adapters, request.out, mix, recipe=recipe)
    before = _read_adapter(request, source, reporter) if len(request.adapters) == 1 else None
    with reporter.progress("merging", sum(p.stat().st_size for p in plan.files)) as advance:
        done = streaming.write_merged(plan, advance)
    found = None
    if before is not None:
        reading, plain = before
        reporter.line("reading the merged model on the same prompts")
        merged = Runner(load_model(plan.partial, dtype=_dtype()))
        found = parity.compare(
            reading, parity.read(merged, source.prompts, _stops(source), NEW_TOKENS, reading.rows), plain
        )
        try:
            parity.require(found, request.limits, "the merged model", str(request.out))
        except BaseException:
            streaming.discard(plan)
            raise
    report = _report(request, source, done, found, recipe)
    streaming.finish(plan, report)
    return report


def _source(request: MergeRequest, reporter: Reporter) -> _Source:
    """The base to merge into, proven to be the one that every card names."""
    cards = [load_card(a) for a in request.adapters if (a / CARD).exists()]
    for adapter in request.adapters:
        if (adapter / CARD).exists():
            check_complete(adapter)
    names = {card.base["name"] for card in cards}
    name = request.base or (sorted(names)[0] if names else None)
    if name is None:
        raise InputError(
            "an adapter without a card does not say what it belongs to",
            where=str(request.adapters[0]),
            fix="name the base it was trained on: --base",
        )
    of_hub = bool(cards) and not request.base and cards[0].base.get("source") == "hub"  # a packaged one has a version
    resolved = resolve_base(name, cards[0].base.get("revision") if of_hub else None)
    fingerprint = fingerprint_base(resolved.path).total
    for adapter, card in ((a, load_card(a)) for a in request.adapters if (a / CARD).exists()):
        wanted = card.base["fingerprint"]["total"]
        if wanted != fingerprint and not request.allow_base_mismatch:
            raise InputError(
                "the adapter was trained on another base",
                where=str(adapter),
                expected=f"{card.base['name']} with fingerprint {wanted}",
                got=f"{name} with fingerprint {fingerprint}",
                fix="name the base it was trained on; --allow-base-mismatch overrides this and is recorded",
            )
    recipes = [card.base.get("recipe") for card in cards]
    if any(r != recipes[0] for r in recipes):
        raise InputError("the adapters were trained on different quantizations", fix="merge with --onto original")
    if len(cards) < len(request.adapters):
        reporter.line("warning: an adapter without a card: nothing proves that this is its base")
    prompts = [list(entry["ids"]) for card in cards for entry in card.template["golden"]]
    if not prompts:
        tokenizer = load_tokenizer(resolved.path)
        prompts = [tokenizer(text)["input_ids"] for text in PLAIN_PROMPTS]
    verified = len(cards) == len(request.adapters)
    return _Source(resolved.path, name, fingerprint, recipes[0] if recipes else None, prompts, verified)


def _dtype() -> torch.dtype:
    return choose_dtype("auto", device="cpu")[0]


def _stops(source: _Source) -> list[int]:
    tokenizer = load_tokenizer(source.folder)
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _read_adapter(request: MergeRequest, source: _Source, reporter: Reporter) -> tuple[Reading, Reading]:
    """The adapter and the plain base on the prompts, on the weights that the adapter was trained on."""
    reporter.line(f"reading the adapter on {source.name}, {len(source.prompts)} prompts")
    model = load_model(source.folder, dtype=_dtype(), recipe=source.recipe)
    runner = Runner(model)
    injection = load_adapter(model, request.adapters[0])
    reading = parity.read(runner, source.prompts, _stops(source), NEW_TOKENS)
    with disabled(injection):
        plain = parity.read(runner, source.prompts, _stops(source), 1, reading.rows)
    return reading, plain


def _report(
    request: MergeRequest, source: _Source, done: streaming.Merged, found: Parity | None, recipe: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "base": {"name": source.name, "fingerprint": source.fingerprint, "recipe": source.recipe},
        "onto": "original weights" if recipe is None else f"weights as {recipe['format']} gives them back",
        "adapters": [
            {"folder": a.name, "hash": adapter_hash(a), "weight": w}
            for a, w in zip(request.adapters, request.weights, strict=True)
        ],
        "verified": source.verified,
        "base_mismatch_allowed": request.allow_base_mismatch,
        "method": request.method,
        "density": request.density,
        "seed": request.seed,
        "modules": done.modules,
        "changed": done.changed,
        "bytes": done.bytes,
        "parity": found.to_json() if found else "none: a mixture has no model to be compared with; evaluate it",
        "limits": asdict(request.limits),
    }


def request_of(
    adapters: Sequence[str], out: str, weights: Sequence[float] | None, method: str, density: float, seed: int,
    base: str | None, onto: str,
) -> MergeRequest:  # fmt: skip
    folders = tuple(Path(a) for a in adapters)
    missing = [str(f) for f in folders if not f.is_dir()]
    if missing:
        raise InputError("no such adapter folder", where=", ".join(missing))
    shares = tuple(weights) if weights else (1.0,) * len(folders)
    return MergeRequest(folders, Path(out), shares, method, density, seed, base, onto)
