"""Answers in OpenAI's two forms, chat and completion, whole or as server-sent events.

A :class:`Shape` writes one request's answers: the same pieces make the whole answer and the events, so both say the
same. Usage counts a prompt once, whatever ``n``; cached tokens are those of its first answer.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tunegate.serve.jobs import TokenLogprob
from tunegate.serve.openai_errors import describe
from tunegate.serve.openai_plan import Plan
from tunegate.serve.openai_streams import Answer, Numbered, Piece
from tunegate.serve.text import BROKEN, Detokenizer
from tunegate.serve.tools import Call

LEAST_LOGPROB = -9999.0  # for a token that cannot come: JSON has no infinity
Entries = Sequence[tuple[int, TokenLogprob]]


@dataclass
class Shape:
    """Writes the answers to one request. ``usage``: whether a stream ends with the counts."""

    plan: Plan
    chat: bool
    usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.plan.served.name,
            "system_fingerprint": self.plan.served.fingerprint,
        }

    # --- whole ------------------------------------------------------------------------------------------------

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return {**self.head(chunk=False), "choices": choices, "usage": self.counts(answers)}

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(number, answer.logprobs, answer.prompt)
        if not self.chat:
            text = self._echoed(number) + answer.text
            return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": answer.finish}
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": [_call(call) for call in answer.calls]}
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    def counts(self, answers: Sequence[Answer]) -> dict[str, Any]:
        prompt, made = self.plan.prompt_tokens, sum(answer.made for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in answers[:: self.plan.n])},
        }

    # --- events -----------------------------------------------------------------------------------------------

    async def events(
        self, first: Numbered, pieces: AsyncGenerator[Numbered, None], answers: list[Answer]
    ) -> AsyncGenerator[bytes, None]:
        """The stream of a request: ``first``, then ``pieces``; ``answers`` is filled on the way. What fails in the
        middle is the last event."""
        head = self.head(chunk=True) | ({"usage": None} if self.usage else {})
        async with aclosing(pieces):
            for number in range(len(answers)):
                if opening := self._opening(number):
                    yield event({**head, "choices": [opening]})
            try:
                yield self._event(head, first, answers)
                async for numbered in pieces:
                    yield self._event(head, numbered, answers)
            except Exception as error:
                yield event(describe(error)[1])
                return
        if self.usage:
            yield event({**head, "choices": [], "usage": self.counts(answers)})
        yield b"data: [DONE]\n\n"

    def _event(self, head: dict[str, Any], numbered: Numbered, answers: list[Answer]) -> bytes:
        number, piece = numbered
        choice = self._delta(number, piece, len(answers[number].calls))
        answers[number].add(piece)
        return event({**head, "choices": [choice]})

    def _opening(self, number: int) -> dict[str, Any] | None:
        """A choice's first chunk: who speaks, or the prompt that is echoed. One with log-probabilities waits for
        these."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        if not self.plan.echo or self.plan.jobs[number].prompt_logprobs is not None:
            return None
        return {"index": number, "text": self._echoed(number), "logprobs": None, "finish_reason": None}

    def _delta(self, number: int, piece: Piece, sent: int) -> dict[str, Any]:
        told = piece.logprobs or piece.prompt is not None
        logprobs = self._logprobs(number, piece.logprobs, piece.prompt) if told else None
        if not self.chat:
            text = piece.text if piece.prompt is None else self._echoed(number) + piece.text
            return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}
        delta: dict[str, Any] = {"content": piece.text} if piece.text or piece.logprobs else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": sent + i, **_call(call)} for i, call in enumerate(piece.calls)]
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    # --- parts ------------------------------------------------------------------------------------------------

    def _echoed(self, number: int) -> str:
        return self.plan.echo[number // self.plan.n] if self.plan.echo else ""

    def _logprobs(self, number: int, entries: Entries, prompt: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if self.plan.jobs[number].logprobs is None:
            return None
        if self.chat:
            return {"content": [self._token(entry) for _, entry in entries], "refusal": None}
        echoed = len(self._echoed(number))
        every: list[tuple[int, TokenLogprob]] = [(echoed + place, entry) for place, entry in entries]
        if prompt is not None:
            every = [*zip(self._places(number)[1:], prompt, strict=True), *every]
        names = [self._name(entry.token) for _, entry in every]
        chosen: list[float | None] = [_finite(entry.logprob) for _, entry in every]
        likeliest: list[dict[str, float] | None] = [
            {self._name(token): _finite(p) for token, p in reversed(entry.top)} | {name: _finite(entry.logprob)}
            for (_, entry), name in zip(every, names, strict=True)
        ]
        places = [place for place, _ in every]
        if prompt is not None:  # nothing says how likely a first token is
            first = self._name(self.plan.jobs[number].tokens[0])
            names, chosen, likeliest, places = [first, *names], [None, *chosen], [None, *likeliest], [0, *places]
        return {"tokens": names, "token_logprobs": chosen, "top_logprobs": likeliest, "text_offset": places}

    def _places(self, number: int) -> list[int]:
        """Where the text of each token of a prompt begins in the echo, in characters."""
        words, places, read = Detokenizer(self.plan.words), [], 0
        for token in self.plan.jobs[number].tokens:
            places.append(min(read, len(self._echoed(number))))
            read += len(words.push(token))
        return places

    def _token(self, entry: TokenLogprob) -> dict[str, Any]:
        return {**self._alone(entry.token, entry.logprob), "top_logprobs": [self._alone(*pair) for pair in entry.top]}

    def _alone(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.plan.words.write(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    def _name(self, token: int) -> str:
        """A token as completions name it; one that is part of a character by its bytes, so that names differ."""
        text, data = self.plan.words.write(token)
        return text if BROKEN not in text else "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
