"""A complete adapter folder: tensors, config, card and README, and a manifest of their hashes that was written last.

The card says what the adapter was made from, how it scored and what the gate decided. It does not write cards
(``pipeline.card`` does), and does not compare an adapter with a base.
"""

from __future__ import annotations

from pathlib import Path

from tunegate import records
from tunegate.adapter.files import CONFIG, TENSORS
from tunegate.errors import InputError, Problem
from tunegate.files import hash_file, read_json
from tunegate.records import AdapterCard

CARD, MANIFEST, README = "card.json", "manifest.json", "README.md"
FILES = (CONFIG, TENSORS, CARD, README)
CHANGED = "copy the adapter again; `tunegate run` remakes one of its own if its folder is removed"


def manifest_problems(folder: Path) -> list[Problem]:
    """What keeps ``folder`` from being a complete adapter, every file as its manifest says."""
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
    for name, digest in manifest.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            problems.append(Problem("a file of the adapter is missing", str(file), fix="copy the whole folder again"))
        elif (found := hash_file(file)) != digest:
            problems.append(Problem("changed since it was published", str(file), str(digest), found, CHANGED))
    return problems


def load_card(folder: Path) -> AdapterCard:
    """The card in ``folder``, its free-form parts checked as far as they are read."""
    card = records.load(folder / CARD, AdapterCard)
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
    if not wrong and not all(isinstance(e, dict) and isinstance(e.get("ids"), list) for e in card.template["golden"]):
        wrong.append("template.golden")
    if wrong or not card.evaluations:
        where = str(folder / CARD)
        raise InputError([Problem(f"missing or wrong: {name}", where) for name in wrong or ["evaluations"]])
    return card


def check_complete(folder: Path) -> None:
    """:class:`InputError` unless every file of the adapter is there and as its manifest says."""
    problems = manifest_problems(folder)
    if problems:
        raise InputError(problems)
