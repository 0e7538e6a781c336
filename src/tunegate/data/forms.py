"""From rows to examples: six forms of labelled data, one :class:`Example`.

The form is told or found from the keys of the first rows; a column mapping renames the user's columns to the
form's fields first. Every row becomes an example or a list of problems, and a row with a problem is never
repaired and never lost: it stays in ``Loaded.bad``.

It splits nothing and counts no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.data.messages import (
    RowProblems,
    answer_text,
    check_order,
    is_json,
    kind_of,
    read_messages,
    read_sharegpt,
    read_tools,
)
from tunegate.data.read import open_source
from tunegate.data.rows import RawRow
from tunegate.data.types import Example, Message
from tunegate.errors import InputError, Problem, nearest

DETECT_ROWS = 100
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """``needs`` must be in every row, ``takes`` may be. ``read`` makes the messages; ``shape`` is for errors."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    shape: str
    read: Callable[[Fields, RowProblems], list[Message]]


@dataclass(frozen=True)
class Loaded:
    """What some sources hold: ``examples``, and in ``bad`` every problem of every other row.

    ``rows`` counts all rows read; ``files`` maps each source to its content hash (``hf:`` and the fingerprint
    for ``datasets:`` sources); ``form`` is the form read, joined by ``+`` where sources differ.
    """

    examples: list[Example]
    bad: list[Problem]
    rows: int
    files: dict[str, str]
    form: str
    on_bad_row: str = "error"

    @property
    def bad_rows(self) -> int:
        return self.rows - len(self.examples)

    def raise_bad_rows(self) -> None:
        """Raise :class:`InputError` with every problem, unless there is none or ``on_bad_row`` is ``skip``."""
        if self.bad and self.on_bad_row != "skip":
            # first, because an error shows its first problems only
            fix = "mend the rows below, or leave them out with `on_bad_row: skip`"
            what = f"{self.bad_rows} of {self.rows} rows cannot be used"
            raise InputError([Problem(what, ", ".join(self.files), fix=fix), *self.bad])


# Forms


def _text(fields: Fields, name: str, bad: RowProblems, convert: bool = False) -> str:
    value = answer_text(fields[name]) if convert else fields[name]
    if not isinstance(value, str):
        bad.add(f"{name} has the wrong type", expected="text", got=kind_of(value))
        return ""
    return value


def _side(fields: Fields, name: str, role: str, bad: RowProblems) -> list[Message]:
    if isinstance(fields[name], list):
        return read_messages(fields[name], bad, name)
    return [{"role": role, "content": _text(fields, name, bad, convert=role == "assistant")}]


def _prompt_completion(fields: Fields, bad: RowProblems) -> list[Message]:
    return _side(fields, "prompt", "user", bad) + _side(fields, "completion", "assistant", bad)


def _alpaca(fields: Fields, bad: RowProblems) -> list[Message]:
    parts = [_text(fields, name, bad) for name in ("instruction", "input") if name in fields]
    question = "\n\n".join(part for part in parts if part.strip())
    answer = _text(fields, "output", bad, convert=True)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _labelled(fields: Fields, bad: RowProblems) -> list[Message]:
    question = _text(fields, "text" if "text" in fields else "prompt", bad)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(fields, "label", bad, convert=True)},
    ]


FORMS: dict[str, Form] = {  # in order of detection: rows often carry a rendered "text" beside the real fields
    "chat": Form(
        ("messages",),
        ("system", "tools"),
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "tools"?: [...]}',
        lambda fields, bad: read_messages(fields["messages"], bad),
    ),
    "sharegpt": Form(
        ("conversations",),
        ("system", "tools"),
        '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
        lambda fields, bad: read_sharegpt(fields["conversations"], bad),
    ),
    "alpaca": Form(
        ("instruction", "output"),
        ("input", "system"),
        '{"instruction": ..., "input"?: ..., "output": ...}',
        _alpaca,
    ),
    "prompt_completion": Form(
        ("prompt", "completion"),
        ("system", "tools"),
        '{"prompt": ..., "completion": ...}',
        _prompt_completion,
    ),
    "text": Form(("text",), (), '{"text": ...}, every token learned', lambda _fields, _bad: []),
    "labelled": Form(
        ("label",),
        ("text", "prompt", "system"),
        '{"text" or "prompt": ..., "label": ...} and no other column, or `form: labelled`',
        _labelled,
    ),
}
FIELDS = tuple(dict.fromkeys(name for form in FORMS.values() for name in form.needs + form.takes))


