"""One request to an OpenAI-compatible server over plain HTTP, and every way in which it can go wrong.

The reply must be whole within ``timeout`` seconds, counted over the whole reply and not from byte to byte, so that a
server that drips does not hold the run. Redirects are refused: a key goes to the address that was configured and to
no other. The standard library does it; it makes one attempt, and ``ask`` decides about the next.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tunegate.errors import InputError, TunegateError

LARGEST_REPLY = 4 << 20  # bytes; a verdict has some hundred
CUT_OFF = "the reply was cut off at its length limit (judge.max_tokens)"
_CHUNK = 1 << 16
_LONGEST_TEXT = 200  # characters of a server's error message that are shown


class Busy(TunegateError):
    """A failure that another attempt may mend. ``wait``: seconds that the server asked for. ``used``: tokens in and out
    that were paid for nevertheless; None if that cannot be known."""

    def __init__(self, what: str, used: tuple[int, int] | None = (0, 0), wait: float | None = None):
        super().__init__(what)
        self.used, self.wait = used, wait


@dataclass(frozen=True)
class Reply:
    """A model's text and what it took; ``whole`` is False where the length limit ended it, ``counted`` where the
    server gave no count of its tokens."""

    text: str
    input_tokens: int
    output_tokens: int
    whole: bool = True
    counted: bool = True


@dataclass(frozen=True)
class Settings:
    """What the address, the model and the key are called where the user sets them; for messages."""

    url: str = "judge.url"
    model: str = "judge.model"
    key: str = "judge.key_env"


@dataclass(frozen=True)
class Endpoint:
    """``url`` of the completions; ``timeout`` in seconds for a whole reply."""

    url: str
    key: str | None = field(repr=False)
    timeout: float = 120.0
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good, parts = False, urlsplit("")
        secret = parts.username is not None or bool(parts.query or parts.fragment)  # a key may stand there
        if not good or secret:
            raise InputError(
                "not the address of a server",
                where=self.settings.url,
                expected="http://HOST:PORT/v1 or https://HOST/v1, without a user name and nothing after it",
                got="an address with a user name or a query" if secret else self.url,
            )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def post(endpoint: Endpoint, body: dict[str, Any], *, cut_off: bool = False) -> Reply:
    """Send a chat completion request. :class:`Busy` if it may be sent again; :class:`InputError` if it is wrong.

    With ``cut_off`` a reply that the length limit ended is one, and so is an empty one.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(endpoint.url, json.dumps(body).encode("utf-8"), headers, method="POST")
    deadline = time.monotonic() + endpoint.timeout
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=endpoint.timeout) as response:
            raw = _read(response, deadline, endpoint.timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(endpoint, error) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        text = f"no reply from {_host(endpoint)}: {type(reason).__name__}: {str(reason)[:_LONGEST_TEXT]}"
        raise Busy(text, (0, 0) if isinstance(reason, ConnectionRefusedError) else None) from None
    return _reply(raw, endpoint, cut_off)


def _read(response: Any, deadline: float, timeout: float) -> bytes:
    parts, size = [], 0
    while chunk := response.read1(_CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > LARGEST_REPLY:
            raise Busy(f"the reply is larger than {LARGEST_REPLY >> 20} MiB", None)
        if time.monotonic() > deadline:
            raise Busy(f"the reply was not whole after {timeout:g} s", None)
    expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdigit() and int(expected) != size:
        raise Busy(f"the reply was cut off after {size} of {expected} bytes", None)
    return b"".join(parts)


def _refused(endpoint: Endpoint, error: urllib.error.HTTPError) -> TunegateError:
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        wait = retry_after(error.headers.get("Retry-After"))
        return Busy(f"{_host(endpoint)} answered with status {error.code}", wait=wait)
    names = endpoint.settings
    ways_out = {
        401: f"check the key in the environment ({names.key})",
        403: f"check the key in the environment ({names.key})",
        404: f"check {names.url} and {names.model}",
    }
    moved = 300 <= error.code < 400
    return InputError(
        f"the server refused the request with status {error.code}",
        where=f"{names.url}: {endpoint.url}",
        got=_message(error, endpoint.key),
        fix="write the address it moved to"
        if moved
        else ways_out.get(error.code, f"check {names.model} and its settings"),
    )


def _message(error: urllib.error.HTTPError, key: str | None) -> str:
    """What the server said, shortened; a server that quotes the key does not get it into a log."""
    try:
        text = " ".join(error.read(2000).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return ""
    return (text.replace(key, "[key]") if key else text)[:_LONGEST_TEXT]


def _reply(raw: bytes, endpoint: Endpoint, cut_off: bool) -> Reply:
    try:
        data = json.loads(raw)
        choice, usage = data["choices"][0], data.get("usage") or {}
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        whole = choice.get("finish_reason") != "length"
        if text is None and cut_off:
            text = ""
        counted = all(type(usage.get(name)) is int for name in ("prompt_tokens", "completion_tokens"))
        used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        if not isinstance(text, str) and not (refusal or not whole):
            raise TypeError("content is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Busy(f"the reply of {_host(endpoint)} is not a chat completion in JSON", None) from None
    if not whole and not cut_off:
        raise Busy(CUT_OFF, used if counted else None)
    if not isinstance(text, str):
        raise Busy(f"the model refused: {str(refusal)[:_LONGEST_TEXT]}", used if counted else None)
    return Reply(text, *used, whole, counted)


def _host(endpoint: Endpoint) -> str:
    return urlsplit(endpoint.url).netloc


def retry_after(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says none."""
    if not header:
        return None
    try:
        seconds = float(header)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
