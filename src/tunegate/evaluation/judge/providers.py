"""Who judges: OpenAI and Anthropic through their own packages, anything OpenAI-compatible through plain HTTP.

A provider takes messages and the JSON schema of the reply, and gives the reply's text with its token counts. What
can be tried again is a :class:`Busy` error, with the time that the server asked to wait; what cannot is an
``InputError``. The packages' own retries are off: ``ask`` repeats, and counts what it costs.

The key is read from the environment when the provider is built, is held by the client only, and is part of no
record, key or message. A provider keeps nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.judge.http import Busy, Endpoint, Reply, post, retry_after
from tunegate.evaluation.judge.rubric import Messages

PROVIDERS = ("openai", "anthropic", "http")
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "http": "TUNEGATE_JUDGE_KEY"}


@dataclass(frozen=True)
class Model:
    """Which model is asked, and how. ``url``: the API's address up to and with ``/v1``; needed for ``http``, another
    one than their own for the packages. ``key_env``: the variable that holds the key; default by provider."""

    provider: str
    name: str
    url: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 120.0  # seconds for a whole reply
    key_env: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a reply depends on; the cache's key holds it."""
        return {
            "provider": self.provider,
            "model": self.name,
            "url": self.url,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def key(self) -> str | None:
        """The key from the environment. Servers of one's own may need none; the two services do."""
        variable = self.key_env or _KEYS[self.provider]
        found = os.environ.get(variable)
        if not found and (self.key_env or (self.provider != "http" and not self.url)):
            raise InputError(
                f"no key for {self.provider}",
                where=f"environment: {variable}",
                fix=f"export {variable}=...; it is read from there only and never written",
            )
        return found or None


class Provider(Protocol):
    """``complete`` raises :class:`Busy` for what can be tried again and ``InputError`` for what cannot."""

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply: ...


def open_provider(model: Model) -> Provider:
    """The provider that ``model`` names. :class:`InputError` for an unknown one, a package or a key that is missing."""
    if model.provider not in PROVIDERS:
        expected = f"one of {', '.join(PROVIDERS)}"
        raise InputError("unknown provider", where="judge.provider", expected=expected, got=model.provider)
    if model.provider == "http":
        if not model.url:
            raise InputError("the address of the server is missing", where="judge.url", expected="http://HOST:PORT/v1")
        return _Http(model, Endpoint(f"{model.url.rstrip('/')}/chat/completions", model.key(), model.timeout))
    if model.provider == "openai":
        return _OpenAi(model, _client("openai", "OpenAI", model))
    return _Anthropic(model, _client("anthropic", "Anthropic", model))


def _client(package: str, name: str, model: Model) -> Any:
    import importlib

    try:
        module = importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"the package {package} is not installed",
            where="judge.provider",
            fix=f"pip install 'tunegate[{package}]', or `judge.provider: http` with a compatible server",
        ) from None
    key = model.key() or "none"  # the packages refuse to start without any; a server of one's own ignores it
    return getattr(module, name)(api_key=key, base_url=model.url, timeout=model.timeout, max_retries=0)


@dataclass(frozen=True)
class _Http:
    model: Model
    endpoint: Endpoint = field(repr=False)

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply:
        body = {
            "model": self.model.name,
            "messages": messages,
            "temperature": self.model.temperature,
            "max_tokens": self.model.max_tokens,
            "response_format": _format(schema),
        }
        return post(self.endpoint, body)


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


@dataclass(frozen=True)
class _OpenAi:
    model: Model
    client: Any = field(repr=False)

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply:
        with _translated("openai"):
            found = self.client.chat.completions.create(
                model=self.model.name,
                messages=messages,
                temperature=self.model.temperature,
                max_completion_tokens=self.model.max_tokens,
                response_format=_format(schema),
            )
            if not found.choices:
                raise Busy("openai: a reply without a choice", None)
            choice, usage = found.choices[0], found.usage
            used = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
            if choice.finish_reason == "length":
                raise Busy("the reply was cut off at judge.max_tokens", used)
            return Reply(choice.message.content or "", *used)


@dataclass(frozen=True)
class _Anthropic:
    model: Model
    client: Any = field(repr=False)

    def complete(self, messages: Messages, schema: dict[str, Any]) -> Reply:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        tool = {"name": "verdict", "description": "The verdict on the answer.", "input_schema": schema}
        with _translated("anthropic"):
            found = self.client.messages.create(
                model=self.model.name,
                system=system,
                messages=[m for m in messages if m["role"] != "system"],
                temperature=self.model.temperature,
                max_tokens=self.model.max_tokens,
                tools=[tool],
                tool_choice={"type": "tool", "name": "verdict"},
            )
            used = found.usage.input_tokens, found.usage.output_tokens
            if found.stop_reason == "max_tokens":
                raise Busy("the reply was cut off at judge.max_tokens", used)
            for block in found.content:
                if block.type == "tool_use":
                    return Reply(json.dumps(block.input), *used)
            return Reply("".join(b.text for b in found.content if b.type == "text"), *used)


@contextlib.contextmanager
def _translated(package: str) -> Iterator[None]:
    """Errors of the two packages (they name them alike) as :class:`Busy` or ``InputError``, without their text: a
    client's message may quote the request, and with it the key."""
    try:
        yield
    except TunegateError:
        raise
    except Exception as error:
        status, name = getattr(error, "status_code", None), type(error).__name__
        if name in ("APIConnectionError", "APITimeoutError"):
            raise Busy(f"{package}: {name}", None) from None
        if status in (408, 409, 429) or (status or 0) >= 500:
            headers = getattr(getattr(error, "response", None), "headers", {})
            raise Busy(f"{package}: status {status}", wait=retry_after(headers.get("retry-after"))) from None
        if status is None:
            raise
        raise InputError(
            f"{package} refused the request: {name}, status {status}",
            where="judge",
            fix="check judge.model, judge.url and the key",
        ) from None
