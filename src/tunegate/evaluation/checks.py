"""Whether an answer is right, by rules that need no second model.

A :class:`Check` is a kind and its options, plain JSON, so that a set of items is data. Each kind is one entry of
:data:`KINDS`: how an answer is scored against the references, which options it takes, and what makes an item
unusable. ``constraints`` checks stated properties of a text (see ``constraints``).

``likelihood`` picks the most likely of fixed choices and needs the model; ``python`` runs the answer and needs
consent (``sandbox``). Both are only described here, and scored by whoever has the model.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunegate.errors import InputError, nearest
from tunegate.evaluation.constraints import LONGEST_ANSWER, bad_pattern, constraint_problems, place_of, plain, satisfies
from tunegate.evaluation.metrics_json import json_equal_metric, json_schema_metric, json_valid_metric
from tunegate.evaluation.metrics_text import NUMBER_TOLERANCE, choice_letter, last_number
from tunegate.evaluation.types import Item

LONGEST_LITERAL = 2000  # characters; longer ones are not parsed
LITERAL_DEPTH = 20

Options = Mapping[str, Any]
Scorer = Callable[[str, tuple[str, ...], Options], bool]


@dataclass(frozen=True)
class Check:
    """``kind`` is a name in :data:`KINDS`; ``options`` are its parameters, JSON values."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """``required`` and ``optional`` are names of options; ``verify`` says what is wrong with an item."""

    score: Scorer | None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    references: bool = True
    verify: Callable[[tuple[str, ...], Options], list[str]] | None = None


def score_answer(check: Check, answer: str, references: Sequence[str]) -> float:
    """1 if ``answer`` passes, else 0. ``ValueError`` for kinds that an answer's text alone cannot settle."""
    scorer = KINDS[check.kind].score
    if scorer is None:
        raise ValueError(f"a check of kind {check.kind!r} is not settled by text")
    return float(scorer(answer, tuple(references), check.options))


def check_problems(check: Check, references: Sequence[str]) -> list[str]:
    """What makes the check or its references unusable; empty if nothing does."""
    kind = KINDS.get(check.kind)
    if kind is None:
        return [f"unknown check {check.kind!r}; {nearest(check.kind, list(KINDS)) or 'known: ' + ', '.join(KINDS)}"]
    known = (*kind.required, *kind.optional)
    found = [
        f"unknown option {name!r} of check {check.kind!r}; "
        + (nearest(name, known) or (f"known: {', '.join(known)}" if known else "it takes none"))
        for name in check.options
        if name not in known
    ]
    found += [f"check {check.kind!r} needs the option {name!r}" for name in kind.required if name not in check.options]
    if kind.references and not any(r.strip() for r in references):
        found.append(f"check {check.kind!r} needs an answer to compare with")
    if not found and kind.verify is not None:
        found += kind.verify(tuple(references), check.options)
    return found


# --- how an answer is scored -------------------------------------------------------------------------------------


def _exact(answer: str, references: tuple[str, ...], options: Options) -> bool:
    return answer.strip() in {r.strip() for r in references}


def _normalised(answer: str, references: tuple[str, ...], options: Options) -> bool:
    return plain(answer) in {plain(r) for r in references}


def _contains(answer: str, references: tuple[str, ...], options: Options) -> bool:
    text = plain(answer)
    return any(place_of(r, text) is not None for r in references if plain(r))


def _mention(answer: str, references: tuple[str, ...], options: Options) -> bool:
    """Of the words in ``among``, the one that the answer names first decides; of two in one place, the longer."""
    text = plain(answer)
    named = [(place, -len(word), word) for word in options["among"] if (place := place_of(word, text)) is not None]
    return bool(named) and plain(min(named)[2]) in {plain(r) for r in references}


def _number(answer: str, references: tuple[str, ...], options: Options) -> bool:
    got = last_number(answer)
    wanted = [value for r in references if (value := last_number(r)) is not None]
    return got is not None and any(abs(got - value) <= NUMBER_TOLERANCE * abs(value) for value in wanted)


def _choice(answer: str, references: tuple[str, ...], options: Options) -> bool:
    got = choice_letter(answer)
    return got is not None and got in {choice_letter(r) for r in references}


def _regex(answer: str, references: tuple[str, ...], options: Options) -> bool:
    text = answer.strip()
    return len(text) <= LONGEST_ANSWER and re.fullmatch(options["pattern"], text) is not None


def _json(build: Callable[[Options], Any]) -> Scorer:
    def score(answer: str, references: tuple[str, ...], options: Options) -> bool:
        metric = build(options)
        return any(metric.per_item(_item(answer, r)) == 1.0 for r in references or ("",))

    return score


def _item(answer: str, reference: str) -> Item:
    from tunegate.data.types import Example

    return Item(answer, reference, Example("check", 1))


