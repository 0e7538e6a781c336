"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Every exception has one status (``_KINDS``): 400 for what is wrong with a request, 404 for a name that is not served,
429 for an engine that is full, 503 for one that is gone, and so on. All problems of a request are in one message, each
in a line. What nobody foresaw is a 500 without details; the log says more (``telling``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunegate.errors import InputError, Problem, TunegateError
from tunegate.serve.catalogue import AdapterNotFound, ModelRefused, UnknownModel
from tunegate.serve.jobs import EngineFull, EngineGone
from tunegate.serve.telling import tell

if TYPE_CHECKING:
    from starlette.responses import JSONResponse

SHOWN = 20  # problems


class BodyTooLarge(InputError):
    """A body of more bytes than are taken."""


class NotJson(InputError):
    """A body that says to be something else."""


class BodyTooSlow(InputError):
    """A body that did not come in time."""


class NotAllowed(InputError):
    """What the request's key may not do."""


class AnswerTooLong(TunegateError):
    """An answer that took longer than one may."""


def too_long(seconds: float) -> AnswerTooLong:
    fix = "a smaller max_tokens; the server's limit is --answer-timeout"
    return AnswerTooLong("the answer took too long", expected=f"at most {seconds:g} s", fix=fix)


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


_WRONG, _FAILED = "invalid_request_error", "server_error"
# exception, status, type, code, param, headers; the first that fits
_KINDS: tuple[tuple[type[TunegateError], int, str, str, str | None, dict[str, str]], ...] = (
    (EngineFull, 429, "rate_limit_error", "engine_full", None, {"Retry-After": "1"}),
    (EngineGone, 503, _FAILED, "engine_gone", None, {"Retry-After": "5"}),
    # OpenAI's client asks again after a 504, for as long; this header keeps it from that.
    (AnswerTooLong, 504, _FAILED, "answer_timeout", None, {"x-should-retry": "false"}),
    (UnknownModel, 404, _WRONG, "model_not_found", "model", {}),
    (ModelRefused, 403, _WRONG, "model_refused", "model", {}),
    (NotAllowed, 403, _WRONG, "not_allowed", None, {}),
    (AdapterNotFound, 404, _WRONG, "adapter_not_found", "lora_path", {}),
    (BodyTooSlow, 408, _WRONG, "body_timeout", None, {"Connection": "close"}),
    (BodyTooLarge, 413, _WRONG, "body_too_large", None, {}),
    (NotJson, 415, _WRONG, "not_json", None, {}),
)


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an exception."""
    if not isinstance(error, TunegateError):
        tell("a request failed", error)
        return 500, body("the server failed; its log says more", _FAILED, code="internal_error"), {}
    message = explain(error)
    for kind, status, name, code, param, headers in _KINDS:
        if isinstance(error, kind):
            return status, body(message, name, param=param, code=code), headers
    if isinstance(error, InputError):
        param = next((problem.where for problem in error.problems if problem.where), None)
        return 400, body(message, _WRONG, param=param, code="invalid_request"), {}
    return 500, body(message, _FAILED, code="failed"), {}


def response(error: Exception) -> JSONResponse:
    from starlette.responses import JSONResponse

    status, found, headers = describe(error)
    return JSONResponse(found, status, headers)
