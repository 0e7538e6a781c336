"""Requests that a model should refuse, and harmless ones that look alike.

The built-in set has ten categories with eight harmful requests and eight benign look-alikes each: one sentence, no
operational detail, prompts only. A user's file has one object a line, with ``prompt`` or ``messages`` and optionally
``id``, ``category`` and ``expected`` (``refuse`` or ``comply``). Two foreign forms are recognised by their fields:

- garak's report.jsonl: lines whose ``entry_type`` is ``attempt``; the prompt is text or a conversation of ``turns``,
  the category the probe's class. Other lines of the report are left out, an attempt told twice counts once.
- PyRIT: seed prompts (``value`` with ``data_type`` or ``harm_categories``), or exported messages
  (``converted_value`` with ``role``), of which the user's are taken. Anything but text is a problem.

Every problem of a file is reported with its line, together. Nothing here asks a model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from tunegate.data.messages import RowProblems, answer_text
from tunegate.data.read import read_source
from tunegate.data.types import Message
from tunegate.errors import InputError, Problem, collecting, nearest
from tunegate.evaluation.sets import SUFFIXES, read_prompt, spread
from tunegate.files import hash_json

BUILT_IN = "redteam"
REFUSE, COMPLY = "refuse", "comply"
FIELDS = ("id", "category", "prompt", "messages", "expected")
LABELS = {"harmful": REFUSE, "unsafe": REFUSE, "benign": COMPLY, "safe": COMPLY}  # other packs' ``label``
FOREIGN = ("label", "source", "subset", "tags")


@dataclass(frozen=True)
class Probe:
    """One request. ``expected`` is what a sound model does: ``refuse`` or ``comply``."""

    id: str
    set: str
    category: str
    messages: tuple[Message, ...]
    expected: str

    @property
    def name(self) -> str:
        return f"{self.set}/{self.id}"

    @property
    def prompt(self) -> str:
        """The last user message's text."""
        return str(self.messages[-1].get("content") or "")


@dataclass(frozen=True)
class ProbeSet:
    """A named list of probes with distinct ids. ``skipped`` counts lines that held no probe."""

    name: str
    probes: tuple[Probe, ...]
    source: str
    skipped: int = 0

    @property
    def hash(self) -> str:
        return hash_json([asdict(probe) for probe in self.probes])

    def first(self, n: int | None) -> ProbeSet:
        """``n`` probes, the expectations by turns and the categories within each; all of them for None."""
        if n is None or n >= len(self.probes):
            return self
        by_category = spread([(probe.category, probe.expected) for probe in self.probes])
        turns = spread([self.probes[place].expected for place in by_category])
        kept = sorted(by_category[turn] for turn in turns[:n])
        return replace(self, probes=tuple(self.probes[place] for place in kept))


def built_in_probes() -> ProbeSet:
    """The built-in requests: 80 harmful ones and 80 look-alikes."""
    file = resources.files("tunegate.evaluation") / "data" / "redteam.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    probes = tuple(
        Probe(r["id"], BUILT_IN, r["category"], ({"role": "user", "content": r["prompt"]},), r["expected"])
        for r in rows
    )
    return ProbeSet(BUILT_IN, probes, "built in")


def load_probes(names: Sequence[str], *, base_dir: Path = Path()) -> list[ProbeSet]:
    """The built-in set by its name ``redteam``, and files by path. All problems of all sets together."""
    problems: list[Problem] = []
    found: list[ProbeSet] = []
    for name in dict.fromkeys(names):
        with collecting(problems):
            if name == BUILT_IN:
                found.append(built_in_probes())
            elif name.lower().removesuffix(".gz").endswith(SUFFIXES):
                found.append(read_probes(name, base_dir=base_dir))
            else:
                fix = nearest(name, (BUILT_IN,)) or f"built in: {BUILT_IN}"
                raise InputError("no such set of requests", where=name, expected=f"{BUILT_IN} or a file", fix=fix)
    twice = [name for name, n in Counter(one.name for one in found).items() if n > 1]
    problems += [Problem("two sets have one name", name, fix="rename one of the files") for name in twice]
    if problems:
        raise InputError(problems)
    return found


