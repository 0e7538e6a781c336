"""Stated properties of a text: how many words, what it starts with, contains or leaves out, its case.

A rule is a JSON object, ``{"rule": "words", "max": 10}``. A text passes if every rule holds, the strict reading of
IFEval (Zhou et al. 2023, arXiv:2311.07911); an empty text never passes. Words and sentences are those of languages
that put white space between words.

It does not judge what a text says.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunegate.errors import nearest

LONGEST_ANSWER = 20_000  # characters that a user's pattern is tried on

Rule = Mapping[str, Any]


def plain(text: str) -> str:
    """Case folded, NFKC, typographic quotes made straight, white space single, no signs at either end."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("‘", "'")
    return " ".join(text.split()).strip(" .,;:!?\"'`*_()[]{}<>#-–—")


def place_of(word: str, text: str) -> int | None:
    """Where ``word`` first stands in the :func:`plain` text ``text`` as a whole word; None if it does not."""
    found = re.search(rf"(?<!\w){re.escape(plain(word))}(?!\w)", text)
    return None if found is None else found.start()


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’\-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])[\"'”’)]*(?:\s+|\Z)", text.strip()) if words(part)]


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def satisfies(text: str, rules: Sequence[Rule]) -> bool:
    """Whether ``text``, outer white space aside, is not empty and keeps every rule."""
    text = text.strip()
    return bool(text) and all(_RULES[rule["rule"]][2](text, rule) for rule in rules)


def _within(count: int, rule: Rule) -> bool:
    return int(rule.get("min", 0)) <= count <= float(rule.get("max", float("inf")))


def _has(text: str, wanted: str) -> bool:
    return place_of(wanted, plain(text)) is not None


def _times(text: str, rule: Rule) -> bool:
    found = re.findall(rf"(?<!\w){re.escape(rule['text'])}(?!\w)", text, re.IGNORECASE)
    return len(found) == int(rule["times"])


def _case(text: str, rule: Rule) -> bool:
    letters = [c for c in text if c.isalpha()]
    if rule["is"] == "title":
        return all(word[0].isupper() for word in words(text) if word[0].isalpha())
    return bool(letters) and all(c.isupper() if rule["is"] == "upper" else c.islower() for c in letters)


def _contains(text: str, rule: Rule) -> bool:
    return sum(_has(text, item) for item in rule["items"]) >= int(rule.get("at_least", len(rule["items"])))


def _matches(text: str, rule: Rule) -> bool:
    return len(text) <= LONGEST_ANSWER and re.search(rule["pattern"], text) is not None


# name: (required keys, optional keys, whether a text keeps the rule)
_RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[str, Rule], bool]]] = {
    "words": ((), ("min", "max"), lambda text, rule: _within(len(words(text)), rule)),
    "sentences": ((), ("min", "max"), lambda text, rule: _within(len(sentences(text)), rule)),
    "lines": ((), ("min", "max"), lambda text, rule: _within(len(lines(text)), rule)),
    "starts_with": (("text",), (), lambda text, rule: text.casefold().startswith(rule["text"].casefold())),
    "ends_with": (("text",), (), lambda text, rule: text.casefold().endswith(rule["text"].casefold())),
    "contains": (("items",), ("at_least",), _contains),
    "excludes": (("items",), (), lambda text, rule: not any(_has(text, item) for item in rule["items"])),
    "without_letter": (("letter",), (), lambda text, rule: rule["letter"].casefold() not in text.casefold()),
    "case": (("is",), (), _case),
    "times": (("text", "times"), (), _times),
    "matches": (("pattern",), (), _matches),
}
RULES = tuple(_RULES)


def constraint_problems(rules: Any) -> list[str]:
    """What makes ``rules`` unusable; empty if nothing does."""
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        return ["rules must be a list of objects, at least one"]
    found = []
    for number, rule in enumerate(rules, 1):
        name = rule.get("rule")
        if not isinstance(name, str) or name not in _RULES:
            near = nearest(str(name), RULES) or f"known: {', '.join(RULES)}"
            found.append(f"rule {number}: unknown rule {name!r}; {near}")
            continue
        required, optional, _ = _RULES[name]
        given = set(rule) - {"rule"}
        found += [f"rule {number} ({name}): {key!r} is missing" for key in required if key not in given]
        unknown = sorted(key for key in given if key not in (*required, *optional))
        found += [f"rule {number} ({name}): unknown {key!r}" for key in unknown]
        found += [f"rule {number} ({name}): {text}" for text in _wrong_values(name, rule)]
    return found


def _wrong_values(name: str, rule: Rule) -> list[str]:
    found = []
    for key in ("min", "max", "times", "at_least"):
        if key in rule and (type(rule[key]) is not int or rule[key] < 0):
            found.append(f"{key!r} must be a whole number from 0, not {rule[key]!r}")
    for key in ("text", "letter"):
        if key in rule and not (isinstance(rule[key], str) and rule[key]):
            found.append(f"{key!r} must be text, not {rule[key]!r}")
    items = rule.get("items", ["-"])
    if not (isinstance(items, list) and items and all(isinstance(i, str) and i for i in items)):
        found.append("'items' must be a list of texts, at least one")
    if name == "case" and rule.get("is", "upper") not in ("upper", "lower", "title"):
        found.append(f"'is' must be upper, lower or title, not {rule['is']!r}")
    if name in ("words", "sentences", "lines") and not ({"min", "max"} & set(rule)):
        found.append("'min' or 'max' is missing")
    return found + (bad_pattern(rule["pattern"]) if "pattern" in rule else [])


def bad_pattern(pattern: Any) -> list[str]:
    """Why ``pattern`` is no regular expression; empty if it is one."""
    if not isinstance(pattern, str):
        return [f"the pattern must be text, not {pattern!r}"]
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"the pattern {pattern!r} is not valid: {error}"]
    return []
