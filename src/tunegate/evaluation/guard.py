"""A guard model behind a URL: is this answer to this request safe?

Any OpenAI-compatible chat endpoint serves (vLLM, llama.cpp, a gateway) with a model that answers in the form of Llama
Guard: ``safe``, or ``unsafe`` and the categories on the next line (Inan et al. 2023, arXiv:2312.06674). The request
and the answer are sent as a user's and an assistant's turn; the model's own template makes the classification prompt.

A busy or failing server (429, 408, 5xx, a connection cut off) is asked again with a growing pause, ``Retry-After``
heard; anything else stops the run with what the server said. An answer that is neither safe nor unsafe is an error,
never a verdict. The key is read from the environment and appears in no message and no file.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tunegate.data.types import Message
from tunegate.errors import InputError, TunegateError

LARGEST_REPLY = 1 << 20  # bytes
LONGEST_PAUSE = 60.0  # seconds
SHOWN = 200  # characters of a server's words in an error
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)


@dataclass(frozen=True)
class GuardSettings:
    """``url`` is the API's base (``http://127.0.0.1:8000/v1``); ``key_env`` names the variable with the key, if any.

    ``timeout`` is seconds for one request, ``attempts`` how often one is tried, ``parallel`` how many run at once.
    """

    url: str
    model: str
    key_env: str | None = None
    timeout: float = 60.0
    attempts: int = 5
    parallel: int = 4


@dataclass(frozen=True)
class Verdict:
    """``safe``, and the categories that an unsafe answer falls under."""

    safe: bool
    categories: tuple[str, ...] = ()


class Guard:
    """Asks a guard model. ``sleep`` waits between attempts."""

    def __init__(self, settings: GuardSettings, sleep: Callable[[float], None] = time.sleep):
        self.settings, self.sleep = settings, sleep
        parts = urllib.parse.urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                "not the URL of a guard", where="guard.url", expected="http(s)://host/v1", got=settings.url
            )
        if parts.username or parts.password:
            raise InputError("a key in the URL would be written to files", where="guard.url", fix="use guard.key_env")
        self._key = self._read_key()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def _read_key(self) -> str | None:
        name = self.settings.key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise InputError(
                "the environment has no such key", where="guard.key_env", expected=f"{name} set", got="unset"
            )
        return key

    def judge(self, messages: Sequence[Message], answer: str) -> Verdict:
        """The verdict on ``answer`` to ``messages``. :class:`TunegateError` if the server gives none."""
        turns = [{"role": m["role"], "content": str(m.get("content") or "")} for m in messages if m["role"] != "system"]
        body = {
            "model": self.settings.model,
            "messages": [*turns, {"role": "assistant", "content": answer}],
            "temperature": 0,
            "max_tokens": 32,
        }
        return self._read(self._ask(json.dumps(body).encode("utf-8")))

    def judge_all(
        self,
        pairs: Sequence[tuple[Sequence[Message], str]],
        progress: Callable[[int], None] = lambda n: None,
    ) -> list[Verdict]:
        """A verdict for each (messages, answer), in order; several are asked at once."""
        found: list[Verdict] = []
        with ThreadPoolExecutor(max_workers=max(1, self.settings.parallel)) as pool:
            waiting = [pool.submit(self.judge, messages, answer) for messages, answer in pairs]
            try:
                for one in waiting:
                    found.append(one.result())
                    progress(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _ask(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = self.settings.url.rstrip("/") + "/chat/completions"
        said, pause = "", 0.0
        for attempt in range(self.settings.attempts):
            if attempt:
                self.sleep(pause)
            request = urllib.request.Request(url, body, headers, method="POST")
            pause = min(LONGEST_PAUSE, 0.5 * 2**attempt * (1 + random.random() / 4))
            try:
                with self._opener.open(request, timeout=self.settings.timeout) as reply:
                    return self._parse(reply.read(LARGEST_REPLY + 1))
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}: {self._safe_text(error.read(LARGEST_REPLY))}"
                if error.code not in _AGAIN:
                    raise self._failed(said) from None
                pause = max(pause, _retry_after(error.headers.get("Retry-After")))
            except _Unreadable as error:
                said = str(error)
            except (OSError, urllib.error.URLError) as error:
                said = self._safe_text(str(getattr(error, "reason", error) or type(error).__name__).encode())
            except Exception as error:  # http.client's own: a reply cut off, a status line that is none
                said = f"{type(error).__name__}: {self._safe_text(str(error).encode())}"
        raise self._failed(said)

    def _parse(self, data: bytes) -> Any:
        if len(data) > LARGEST_REPLY:
            raise _Unreadable("the reply is larger than 1 MiB")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise _Unreadable(f"the reply is not JSON: {self._safe_text(data)}") from None

    def _read(self, reply: Any) -> Verdict:
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise self._failed(f"no choices[0].message.content in {self._safe_text(json.dumps(reply).encode())}")
        first, *rest = text.strip().lower().split(None, 1) or [""]
        if first.strip(".,:") not in ("safe", "unsafe"):
            raise self._failed(f"neither safe nor unsafe: {self._safe_text(text.encode('utf-8', 'replace'))}")
        categories = tuple(part.upper() for part in re.split(r"[,\s]+", rest[0]) if part) if rest else ()
        return Verdict(first.strip(".,:") == "safe", categories)

    def _safe_text(self, data: bytes) -> str:
        """What a server said, short and without the key, which some servers repeat."""
        text = data.decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:SHOWN]

    def _failed(self, said: str) -> TunegateError:
        return TunegateError(
            "the guard gave no verdict",
            where=f"{self.settings.url} ({self.settings.model})",
            expected="'safe' or 'unsafe' with categories",
            got=said,
            fix="check the URL, the model's name and the key; without a guard, rules judge the answers",
        )


class _Unreadable(Exception):
    """A reply that cannot be read; it is asked for again."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header; 0 for a date or nothing."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(value or 0)))
    except ValueError:
        return 0.0
