"""The language of gate rules: a line of text becomes a :class:`Rule`, and a rule prints as the same line.

::

    rule       = ["not"] metric ["vs" reference] op bound
    bound      = number                          the value, or with "vs" the gain
               | number "of" reference           a share of the reference's value
               | reference [("+" | "-") digits]  the reference's value, give or take
    metric     = name {"." (name | "*")}
    reference  = "base" | "best_prompt"
    op         = ">=" | ">" | "<=" | "<"
    number     = ["+" | "-"] digits

``task vs best_prompt >= +0.02``, ``regression.* >= 0.95 of base``, ``safety.over_refusal <= base + 0.05``,
``not train.score vs base < 0``. A ``*`` stands for one or more names and makes one rule of each measure it meets.
``not R`` fails if R is shown and passes if it is not: an alarm, where the plain rule asks for proof.

The families of metrics are known here, with the command that measures each, so that a misspelt rule is refused
before anything runs. What a rule says about numbers is ``gate``'s business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from tunegate.errors import InputError, Problem, nearest

REFERENCES = ("base", "best_prompt")
OPERATORS = (">=", ">", "<=", "<")
KEYWORDS = ("not", "vs", "of", *REFERENCES)
EXAMPLE = "task vs base > 0"


@dataclass(frozen=True)
class Family:
    """``names``: what may follow the family's name, None where users name it. ``command``: what measures it."""

    names: tuple[str, ...] | None
    command: str
    alone: bool = False  # whether the family's own name is a metric
    apart: tuple[str, ...] = ()  # names that a * right after the family's name does not stand for


_TRAIN = ("loss_ratio", "loss_gap", "loss_turn", "score", "best_share")
_MEMORISED = ("verbatim_rate", "verbatim_excess", "ngram_overlap", "ngram_excess")
FAMILIES = {
    "task": Family(None, "tunegate run TASK", alone=True),
    "regression": Family(None, "tunegate run TASK", apart=("likelihood", "divergence")),
    "judge": Family(("mean", "pass_rate", "win_rate", "alpha", "kappa"), "tunegate run TASK"),
    "safety": Family(("bypass_rate", "over_refusal", "coherence", "refusal_rate"), "tunegate run TASK"),
    "review": Family(("accept", "preferred"), "tunegate review TASK"),
    "train": Family(_TRAIN + _MEMORISED, "tunegate run TASK"),
    "data": Family(("leaked_rows", "near_leaks", "valid_leaks", "harmful_rows"), "tunegate check TASK"),
}


@dataclass(frozen=True)
class Rule:
    """A parsed rule.

    ``form`` says what is compared with ``number``: the ``value``; the ``gain`` over ``reference``; the ``share`` of
    the reference (a ratio); or ``offset``, the value with the reference's plus ``number``. Gain and offset ask the
    same of the numbers and differ in how they are written.
    """

    metric: str
    op: str
    number: float
    form: str = "value"
    reference: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        number = _digits(self.number)
        if self.form == "offset":
            bound = str(self.reference)
            if self.number:
                bound += f" {'-' if self.number < 0 else '+'} {_digits(abs(self.number))}"
        elif self.form == "share":
            bound = f"{number} of {self.reference}"
        elif self.form == "gain":
            bound = number if self.number <= 0 else f"+{number}"
        else:
            bound = number
        subject = f"{self.metric} vs {self.reference}" if self.form == "gain" else self.metric
        return f"{'not ' if self.negated else ''}{subject} {self.op} {bound}"

    @property
    def at_least(self) -> bool:
        """Whether larger values meet the comparison."""
        return self.op in (">=", ">")

    def holds(self, value: float) -> bool:
        """Whether ``value`` (or gain, or ratio) meets the comparison; NaN does not. ``negated`` is not looked at."""
        if self.op == ">=":
            return value >= self.number
        if self.op == ">":
            return value > self.number
        return value <= self.number if self.op == "<=" else value < self.number

    def matches(self, name: str) -> bool:
        """Whether the rule is about the metric ``name``; a ``*`` stands for one or more of its parts, but not for the
        names that its family keeps apart (``regression.*`` are the domains, ``regression.likelihood.*`` others)."""
        family, _, rest = self.metric.partition(".")
        if rest[:1] == "*" and name.split(".")[1:2] and name.split(".")[1] in FAMILIES[family].apart:
            return False
        return re.fullmatch(re.escape(self.metric).replace(r"\*", r"[^.]+(?:\.[^.]+)*"), name) is not None

    @property
    def family(self) -> Family:
        return FAMILIES[self.metric.partition(".")[0]]


def _digits(number: float) -> str:
    return repr(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)


_REST = r"(?:-[A-Za-z_][A-Za-z0-9_:]*)*"  # a hyphen before a digit is a minus
_FIRST, _NAME = rf"[A-Za-z_][A-Za-z0-9_:]*{_REST}", rf"[A-Za-z0-9_:]+{_REST}"
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)(?![A-Za-z0-9_.%])"
    rf"|(?P<name>{_FIRST}(?:\.(?:{_NAME}|\*))*)"
    r"|(?P<op>>=|<=|>|<)|(?P<sign>[+-])|(?P<other>\S[^\s<>=]*))"
)


