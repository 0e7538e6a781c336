"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Every exception has one status: 400 for what is wrong with a request, 403 for a model that must not answer, 404 for a
name that is not served, 413 and 415 for a body that is too large or no JSON, 429 for an engine that is full, 503 for
one that is gone, the last two with ``Retry-After``. All problems of a request are in one message, a line each. What
nobody foresaw is a 500 without details; they go to the log.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tunegate.errors import InputError, Problem, TunegateError
from tunegate.serve.catalogue import AdapterNotFound, ModelRefused, UnknownModel
from tunegate.serve.jobs import EngineFull, EngineGone

if TYPE_CHECKING:
    from starlette.responses import JSONResponse

RETRY_FULL, RETRY_GONE = 1, 5  # seconds
SHOWN = 20  # problems


class BodyTooLarge(InputError):
    """A body of more bytes than are taken."""


class NotJson(InputError):
    """A body that says to be something else."""


def line(problem: Problem) -> str:
    """A problem in one line."""
    text = f"{problem.where}: {problem.what}" if problem.where else problem.what
    aside = [f"{name} {value}" for name, value in (("expected", problem.expected), ("got", problem.got)) if value]
    text += f" ({', '.join(aside)})" if aside else ""
    text += f"; {problem.fix}" if problem.fix else ""
    return " ".join(text.split())


def explain(error: TunegateError) -> str:
    lines = [line(problem) for problem in error.problems[:SHOWN]]
    left = len(error.problems) - SHOWN
    return "\n".join([*lines, f"and {left} more"] if left > 0 else lines)


def body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an exception."""
    if not isinstance(error, TunegateError):
        logging.getLogger("tunegate.serve").error("a request failed", exc_info=error)
        return 500, body("the server failed; its log says more", "server_error", code="internal_error"), {}
    message = explain(error)
    if isinstance(error, EngineFull):
        found = body(message, "rate_limit_error", code="engine_full")
        return 429, found, {"Retry-After": str(RETRY_FULL)}
    if isinstance(error, EngineGone):
        return 503, body(message, "server_error", code="engine_gone"), {"Retry-After": str(RETRY_GONE)}
    if isinstance(error, UnknownModel):
        return 404, body(message, "invalid_request_error", param="model", code="model_not_found"), {}
    if isinstance(error, ModelRefused):
        return 403, body(message, "invalid_request_error", param="model", code="model_refused"), {}
    if isinstance(error, AdapterNotFound):
        return 404, body(message, "invalid_request_error", param="lora_path", code="adapter_not_found"), {}
    if isinstance(error, BodyTooLarge):
        return 413, body(message, "invalid_request_error", code="body_too_large"), {}
    if isinstance(error, NotJson):
        return 415, body(message, "invalid_request_error", code="not_json"), {}
    if isinstance(error, InputError):
        param = next((problem.where for problem in error.problems if problem.where), None)
        return 400, body(message, "invalid_request_error", param=param, code="invalid_request"), {}
    return 500, body(message, "server_error", code="failed"), {}


def response(error: Exception) -> JSONResponse:
    from starlette.responses import JSONResponse

    status, found, headers = describe(error)
    return JSONResponse(found, status, headers)
