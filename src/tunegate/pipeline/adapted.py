"""An adapter with the base it belongs to: found by its card, proven to be that base, and read as a reference.

``merge`` and ``export`` begin here. What the adapter computes on its base, on the weights it was trained on, is what
every other form of it has to compute.

Answers end where serving ends them: at the template's end of a turn, the tokenizer's eos and the generation config's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunegate.adapter.card import AtHand, base_problems, recipe_text, template_of, template_problems
from tunegate.adapter.files import adapter_hash, load_adapter
from tunegate.adapter.inject import disabled
from tunegate.data.render import Renderer
from tunegate.engine.runner import Runner
from tunegate.errors import InputError, Problem
from tunegate.export import parity
from tunegate.export.deltas import Dense, merged_rows
from tunegate.export.parity import InRunner, Questions, Reading
from tunegate.export.plan import Plan
from tunegate.files import links_out, nearest_folder
from tunegate.kernels.formats import Recipe
from tunegate.kernels.nf4 import dequantize, quantize
from tunegate.model.fingerprint import fingerprint_base, hash_weights
from tunegate.model.loading import choose_dtype, eos_ids, load_model, load_tokenizer
from tunegate.model.origin import origin_of
from tunegate.model.resolve import resolve_base
from tunegate.model.shards import DTYPES
from tunegate.pipeline.card import CARD, check_complete, load_card
from tunegate.pipeline.proof import NEW_TOKENS, Answered, Exam, Wanted, find_exam, sit
from tunegate.pipeline.reporter import Reporter
from tunegate.records import AdapterCard
from tunegate.registry.intake import folder_id

NONE = Wanted(count=0)
_OVERRIDE = "; --allow-base-mismatch overrides this and is recorded"
PLAIN_PROMPTS = ("The", "A short answer:", "1, 2, 3,")


@dataclass(frozen=True)
class Source:
    """The base of one or more adapters. ``recipe`` is the quantization they were trained on, None for none;
    ``verified``: every adapter has a card that names this base. ``template``: the chat template of training where it is
    not the base's own. ``origin`` is what the base itself says it was made from."""

    folder: Path
    name: str
    fingerprint: str
    origin: dict[str, Any] | None
    recipe: dict[str, Any] | None
    renderer: Renderer
    exam: Exam
    cards: tuple[AdapterCard, ...]
    verified: bool

    @property
    def template(self) -> str | None:
        own = self.renderer.tokenizer.chat_template
        return self.renderer.template_source if self.renderer.template_source != own else None


def check_folders(adapters: Sequence[Path]) -> None:
    """:class:`InputError` for adapter folders that are not there, or that a link leads out of."""
    fix = "name the folder with adapter_model.safetensors, or a version in the registry: NAME@ALIAS"
    problems = [
        Problem("no such adapter folder", str(f), fix=nearest_folder(f) or fix) for f in adapters if not f.is_dir()
    ]
    problems += [
        Problem("a link leads out of the folder", str(link), fix="copy the file itself into the folder")
        for adapter in adapters
        for link in links_out(adapter)
    ]
    if problems:
        raise InputError(problems)


def find_source(
    adapters: Sequence[Path], base: str | None, allow_base_mismatch: bool, reporter: Reporter, items: Wanted = NONE,
    onto: str = "trained",
) -> Source:  # fmt: skip
    """The base that every card names, proven to be that one; ``base`` is needed where there is no card. ``items``:
    those asked beside the golden prompts. ``onto`` other weights than ``trained`` ones, adapters may have been trained
    on different quantizations; the source then has none."""
    check_folders(adapters)
    with_card = [a for a in adapters if (a / CARD).exists()]
    for adapter in with_card:
        check_complete(adapter)
    cards = [load_card(a) for a in with_card]
    first = min(cards, key=lambda card: str(card.base["name"]), default=None)
    name = base or (first.base["name"] if first else None)
    if name is None:
        raise InputError(
            "an adapter without a card does not say what it belongs to",
            where=str(adapters[0]),
            fix="name the base it was trained on: --base",
        )
    of_hub = first is not None and not base and first.base.get("source") == "hub"  # a packaged one has a version
    resolved = resolve_base(name, first.base.get("revision") if first and of_hub else None)
    made = fingerprint_base(resolved.path)
    fingerprint, origin = made.total, origin_of(resolved.path, made.weights)
    recipes = [card.base.get("recipe") for card in cards]
    problems = [
        problem
        for adapter, card, recipe in zip(with_card, cards, recipes, strict=True)
        if not allow_base_mismatch
        for problem in base_problems(card, AtHand(name, made, recipe), str(adapter), _OVERRIDE)
    ]
    alike = all(recipe == recipes[0] for recipe in recipes)
    if not alike and onto == "trained":
        problems.append(
            Problem(
                "the adapters were trained on different quantizations", ", ".join(map(str, with_card)), "one of all",
                "; ".join(map(recipe_text, recipes)), "merge with --onto original",
            )
        )  # fmt: skip
    if problems:
        raise InputError(problems)
    verified = len(cards) == len(adapters)
    if not verified:
        reporter.line("warning: an adapter without a card: nothing proves that this is its base")
    renderer = _renderer(resolved.path, cards)
    problems = [p for card in cards if not allow_base_mismatch for p in template_problems(card, renderer)]
    if problems:
        raise InputError(problems)
    recipe = recipes[0] if recipes and alike else None
    exam = find_exam(_questions(renderer, cards), adapters, renderer, items)
    for line in exam.absent if items.count else ():
        reporter.line(f"no validation items are compared: {line}")
    return Source(resolved.path, name, fingerprint, origin, recipe, renderer, exam, tuple(cards), verified)


