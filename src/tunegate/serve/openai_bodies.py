"""A request's body as one of the models, or everything that is wrong with it.

A body is strict JSON (no NaN, no key twice, no half of a surrogate pair, nested less than 100 deep), then the model. A
field that is not known is an error that names the nearest. Places are written as they stand in the body:
``messages[0].content``.

It does not ask whether a request fits a model; ``openai_plan`` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from tunegate.data.rows import JsonError, excerpt, parse_json
from tunegate.errors import InputError, Problem, nearest
from tunegate.serve.openai_requests import Strict

Model = TypeVar("Model", bound=Strict)
_INSTANCE = re.compile(r" or instance of \w+$")  # a client sends JSON


def read_request(data: bytes, model: type[Model]) -> Model:
    """A body as ``model``; :class:`InputError` with everything that is wrong."""
    try:
        value = parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError("the body is not UTF-8", got=f"byte {error.object[error.start]:#04x}") from None
    except JsonError as error:
        raise InputError(f"the body cannot be read: {error.what}", got=error.got) from None
    if not isinstance(value, dict):
        raise InputError("the body is not a JSON object", got=type(value).__name__)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InputError(_problems(error, model, value)) from None


def _problems(error: ValidationError, model: type[Strict], value: Any) -> list[Problem]:
    found: dict[str, Problem] = {}
    for entry in error.errors(include_url=False, include_input=False):
        location, said = entry["loc"], _INSTANCE.sub("", entry["msg"].removeprefix("Value error, "))[:300]
        where = _place(location, value)
        if entry["type"] == "extra_forbidden":
            problem = Problem("unknown field", where, fix=nearest(str(location[-1]), _fields_at(model, location[:-1])))
        elif entry["type"] == "missing":
            where += f".{location[-1]}" if where else str(location[-1])
            problem = Problem("the field is missing", where)
        else:
            problem = Problem(said, where)
        found.setdefault(where or said, problem)  # the members of a union say no more than the first
    return list(found.values())


def _place(location: Sequence[str | int], value: Any) -> str:
    """``messages[0].content``: the parts that stand in the body; pydantic's names of union members do not."""
    text = ""
    for part in location:
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            text += f"[{part}]"
            value = value[part]
        elif isinstance(value, dict) and part in value:
            name = excerpt(part) if not re.fullmatch(r"\w{1,60}", str(part)) else str(part)
            text += f".{name}" if text else name
            value = value[part]
    return text


def _fields_at(model: type[Strict], location: Sequence[str | int]) -> list[str]:
    """Names that are known at a place, as they are written."""
    kinds = [model]
    for part in location:
        fields = [f for kind in kinds for name, f in kind.model_fields.items() if part == (f.alias or name)]
        kinds = [inner for field in fields for inner in _models_in(field.annotation)] if fields else kinds
    return [field.alias or name for kind in kinds for name, field in kind.model_fields.items()]


def _models_in(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models_in(inner)]
