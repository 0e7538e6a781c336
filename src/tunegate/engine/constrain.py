"""Answers held to a form: which tokens may come next.

A :class:`Constraint` starts one state per answer. Before each token the state says which ids may follow; generation
takes the others out of the logits and tells the state what was picked. A list of choices is a trie over token ids. A
regular expression or a JSON schema goes through llguidance (the extra ``constrain``), which walks the tokenizer's
bytes; text that the form dictates is spelled as the tokenizer spells it. A stop id is allowed exactly where the answer
is complete, so an answer that stopped has the form.

It does not bound the time that a form takes: llguidance needs exponentially long for some (many ``pattern`` in one
``allOf``). It does not bound lengths: an answer that ``max_new_tokens`` cuts off is not ``stopped`` and may be
incomplete. Choices are spelled as the tokenizer spells them; other splits of the same text are not tried.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from tunegate.errors import InputError

LIBRARY = "llguidance"
_LONGEST_WHY = 300  # characters; its words may be as long as the form


@dataclass(frozen=True)
class AnswerForm:
    """What every answer must look like.

    ``value``: the choices; a regular expression for the whole answer (``\\d`` is 0 to 9); or a JSON schema as JSON
    text. JSON is written on one line, with a space behind ``,`` and ``:`` unless ``compact``.
    """

    kind: Literal["choices", "regex", "json_schema"]
    value: tuple[str, ...] | str
    compact: bool = False


class RowState(Protocol):
    def allowed(self) -> np.ndarray:
        """(n,) bool: whether id i may come next; ids from n on may not."""

    def advance(self, token: int) -> None:
        """``token``, an allowed one that does not stop, was picked."""


class Constraint(Protocol):
    def start(self) -> RowState:
        """The state before an answer's first token."""


def form_problem(form: AnswerForm) -> str:
    """Why ``form`` cannot be used in this installation; empty if it can."""
    if form.kind == "choices" or importlib.util.find_spec(LIBRARY) is not None:
        return ""
    return f"{LIBRARY} is not installed: pip install 'tunegate[constrain]'"


def build_constraint(form: AnswerForm, tokenizer: Any, stop_ids: Sequence[int], spelled: Any = None) -> Constraint:
    """The constraint of ``form`` for a fast tokenizer. ``spelled``: its :func:`spelling`, if that is at hand.
    :class:`InputError` if the form cannot be followed."""
    if form.kind == "choices":
        return Choices([tokenizer(text, add_special_tokens=False)["input_ids"] for text in form.value], stop_ids)
    return Grammar(form, tokenizer, stop_ids, spelled)


def spelling(tokenizer: Any) -> Any:
    """A fast tokenizer as llguidance takes it, for any stop ids; half a second for 50,000 tokens."""
    from llguidance import LLTokenizer

    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    if not special:
        raise InputError("a form needs a tokenizer that has a special token", got=type(tokenizer).__name__)
    # One id has to stand for the end there. It is no text, so no form allows it otherwise.
    return LLTokenizer(_tokenizer_json(tokenizer), eos_token=special[0])


def grammar_text(form: AnswerForm) -> str:
    """A regular expression or a JSON schema in llguidance's language. :class:`InputError` if it is none."""
    if problem := form_problem(form):
        raise InputError("the answer's form cannot be enforced here", where=form.kind, got=problem)
    from llguidance import LLMatcher, regex_to_lark

    assert isinstance(form.value, str)
    if form.kind == "regex":
        # \d as ASCII: Python's re and the library know digits of different versions of Unicode.
        pattern = regex_to_lark(without_anchors(form.value), "d")
        return str(LLMatcher.grammar_from_lark(f"start: /{pattern}/"))
    separators = (",", ":") if form.compact else (", ", ": ")
    style: Any = {"whitespace_flexible": False, "item_separator": separators[0], "key_separator": separators[1]}
    schema = json.loads(form.value)
    if schema is False:
        raise InputError("no answer has this form", where=form.kind, got="false")
    try:
        return str(LLMatcher.grammar_from_json_schema({} if schema is True else schema, style))
    except ValueError as error:  # a number that it cannot hold
        raise cannot_be_enforced(form.kind, str(error)) from None


def cannot_be_enforced(kind: str, why: str) -> InputError:
    """``why``: in llguidance's words, of which the first paragraph is for people."""
    return InputError(
        "the answer's form cannot be enforced", where=kind, got=why.partition("\n\n")[0][:_LONGEST_WHY],
        fix="use plainer keywords (no look-around or back-references in a regular expression)",
    )  # fmt: skip


class Choices:
    """One of several token sequences, then a stop id."""

    def __init__(self, choices: Sequence[Sequence[int]], stop_ids: Sequence[int]):
        if not choices or not all(len(ids) for ids in choices) or not stop_ids:
            raise InputError("no answer to choose from", expected="choices of at least one token, and a stop id")
        self.root: dict[int, Any] = {}
        for ids in choices:
            node = self.root
            for token in ids:
                node = node.setdefault(token, {})
            node.update((stop, {}) for stop in stop_ids)
        self.size = max(max(stop_ids), *(max(ids) for ids in choices)) + 1

    def start(self) -> RowState:
        return _ChoiceState(self.root, self.size)


class _ChoiceState:
    def __init__(self, node: dict[int, Any], size: int):
        self._node, self._size = node, size

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self._size, dtype=bool)
        mask[list(self._node)] = True
        return mask

    def advance(self, token: int) -> None:
        self._node = self._node[token]


class Grammar:
    """A regular expression or a JSON schema, by llguidance."""

    def __init__(self, form: AnswerForm, tokenizer: Any, stop_ids: Sequence[int], spelled: Any = None):
        if not stop_ids:
            raise InputError("a form needs a token that stops the answer", where=form.kind)
        grammar = grammar_text(form)
        from llguidance import LLMatcher

        self._spelled = spelling(tokenizer) if spelled is None else spelled
        self._stops = np.array(list(stop_ids))
        self._matcher = LLMatcher(self._spelled, grammar, log_level=0)
        if self._matcher.is_error():
            raise cannot_be_enforced(form.kind, str(self._matcher.get_error()))

    def start(self) -> RowState:
        return _GrammarState(self._matcher.deep_copy(), self._stops, self._spelled.eos_token)


class _GrammarState:
    def __init__(self, matcher: Any, stops: np.ndarray, end: int):
        self._matcher, self._stops, self._end = matcher, stops, end

    def allowed(self) -> np.ndarray:
        complete = self._matcher.is_accepting()
        if self._matcher.is_stopped():
            mask: np.ndarray = np.zeros(int(self._stops.max()) + 1, dtype=bool)
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            mask = np.unpackbits(bits, bitorder="little").astype(bool)
            mask = np.pad(mask, (0, max(0, int(self._stops.max()) + 1 - len(mask))))
            mask[self._end] = False
        mask[self._stops] = complete
        self._check()
        return mask

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                "the answer's form became too complex to follow",
                got=str(self._matcher.get_error()).partition("\n\n")[0][:_LONGEST_WHY],
                fix="a plainer form, with smaller counts of repetition",
            )


def without_anchors(pattern: str) -> str:
    """The whole answer is matched anyway, and ``^`` and ``$`` are not in llguidance's language."""
    pattern = pattern.removeprefix("^")
    return pattern[:-1] if pattern.endswith("$") and not pattern.endswith(r"\$") else pattern


def _tokenizer_json(tokenizer: Any) -> str:
    """The fast tokenizer as tokenizer.json holds it, added tokens included; the tokenizer itself stays as it is."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**data, "padding": None, "truncation": None})
