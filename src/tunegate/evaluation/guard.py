"""A guard model behind a URL: is this answer to this request safe?

Any OpenAI-compatible chat endpoint serves (vLLM, llama.cpp, a gateway) with a model that answers in the form of Llama
Guard: ``safe``, or ``unsafe`` and the categories on the next line (Inan et al. 2023, arXiv:2312.06674). The request
and the answer are sent as a user's and an assistant's turn; the model's own template makes the classification prompt.

A busy or failing server is asked again with a growing pause, ``Retry-After`` heard; anything else stops the run with
what the server said. An answer that is neither safe nor unsafe is an error, never a verdict. The key is read from the
environment and appears in no message and no file. HTTP itself is ``judge.http``.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tunegate.data.types import Message
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.judge.http import Busy, Endpoint, post

LONGEST_PAUSE = 60.0  # seconds
MAX_TOKENS = 64
SHOWN = 200  # characters of a server's words in an error


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
        try:
            url = settings.url.rstrip("/") + "/chat/completions"
            self._endpoint = Endpoint(url, _key(settings.key_env), settings.timeout)
        except InputError as error:
            if any(problem.where != "judge.url" for problem in error.problems):
                raise
            shown = "an address with a user name" if "@" in settings.url else settings.url
            raise InputError(
                "not the address of a guard",
                where="safety.guard.url",
                expected="http(s)://HOST/v1, without a user name",
                got=shown,
                fix="a key goes into the environment; guard.key_env names its variable",
            ) from None

    def judge(self, messages: Sequence[Message], answer: str) -> Verdict:
        """The verdict on ``answer`` to ``messages``. :class:`TunegateError` if the server gives none."""
        turns = [{"role": m["role"], "content": str(m.get("content") or "")} for m in messages if m["role"] != "system"]
        body = {
            "model": self.settings.model,
            "messages": [*turns, {"role": "assistant", "content": answer}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        return self._read(self._ask(body))

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

    def _ask(self, body: dict[str, Any]) -> str:
        said, pause = "", 0.0
        for attempt in range(self.settings.attempts):
            if attempt:
                self.sleep(pause)
            try:
                return post(self._endpoint, body).text
            except Busy as error:
                said = error.problems[0].what
                pause = min(LONGEST_PAUSE, max(error.wait or 0.0, 0.5 * 2**attempt * (1 + random.random() / 4)))
            except InputError as error:
                problem = error.problems[0]
                raise self._failed(f"{problem.what} {problem.got}".strip()) from None
        raise self._failed(said)

    def _read(self, text: str) -> Verdict:
        first, *rest = text.strip().lower().split(None, 1) or [""]
        if first.strip(".,:") not in ("safe", "unsafe"):
            raise self._failed(f"neither safe nor unsafe: {' '.join(text.split())[:SHOWN]!r}")
        categories = tuple(part.upper() for part in re.split(r"[,\s]+", rest[0]) if part) if rest else ()
        return Verdict(first.strip(".,:") == "safe", categories)

    def _failed(self, said: str) -> TunegateError:
        key = self._endpoint.key
        return TunegateError(
            "the guard gave no verdict",
            where=f"{self.settings.url} ({self.settings.model})",
            expected="'safe' or 'unsafe' with categories",
            got=said.replace(key, "[key]") if key else said,
            fix="check the URL, the model's name and the key; without a guard, rules judge the answers",
        )


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(
            "the environment has no such key", where="safety.guard.key_env", expected=f"{name} set", got="unset"
        )
    return key
