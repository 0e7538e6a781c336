"""Answers from a model behind an OpenAI-compatible URL (``POST URL/chat/completions``).

A request that fails for the moment (429, 5xx, a broken or slow connection, an answer that is cut off or no JSON) is
sent again after a wait that doubles, or as long as ``Retry-After`` says. One that can never work (401, 404, 400) is
an :class:`InputError` at once. Redirects are refused, because they would carry the key elsewhere.

The key comes from the environment alone: ``OPENAI_API_KEY`` goes to api.openai.com only, any other host gets
``TUNEGATE_REFERENCE_KEY``. It is never written or shown. No streaming, no tools, no price list.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunegate.errors import InputError, TunegateError

OPENAI_HOST = "api.openai.com"
TRIES = 6
LONGEST_WAIT = 60.0  # seconds, between two tries
MOST_BYTES = 8 * 2**20
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)


@dataclass(frozen=True)
class Reply:
    """``stopped`` is False where the length limit ended it. Token counts are the service's, None if it gives none."""

    text: str
    stopped: bool
    prompt_tokens: int | None
    answer_tokens: int | None


class _Passing(Exception):
    """Try again; ``wait`` is what the server asked for, seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        del arguments


@dataclass(frozen=True)
class Endpoint:
    """``url`` is the API's root, such as ``http://127.0.0.1:8000/v1``. ``timeout`` in seconds, for each try."""

    url: str
    model: str
    timeout: float = 120.0
    tries: int = TRIES
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            expected = "http(s)://HOST[:PORT]/v1, without a key in it"
            raise InputError(
                "not the URL of a service", where="--reference", expected=expected, got=parts.hostname or ""
            )

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        official = urllib.parse.urlsplit(self.url).hostname == OPENAI_HOST
        return environment.get("OPENAI_API_KEY" if official else "TUNEGATE_REFERENCE_KEY") or None

    def ask(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> Reply:
        """The model's answer to ``messages``. :class:`TunegateError` after so many tries."""
        body = {
            "model": self.model, "messages": [dict(m) for m in messages], "max_tokens": max_tokens,
            "temperature": temperature, "top_p": top_p,
        }  # fmt: skip
        wait, reason = 1.0, ""
        for attempt in range(self.tries):
            try:
                return _read(self._send(json.dumps(body).encode()))
            except _Passing as error:
                reason = str(error)
                if attempt + 1 < self.tries:
                    self.sleep(min(LONGEST_WAIT, wait if error.wait is None else error.wait))
                    wait *= 2
        raise TunegateError(
            f"the reference model gave no answer in {self.tries} tries", where=self.url, got=reason,
            fix="the same command goes on where it stopped; what was answered is kept",
        )  # fmt: skip

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "tunegate"}
        if key := self.key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers, method="POST")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                found: bytes = response.read(MOST_BYTES + 1)
                left = response.length
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Passing(f"{type(error).__name__}: {error}") from None
        if len(found) > MOST_BYTES:
            raise TunegateError("the service's answer is too large", where=self.url, expected=f"{MOST_BYTES:,} bytes")
        if left:
            raise _Passing(f"the answer was cut off, {left} bytes are missing")
        return found

    def _refused(self, error: urllib.error.HTTPError) -> None:
        """Raise what the status means."""
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        reason = f"HTTP {error.code}: {said.strip()[:300]}"
        if error.code in PASSING:
            raise _Passing(reason, _seconds(error.headers.get("Retry-After")))
        name = "OPENAI_API_KEY" if urllib.parse.urlsplit(self.url).hostname == OPENAI_HOST else "TUNEGATE_REFERENCE_KEY"
        fix = {
            401: f"set {name}",
            403: f"set {name}",
            404: "the URL ends before /chat/completions; is the model's name right?",
        }
        raise InputError("the service refuses", where=self.url, got=reason, fix=fix.get(error.code, ""))


def _seconds(text: str | None) -> float | None:
    """``Retry-After`` in seconds; dates are not read."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def _read(data: bytes) -> Reply:
    try:
        found = json.loads(data)
        choice = found["choices"][0]
        text = choice["message"]["content"]
        usage = found.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _Passing(f"not a chat completion: {type(error).__name__} in {data[:120]!r}") from None
    if text is not None and not isinstance(text, str):
        raise _Passing(f"the answer is no text: {str(text)[:120]}")
    first, second = (n if type(n) is int else None for n in counts)
    return Reply((text or "").strip(), choice.get("finish_reason") != "length", first, second)
