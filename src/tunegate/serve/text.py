"""Ids into text while they come: no broken character, no beginning of a stop string, the same text as at once.

:class:`Detokenizer` decodes the newest ids behind the ids of the piece before, because some decoders treat a text's
first token apart (a leading space). A piece is final once it does not end in the replacement character, which is what
half a character decodes to, nor in a byte token (``<0xE2>``), because one wrong byte changes how its whole group is
read. So the pieces together are :meth:`Renderer.decode` of all ids. :class:`StopScanner` keeps text back for as long
as a stop string could begin in it; where the text is cut does not depend on how it came in pieces. :class:`Words` says
how single tokens are written, for log-probabilities.

It renders no prompts: ``data.render`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tunegate.data.render import Renderer

BROKEN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Words:
    """The tokens of one renderer's tokenizer: ``special`` ids are no text, ``byte_ids`` are one byte each."""

    def __init__(self, renderer: Renderer):
        tokenizer = renderer.tokenizer
        self.decode: Callable[[Sequence[int]], str] = renderer.decode
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {i: token.content for i, token in added.items()}
        self.special = {i: token.content for i, token in added.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        self.size = max(vocabulary.values(), default=-1) + 1
        self.byte_ids = {i: int(m[1], 16) for t, i in vocabulary.items() if (m := _BYTE_TOKEN.fullmatch(t))}
        self._alphabet = _byte_alphabet() if "ByteLevel" in _decoder_of(tokenizer) else {}
        self._context = next((i for t, i in vocabulary.items() if t == "a"), None)
        self._known: dict[int, tuple[str, bytes]] = {}

    def write(self, token: int) -> tuple[str, bytes]:
        """A token as text and as bytes. The bytes of an answer's tokens, in order, are the bytes of its text; the text
        of a token that is part of a character is the replacement character."""
        if token not in self._known:
            self._known[token] = self._write(token)
        return self._known[token]

    def _write(self, token: int) -> tuple[str, bytes]:
        if token in self._added:
            text = self._added[token]
            return text, text.encode()
        if token in self.byte_ids:
            data = bytes([self.byte_ids[token]])
            return data.decode("utf-8", "replace"), data
        name = self._tokenizer.convert_ids_to_tokens(token) if token < self.size else None
        if name and self._alphabet and all(c in self._alphabet for c in name):
            data = bytes(self._alphabet[c] for c in name)
            return data.decode("utf-8", "replace"), data
        context = [] if self._context is None else [self._context]  # behind other text, a leading space is kept
        text = self.decode([*context, token])[len(self.decode(context)) if context else 0 :]
        return text, text.encode()


def _decoder_of(tokenizer: Any) -> str:
    """The decoder as tokenizer.json holds it."""
    decoder = tokenizer.backend_tokenizer.decoder
    return "" if decoder is None else decoder.__getstate__().decode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class Detokenizer:
    """The text of one answer, id by id. ``shown``: special tokens that are written out all the same, id to text."""

    def __init__(self, words: Words, shown: Mapping[int, str] | None = None):
        self._words, self._shown = words, shown or {}
        self._ids: list[int] = []  # of the piece before, then those that are not text yet
        self._new = 0  # where the latter begin
        self._before = ""  # text of the former

    def push(self, token: int) -> str:
        """The text that is final with this id; it may be of ids before it, and empty."""
        if token in self._shown:
            return self.finish() + self._shown[token]
        if token in self._words.special:
            return ""  # no text, and no context either
        self._ids.append(token)
        if token in self._words.byte_ids:
            return ""
        whole = self._words.decode(self._ids)
        if whole.endswith(BROKEN) or len(whole) <= len(self._before) or not whole.startswith(self._before):
            return ""
        text = whole[len(self._before) :]
        self._ids, self._new = self._ids[self._new :], 0
        self._before, self._new = self._words.decode(self._ids), len(self._ids)
        return text

    def finish(self) -> str:
        """What is left, as the decoder writes it."""
        text = self._words.decode(self._ids)[len(self._before) :] if len(self._ids) > self._new else ""
        self._ids, self._new, self._before = [], 0, ""
        return text


class StopScanner:
    """Text up to the first stop string. Of several, the one that is complete first ends the text; of those complete at
    the same character, the longest."""

    def __init__(self, stops: Iterable[str]):
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that no stop string can take back any more. After a hit: none."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.hit, self._held = True, ""
            return text[: min(ends)[1]]
        keep = held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was kept back, when nothing comes any more."""
        text, self._held = self._held, ""
        return text


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of one of ``stops``."""
    longest = max((len(stop) for stop in stops), default=0) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops if len(stop) > n):
            return n
    return 0
