"""What comes back, as models for the OpenAPI document; the tests hold real answers to them.

Answers are written as plain dicts (``openai_answers``): these models document and check, and make nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from tunegate.serve import openai_requests as requests


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorDetails(Document):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Document):
    error: ErrorDetails


class CachedTokens(Document):
    cached_tokens: int


class Usage(Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenLogprob(Document):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Document):
    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(Document):
    name: str
    arguments: str


class Called(Document):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Document):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Called] | None = None


class ChatChoice(Document):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Document):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Document):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Document):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Document):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(Document):
    """``standing``: what the gate said of the adapter; ``fingerprint``: its content hash, or the base's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    standing: str
    fingerprint: str


class ModelList(Document):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Document):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Document):
    prompt: str


class Health(Document):
    status: Literal["ok"]


BODIES: tuple[type[BaseModel], ...] = (
    requests.ChatRequest,
    requests.CompletionRequest,
    requests.TokenizeRequest,
    requests.DetokenizeRequest,
    requests.LoadAdapterRequest,
    requests.UnloadAdapterRequest,
)
_REF = "#/components/schemas/{model}"


def taken(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI part of a route that takes ``model`` as its body."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def completed(document: dict[str, Any]) -> Mapping[str, Any]:
    """FastAPI's document with the bodies' schemas, and without the 422 that it adds: such errors are 400 here."""
    _, schemas = models_json_schema([(model, "validation") for model in BODIES], ref_template=_REF)
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return document
