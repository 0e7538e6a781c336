"""Answers from a reference model behind an OpenAI-compatible URL (``POST URL/chat/completions``).

A request that fails for the moment is sent again after a wait that doubles, or as long as the server asks for; what is
wrong with the request itself is an :class:`InputError` at once. HTTP is ``judge.http``.

The key comes from the environment alone: ``OPENAI_API_KEY`` goes to api.openai.com only, any other host gets
``TUNEGATE_REFERENCE_KEY``. It is never written or shown. No streaming, no tools, no price list.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tunegate.errors import TunegateError
from tunegate.evaluation.judge.http import Busy, Endpoint, Reply, Settings, post

OPENAI_HOST = "api.openai.com"
TRIES = 6
LONGEST_WAIT = 60.0  # seconds, between two tries


@dataclass(frozen=True)
class Reference:
    """``url`` is the API's root, such as ``http://127.0.0.1:8000/v1``. ``timeout`` in seconds, for each try."""

    url: str
    model: str
    timeout: float = 120.0
    tries: int = TRIES
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def ask(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> Reply:
        """The model's answer to ``messages``. :class:`TunegateError` after so many tries."""
        body = {
            "model": self.model, "messages": [dict(m) for m in messages], "max_tokens": max_tokens,
            "temperature": temperature, "top_p": top_p,
        }  # fmt: skip
        endpoint, said = self.endpoint(), ""
        for attempt in range(self.tries):
            try:
                return post(endpoint, body, cut_off=True)
            except Busy as error:
                said = error.problems[0].what
                if attempt + 1 < self.tries:
                    self.sleep(min(LONGEST_WAIT, max(error.wait or 0.0, 2.0**attempt)))
        raise TunegateError(
            f"the reference model gave no answer in {self.tries} tries", where=self.url, got=said,
            fix="the same command goes on where it stopped; what was answered is kept",
        )  # fmt: skip

    def endpoint(self) -> Endpoint:
        """Address and key. :class:`InputError` if ``url`` is not the address of a server."""
        variable = "OPENAI_API_KEY" if urlsplit(self.url).hostname == OPENAI_HOST else "TUNEGATE_REFERENCE_KEY"
        names = Settings("--reference", "--reference-model", variable)
        url = f"{self.url.rstrip('/')}/chat/completions"
        return Endpoint(url, os.environ.get(variable) or None, self.timeout, names)