def unfenced(text: str) -> str:
    """What stands inside the first code fence, or the text itself where there is none."""
    found = re.search(r"```[A-Za-z]*[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found[1] if found else text


def literal(text: str) -> Any:
    """The Python literal that ``text`` is, code fence or back ticks aside. ``ValueError`` if it is none."""
    text = unfenced(text).strip().strip("`").strip()
    if len(text) > LONGEST_LITERAL:
        raise ValueError("too long for a literal")
    try:
        value = ast.literal_eval(text)
        shown = repr(value)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if len(shown) > 10 * LONGEST_LITERAL or not _shallow(value):
        raise ValueError("nested too deep")
    return value


def _shallow(value: Any) -> bool:
    level = [value]
    for _ in range(LITERAL_DEPTH):
        level = [x for v in level for x in _parts(v)]
    return not level


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set)) else []


def _literal(answer: str, references: tuple[str, ...], options: Options) -> bool:
    try:
        got = literal(answer)
    except ValueError:
        return False
    wanted = [literal(r) for r in references]
    return any(type(got) is type(value) and repr(got) == repr(value) for value in wanted)


def _constraints(answer: str, references: tuple[str, ...], options: Options) -> bool:
    return satisfies(answer, options["rules"])


# --- what makes an item unusable ---------------------------------------------------------------------------------


def _self_test(kind: str, references: tuple[str, ...], options: Options) -> list[str]:
    """A reference that fails its own check would count every right answer as wrong."""
    scorer = KINDS[kind].score
    assert scorer is not None
    return [
        f"the answer {_short(r)} does not pass its own check {kind!r}"
        for r in references
        if not scorer(r, references, options)
    ]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _verify_among(references: tuple[str, ...], options: Options) -> list[str]:
    among = options["among"]
    if not isinstance(among, list) or len(among) < 2 or not all(isinstance(w, str) and plain(w) for w in among):
        return ["'among' must be a list of at least two words"]
    known = {plain(word) for word in among}
    return [f"the answer {_short(r)} is not in 'among'" for r in references if plain(r) not in known]


def _verify_choices(references: tuple[str, ...], options: Options) -> list[str]:
    choices = options["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return ["'choices' must be a list of at least two texts"]
    if len(set(choices)) < len(choices):
        return ["a choice stands twice"]
    return [f"the answer {_short(r)} is not one of the choices" for r in references if r not in choices]


def _verify_number(references: tuple[str, ...], options: Options) -> list[str]:
    return [f"no number in the answer {_short(r)}" for r in references if last_number(r) is None]


def _verify_letter(references: tuple[str, ...], options: Options) -> list[str]:
    return [f"no choice letter in the answer {_short(r)}" for r in references if choice_letter(r) is None]


def _verify_literal(references: tuple[str, ...], options: Options) -> list[str]:
    found = []
    for r in references:
        try:
            literal(r)
        except ValueError as error:
            found.append(f"the answer {_short(r)} is not a Python literal: {error}")
    return found


def _verify_regex(references: tuple[str, ...], options: Options) -> list[str]:
    return bad_pattern(options["pattern"]) or _self_test("regex", references, options)


def _verify_json(references: tuple[str, ...], options: Options) -> list[str]:
    found = []
    for r in references:
        try:
            json.loads(r)
        except (ValueError, RecursionError) as error:
            found.append(f"the answer {_short(r)} is not JSON: {error}")
    return found


def _verify_schema(references: tuple[str, ...], options: Options) -> list[str]:
    try:
        json_schema_metric(options["schema"], Path())
    except InputError as error:
        return [problem.what + (f" ({problem.got})" if problem.got else "") for problem in error.problems]
    return _self_test("json_schema", references, options)


def _verify_constraints(references: tuple[str, ...], options: Options) -> list[str]:
    return constraint_problems(options["rules"]) or _self_test("constraints", references, options)


def _verify_python(references: tuple[str, ...], options: Options) -> list[str]:
    tests, seconds = options["tests"], options.get("timeout", 1)
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        return ["'tests' must be a list of Python statements, at least one"]
    found = []
    if type(seconds) not in (int, float) or not 0 < seconds <= 60:
        found.append(f"'timeout' must be seconds, above 0 and at most 60, not {seconds!r}")
    for number, test in enumerate(tests, 1):
        try:
            compile(test, "test", "exec")
        except (SyntaxError, ValueError) as error:
            found.append(f"test {number} is not Python: {error}")
    return found


KINDS: dict[str, Kind] = {
    "exact": Kind(_exact),
    "normalised": Kind(_normalised),
    "contains": Kind(_contains),
    "mention": Kind(_mention, ("among",), verify=_verify_among),
    "number": Kind(_number, verify=_verify_number),
    "choice": Kind(_choice, verify=_verify_letter),
    "likelihood": Kind(None, ("choices",), verify=_verify_choices),
    "regex": Kind(_regex, ("pattern",), references=False, verify=_verify_regex),
    "literal": Kind(_literal, verify=_verify_literal),
    "json_valid": Kind(_json(lambda options: json_valid_metric()), references=False),
    "json_equal": Kind(_json(lambda options: json_equal_metric()), verify=_verify_json),
    "json_schema": Kind(
        _json(lambda options: json_schema_metric(options["schema"], Path())),
        ("schema",),
        references=False,
        verify=_verify_schema,
    ),
    "constraints": Kind(_constraints, ("rules",), references=False, verify=_verify_constraints),
    "python": Kind(None, ("tests",), ("timeout",), references=False, verify=_verify_python),
}
"""How an answer can be checked, by name."""
