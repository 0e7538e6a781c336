"""The form that a task's answers have, read off its metric, labels and training answers.

A schema or a pattern of the task file is taken as it is. Without one, answers that are all JSON objects give a schema
of their keys and types, and answers that repeat give a list of choices. Only training answers are read.

Constrained JSON has its keys in the schema's order, so they are put in the usual order of the training answers: a
model that is held to another order leaves keys out. An answer whose keys come in yet another order still pays that.

It infers no lengths, ranges or enumerations inside JSON, and no regular expressions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunegate.config import TaskSection
from tunegate.data.rows import parse_json
from tunegate.engine.constrain import AnswerForm

MOST_CHOICES = 200
JSON_METRICS = ("json_valid", "json_schema", "json_equal", "field_f1")


def find_form(
    task: TaskSection, labels: Sequence[str] | None, answers: Sequence[str], folder: Path
) -> tuple[AnswerForm, str] | None:
    """The form of a task's answers and where it comes from; None if the answers are free text."""
    metrics = {task.metric, *task.report}
    if task.json_schema is not None:
        schema = parse_json((folder / task.json_schema).read_text(encoding="utf-8"))
        return _json_form(schema, answers), f"task.json_schema ({task.json_schema})"
    if task.pattern is not None:
        return AnswerForm("regex", task.pattern), "task.pattern"
    if labels and len(labels) <= MOST_CHOICES:
        return AnswerForm("choices", tuple(labels)), f"the {len(labels)} labels"
    if metrics & set(JSON_METRICS):
        inferred = infer_schema([value for value in (_value(a) for a in answers) if value is not _NOTHING])
        return _json_form(inferred, answers), "keys and types of the training answers"
    distinct = sorted(set(answers))
    if 2 <= len(distinct) <= min(MOST_CHOICES, len(answers) // 5) and all(distinct):
        return AnswerForm("choices", tuple(distinct)), f"the {len(distinct)} answers in train"
    return None


def _json_form(schema: Any, answers: Sequence[str]) -> AnswerForm:
    """``schema`` in the order and with the white space of ``answers``."""
    return AnswerForm("json_schema", json.dumps(_ordered(schema, _usual_places(answers))), _compact(answers))


_NOTHING = object()


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _compact(answers: Sequence[str]) -> bool:
    """Whether the training answers mostly write JSON without spaces."""
    return sum('": ' in a for a in answers) < sum('":' in a and '": ' not in a for a in answers)


def _usual_places(answers: Sequence[str]) -> dict[str, float]:
    """The mean place of every key in its objects, from 0 (first) to 1 (last), over all answers."""
    places: dict[str, list[float]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for place, (key, inner) in enumerate(value.items()):
                places.setdefault(key, []).append(place / max(1, len(value) - 1))
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for answer in answers:
        walk(_value(answer))
    return {key: sum(found) / len(found) for key, found in places.items()}


def _ordered(schema: Any, places: dict[str, float]) -> Any:
    """``schema`` with the keys of every ``properties`` in the order of ``places``, others last; it means the same."""
    if isinstance(schema, list):
        return [_ordered(inner, places) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: inner if key in ("const", "enum") else _ordered(inner, places) for key, inner in schema.items()}
    if isinstance(found.get("properties"), dict):
        keys = sorted(found["properties"], key=lambda key: places.get(key, 2.0))
        found["properties"] = {key: found["properties"][key] for key in keys}
    return found


def infer_schema(values: Sequence[Any]) -> dict[str, Any]:
    """A JSON schema that all ``values`` satisfy: types, and for objects their keys in order of appearance, required
    where every object has them. Without values, any JSON."""
    kinds: dict[str, list[Any]] = {}
    for value in values:
        kinds.setdefault(_kind(value), []).append(value)
    if "number" in kinds and "integer" in kinds:
        kinds["number"] += kinds.pop("integer")
    schemas = [_schema_of(kind, found) for kind, found in sorted(kinds.items())]
    if len(schemas) < 2:
        return schemas[0] if schemas else {}
    return {"anyOf": schemas}


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _schema_of(kind: str, values: Sequence[Any]) -> dict[str, Any]:
    if kind == "array":
        return {"type": kind, "items": infer_schema([item for value in values for item in value])}
    if kind != "object":
        return {"type": kind}
    keys = dict.fromkeys(key for value in values for key in value)
    return {
        "type": "object",
        "properties": {key: infer_schema([v[key] for v in values if key in v]) for key in keys},
        "required": [key for key in keys if all(key in value for value in values)],
        "additionalProperties": False,
    }
