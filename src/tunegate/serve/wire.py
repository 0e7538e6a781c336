"""Messages between the front and the engine's process: one JSON object a line, over a socket that only they have.

To the engine: ``{"job": n, "data": Job, "folder": path}``, ``{"cancel": n}``, ``{"load": n, "key", "folder",
"pinned"}``, ``{"identify": n, "folder": path}``, ``{"unload": key}``, ``{"stats": n}``, ``{"stop": true}``. From it:
``{"started": EngineFacts}`` or ``{"failed": error}`` first, then ``{"tokens": n, "data": Tokens}``, ``{"answer": n,
"data": ...}`` to a load or a question, and ``{"error": n, "data": error}``. Errors travel as their class's name and
their problems.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tunegate.errors import InputError, Problem, TunegateError
from tunegate.serve.jobs import EngineFull

LONGEST_LINE = 1 << 27
_ERRORS = {kind.__name__: kind for kind in (TunegateError, InputError, EngineFull)}


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def error_json(error: TunegateError) -> dict[str, Any]:
    kind = next(name for name, known in reversed(_ERRORS.items()) if isinstance(error, known))
    return {"kind": kind, "problems": [dataclasses.asdict(problem) for problem in error.problems]}


def error_of(data: dict[str, Any]) -> TunegateError:
    return _ERRORS[data["kind"]]([Problem(**problem) for problem in data["problems"]])
