"""Seeded draws that give the same items on every Python version, and the shape of what a template makes.

Only ``random.Random(text).random()`` is used: Python's documentation promises that sequence ("the generator's
random() method will continue to produce the same sequence when the compatible seeder is given the same seed");
``choice``, ``sample`` and ``shuffle`` carry no such promise. Everything else is arithmetic on it.

It knows no domain.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tunegate.evaluation.checks import Check

T = TypeVar("T")


class Draw:
    """Draws for one item, seeded by a text."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        return int(self._random.random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both possible."""
        return low + self.below(high - low + 1)

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], n: int) -> list[T]:
        """``n`` different places of ``values``, in random order."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(n)]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.sample(values, len(values))


@dataclass(frozen=True)
class Made:
    """What a template makes: an item without its place in a set. Likelihood takes the first reference."""

    prompt: str
    references: tuple[str, ...]
    check: Check
    max_new_tokens: int = 24


Template = Callable[[Draw, int], Made]
"""``(draw, number)`` to an item; ``number`` counts the template's items, a higher one may be harder."""


def number(prompt: str, value: int) -> Made:
    return Made(f"{prompt} Answer with the number only.", (str(value),), Check("number"))


def mention(prompt: str, answer: str, among: Sequence[str]) -> Made:
    """The first of ``among`` that the reply names decides."""
    return Made(prompt, (answer,), Check("mention", {"among": list(among)}))


def contains(prompt: str, *answers: str) -> Made:
    return Made(prompt, answers, Check("contains"))


def likeliest(prompt: str, answer: str, others: Sequence[str], draw: Draw) -> Made:
    """Fixed choices, the most likely one counts; their order is drawn, so that ties do not favour the right one."""
    return Made(prompt, (answer,), Check("likelihood", {"choices": draw.shuffled([answer, *others])}))


def ruled(prompt: str, reference: str, *rules: dict[str, Any], max_new_tokens: int = 48) -> Made:
    """An instruction with stated properties; ``reference`` is one answer that has them."""
    return Made(prompt, (reference,), Check("constraints", {"rules": list(rules)}), max_new_tokens)


def escaped(text: str) -> str:
    """``text`` as a pattern. Fixed here, because which signs ``re.escape`` escapes changed between versions."""
    return "".join("\\" + c if c in r"\.^$*+?{}[]|()" else c for c in text)
