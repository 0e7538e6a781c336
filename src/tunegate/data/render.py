"""The one renderer: examples to token ids with a target mask, prompts to token ids, ids back to text.

Training, evaluation and serving all come here. A chat goes through the model's own Jinja template, once, and is
tokenised once, with offsets. The targets of an assistant turn reach from its first character after the role header
to its end-of-turn token, that token included and the white space behind it not. They are found

- by the template's ``{% generation %}`` markers where it has them, extended to the end-of-turn token;
- else by rendering the messages before the turn as a prompt and the messages up to it, and CHECKING that both
  are a prefix of the whole row. A turn that fails is not learned, because serving would never see those tokens
  (templates that strip earlier reasoning, for one); if it is the row's last turn, the row is a problem.

Then the tokens are checked: what stands before an answer must be the very tokens that ``prompt_ids`` gave to
serving. Where the tokenizer merges across that border, rows and later prompts are tokenised with a cut there, so
that a conversation's history is what the model was given and wrote. Everywhere else the ids are those of
``tokenizer.apply_chat_template``. Control tokens in the row's own text are encoded as text (see ``control``).

It does not pack, pad or move anything to a device, and it does not repair rows.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunegate.data.control import BREAK, CUT, ControlTokens
from tunegate.data.template import ChatTemplate
from tunegate.data.types import Example, Message, Rendered
from tunegate.errors import InputError, Problem, TunegateError


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: its answer starts at ``start``, its end-of-turn token ends at ``end``, in characters.

    ``context`` is where the last control token before it starts (0 if none). Tokenizers cut at control tokens, so
    what stands before ``context`` cannot change the tokens behind it.
    """

    context: int
    start: int
    end: int


