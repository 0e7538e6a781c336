"""Who judges: OpenAI and Anthropic through their own packages, anything OpenAI-compatible through plain HTTP.

A provider takes messages and the JSON schema of the reply, and gives the reply's text with its token counts. What
can be tried again is a :class:`Busy` error, with the time that the server asked to wait; what cannot is an
``InputError``. The packages' own retries are off: ``ask`` repeats, and counts what it costs.

The key is read from the environment when the provider is built, is held by the client only, and is part of no
record, key or message. A provider keeps nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunegate.errors import InputError, Problem, TunegateError, collecting
from tunegate.evaluation.judge.http import CUT_OFF, Busy, Endpoint, Reply, post, retry_after
from tunegate.evaluation.judge.rubric import Messages

PROVIDERS = ("openai", "anthropic", "url")
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "url": "TUNEGATE_JUDGE_KEY"}
# Written out, because the packages would take another address from the environment, and the key would go there.
_OWN = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
_LONGEST_TEXT = 300  # characters of a service's error message that are shown


@dataclass(frozen=True)
class Model:
    """Which model is asked, and how. ``url``: the API's address up to and with ``/v1``; needed for ``url``, another
    one than their own for the packages. ``temperature`` None: not sent. ``max_tokens`` of one reply. ``timeout`` in
    seconds: for a whole reply over plain HTTP, for each wait of the connection in the packages. ``key_env``: the
    variable that holds the key; default by provider. ``structured``: ask the API for JSON of the schema; without, the
    words of the question do."""

    provider: str
    name: str
    url: str | None = None
    temperature: float | None = None
    max_tokens: int = 1024
    timeout: float = 120.0
    key_env: str | None = None
    structured: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.provider not in PROVIDERS:
            expected = f"one of {', '.join(PROVIDERS)}"
            problems.append(Problem("unknown provider", "judge.provider", expected, self.provider))
        if self.url is not None:
            with collecting(problems):
                Endpoint(self.url, None)
        elif self.provider == "url":
            problems.append(Problem("the address of the server is missing", "judge.url", "http://HOST:PORT/v1"))
        if problems:
            raise InputError(problems)

    @property
    def identity(self) -> dict[str, Any]:
        """What a reply depends on; the cache's key holds it."""
        return {
            "provider": self.provider,
            "model": self.name,
            "url": self.url,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
        }

    def key(self) -> str | None:
        """The key from the environment. Servers of one's own may need none; the two services do."""
        variable = self.key_env or _KEYS[self.provider]
        found = os.environ.get(variable, "").strip()
        if not found and (self.key_env or not self.url):
            raise InputError(
                f"no key for the judge ({self.provider})",
                where=f"environment: {variable}",
                fix=f"export {variable}=...; it is read from there only and never written",
            )
        return found or None


class Provider(Protocol):
    """``complete`` raises :class:`Busy` for what can be tried again and ``InputError`` for what cannot."""

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply: ...


def open_provider(model: Model) -> Provider:
    """The provider that ``model`` names. :class:`InputError` for a package or a key that is missing."""
    if model.provider == "url":
        assert model.url is not None
        return _Http(model, Endpoint(f"{model.url.rstrip('/')}/chat/completions", model.key(), model.timeout))
    if model.provider == "openai":
        return _OpenAi(model, _client("openai", "OpenAI", model))
    return _Anthropic(model, _client("anthropic", "Anthropic", model))


def _client(package: str, name: str, model: Model) -> Any:
    problems: list[Problem] = []
    module, key = None, None
    try:
        module = importlib.import_module(package)
    except ImportError:
        fix = f"pip install 'tunegate[{package}]', or `judge.provider: url` with a compatible server"
        problems.append(Problem(f"the package {package} is not installed", "judge.provider", fix=fix))
    with collecting(problems):
        key = model.key() or "none"  # the packages refuse to start without any; a server of one's own ignores it
    if problems:
        raise InputError(problems)
    url = model.url or _OWN[package]
    if package == "anthropic":
        url = url.rstrip("/").removesuffix("/v1")  # this one adds it
    # a key goes to the address that was configured and to no other
    client = module.DefaultHttpxClient(follow_redirects=False, timeout=model.timeout)  # type: ignore[union-attr]
    return getattr(module, name)(api_key=key, base_url=url, timeout=model.timeout, max_retries=0, http_client=client)


