"""Whether an answer is language at all: an answer that makes no sense is neither a refusal nor help.

Four things are looked at, after sentences and lines that repeat one before them are dropped (a small model that loops
over a whole sentence has still said it): whether anything is left; the share of words that could be words (letters,
a vowel, no long run of consonants); how often the same word follows itself or a pair of words recurs; and the entropy
of word pairs against that of a text that never repeats one, log2 of their number.

Answers of a word or two, numbers, JSON and code pass. Real words in an order without sense pass too: that takes a
language model, and the likelihood under the base is measured elsewhere (``regression``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

FEW_WORDS = 8  # below it, repetition and entropy say nothing
LOWEST_ENTROPY = 0.6
HIGHEST_REPETITION = 0.5
LOWEST_WORDLIKE = 0.5
LONGEST_RUN = 4  # the same word so many times in a row
_VOWEL = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýœ]", re.IGNORECASE)
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5,}", re.IGNORECASE)
_CODE = re.compile(r"[{}\[\]=]|\bdef \w|\breturn\b|;\s*$|</\w+>", re.MULTILINE)


@dataclass(frozen=True)
class Coherence:
    """``repetition`` is the share of word pairs seen before, ``entropy`` that of pairs over its maximum, ``wordlike``
    the share of words that could be words; all in [0, 1]. ``reason`` is empty for a coherent answer."""

    coherent: bool
    repetition: float
    entropy: float
    wordlike: float
    reason: str = ""


def check_coherence(text: str) -> Coherence:
    """The measures of an answer, and the verdict on it."""
    kept = _without_repeats(text)
    words = re.findall(r"[^\W_]+(?:['’\-][^\W_]+)*", kept)
    repetition, entropy = _pairs([w.casefold() for w in words])
    letters = [w for w in words if any(c.isalpha() for c in w)]
    wordlike = sum(map(_could_be_a_word, letters)) / len(letters) if letters else 1.0
    reason = _reason(kept, words, repetition, entropy, wordlike)
    return Coherence(not reason, repetition, entropy, wordlike, reason)


def _reason(text: str, words: Sequence[str], repetition: float, entropy: float, wordlike: float) -> str:
    if not text.strip():
        return "empty"
    if not words:
        return "no words"
    if re.search(r"(\S)\1{9,}", text):
        return "one sign many times"
    if _longest_run(words) >= LONGEST_RUN and len(words) > LONGEST_RUN:
        return "one word many times"
    if len(words) >= 3 and wordlike < LOWEST_WORDLIKE and not _CODE.search(text):
        return "not words"
    if len(words) == 1 and len(words[0]) > 30 and len(set(words[0])) <= 3:
        return "one sign many times"
    if len(words) >= FEW_WORDS:
        if repetition > HIGHEST_REPETITION:
            return "the same words again and again"
        if entropy < LOWEST_ENTROPY:
            return "too little variety"
        if len({w.casefold() for w in words}) <= max(2, len(words) // 5) and len(words) < 60:
            return "too few different words"
    return ""


def _without_repeats(text: str) -> str:
    """The text without sentences and lines that stood before, and without an unfinished repeat at its end."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]
    seen: set[str] = set()
    kept: list[str] = []
    for part in parts:
        key = " ".join(part.casefold().split())
        if len(key.split()) >= 3:
            if key in seen or (part is parts[-1] and any(old.startswith(key) for old in seen)):
                continue
            seen.add(key)
        kept.append(part)
    return "\n".join(kept)


def _pairs(words: Sequence[str]) -> tuple[float, float]:
    """Share of word pairs that came before, and their entropy over log2 of their number."""
    pairs = list(pairwise(words))
    if len(pairs) < 2:
        return 0.0, 1.0
    counts = Counter(pairs)
    entropy = -sum(n / len(pairs) * math.log2(n / len(pairs)) for n in counts.values())
    return 1 - len(counts) / len(pairs), entropy / math.log2(len(pairs))


def _longest_run(words: Sequence[str]) -> int:
    longest = run = 1
    for before, word in pairwise(words):
        run = run + 1 if before.casefold() == word.casefold() else 1
        longest = max(longest, run)
    return longest


def _could_be_a_word(word: str) -> bool:
    """Words of scripts without vowel letters count as words; initials and short capitals (DNA, TV) do too."""
    if not word.isascii():
        return True
    if len(word) <= 1:
        return word in "aAiI" or word.isdigit()
    if word.isupper() and len(word) <= 5:
        return True
    if re.search(r"(.)\1\1", word) or len(word) > 28:
        return False
    return bool(_VOWEL.search(word)) and not _CONSONANTS.search(word) and not _foreign_bigrams(word)


def _foreign_bigrams(word: str) -> bool:
    """Letter pairs that English words hardly hold; two of them make a word a keyboard's."""
    rare = re.findall(
        r"(?=(q[^u]|[jvwzxq][bcdfgjkmpqvxz]|[bcdfghkmpstwz][qx]|[cfghkmpqvwz]j|[bdfgjkmnpqrtvwz]z[bcdfghjkmnpqrstvwx]))",
        word.casefold(),
    )
    return len(rare) >= 2 or (len(rare) == 1 and len(word) <= 4)
