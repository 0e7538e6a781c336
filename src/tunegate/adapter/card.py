"""A complete adapter folder: tensors, config, card and README, and a manifest of their hashes that was written last.

The card says what the adapter was made from, how it scored and what the gate decided; :func:`base_problems` and
:func:`template_problems` say whether that is a base and a renderer at hand. It does not write cards (``pipeline.card``
does).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.adapter.files import CONFIG, TENSORS
from tunegate.data.render import Renderer
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.files import hash_file, read_json
from tunegate.model.fingerprint import BaseFingerprint
from tunegate.records import AdapterCard

CARD, MANIFEST, README = "card.json", "manifest.json", "README.md"
FILES = (CONFIG, TENSORS, CARD, README)
CHANGED = "copy the adapter again; `tunegate run` remakes one of its own if its folder is removed"


def manifest_problems(folder: Path, digest: Callable[[Path], str] = hash_file) -> list[Problem]:
    """What keeps ``folder`` from being a complete adapter, every file as its manifest says. ``digest``: of a file."""
    path = folder / MANIFEST
    if not path.exists():
        what = "not a complete adapter: it has no manifest" if folder.is_dir() else "no such adapter folder"
        return [Problem(what, str(folder), fix="`tunegate run` makes and finishes one")]
    try:
        manifest = read_json(path)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or not set(FILES) <= manifest.keys():
        return [Problem("the manifest is damaged", str(path), f"hashes of {', '.join(FILES)}")]
    problems = []
    for name, wanted in manifest.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            problems.append(Problem("a file of the adapter is missing", str(file), fix="copy the whole folder again"))
        elif (found := digest(file)) != wanted:
            problems.append(Problem("changed since it was published", str(file), str(wanted), found, CHANGED))
    return problems


def load_card(folder: Path) -> AdapterCard:
    """The card in ``folder``, its free-form parts checked as far as they are read."""
    card = records.load(folder / CARD, AdapterCard)
    problems = card_problems(card, str(folder / CARD))
    if problems:
        raise InputError(problems)
    return card


def card_problems(card: AdapterCard, where: str) -> list[Problem]:
    """What is missing or of another kind in a card's free-form parts, as far as they are read."""
    needed = {
        "base.name": (card.base.get("name"), str),
        "base.parameters": (card.base.get("parameters"), int),
        "base.fingerprint": (card.base.get("fingerprint"), dict),
        "adapter.hash": (card.adapter.get("hash"), str),
        "adapter.run": (card.adapter.get("run"), str),
        "template.golden": (card.template.get("golden"), list),
    }
    wrong = [name for name, (value, kind) in needed.items() if not isinstance(value, kind)]
    if not wrong and not isinstance(card.base["fingerprint"].get("total"), str):
        wrong.append("base.fingerprint.total")
    if not wrong and not all(map(_is_golden, card.template["golden"])):
        wrong.append("template.golden")
    if not wrong and not isinstance(template_of(card), (str, type(None))):
        wrong.append("config.base.template")
    if not wrong and not card.evaluations:
        wrong.append("evaluations")
    return [Problem(f"missing or wrong: {name}", where) for name in wrong]


def _is_golden(entry: object) -> bool:
    """Whether ``entry`` is a prompt, as text or messages, with its token ids."""
    if not isinstance(entry, dict) or not isinstance(entry.get("ids"), list):
        return False
    messages, tools = entry.get("messages"), entry.get("tools") or []
    chat = isinstance(messages, list) and isinstance(tools, list) and all(isinstance(m, dict) for m in messages)
    return (isinstance(entry.get("text"), str) or chat) and all(
        type(i) is int and 0 <= i < 1 << 31 for i in entry["ids"]
    )


def template_of(card: AdapterCard) -> Any:
    """The chat template of the training (:class:`~tunegate.data.render.Renderer`'s argument), None: the base's own."""
    base = card.config.get("base")
    return base.get("template") if isinstance(base, dict) else None


def check_complete(folder: Path) -> None:
    """:class:`InputError` unless every file of the adapter is there and as its manifest says."""
    problems = manifest_problems(folder)
    if problems:
        raise InputError(problems)


# --- an adapter and a base -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtHand:
    """The base that an adapter is put on. ``recipe``: how its weights are quantized, None if they are not."""

    name: str
    fingerprint: BaseFingerprint
    recipe: Mapping[str, Any] | None


def base_problems(card: AdapterCard, base: AtHand, where: str, override: str = "") -> list[Problem]:
    """Why ``base`` is not what the adapter was trained on. ``override``: a way around that, to name with the fix."""
    problems = []
    made_for, here = card.base["fingerprint"], base.fingerprint
    if made_for["total"] != here.total:
        parts = ("weights", "config", "tokenizer", "template")
        differ = ", ".join(p for p in parts if made_for.get(p) != getattr(here, p)) or "parts"
        problems.append(
            Problem(
                "the adapter was trained on another base",
                where,
                f"{card.base['name']} with fingerprint {made_for['total']}",
                f"{base.name} with fingerprint {here.total} ({differ} differ)",
                f"use the base it was trained on{override}",
            )
        )
    if card.base.get("recipe") != base.recipe:
        problems.append(
            Problem(
                "the adapter was trained on another quantization of this base",
                where,
                recipe_text(card.base.get("recipe")),
                recipe_text(base.recipe),
                f"quantize the base as it was trained{override}",
            )
        )
    return problems


def recipe_text(recipe: Any) -> str:
    return "no quantization" if recipe is None else json.dumps(recipe, sort_keys=True, separators=(",", ":"))


def template_problems(card: AdapterCard, renderer: Renderer) -> list[Problem]:
    """The golden prompts that ``renderer`` gives other tokens for."""
    try:
        renderer.check_golden(card.template["golden"])
    except TunegateError as error:
        return error.problems
    return []
