"""Sets of checkable items: what a base and its adapter are both asked.

A :class:`SetItem` is a prompt, the answers that count as right, and the check that decides. A set is a named, ordered
list of them with a hash over everything that can change a score. Sets come from the generators in ``builtin`` (same
bytes on every machine) and from a user's file; tasks of lm-eval-harness go their own way (``lm_eval``).

A user's file has one object a line:

    {"prompt": "2+2?", "answer": "4", "check": "number", "category": "sums"}
    {"messages": [...], "answers": ["a", "b"], "check": {"kind": "constraints", "rules": [...]}}

``check`` is a kind of ``checks`` or an object with its options (default: ``normalised``). Every problem of a file is
reported with its line, together.

It asks no model and scores nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.data.messages import RowProblems, answer_text, read_messages
from tunegate.data.read import read_source
from tunegate.data.types import Message
from tunegate.errors import InputError, Problem, collecting, nearest
from tunegate.evaluation.checks import Check, check_problems
from tunegate.files import hash_json

MAX_NEW_TOKENS = 64
LM_EVAL_PREFIX = "lm_eval:"
REGRESSION = "regression"  # stands for the six built-in domains
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FIELDS = ("id", "category", "prompt", "messages", "answer", "answers", "check", "tags", "max_new_tokens")
# What other packs call their checks, and fields of theirs that say nothing about scoring. Read, never written.
ANSWER_TYPES = {"choice": "choice", "number": "number", "python_literal": "literal", "text": "normalised"}
FOREIGN = ("answer_type", "choices", "subset", "label", "expected", "source")


@dataclass(frozen=True)
class SetItem:
    """One item. ``messages`` ends with the user's turn; all ``references`` are right, likelihood takes the first.

    ``category`` is the domain that scores are grouped by. ``max_new_tokens`` bounds the answer.
    """

    id: str
    set: str
    category: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    check: Check
    tags: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def name(self) -> str:
        """``set/id``: unique over all sets of a run, how reports name this item."""
        return f"{self.set}/{self.id}"

    @property
    def prompt(self) -> str:
        """The last user message's text."""
        return str(self.messages[-1].get("content") or "")


@dataclass(frozen=True)
class ItemSet:
    """A named list of items with distinct ids. ``hash`` covers everything that can change a score."""

    name: str
    items: tuple[SetItem, ...]
    source: str

    @property
    def hash(self) -> str:
        return hash_json([dataclasses.asdict(item) for item in self.items])

    def first(self, n: int | None) -> ItemSet:
        """``n`` items, every kind (category and tags) in turn, in their order; all of them for None."""
        if n is None or n >= len(self.items):
            return self
        kept = sorted(spread([(item.category, item.tags) for item in self.items])[:n])
        return dataclasses.replace(self, items=tuple(self.items[place] for place in kept))


def spread(kinds: Sequence[Hashable]) -> list[int]:
    """The places of ``kinds``, the first of every kind before the second of any."""
    seen: Counter[Hashable] = Counter()
    rounds = []
    for place, kind in enumerate(kinds):
        rounds.append((seen[kind], place))
        seen[kind] += 1
    return [place for _, place in sorted(rounds)]


def load_sets(names: Sequence[str], *, base_dir: Path = Path(), seed: int = 0) -> list[ItemSet]:
    """Built-in sets by name (``regression`` stands for the six domains), and files by path.

    :class:`InputError` lists every problem of every set.
    """
    from tunegate.evaluation.builtin import BUILT_IN, DOMAINS, build_set

    problems: list[Problem] = []
    found: list[ItemSet] = []
    wanted = [part for name in names for part in (DOMAINS if name == REGRESSION else (name,))]
    for name in dict.fromkeys(wanted):
        with collecting(problems):
            if name in BUILT_IN:
                found.append(build_set(name, seed))
            elif name.startswith(LM_EVAL_PREFIX):
                raise InputError("a task of lm-eval-harness is not a set of items", where=name)
            elif name.lower().removesuffix(".gz").endswith(SUFFIXES):
                found.append(read_set(name, base_dir=base_dir))
            else:
                fix = nearest(name, (*BUILT_IN, REGRESSION)) or f"built in: {REGRESSION}, {', '.join(BUILT_IN)}"
                raise InputError("no such set", where=name, expected="a built-in set or a .jsonl file", fix=fix)
    twice = [name for name, n in Counter(one.name for one in found).items() if n > 1]
    problems += [Problem("two sets have one name", name, fix="rename one of the files") for name in twice]
    if problems:
        raise InputError(problems)
    return found