@dataclass(frozen=True)
class _Http:
    model: Model
    endpoint: Endpoint = field(repr=False)

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply:
        body = {
            "model": self.model.name,
            "messages": messages,
            "max_tokens": self.model.max_tokens,
            **_temperature(self.model),
            **_format(self.model, schema),
        }
        return post(self.endpoint, body)


def _temperature(model: Model) -> dict[str, Any]:
    return {} if model.temperature is None else {"temperature": model.temperature}


def _format(model: Model, schema: dict[str, Any]) -> dict[str, Any]:
    wanted = {"name": "verdict", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": wanted}} if model.structured else {}


@dataclass(frozen=True)
class _OpenAi:
    """Chat completions (https://developers.openai.com/api/docs/guides/structured-outputs)."""

    model: Model
    client: Any = field(repr=False)

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply:
        with _translated("openai", self.client.api_key):
            found = self.client.chat.completions.create(
                model=self.model.name,
                messages=messages,
                max_completion_tokens=self.model.max_tokens,
                **_temperature(self.model),
                **_format(self.model, schema),
            )
            choice, usage = found.choices[0], found.usage
            used = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else None
            if choice.finish_reason == "length":
                raise Busy(CUT_OFF, used)
            if choice.message.refusal or choice.finish_reason == "content_filter":
                raise Busy(f"the model refused: {choice.message.refusal or 'content filter'}", used)
            read, written = used or (0, 0)
            return Reply(choice.message.content or "", read, written, counted=used is not None)


@dataclass(frozen=True)
class _Anthropic:
    """Messages with a JSON output format (https://platform.claude.com/docs/en/build-with-claude/structured-outputs)."""

    model: Model
    client: Any = field(repr=False)

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply:
        asked: dict[str, Any] = {}
        if self.model.structured:
            asked["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        if self.model.temperature is not None:
            asked["extra_body"] = _temperature(self.model)  # newer models have none, and the package neither
        with _translated("anthropic", self.client.api_key):
            found = self.client.messages.create(
                model=self.model.name,
                system="\n\n".join(m["content"] for m in messages if m["role"] == "system"),
                messages=[m for m in messages if m["role"] != "system"],
                max_tokens=self.model.max_tokens,
                **asked,
            )
            used = found.usage.input_tokens, found.usage.output_tokens
            if found.stop_reason == "max_tokens":
                raise Busy(CUT_OFF, used)
            if found.stop_reason == "refusal":
                raise Busy("the model refused", used)
            return Reply("".join(block.text for block in found.content if block.type == "text"), *used)


@contextlib.contextmanager
def _translated(package: str, key: str) -> Iterator[None]:
    """Errors of the two packages (they name them alike) as :class:`Busy` or ``InputError``; a message that quotes the
    key does not get it into a log."""
    try:
        yield
    except TunegateError:
        raise
    except Exception as error:
        status, name = getattr(error, "status_code", None), type(error).__name__
        said = " ".join(str(error).split()).replace(key, "[key]")[:_LONGEST_TEXT]
        if name in ("APIConnectionError", "APITimeoutError"):
            raise Busy(f"{package}: {name}", None) from None
        if status in (408, 409, 429) or (status or 0) >= 500:
            headers = getattr(getattr(error, "response", None), "headers", {})
            raise Busy(f"{package}: status {status}: {said}", wait=retry_after(headers.get("retry-after"))) from None
        if status is None or status < 300:  # what came is no reply in the service's form
            raise Busy(f"{package}: a reply that cannot be read: {name}", None) from None
        raise InputError(
            f"{package} refused the request with status {status}",
            where="judge",
            got=said,
            fix="check judge.model, judge.url and the key",
        ) from None
