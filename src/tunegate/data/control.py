"""Control tokens that stand in text stay text.

A user may type ``<|im_end|>``. Rendered and tokenised plainly it would end the turn. Three steps prevent that:

1. ``shield``: before rendering, every control token in a string of the row gets the noncharacter BREAK after its
   first character, and so does the beginning of one at a string's end (a template may join two strings). Trimming,
   JSON dumps and joins leave BREAK alone; a template that would drop or escape it leaves the token broken, never
   whole.
2. ``guard_text``: after rendering, the control tokens still whole are the template's own. They are renamed to
   OPEN + token + CLOSE; then BREAK is removed, and the row's text is as the user wrote it.
3. ``encode``: a copy of the tokenizer knows the control tokens by the new names only. The template's become
   control ids; the user's go through the ordinary pipeline, merges and offsets included.

Control tokens are the tokenizer's special tokens everywhere, and added tokens that are not special but stand in
the template's source (``<think>``, ``<tool_call>``, some role markers). In assistant messages the latter remain
tokens, since the model is to produce them, except those that a prompt without an answer already holds (role
markers). Tokens of one character cannot be broken and are left alone.

Rows without control tokens never come here: they are tokenised by the tokenizer itself. BREAK and the others are
Unicode noncharacters, not allowed in interchanged text; a row that holds one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tunegate.errors import InputError, TunegateError

BREAK, OPEN, CLOSE, CUT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_REFUSED = re.compile("[\ufdd0-\ufdd3\ud800-\udfff]")  # surrogates alone cannot be written as UTF-8
_WORD = re.compile(r"[\w\s▁]+")


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)")


class ControlTokens:
    """The control tokens of a fast tokenizer under one template. ``ids`` maps each to its id.

    ``template`` is the template's source; ``probe`` a rendered prompt that holds no answer.
    """

    def __init__(self, tokenizer: Any, template: str, probe: str):
        self._tokenizer = tokenizer
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        written = {t.content for t in tokenizer.added_tokens_decoder.values() if t.content in template} - special
        written = {t for t in written if not _WORD.fullmatch(t)}  # white space and words that templates write as text
        special = {t for t in special if len(t) > 1}
        written = {t for t in written if len(t) > 1}
        tokens = sorted(special | written)
        self.ids: dict[str, int] = {t: tokenizer.convert_tokens_to_ids(t) for t in tokens}
        self._pattern = _any_of(tokens)
        self._in_answers = _any_of([t for t in tokens if t in special or t in probe])
        self._beginnings = {t[:n] for t in tokens for n in range(1, len(t))}
        self._longest = max(map(len, tokens), default=1)

    # --- before rendering --------------------------------------------------------------------------------------

    def shield(self, value: Any, pattern: re.Pattern[str] | None = None) -> Any:
        """A copy of a JSON value with every control token in it broken, keys included.

        :class:`InputError` if a string holds a noncharacter used here or half of a surrogate pair.
        """
        pattern = pattern or self._pattern
        if isinstance(value, str):
            return self._shield_text(value, pattern)
        if isinstance(value, dict):
            return {self.shield(k, pattern): self.shield(v, pattern) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.shield(v, pattern) for v in value]
        return value

    def shield_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """``shield`` by the rules of the message's role, without the keys that are null."""
        pattern = self._in_answers if message.get("role") == "assistant" else self._pattern
        return {k: self.shield(v, pattern) for k, v in message.items() if v is not None}

    def _shield_text(self, text: str, pattern: re.Pattern[str]) -> str:
        if bad := _REFUSED.search(text):
            raise InputError(
                "the text holds a code point that no text may hold",
                expected="Unicode text without noncharacters and halves of surrogate pairs",
                got=f"U+{ord(bad[0]):04X} at character {bad.start() + 1} of a string of {len(text)}",
                fix="remove that character",
            )
        found = 1
        while found:  # breaking <<x>> may leave <x> whole
            text, found = pattern.subn(lambda m: m[0][0] + BREAK + m[0][1:], text)
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return text[: len(text) - n + 1] + BREAK + text[len(text) - n + 1 :]
        return text

    def find_in_message(self, message: dict[str, Any]) -> Iterator[str]:
        """Control tokens in the strings of a message, those that ``shield_message`` breaks."""
        pattern = self._in_answers if message.get("role") == "assistant" else self._pattern
        return self.find_in(message, pattern)

    def find_in(self, value: Any, pattern: re.Pattern[str] | None = None) -> Iterator[str]:
        """Control tokens in the strings of a JSON value."""
        pattern = pattern or self._pattern
        if isinstance(value, str):
            yield from pattern.findall(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from pattern.findall(key)
                yield from self.find_in(inner, pattern)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from self.find_in(inner, pattern)

    # --- after rendering ---------------------------------------------------------------------------------------

    def whole(self, text: str) -> list[re.Match[str]]:
        """The control tokens of a rendered text that the template wrote, in order."""
        return list(self._pattern.finditer(text))

    def guard_text(self, text: str) -> str:
        """Rendered text for :meth:`encode`: the template's control tokens renamed, the user's text restored."""
        return self._pattern.sub(lambda m: OPEN + m[0] + CLOSE, text).replace(BREAK, "")

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of guard texts with their (start, end) characters. CUT in a text is a border that no token crosses."""
        encodings = self._guard.encode_batch(list(texts), add_special_tokens=False)
        cut = self._guard.token_to_id(CUT)
        done = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids, offsets = encoding.ids, encoding.offsets
            if CUT in text:
                kept = [i for i, token in enumerate(ids) if token != cut]
                ids, offsets = [ids[i] for i in kept], [offsets[i] for i in kept]
            done.append((ids, offsets))
        return done

    @cached_property
    def _guard(self) -> Any:
        """The copy of the tokenizer that knows the control tokens as OPEN + token + CLOSE, under the same ids."""
        from tokenizers import AddedToken, Tokenizer

        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None
        new = {token: OPEN + token + CLOSE for token in self.ids}
        for added in spec["added_tokens"]:
            added["content"] = new.get(added["content"], added["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {new.get(token, token): i for token, i in model["vocab"].items()}
        else:  # Unigram: a list of (piece, score)
            model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
        if "merges" in model:  # merges that would build a control token out of text
            pairs = ((m, m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"])
            model["merges"] = [m for m, (a, b) in pairs if not {a, b, a + b} & self.ids.keys()]
        guard = Tokenizer.from_str(json.dumps(spec))
        guard.add_special_tokens([AddedToken(CUT, special=True, normalized=False)])
        self._check(guard)
        return guard

    def _check(self, guard: Any) -> None:
        tokens = list(self.ids)[:64]
        sample = "".join(f"{token}Some text, as the\n tokenizer reads it.{token}" for token in tokens) or "Some text."
        expected = self._tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        got = guard.encode(self.guard_text(sample), add_special_tokens=False).ids
        moved = [t for t, i in self.ids.items() if guard.token_to_id(OPEN + t + CLOSE) != i]
        if expected != got or moved:
            raise TunegateError(
                "this tokenizer cannot encode control tokens in text as text",
                where=type(self._tokenizer).__name__,
                got=f"ids of {', '.join(map(repr, moved[:3]))} changed"
                if moved
                else "another tokenisation of a sample",
                fix="remove the control tokens from the rows, or use a base with a standard tokenizer.json",
            )
