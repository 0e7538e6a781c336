"""One row, read or refused, and the strict JSON it is read with.

A row that cannot be read is a row too: it carries a :class:`Problem` in place of a value. JSON is taken
strictly, because everything later hashes and re-writes it: no duplicate keys, no NaN, no lone surrogates, no
nesting that would exhaust the stack of the next reader.

It opens no file: ``read`` does.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from tunegate.errors import Problem

MAX_DEPTH = 100  # chat templates and hashing walk values recursively; real rows nest less than ten deep


@dataclass(frozen=True)
class RawRow:
    """One row: ``value`` is its object, or ``problem`` says why there is none. ``line`` counts from 1."""

    source: str
    line: int
    value: dict[str, Any] | None
    problem: Problem | None = None


def bad_row(source: str, line: int, what: str, **fields: str) -> RawRow:
    return RawRow(source, line, None, Problem(what, f"{source}:{line}", **fields))


def excerpt(value: Any, limit: int = 60) -> str:
    """``value`` as one short line, escapes shown, cut after ``limit`` characters."""
    text = value[: limit + 1] if isinstance(value, str) else repr(value)
    shown = repr(text[:limit]) if isinstance(value, str) else text[:limit]
    return shown + ("..." if len(text) > limit else "")


class JsonError(ValueError):
    """Why a JSON text cannot be used. ``got`` is a short excerpt of the place."""

    def __init__(self, what: str, got: str = ""):
        super().__init__(what)
        self.what = what
        self.got = got


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        raise JsonError(f"the key {excerpt(twice[0])} stands twice in one object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError("a number is too large", excerpt(text))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


def parse_json(text: str) -> Any:
    """A JSON value of strict JSON: no duplicate keys, NaN, lone surrogates or nesting beyond ``MAX_DEPTH``.

    Raises :class:`JsonError` and nothing else.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text else f"line {error.lineno} column {error.colno} of it"
        near = excerpt(text[max(0, error.pos - 20) : error.pos + 20])
        raise JsonError(f"not valid JSON: {error.msg} at {place}", near) from error
    except JsonError:
        raise
    except RecursionError as error:
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels", excerpt(text, 30)) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise JsonError(f"not usable JSON: {error}") from error
    check_value(value)
    return value


def check_value(value: Any) -> None:
    """Raise :class:`JsonError` for nesting beyond ``MAX_DEPTH``, numbers that are not finite, lone surrogates."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if not item.isascii():
                try:
                    item.encode("utf-8")
                except UnicodeEncodeError as error:
                    lone = f"half of a surrogate pair (\\u{ord(item[error.start]):04x}) in a text"
                    raise JsonError(lone, excerpt(item[max(0, error.start - 20) : error.start + 20])) from error
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise JsonError(f"the number {item} is not JSON")
        elif isinstance(item, (dict, list)):
            if depth > MAX_DEPTH:
                raise JsonError(f"nested deeper than {MAX_DEPTH} levels")
            if isinstance(item, dict):
                stack += [(key, depth) for key in item]
            stack += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]


def json_row(text: str, source: str, line: int) -> RawRow:
    """The row that the JSON ``text`` holds, or the problem why it holds none."""
    try:
        value = parse_json(text)
    except JsonError as error:
        return bad_row(source, line, error.what, got=error.got)
    if not isinstance(value, dict):
        want = 'an object, {"name": value, ...}'
        got = f"a {type(value).__name__}: {excerpt(text.strip())}"
        fix = "if the file is one array, give it the ending .json" if isinstance(value, list) else ""
        return bad_row(source, line, "the row is not a JSON object", expected=want, got=got, fix=fix)
    return RawRow(source, line, value)