def detect_form(rows: list[dict[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """The form that most of the first rows have. InputError if none fits, or if two fit and differ in meaning."""
    columns = columns or {}
    rows = rows[:DETECT_ROWS]
    forms = [name for name in FORMS if set(columns) <= set(FORMS[name].needs + FORMS[name].takes)]
    votes = dict.fromkeys(forms, 0)
    with_label: list[int] = []
    for row in rows:
        has = {name for name in FIELDS if row.get(columns.get(name, name)) is not None}
        for name in forms:
            votes[name] += _fits(name, has, len(row), columns)
        if {"text", "label"} <= has:
            with_label.append(len(row))
    best = max(forms, key=lambda name: votes[name], default="")  # the first of equals, in the order of FORMS
    if best == "text" and with_label and set(with_label) == {2}:
        best = "labelled"
    if best == "text" and with_label:
        fix = "say `form: labelled` (learn the label) or `form: text` (learn the text itself)"
        raise InputError("the rows hold text, label and more: the form is not clear", got=_keys(rows), fix=fix)
    if best and votes[best]:
        return best
    wants = "; ".join(f"{name}: {form.shape}" for name, form in FORMS.items())
    own = list(dict.fromkeys(str(key) for row in rows for key in row))
    prompt, completion = own[:2] if len(own) > 1 else ("question", "answer")
    example = f"data.columns: {{prompt: {prompt}, completion: {completion}}}"
    fix = f"name your columns in the task file, for example `{example}`"
    raise InputError("the rows have no known form", expected=wants, got=_keys(rows), fix=fix)


def _fits(name: str, has: set[str], width: int, columns: Mapping[str, str]) -> bool:
    if name == "labelled":
        asked = "label" in columns
        return "label" in has and bool(has & {"text", "prompt"}) and (asked or width == 2)
    return set(FORMS[name].needs) <= has


def _keys(rows: Iterable[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    return "keys " + (", ".join(keys[:20]) + (", ..." if len(keys) > 20 else "") if keys else "none")


def to_example(
    raw: RawRow,
    form: str,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    group_by: str | None = None,
) -> Example | list[Problem]:
    """One row as an :class:`Example`, or everything that is wrong with it.

    ``columns`` maps our field name to the user's column; ``system`` is put in front where the row has no system
    message; ``group_by`` names the column whose value keeps rows on one side of a split.
    """
    if raw.value is None:
        return [raw.problem] if raw.problem else [Problem("the row cannot be read", f"{raw.source}:{raw.line}")]
    columns, kind = columns or {}, FORMS[form]
    bad = RowProblems(f"{raw.source}:{raw.line}")
    names = {field: columns.get(field, field) for field in kind.needs + kind.takes}
    fields = {field: raw.value[name] for field, name in names.items() if raw.value.get(name) is not None}
    needs = kind.needs
    if form == "labelled":
        needs += ("prompt" if "prompt" in fields else "text",)
    for field in needs:
        if field not in fields:
            _missing(raw.value, field, names[field], bad)
    group = _group(raw.value, group_by, bad)
    if bad.found:
        return bad.found
    meta = {k: v for k, v in raw.value.items() if k not in names.values() and is_json(v)}
    if form == "text":
        text = _text(fields, "text", bad)
        if not bad.found and not text.strip():
            bad.add("the text is empty", expected="text")
        return bad.found or Example(raw.source, raw.line, text=text, group=group, meta=meta)
    messages = kind.read(fields, bad)
    tools = read_tools(fields.get("tools"), bad)
    if not bad.found:
        check_order(messages, bad)
    messages = _with_system(messages, fields, system, bad)
    if bad.found:
        return bad.found
    return Example(raw.source, raw.line, messages=tuple(messages), tools=tools, group=group, meta=meta)


def _missing(row: Mapping[str, Any], field: str, name: str, bad: RowProblems) -> None:
    called = f"{field} (column {name!r})" if name != field else field
    state = "is null" if name in row else "is missing"
    near = nearest(name, [str(key) for key in row]) if name not in row else ""
    bad.add(f"{called} {state}", expected="a value", got=_keys([row]), fix=near)


def _group(row: Mapping[str, Any], group_by: str | None, bad: RowProblems) -> str | None:
    if group_by is None:
        return None
    value = row.get(group_by)
    if isinstance(value, (str, int, float)):
        return str(value)
    if value is None:
        _missing(row, "group_by", group_by, bad)
    else:
        bad.add(f"group_by (column {group_by!r}) has the wrong type", expected="text or number", got=kind_of(value))
    return None


def _with_system(messages: list[Message], fields: Fields, system: str | None, bad: RowProblems) -> list[Message]:
    """The row's own system text wins over the setting; two system texts in one row are a problem."""
    has_message = any(message["role"] == "system" for message in messages)
    own = fields.get("system") or None
    if own is not None and not isinstance(own, str):
        bad.add("system has the wrong type", expected="text", got=kind_of(own))
    elif own and has_message:
        bad.add("two system texts", expected="a system field or a system message, not both", got=kind_of(own))
    chosen = own or system
    return [{"role": "system", "content": chosen}, *messages] if chosen and not has_message else messages


# Loading


def load_examples(
    sources: Sequence[str],
    *,
    base_dir: Path,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    group_by: str | None = None,
    on_bad_row: str = "error",
) -> Loaded:
    """Read every source. Bad rows are listed, not raised: call :meth:`Loaded.raise_bad_rows`.

    Raises :class:`InputError` for wrong settings and for files that cannot be read as a whole, all together.
    """
    columns = columns or {}
    problems = _check_settings(sources, form, columns, system, on_bad_row)
    examples: list[Example] = []
    bad: list[Problem] = []
    files: dict[str, str] = {}
    forms: list[str] = []
    rows = 0
    for source in dict.fromkeys(sources):
        try:
            opened = open_source(source, base_dir=base_dir)
            raws = list(opened.rows)
            known = _source_form(source, raws, form, columns, group_by)
        except InputError as error:
            problems += error.problems
            continue
        files[source] = opened.hash
        rows += len(raws)
        forms.append(known)
        for raw in raws:
            made = to_example(raw, known, columns, system, group_by)
            if isinstance(made, Example):
                examples.append(made)
            else:
                bad += made
    if system and "text" in forms:
        problems.append(Problem("`system` does not go with `form: text`", ", ".join(files), fix="leave it out"))
    if problems:
        raise InputError(problems)
    return Loaded(examples, bad, rows, files, "+".join(dict.fromkeys(forms)), on_bad_row)


def _check_settings(
    sources: Sequence[str], form: str, columns: Mapping[str, str], system: str | None, on_bad_row: str
) -> list[Problem]:
    problems = []
    if not sources:
        problems.append(Problem("no source named", "data", expected="a file or a datasets: address"))
    twice = [source for source in dict.fromkeys(sources) if list(sources).count(source) > 1]
    problems += [Problem("the same source is named twice", source, fix="name it once") for source in twice]
    if form != "auto" and form not in FORMS:
        known = ["auto", *FORMS]
        problems.append(Problem(f"unknown form {form!r}", "form", ", ".join(known), fix=nearest(form, known)))
    takes = FORMS[form].needs + FORMS[form].takes if form in FORMS else FIELDS
    problems += [
        Problem(f"unknown field {field!r}", "columns", ", ".join(takes), fix=nearest(field, takes))
        for field in columns
        if field not in takes
    ]
    if system is not None and not system.strip():
        problems.append(Problem("`system` is empty", "system", fix="leave it out"))
    if on_bad_row not in ("error", "skip"):
        problems.append(Problem("unknown value", "on_bad_row", "error | skip", got=repr(on_bad_row)))
    if problems:
        raise InputError(problems)
    return problems


def _source_form(source: str, raws: list[RawRow], form: str, columns: Mapping[str, str], group_by: str | None) -> str:
    """The form of one source; InputError if a mapped column is in none of its rows, or no form fits."""
    values = [raw.value for raw in raws if raw.value is not None]
    if not values:
        return form if form in FORMS else "unknown"  # every row is refused before its form matters
    keys = list(dict.fromkeys(str(key) for value in values for key in value))
    asked = [(f"columns.{field}", name) for field, name in columns.items()]
    asked += [("group_by", group_by)] if group_by is not None else []
    problems = [
        Problem(f"no column {name!r}", f"{source} ({key})", ", ".join(keys[:20]), fix=nearest(name, keys))
        for key, name in asked
        if name not in keys
    ]
    if problems:
        raise InputError(problems)
    if form in FORMS:
        return form
    try:
        return detect_form(values, columns)
    except InputError as error:
        first = error.problems[0]
        raise InputError(first.what, where=source, expected=first.expected, got=first.got, fix=first.fix) from None