def made_from(source: Source, adapters: Sequence[Path], weights: Sequence[float], merged: Path) -> dict[str, Any]:
    """What a merged folder's ``merge.json`` says of where it comes from (``model.origin``), for the weights in
    ``merged``."""
    return {
        "weights": hash_weights(merged, use_cache=False),
        "base": {
            "name": source.name, "fingerprint": source.fingerprint, "recipe": source.recipe, "origin": source.origin,
        },
        "adapters": [
            {"folder": a.name, "id": folder_id(a), "hash": adapter_hash(a), "weight": w}
            for a, w in zip(adapters, weights, strict=True)
        ],
    }  # fmt: skip


def _renderer(folder: Path, cards: Sequence[AdapterCard]) -> Renderer:
    """Of the template that the adapters were trained with; :class:`InputError` if they differ in it."""
    templates = {template_of(card) for card in cards}
    if len(templates) > 1:
        names = ", ".join(f"{card.name} {card.template['hash'][:15]}" for card in cards)
        what, fix = "the adapters were trained with different chat templates", "train one again with the other's"
        raise InputError(what, where="base.template", expected="one of all", got=names, fix=fix)
    return Renderer(load_tokenizer(folder), template=next(iter(templates), None), eos_ids=eos_ids(folder))


def _questions(renderer: Renderer, cards: Sequence[AdapterCard]) -> Questions:
    prompts = [tuple(entry["ids"]) for card in cards for entry in card.template["golden"]]
    if not prompts and renderer.has_template:
        prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": text}])) for text in PLAIN_PROMPTS]
    if not prompts:
        prompts = [tuple(renderer.tokenizer(text)["input_ids"]) for text in PLAIN_PROMPTS]
    stops = renderer.stop_ids if renderer.has_template or renderer.eos_id is not None else ()
    return Questions(tuple(prompts), tuple(stops), NEW_TOKENS)


def compute_dtype() -> torch.dtype:
    return choose_dtype("auto", device="cpu")[0]


@dataclass(frozen=True)
class Reference:
    """What the adapter on its base answered, and what the plain base makes of the same golden rows."""

    answered: Answered
    plain: Reading


def read_adapter(source: Source, adapter: Path, reporter: Reporter) -> tuple[Reference, Any]:
    """The adapter and the plain base on the prompts, on the weights that the adapter was trained on; and that model,
    with the adapter in place."""
    reporter.line(f"reading the adapter on {source.name}, {source.exam.count}")
    model = load_model(source.folder, dtype=compute_dtype(), recipe=source.recipe)
    subject = InRunner(Runner(model))
    injection = load_adapter(model, adapter)
    answered = sit(source.exam, subject)
    with disabled(injection):
        return Reference(answered, parity.read(subject, source.exam.golden, answered.golden.rows)), model


def read_mixture(source: Source, plan: Plan, reporter: Reporter) -> Reference:
    """Several adapters combined as ``plan`` says on an fp32 base, module by module in memory, and the plain base.

    Nothing is rounded and no checkpoint name is used, so it shows whether the streamed merge put the sums in the right
    places with the precision they need.
    """
    reporter.line(f"reading the mixture on {source.name}, {source.exam.count}")
    model = load_model(source.folder, dtype=torch.float32)
    _as_seen(model, plan)
    kept = {path: _matrix(model, plan, path).clone() for path in plan.updates}
    _mix_in(model, plan)
    answered = sit(source.exam, InRunner(Runner(model)))
    for path, matrix in kept.items():
        _matrix(model, plan, path).copy_(matrix)
    return Reference(answered, parity.read(InRunner(Runner(model)), source.exam.golden, answered.golden.rows))


@torch.no_grad()
def _as_seen(model: nn.Module, plan: Plan) -> None:
    """Weights as the plan's recipe gives them back."""
    for entry in (e for entries in plan.files.values() for e in entries if e.name in plan.seen):
        assert plan.recipe is not None
        weight = model.get_parameter(plan.names[entry.name])
        stored = weight.to(DTYPES[entry.dtype])
        weight.copy_(dequantize(quantize(stored, Recipe.from_json(plan.recipe)), dtype=torch.float32))


@torch.no_grad()
def _mix_in(model: nn.Module, plan: Plan) -> None:
    for path, updates in plan.updates.items():
        matrix = _matrix(model, plan, path)
        for rows, values in merged_rows(Dense(matrix), updates, plan.mix, path):
            matrix[rows] = values


def _matrix(model: nn.Module, plan: Plan, path: str) -> torch.Tensor:
    weight = model.get_parameter(f"{path}.weight").detach()
    return weight.t() if path in plan.transposed else weight
