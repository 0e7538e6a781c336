"""Metrics that read an answer as JSON.

The whole answer, white space at both ends aside, must be one JSON value: an answer inside a code fence or with a
sentence around it is not valid, since a program that reads it would choke. Also not valid are NaN and Infinity,
two equal keys in one object, and nesting deeper than :data:`MAX_DEPTH`. Integers may be of any length.

Values are compared as JSON: true is not 1, 1 equals 1.0, key order is free. No schema is fetched from a network
and no ``format`` is asserted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.errors import InputError, Problem
from tunegate.evaluation.types import Item, Metric

MAX_DEPTH = 64  # containers inside containers; also the default of .NET's reader
_DIGITS_AT_ONCE = 4000  # Python refuses to read longer integers in one go (sys.set_int_max_str_digits)

Schema = dict[str, Any] | bool
Path_ = tuple[str | None, ...]  # None stands for "an element of this list"


class _Unreadable(ValueError):
    """Why a text is not one JSON value."""


def _read_int(digits: str) -> int:
    if len(digits) <= _DIGITS_AT_ONCE:
        return int(digits)
    sign, digits = (-1, digits[1:]) if digits[0] == "-" else (1, digits)
    value = 0
    for start in range(0, len(digits), _DIGITS_AT_ONCE):
        chunk = digits[start : start + _DIGITS_AT_ONCE]
        value = value * 10 ** len(chunk) + int(chunk)
    return sign * value


def _read_constant(name: str) -> float:
    raise _Unreadable(f"{name} is not JSON")


def _read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _Unreadable(f"the key {twice!r} occurs twice in one object")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Unreadable(f"nested deeper than {MAX_DEPTH} levels")
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]


def parse_json(text: str) -> Any:
    """``text`` as one JSON value; ``ValueError`` with the reason if it is not."""
    try:
        value = json.loads(
            text.strip(),
            parse_int=_read_int,
            parse_constant=_read_constant,
            object_pairs_hook=_read_pairs,
        )
    except RecursionError:
        raise _Unreadable(f"nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(value)
    return value


def _readable(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _check_reference(reference: str) -> str | None:
    try:
        parse_json(reference)
    except ValueError as error:
        return f"the reference is not JSON: {error}"
    return None


def _comparable(value: Any) -> Any:
    """A hashable twin of a JSON value that is equal exactly when the JSON values are."""
    if isinstance(value, dict):
        return ("object", frozenset((key, _comparable(child)) for key, child in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_comparable(child) for child in value))
    if isinstance(value, bool) or value is None:
        return ("constant", str(value))
    return ("string" if isinstance(value, str) else "number", value)


def _fields(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _fields(child, (*path, key))
    elif isinstance(value, list) and value:
        for child in value:
            yield from _fields(child, (*path, None))
    else:
        yield path, _comparable(value)


def json_valid_metric() -> Metric:
    """1 if the answer is one JSON value. The reference is not looked at."""
    return Metric("json_valid", lambda item: float(_readable(item.prediction)), readable=_readable)


def json_equal_metric() -> Metric:
    """1 if the answer and the reference are equal JSON values. Key order is free, list order is not."""

    def per_item(item: Item) -> float:
        try:
            got = parse_json(item.prediction)
        except ValueError:
            return 0.0
        return float(_comparable(got) == _comparable(parse_json(item.reference)))

    return Metric("json_equal", per_item, check_reference=_check_reference, readable=_readable)


def field_f1_metric() -> Metric:
    """F1 over the (path, value) pairs of both values; the reported value is micro F1 over all items.

    A path is the keys from the root; every element of a list has the list's path, so lists are compared as
    multisets of leaves and which leaves stood together in an element is not judged. An empty object or list is a
    value. An answer that is not JSON has no pairs: all of the reference's count as missed.
    """

    def counts(item: Item) -> list[float]:
        wanted = Counter(_fields(parse_json(item.reference)))
        try:
            got = Counter(_fields(parse_json(item.prediction)))
        except ValueError:
            got = Counter()
        hits = (got & wanted).total()
        return [hits, got.total() - hits, wanted.total() - hits]

    return Metric(
        "field_f1",
        lambda item: _f1(np.array(counts(item))),
        counts=counts,
        aggregate=_f1,
        check_reference=_check_reference,
        readable=_readable,
    )


def _f1(counts: np.ndarray) -> float:
    hits, extra, missed = (float(count) for count in counts)
    return 2 * hits / (2 * hits + extra + missed) if hits else 0.0


def json_schema_metric(schema: Schema | str | Path, base_dir: Path) -> Metric:
    """1 if the answer is JSON and satisfies ``schema`` (a mapping, or the path of a JSON file).

    The draft is the one ``$schema`` names, 2020-12 without one. :class:`InputError` if the schema itself is
    wrong, refers to something it does not contain, or refers to itself without end. An answer that the
    validator gives up on (nesting, overflow) does not count as valid.
    """
    satisfies = _compile_schema(*_load_schema(schema, base_dir))

    def per_item(item: Item) -> float:
        try:
            return float(satisfies(parse_json(item.prediction)))
        except (ValueError, ArithmeticError, RecursionError):
            return 0.0

    return Metric("json_schema", per_item, readable=_readable)


def _load_schema(schema: Schema | str | Path, base_dir: Path) -> tuple[Schema, str]:
    """The schema and the place it came from."""
    if isinstance(schema, (dict, bool)):
        return schema, "schema"
    path = base_dir / schema
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("the JSON schema cannot be read", where=str(path), got=str(error)) from error
    if not isinstance(value, (dict, bool)):
        raise InputError("not a JSON schema", where=str(path), expected="an object", got=type(value).__name__)
    return value, str(path)


def _compile_schema(schema: Schema, where: str) -> Callable[[Any], bool]:
    import jsonschema
    import referencing
    from jsonschema.validators import validator_for
    from referencing.jsonschema import SchemaRegistry

    kind: Any = jsonschema.Draft202012Validator
    if isinstance(schema, dict) and "$schema" in schema:
        named = isinstance(schema["$schema"], str)
        kind = validator_for(schema, default=None) if named else None  # type: ignore[arg-type]
        if kind is None:
            raise InputError(
                "the schema names a draft that is not known",
                where=where,
                expected="for example https://json-schema.org/draft/2020-12/schema",
                got=str(schema["$schema"]),
            )
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        at = "".join(f"/{part}" for part in error.absolute_path) or "the root"
        raise InputError("the JSON schema is not valid", where=f"{where}, at {at}", got=error.message[:300]) from error
    # An empty registry of our own: the default one would fetch a remote $ref from the network.
    registry: SchemaRegistry = referencing.Registry()
    problems = [Problem(text, where=where) for text in _dangling_references(schema, kind, registry)]
    if problems:
        raise InputError(problems)
    validator = kind(schema, registry=registry)
    try:
        validator.is_valid(None)
    except RecursionError:
        raise InputError("the JSON schema refers to itself without end", where=where) from None

    def satisfies(value: Any) -> bool:
        return bool(validator.is_valid(value))

    return satisfies


def _dangling_references(schema: Schema, kind: Any, registry: Any) -> list[str]:
    """One text for every ``$ref`` below ``schema`` that leads nowhere."""
    from jsonschema_specifications import REGISTRY as SPECIFICATIONS
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    specification = specification_with(kind.META_SCHEMA["$schema"])
    root = specification.create_resource(schema)
    waiting = [(root, SPECIFICATIONS.combine(registry).resolver_with_root(root))]
    found = []
    while waiting:
        resource, resolver = waiting.pop()
        reference = resource.contents.get("$ref") if isinstance(resource.contents, dict) else None
        if isinstance(reference, str):
            try:
                resolver.lookup(reference)
            except (Unresolvable, ValueError):
                found.append(f"$ref {reference!r} leads nowhere (schemas on a network are not fetched)")
        waiting += [(child, resolver.in_subresource(child)) for child in resource.subresources()]
    return found
