"""The part of a prompt that many rows share, found and left out.

Texts are sorted, so that texts with a common opening are neighbours; an opening shared by half of the rows, or
one of 40 characters and more shared by one row in a hundred, is the instruction and not the question. The same
is done from the end. What was removed is kept as a template number: rows that differ in their instruction ask
for different things even where the rest is equal.

It does not find an instruction in the middle of a text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, deque

MIN_ROWS = 10  # with fewer rows alike, an opening may as well be a real near duplicate
LONG = 40  # characters; natural questions rarely open with as many equal ones
# Signs that do not change a question, unless they stand in a number. Operators and brackets stay.
_SIGNS = re.compile(r"(?<!\d)[.,:;!?'\"’‘“”`]+|[.,:;!?'\"’‘“”`]+(?!\d)")


def fold(text: str) -> str:
    """NFKC, lower case, sentence signs dropped, white space folded."""
    return " ".join(_SIGNS.sub("", unicodedata.normalize("NFKC", text).casefold()).split())


def strip_shared(texts: list[str], systems: list[str]) -> tuple[list[str], list[int]]:
    """Folded texts without shared openings and endings, and for each the number of its template.

    Rows have the same template number if the same opening and ending was removed and, for system messages that
    many rows share, the system message is the same. A rare system message counts as none.
    """
    folded = [fold(text) for text in texts]
    heads = _shared_openings(folded)
    rest = [text[size:] for text, size in zip(folded, heads, strict=True)]
    tails = _shared_openings([text[::-1] for text in rest])
    often = Counter(systems)
    least = max(MIN_ROWS, len(texts) // 100)
    numbers: dict[tuple[str, str, str], int] = {}
    stripped, templates = [], []
    for i, text in enumerate(rest):
        stop = len(text) - tails[i]
        system = systems[i] if often[systems[i]] >= least else ""
        template = (folded[i][: heads[i]], text[stop:], system)
        templates.append(numbers.setdefault(template, len(numbers)))
        stripped.append(text[:stop].strip())
    return stripped, templates


def _shared_openings(texts: list[str]) -> list[int]:
    """For each text the number of characters at its front that are boilerplate, cut between words."""
    distinct = sorted(set(texts))
    sizes = dict.fromkeys(distinct, 0)
    n = len(distinct)
    for rows, least in ((max(MIN_ROWS, (n + 1) // 2), 1), (max(MIN_ROWS, n // 100), LONG)):
        if rows > n:
            continue
        # Of sorted texts, the first and the last of a window share what all of the window share.
        windows = [_common(distinct[i], distinct[i + rows - 1]) for i in range(n - rows + 1)]
        for i, size in enumerate(_sliding_max(windows, rows, n)):
            text = distinct[i]
            cut = size if size == len(text) else text.rfind(" ", 0, size) + 1
            if cut >= least:
                sizes[text] = max(sizes[text], cut)
    return [sizes[text] for text in texts]


def _common(a: str, b: str) -> int:
    """Length of the common opening, by bisection on slices."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _sliding_max(windows: list[int], width: int, n: int) -> list[int]:
    """For each of ``n`` places the largest of the windows (of ``width`` places) that cover it."""
    best, waiting = [], deque[int]()
    for i in range(n):
        if i < len(windows):
            while waiting and windows[waiting[-1]] <= windows[i]:
                waiting.pop()
            waiting.append(i)
        while waiting[0] <= i - width:
            waiting.popleft()
        best.append(windows[waiting[0]])
    return best