@dataclass(frozen=True)
class _Token:
    kind: str  # number, name, op, sign, other or end
    text: str
    column: int  # from 1


def _tokens(text: str) -> list[_Token]:
    found, end = [], len(text.rstrip())
    position = 0
    while position < end:
        match = _TOKEN.match(text, position)
        assert match is not None and match.lastgroup is not None  # `other` takes any text
        found.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1))
        position = match.end()
    return [*found, _Token("end", "the end", end + 1)]


class _Reader:
    """One pass over the tokens of a rule, with an error that says where it stopped."""

    def __init__(self, text: str):
        self.text, self.tokens, self.next = text, _tokens(text), 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def take(self) -> _Token:
        self.next += 1
        return self.tokens[self.next - 1]

    def took(self, kind: str, *texts: str) -> str | None:
        """The text of the next token if it is of ``kind`` and one of ``texts``; it is then used up."""
        if self.token.kind != kind or (texts and self.token.text not in texts):
            return None
        return self.take().text

    def fail(self, expected: str, fix: str = "") -> NoReturn:
        got = self.token.text if self.token.kind == "end" else repr(self.token.text)
        column = self.token.column
        raise InputError(Problem(f"not a rule, at column {column} of {self.text!r}", "", expected, got, fix))


def parse_rule(text: str) -> Rule:
    """The rule that ``text`` says; :class:`InputError` with the column, what was expected and the nearest name."""
    read = _Reader(text)
    negated = read.took("name", "not") is not None
    metric = _metric(read)
    against = _reference(read) if read.took("name", "vs") else None
    op = read.took("op")
    if op is None:
        fix = "for example " + repr(f"{metric} >= 0.9" if against is None else f"{metric} vs {against} > 0")
        read.fail(f"a comparison: {', '.join(OPERATORS)}", fix)
    form, number, reference = _bound(read, against)
    if read.token.kind != "end":
        read.fail("the end of the rule")
    return Rule(metric, op, number, form, reference, negated)


def _metric(read: _Reader) -> str:
    token = read.token
    if token.kind != "name" or token.text in KEYWORDS:
        read.fail(f"a metric, like {', '.join(_some_metrics())}", f"for example {EXAMPLE!r}")
    problem = unknown_metric(token.text)
    if problem:
        read.fail(*problem)
    return read.take().text


def _bound(read: _Reader, against: str | None) -> tuple[str, float, str | None]:
    """``(form, number, reference)``"""
    if read.token.kind == "name":
        if against is not None:
            read.fail("a number: the gain", f"for example '>= +0.02'; what it is over stands after 'vs': {against}")
        reference = _reference(read)
        sign = read.took("sign")
        return "offset", _number(read, sign) if sign else 0.0, reference
    start = read.next
    number = _number(read, read.took("sign"))
    if read.token.kind == "name" and read.token.text == "of":
        if against is not None:
            read.fail("the end of the rule", "a rule has 'vs' or 'of', not both")
        if number <= 0.0:
            read.next = start
            read.fail("a share above 0")
        read.take()
        return "share", number, _reference(read)
    return ("gain" if against else "value"), number, against


def _reference(read: _Reader) -> str:
    found = read.took("name", *REFERENCES)
    if found is None:
        read.fail(f"one of {', '.join(REFERENCES)}", nearest(read.token.text, REFERENCES))
    return found


def _number(read: _Reader, sign: str | None) -> float:
    if read.token.kind != "number":
        expected = "a number" if sign else f"a number, or one of {', '.join(REFERENCES)}"
        fix = nearest(read.token.text, REFERENCES) if read.token.kind in ("name", "other") else ""
        if read.token.text.endswith("%"):
            fix = "write a share, 0.9 for 90 %"
        read.fail(expected, fix)
    value = float(read.token.text)
    if not math.isfinite(value):
        read.fail("a finite number")
    read.take()
    return -value if sign == "-" and value else value


def _some_metrics() -> list[str]:
    return [name if family.alone else f"{name}.{(family.names or ('*',))[0]}" for name, family in FAMILIES.items()]


def known_metrics(measured: Iterable[str] = ()) -> list[str]:
    """Every metric name that is fixed, and those of ``measured``."""
    fixed = [name for name, family in FAMILIES.items() if family.alone]
    fixed += [f"{name}.{inner}" for name, family in FAMILIES.items() for inner in family.names or ()]
    return list(dict.fromkeys([*fixed, *measured]))


def unknown_metric(name: str) -> tuple[str, str] | None:
    """``(expected, fix)`` if no such metric can be: its family is unknown, or has a fixed list without it."""
    first, _, rest = name.partition(".")
    family = FAMILIES.get(first)
    if family is None:
        return f"a metric of {', '.join(FAMILIES)}", nearest(name, known_metrics()) or nearest(first, list(FAMILIES))
    if not rest and not family.alone:
        options = ", ".join(f"{first}.{inner}" for inner in family.names or ("NAME",))
        return f"one of {options}", ""
    inner = rest.partition(".")[0]
    if rest and family.names is not None and inner not in ("*", *family.names):
        known = [f"{first}.{each}" for each in family.names]
        return f"one of {', '.join(known)}", nearest(f"{first}.{inner}", known)
    return None
