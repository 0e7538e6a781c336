"""The built-in sets: six domains of 72 items each, made by seeded templates, and code that is run.

Each domain is a list of templates with a count; a template turns draws into a prompt, its right answers and a check.
An item whose prompt came up before is drawn again, so a set has no repeats. The answers are right by construction,
and the tests ask every reference to pass its own check.

The items are easy for people on purpose: a small base solves some and fails others, which is where forgetting shows.
They are no benchmark to compare models by.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunegate.errors import InputError, TunegateError, nearest
from tunegate.evaluation.builtin import code, formats, instructions, language, mathematics, reasoning
from tunegate.evaluation.builtin.draw import Draw, Made, Template
from tunegate.evaluation.sets import ItemSet, SetItem

VERSION = 1  # part of every item's seed; raised when a template changes what it draws
DOMAINS = ("reasoning", "math", "code", "language", "instructions", "formats")
_TEMPLATES: dict[str, Sequence[tuple[Template, int]]] = {
    "reasoning": reasoning.TEMPLATES,
    "math": mathematics.TEMPLATES,
    "code": code.TEMPLATES,
    "language": language.TEMPLATES,
    "instructions": instructions.TEMPLATES,
    "formats": formats.TEMPLATES,
    "code_run": code.RUN_TEMPLATES,
}
BUILT_IN = tuple(_TEMPLATES)
_TRIES = 200


def build_set(name: str, seed: int = 0) -> ItemSet:
    """The built-in set ``name``; the same arguments give the same items. :class:`InputError` for an unknown name."""
    if name not in _TEMPLATES:
        fix = nearest(name, BUILT_IN) or f"known: {', '.join(BUILT_IN)}"
        raise InputError(f"no built-in set {name!r}", fix=fix)
    items: list[SetItem] = []
    seen: set[str] = set()
    for template, count in _TEMPLATES[name]:
        kind = template.__name__
        for number in range(count):
            made = _new(template, f"{VERSION}/{name}/{kind}/{number}/{seed}", number, seen)
            seen.add(made.prompt)
            items.append(
                SetItem(
                    id=f"{kind}-{number + 1}",
                    set=name,
                    category=name,
                    messages=({"role": "user", "content": made.prompt},),
                    references=made.references,
                    check=made.check,
                    tags=(kind,),
                    max_new_tokens=made.max_new_tokens,
                )
            )
    return ItemSet(name, tuple(items), f"built in, version {VERSION}, seed {seed}")


def _new(template: Template, seed: str, number: int, seen: set[str]) -> Made:
    for attempt in range(_TRIES):
        made = template(Draw(f"{seed}/{attempt}"), number)
        if made.prompt not in seen:
            return made
    raise TunegateError("a template cannot make so many different items", where=seed)