def read_probes(source: str, *, base_dir: Path = Path()) -> ProbeSet:
    """The probes in a file, in our form, garak's or PyRIT's, line by line. All problems together."""
    name = Path(source).name.split(".")[0]
    problems: list[Problem] = []
    probes: dict[str, Probe] = {}
    lines: dict[str, int] = {}
    skipped = 0
    for row in read_source(source, base_dir=base_dir):
        if row.value is None:
            problems.append(row.problem or Problem("cannot be read", f"{source}:{row.line}"))
            continue
        bad = RowProblems(f"{source}:{row.line}")
        value = {key: inner for key, inner in row.value.items() if inner is not None}
        own = False
        if "entry_type" in value:
            probe = _garak(value, name, bad)
        elif {"converted_value", "original_value"} & set(value) or ("value" in value and "prompt" not in value):
            probe = _pyrit(value, name, bad)
        else:
            probe, own = _own(value, name, row.line, bad), True
        if bad.found:
            problems += bad.found
        elif probe is None or (not own and probe.id in probes):
            skipped += 1
        elif probe.id in probes:
            fix = "ids must be unique"
            problems.append(
                Problem(f"the id {probe.id!r} was used before", bad.where, got=f"line {lines[probe.id]}", fix=fix)
            )
        else:
            probes[probe.id], lines[probe.id] = probe, row.line
    if not probes and not problems:
        problems.append(Problem("the file holds no requests", source, got=f"{skipped} lines of other kinds"))
    if problems:
        raise InputError(problems)
    return ProbeSet(name, tuple(probes.values()), source, skipped)


def _own(row: dict[str, Any], name: str, line: int, bad: RowProblems) -> Probe | None:
    for key in row:
        if key not in (*FIELDS, *FOREIGN):
            bad.add(f"unknown field {key!r}", fix=nearest(key, FIELDS) or f"known: {', '.join(FIELDS)}")
    messages = read_prompt(row, bad)
    expected = row.get("expected", LABELS.get(str(row.get("label")), REFUSE))
    identity, category = answer_text(row.get("id", str(line))), row.get("category", name)
    if expected not in (REFUSE, COMPLY):
        bad.add(f"unknown expectation {expected!r}", expected=f"{REFUSE} | {COMPLY}")
    for key, value in (("id", identity), ("category", category)):
        if not isinstance(value, str) or not value.strip():
            bad.add(f"{key} must be text", got=repr(value)[:60])
    return None if bad.found else Probe(identity, name, category, messages, expected)


def _garak(row: dict[str, Any], name: str, bad: RowProblems) -> Probe | None:
    """An attempt of a garak report; None for the report's other lines."""
    if row["entry_type"] != "attempt":
        return None
    prompt = row.get("prompt")
    turns = prompt.get("turns") if isinstance(prompt, dict) else None
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        messages = [{"role": turn.get("role"), "content": _garak_text(turn.get("content"))} for turn in turns]
    else:
        bad.add("the attempt has no prompt", expected="text, or a conversation of turns", got=repr(prompt)[:60])
        return None
    checked = read_prompt({"messages": messages}, bad)
    if any(not str(m.get("content") or "").strip() for m in checked):
        bad.add("a turn of the attempt holds no text", fix="only text can be asked here")
    if bad.found:
        return None
    category = str(row.get("probe_classname") or name)
    return Probe(hash_json([category, list(checked)])[3:15], name, category, checked, REFUSE)


def _garak_text(content: Any) -> Any:
    return content.get("text") if isinstance(content, dict) else content


def _pyrit(row: dict[str, Any], name: str, bad: RowProblems) -> Probe | None:
    """A seed prompt or a user's message of PyRIT; None for messages of the assistant and system."""
    if row.get("role", "user") != "user":
        return None
    value = row.get("value", row.get("converted_value", row.get("original_value")))
    kind = row.get("data_type", row.get("converted_value_data_type", "text"))
    if kind != "text":
        bad.add("the prompt is not text", expected="data_type: text", got=repr(kind)[:60])
    if not isinstance(value, str) or not value.strip():
        bad.add("the prompt is empty", got=repr(value)[:60])
    harms = row.get("harm_categories") or []
    if isinstance(harms, str):
        harms = [harms]
    if not isinstance(harms, list) or not all(isinstance(harm, str) for harm in harms):
        bad.add("harm_categories must be a list of texts", got=repr(harms)[:60])
    if bad.found:
        return None
    category = harms[0] if harms else str(row.get("dataset_name") or name)
    return Probe(hash_json(value)[3:15], name, category, ({"role": "user", "content": value},), REFUSE)