@dataclass(frozen=True)
class _Layout:
    """A row or a prompt as text, with the turns to be learned or once written; ``plain`` for a text example."""

    text: str
    turns: tuple[_Turn, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class _Tokens:
    """``starts`` and ``ends`` count characters of the text that was tokenised."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Renderer:
    """Renders for one fast tokenizer and one template.

    ``template`` is None (the tokenizer's own), ``"plain"``, ``"chatml"``, the name of one of the tokenizer's
    templates, or Jinja text. ``eos_ids`` are the generation config's. A base without a template renders plain
    text examples; a chat is then a problem, never rendered by a template nobody chose.
    """

    def __init__(self, tokenizer: Any, *, template: str | None = None, eos_ids: Sequence[int] = ()):
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "a fast tokenizer is needed: only it reports where its tokens lie in the text",
                where=type(tokenizer).__name__,
                fix="use a base with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        empty = tokenizer("", verbose=False)["input_ids"]
        self.adds_bos = self.bos_id is not None and self.bos_id in empty[:1] and self.bos_id != self.eos_id
        self._eos_ids = tuple(eos_ids)
        self._template = ChatTemplate(tokenizer, template, self.adds_bos)
        self._contexts: dict[str, list[int]] = {}
        source = (self._template.source or "") + (self._template.tool_source or "")
        self.control = ControlTokens(tokenizer, source, self._probe_prompt())

    # --- template ----------------------------------------------------------------------------------------------

    @property
    def has_template(self) -> bool:
        return self._template.source is not None

    @property
    def template_source(self) -> str | None:
        """The Jinja text that renders chats without tools; None where there is no template."""
        return self._template.source

    def rendered(
        self, messages: Sequence[Mapping[str, Any]], prompt: bool = False, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """``messages`` as the template writes them, with the opening of an answer behind them if ``prompt``."""
        return self._template.render([dict(m) for m in messages], tools, prompt=prompt)[0]

    @property
    def template_hash(self) -> str:
        """Hash of the template's text and of the special tokens it can write."""
        return self._template.hash

    def _probe_prompt(self) -> str:
        """A rendered prompt without an answer: it shows the role markers. Empty if the template cannot do that."""
        try:
            return self._template.render([{"role": "user", "content": "Question"}], ())[0]
        except InputError:
            return ""

    @cached_property
    def end_of_turn_id(self) -> int:
        """The id that ends an assistant turn: the control token the template writes after an answer, or eos."""
        if not self.has_template:
            return self._eos()
        answer = "An answer"
        messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": answer}]
        text, _ = self._template.render(messages, ())
        start = text.rfind(answer) + len(answer)
        first = next(iter(self.control.whole(text[start:])), None)
        if answer not in text or first is None or text[start : start + first.start()].strip():
            raise InputError(
                "the chat template ends an answer without a special token, so no model could learn to stop",
                expected="a special token right after the answer",
                got=repr(text[start : start + 40]) if answer in text else "the answer does not appear",
                fix="`base.template: plain` ends answers with the tokenizer's eos token",
            )
        return self.control.ids[first[0]]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's end-of-turn token, the tokenizer's eos, the generation config's."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((self.end_of_turn_id, *eos, *self._eos_ids)))

    def _eos(self) -> int:
        if self.eos_id is None:
            raise InputError(
                "the tokenizer has no eos token, so no model could learn to stop",
                fix="set `eos_token` in the base's tokenizer_config.json",
            )
        return self.eos_id

    def uses_markers(self, tools: Sequence[Any] = ()) -> bool:
        """Whether the template for such rows marks the targets itself, with ``{% generation %}``."""
        return self._template.uses_markers(tools)

    # --- rows --------------------------------------------------------------------------------------------------

    def render(self, example: Example) -> Rendered | Problem:
        """The row as tokens with its target mask, or what is wrong with it."""
        return self.render_many([example])[0]

    def render_many(self, examples: Sequence[Example]) -> list[Rendered | Problem]:
        """``render`` for many rows, tokenised together. The order is kept."""
        rows: list[_Layout | Problem] = []
        for example in examples:
            try:
                rows.append(self._lay_out(example))
            except InputError as error:
                rows.append(_at(error.problems[0], example.row_id))
        tokens = iter(self._encode([row.text for row in rows if isinstance(row, _Layout)]))
        done: list[Rendered | Problem] = []
        for example, row in zip(examples, rows, strict=True):
            try:
                done.append(row if isinstance(row, Problem) else self._assemble(row, next(tokens), example.row_id))
            except InputError as error:
                done.append(_at(error.problems[0], example.row_id))
        return done

    def _lay_out(self, example: Example) -> _Layout:
        if example.text is not None:
            self._eos()
            return _Layout(self.control.shield(example.text), plain=True)
        messages = [self.control.shield_message(m) for m in example.messages]
        tools = self.control.shield(example.tools)
        if not messages or messages[-1].get("role") != "assistant":
            got = repr(messages[-1].get("role")) if messages else "no messages"
            raise InputError("the row does not end with an answer", expected="an assistant message", got=got)
        return self._lay_out_chat(messages, tools)

    def _lay_out_chat(self, messages: list[Message], tools: Sequence[Any], prompt: bool = False) -> _Layout:
        markers = self.uses_markers(tools)
        text, marked = self._template.render(messages, tools, prompt=prompt, spans=markers)
        control = self.control.whole(text)
        if markers:
            spans = [(start, self._marked_end(text, control, start, end)) for start, end in marked]
        else:
            spans = self._checked_spans(messages, tools, text, control, prompt)
        turns = []
        for start, end in spans:
            before = _before(control, start)
            turns.append(_Turn(control[before - 1].start() if before else 0, start, end))
        return _Layout(text, tuple(turns))

    def _checked_spans(
        self, messages: list[Message], tools: Sequence[Any], text: str, control: list[re.Match[str]], prompt: bool
    ) -> list[tuple[int, int]]:
        """Spans of the turns whose prompt and whose own rendering are prefixes of ``text``.

        In a row, not in a prompt, :class:`InputError` if the last turn is not among them.
        """
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            last = i == len(messages) - 1 and not prompt
            try:
                given, _ = self._template.render(messages[:i], tools, prompt=True)
                through = text if last else self._template.render(messages[: i + 1], tools)[0]
                if text.startswith(given) and text.startswith(through):
                    spans.append((len(given), self._turn_end(text, control, len(given), len(through))))
                elif last:
                    raise self._no_prefix(text, given)
            except InputError:
                if last:
                    raise
        return spans

    def _no_prefix(self, text: str, prompt: str) -> InputError:
        row, expected = (tokens.ids for tokens in self._encode([text, prompt]))
        n = _first_difference(row, expected)
        shown = [repr(self.tokenizer.decode(ids[n : n + 8])) if n < len(ids) else "nothing" for ids in (expected, row)]
        return InputError(
            "the last answer cannot be learned: its prompt is not the beginning of the rendered row",
            expected=f"from token {n} on, as serving will prompt: {shown[0]}",
            got=f"in the row: {shown[1]}",
            fix="let the answer begin with what the template's generation prompt opens (a <think> block, for one), "
            "or choose a template with {% generation %} markers (base.template)",
        )

    def _turn_end(self, text: str, control: list[re.Match[str]], start: int, stop: int) -> int:
        """Where the end-of-turn token of the turn in ``text[start:stop]`` ends.

        Of the control tokens at the turn's end, with nothing but white space between and behind them, it is the
        first that stops generation, else the last (a token that only tool calls end with, say).
        """
        run: list[re.Match[str]] = []
        edge = stop
        for match in reversed(control[: _before(control, stop)]):
            if match.start() < start or text[match.end() : edge].strip():
                break
            run.append(match)
            edge = match.start()
        if not run:
            raise InputError(
                "the chat template ends this answer without a special token, so no model could learn to stop",
                got=repr(text[max(start, stop - 40) : stop]),
                fix="`base.template: plain` ends answers with the tokenizer's eos token",
            )
        return next((m for m in reversed(run) if self.control.ids[m[0]] in self.stop_ids), run[0]).end()

    def _marked_end(self, text: str, control: list[re.Match[str]], start: int, end: int) -> int:
        """As ``_turn_end`` for a marked span; markers that leave the end-of-turn token out are extended to it."""
        stop = self.stop_ids
        inside = [m for m in control if start <= m.start() and m.end() <= end]
        closed = any(self.control.ids[m[0]] in stop and not text[m.end() : end].strip() for m in inside)
        after = control[_before(control, end) :][:1]
        if not closed and after and not text[end : after[0].start()].strip():
            return after[0].end()
        return self._turn_end(text, control, start, end)

    def _assemble(self, row: _Layout, tokens: _Tokens, row_id: str) -> Rendered:
        if row.plain:
            bos = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
            ids = (*bos, *tokens.ids, self._eos())
            return Rendered(row_id, ids, (*(False for _ in bos), *(True for _ in ids[len(bos) :])))
        if row.turns and self._fate(row.text, row.turns[-1], tokens) == "lost":
            last = row.turns[-1]
            raise InputError(
                "the tokenizer joins the end of the prompt with the beginning of the answer",
                got=repr(row.text[max(last.context, last.start - 20) : last.start + 20]),
                fix="remove the white space around the answer",
            )
        row, tokens = self._settle(row, tokens)
        mask = _mask(tokens, [(self._place(row.text, t.start), self._place(row.text, t.end)) for t in row.turns])
        return Rendered(row_id, tuple(tokens.ids), mask)

    def _settle(self, row: _Layout, tokens: _Tokens) -> tuple[_Layout, _Tokens]:
        """``row`` and its tokens with a cut where an answer starts and the tokenizer merged; lost turns left out."""
        fates = [self._fate(row.text, turn, tokens) for turn in row.turns]
        cuts = [turn.start for turn, fate in zip(row.turns, fates, strict=True) if fate == "cut"]
        kept = [turn for turn, fate in zip(row.turns, fates, strict=True) if fate != "lost"]
        text = row.text
        for start in reversed(cuts):
            text = text[:start] + CUT + text[start:]
        moved = [
            _Turn(*(at + bisect_left(cuts, at + inside) for at, inside in ((t.context, 0), (t.start, 1), (t.end, 0))))
            for t in kept
        ]
        return _Layout(text, tuple(moved)), self._encode([text])[0] if cuts else tokens

    def _fate(self, text: str, turn: _Turn, tokens: _Tokens) -> str:
        """``kept`` if the tokens before the answer are those of its prompt, tokenised alone. Else ``cut``, or
        ``lost`` where a cut would change the text (SentencePiece puts a space in front of every piece).

        Only what stands between two control tokens is looked at, so a turn has the same fate in every row and
        prompt that holds it.
        """
        context, answer = text[turn.context : turn.start], text[turn.start : turn.end]
        expected = self._contexts.get(context)
        if expected is None:
            if len(self._contexts) >= 4096:
                self._contexts.clear()
            expected = self._contexts[context] = self._encode([context])[0].ids
        first = bisect_left(tokens.starts, self._place(text, turn.start))
        if first >= len(expected) and tokens.ids[first - len(expected) : first] == expected:
            return "kept"
        whole, parts = self._encode([context + answer, context + CUT + answer])
        joined, apart = (self.tokenizer.decode(t.ids, clean_up_tokenization_spaces=False) for t in (whole, parts))
        return "cut" if joined == apart else "lost"

    # --- tokens ------------------------------------------------------------------------------------------------

    def _encode(self, texts: Sequence[str]) -> list[_Tokens]:
        """Rendered texts as tokens: by the tokenizer itself, or by its guarded copy where a text needs it."""
        done: list[_Tokens | None] = [None] * len(texts)
        guarded = [i for i, text in enumerate(texts) if BREAK in text or CUT in text]
        if guarded:
            encoded = self.control.encode([self.control.guard_text(texts[i]) for i in guarded])
            for i, (ids, offsets) in zip(guarded, encoded, strict=True):
                done[i] = _Tokens(ids, [a for a, _ in offsets], [b for _, b in offsets])
        plain = [i for i in range(len(texts)) if done[i] is None]
        if plain:
            out = self.tokenizer(
                [texts[i] for i in plain],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                padding=False,
                truncation=False,
                split_special_tokens=False,
                verbose=False,
            )
            for i, ids, offsets in zip(plain, out["input_ids"], out["offset_mapping"], strict=True):
                done[i] = _Tokens(ids, [a for a, _ in offsets], [b for _, b in offsets])
        return [tokens for tokens in done if tokens is not None]

    def _place(self, text: str, at: int) -> int:
        """Character ``at`` of a rendered text, counted in the text that was tokenised."""
        return len(self.control.guard_text(text[:at])) if BREAK in text or CUT in text else at

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of ``messages`` with the template's generation prompt: what the model is given to answer."""
        shielded = [self.control.shield_message(m) for m in messages]
        row = self._lay_out_chat(shielded, self.control.shield(tools), prompt=True)
        ids = self._settle(row, self._encode([row.text])[0])[1].ids
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            raise InputError(
                "the prompt begins with two BOS tokens",
                got=repr(row.text[:40]),
                fix="let either the template or the tokenizer write it, not both",
            )
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of a plain text to go on from, as plain text rows begin: a BOS where the tokenizer adds one."""
        bos = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        return bos + self._encode([self.control.shield(text)])[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens, white space as it is."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def control_in(self, example: Example) -> list[str]:
        """Control tokens that stand in the row's own text, in order of appearance. They are encoded as text."""
        found = [token for m in example.messages for token in self.control.find_in_message(m)]
        return [*found, *self.control.find_in(list(example.tools)), *self.control.find_in(example.text)]

    def truncate(self, row: Rendered, max_tokens: int) -> Rendered | None:
        """``row`` in at most ``max_tokens`` tokens: the oldest are cut, a BOS that the tokenizer adds stays.

        The last turn's targets are never cut, and one token stays before them to predict the first; None when that
        does not fit. A plain text row, all targets, loses its beginning.
        """
        if len(row) <= max_tokens:
            return row
        head = 1 if self.adds_bos and row.ids[0] == self.bos_id else 0
        keep = max_tokens - head
        if keep < 1:
            return None
        if not all(row.target[head:]):
            last = len(row) - 1 - row.target[::-1].index(True) if any(row.target) else 0
            first = last
            while first > 0 and row.target[first - 1]:
                first -= 1
            if len(row) - first + (head == 0) > keep:
                return None
        return Rendered(row.row_id, row.ids[:head] + row.ids[-keep:], row.target[:head] + row.target[-keep:])

    # --- golden prompts ----------------------------------------------------------------------------------------

    def golden(self, examples: Sequence[Example], k: int = 3) -> list[dict[str, Any]]:
        """The first ``k`` chat prompts with their ids, to travel with an adapter. Texts, where there is no chat."""
        chats = [e for e in examples if e.messages][:k]
        found: list[dict[str, Any]] = []
        for example in chats:
            messages, tools = list(example.prompt), list(example.tools)
            found.append({"messages": messages, "tools": tools, "ids": self.prompt_ids(messages, tools)})
        for example in [e for e in examples if e.text is not None][: k - len(chats)]:
            found.append({"text": example.text, "ids": self._encode([self.control.shield(example.text)])[0].ids})
        return found

    def check_golden(self, golden: Sequence[dict[str, Any]]) -> None:
        """:class:`TunegateError` unless every golden prompt still gives its ids."""
        problems = []
        for number, entry in enumerate(golden, 1):
            expected = list(entry["ids"])
            if "text" in entry:
                got = self._encode([self.control.shield(entry["text"])])[0].ids
            else:
                got = self.prompt_ids(entry["messages"], entry.get("tools") or ())
            if got == expected:
                continue
            n = _first_difference(expected, got)
            expected_text, got_text = (
                f"{x[n : n + 4]}, {self.tokenizer.decode(x[n : n + 4])!r}" for x in (expected, got)
            )
            problems.append(
                Problem(
                    f"golden prompt {number} gives other tokens, the first at position {n}",
                    expected=f"{len(expected)} ids, there {expected_text}",
                    got=f"{len(got)} ids, there {got_text}",
                    fix="use the tokenizer and the chat template that the adapter was trained with",
                )
            )
        if problems:
            raise TunegateError(problems)


def _mask(tokens: _Tokens, spans: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
    """Targets: from the first token that starts in a span to the one, the end-of-turn token, that reaches its end."""
    mask = [False] * len(tokens.ids)
    for start, end in spans:
        first, last = bisect_left(tokens.starts, start), bisect_left(tokens.ends, end)
        mask[first : last + 1] = [True] * (last + 1 - first)
    return tuple(mask)


def _before(control: list[re.Match[str]], place: int) -> int:
    """How many of the control tokens start before ``place``."""
    return bisect_left(control, place, key=lambda match: match.start())


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _at(problem: Problem, where: str) -> Problem:
    return Problem(problem.what, where, problem.expected, problem.got, problem.fix)
