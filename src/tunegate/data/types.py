"""What the data module hands on: examples as read, rows as rendered.

An :class:`Example` is a conversation (or a plain text) with the place it came from. A :class:`Rendered` row is
its token ids with a mask of the targets, the tokens the model learns to produce. Nothing here knows a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tunegate.files import hash_json

Message = dict[str, Any]  # {"role": ..., "content": ..., optional "tool_calls", "name", "tool_call_id"}


@dataclass(frozen=True)
class Example:
    """One labelled example.

    ``messages`` is a chat (the last message is the assistant's answer); ``text`` is set instead for the
    plain-text form, where every token is a target. ``line`` counts from 1; for Parquet and ``datasets``
    sources it is the row number, counted from 1.
    """

    source: str
    line: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def row_id(self) -> str:
        """``file:line``, how every report and error names this row."""
        return f"{self.source}:{self.line}"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last assistant answer: what the model sees at evaluation."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last assistant message's text (empty for plain text or a pure tool call)."""
        if not self.messages:
            return ""
        content = self.messages[-1].get("content")
        return content if isinstance(content, str) else ""

    @cached_property
    def input_hash(self) -> str:
        """Hash of what the model is given (of the text itself for plain text), white space and case folded.

        Splits are made on it, so that an input never lies on both sides of a split.
        """
        if self.text is not None:
            return hash_json(["text", " ".join(self.text.casefold().split())])
        folded = [
            [m.get("role"), " ".join(str(m.get("content") or "").casefold().split()), m.get("tool_calls")]
            for m in self.prompt
        ]
        return hash_json(["chat", folded, list(self.tools)])

    @cached_property
    def content_hash(self) -> str:
        """Hash of the whole example as it is, answer included, place of origin excluded."""
        return hash_json([self.text, list(self.messages), list(self.tools)])


@dataclass(frozen=True)
class Rendered:
    """One row as tokens. ``target[i]`` says that token ``ids[i]`` is learned (predicted from ids[:i])."""

    row_id: str
    ids: tuple[int, ...]
    target: tuple[bool, ...]

    @property
    def n_targets(self) -> int:
        """Targets that can be learned: the first token has nothing before it."""
        return sum(self.target[1:])

    def __len__(self) -> int:
        return len(self.ids)