def read_set(source: str, *, base_dir: Path = Path()) -> ItemSet:
    """The set in a file (any that ``data.read`` opens), named after the file. All problems together."""
    name = Path(source).name.split(".")[0]
    problems: list[Problem] = []
    items: list[SetItem] = []
    lines: dict[str, int] = {}
    for row in read_source(source, base_dir=base_dir):
        if row.value is None:
            problems.append(row.problem or Problem("cannot be read", f"{source}:{row.line}"))
            continue
        bad = RowProblems(f"{source}:{row.line}")
        item = _read_item(row.value, name, row.line, bad)
        if item is not None and item.id in lines:
            bad.add(f"the id {item.id!r} was used before", got=f"line {lines[item.id]}", fix="ids must be unique")
        elif item is not None:
            lines[item.id] = row.line
            items.append(item)
        problems += bad.found
    if problems:
        raise InputError(problems)
    return ItemSet(name, tuple(items), source)


def _read_item(row: dict[str, Any], name: str, line: int, bad: RowProblems) -> SetItem | None:
    row = {key: value for key, value in row.items() if value is not None}
    for key in row:
        if key not in (*FIELDS, *FOREIGN):
            bad.add(f"unknown field {key!r}", fix=nearest(key, FIELDS) or f"known: {', '.join(FIELDS)}")
    messages = read_prompt(row, bad)
    references = _references(row, bad)
    check = _check(row, bad)
    identity = answer_text(row.get("id", str(line)))
    category, tags = row.get("category", name), row.get("tags", [])
    tokens = row.get("max_new_tokens", MAX_NEW_TOKENS)
    for key, value in (("id", identity), ("category", category)):
        if not isinstance(value, str) or not value.strip():
            bad.add(f"{key} must be text", got=repr(value)[:60])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        bad.add("tags must be a list of texts", got=repr(tags)[:60])
    if type(tokens) is not int or not 1 <= tokens <= 4096:
        bad.add("max_new_tokens must be a whole number from 1 to 4096", got=repr(tokens)[:60])
    if check is not None and references is not None:
        for text in check_problems(check, references):
            bad.add(text)
    if bad.found or check is None or references is None:
        return None
    return SetItem(identity, name, category, messages, references, check, tuple(tags), tokens)


def read_prompt(row: dict[str, Any], bad: RowProblems) -> tuple[Message, ...]:
    """The messages of a row with ``prompt`` (text) or ``messages`` (a chat that ends with the user's turn)."""
    if "messages" in row:
        before = len(bad.found)
        messages = read_messages(row["messages"], bad)
        if len(bad.found) == before and messages[-1]["role"] not in ("user", "tool"):
            bad.add("the chat must end with the user's turn", got=f"it ends with {messages[-1]['role']!r}")
        return tuple(messages)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        bad.add("no question", expected='"prompt": text, or "messages": a list', got=repr(prompt)[:60])
        return ()
    return ({"role": "user", "content": prompt},)


def _references(row: dict[str, Any], bad: RowProblems) -> tuple[str, ...] | None:
    if "answer" in row and "answers" in row:
        bad.add("both answer and answers", fix="keep one of the two")
    value = row["answers"] if "answers" in row else [row["answer"]] if "answer" in row else []
    texts = [answer_text(v) for v in value] if isinstance(value, list) else [None]
    known = tuple(text for text in texts if isinstance(text, str))
    if len(known) < len(texts):
        bad.add("an answer must be text", got=repr(value)[:60])
        return None
    return known


def _check(row: dict[str, Any], bad: RowProblems) -> Check | None:
    foreign = row.get("answer_type")
    if "check" not in row and foreign is not None:
        if foreign not in ANSWER_TYPES:
            bad.add(f"unknown answer_type {foreign!r}", expected=" | ".join(ANSWER_TYPES))
            return None
        return Check(ANSWER_TYPES[foreign])
    value = row.get("check", "normalised")
    if isinstance(value, str):
        return Check(value)
    if isinstance(value, dict) and isinstance(value.get("kind"), str):
        return Check(value["kind"], {key: inner for key, inner in value.items() if key != "kind"})
    bad.add("check must be a name, or an object with a kind", got=repr(value)[:60])
    return None
