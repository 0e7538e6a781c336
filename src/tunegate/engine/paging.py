"""Which pages hold the keys and values of which row, and which can be used again.

A page holds ``size`` consecutive tokens of one row. A full page is known by what it holds: its own tokens, those of all
pages before it, and a salt (the adapter that computed it); a new row that begins with the same tokens holds the same
pages and does not compute them (the hash chains of vLLM's prefix cache). Where it parts from another row within a page,
that page's beginning can be copied. Pages that nobody holds keep their contents until they are needed, the longest
unused first.

It moves no tensors: pages are numbers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice


def page_keys(tokens: Sequence[int], size: int, salt: bytes, *, after: Sequence[bytes] = ()) -> list[bytes]:
    """The key of every full page of ``tokens``; ``after`` are those of its first pages, known already."""
    keys = list(after)
    for number in range(len(keys), len(tokens) // size):
        before = keys[-1] if keys else salt
        own = array("q", tokens[number * size : (number + 1) * size]).tobytes()
        keys.append(blake2b(own, digest_size=16, key=before[:64]).digest())
    return keys


_LOOKS = 8  # known pages that follow the same pages, of which the nearest is looked for: the last ones


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PagePool:
    """``pages`` pages of ``size`` tokens."""

    def __init__(self, pages: int, size: int):
        self.pages, self.size = pages, size
        self._free = deque(range(pages))
        self._holders = [0] * pages
        self._by_key: dict[bytes, int] = {}
        self._known: dict[int, tuple[bytes, bytes, Sequence[int]]] = {}  # the key, the one before, its own tokens
        self._after: dict[bytes, dict[int, None]] = {}  # known pages by the key before, the oldest first
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that nobody holds, the longest unused first

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.pages - self.available

    def take(self) -> int | None:
        """A page for the caller alone; None if all are held."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            key, before, _ = self._known.pop(page)
            del self._by_key[key], self._after[before][page]
            if not self._after[before]:
                del self._after[before]
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Pages that hold the beginning of a row with these keys, held by the caller from now on."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            self._hold(page)
            found.append(page)
        return found

    def nearest(self, before: bytes, tokens: Sequence[int]) -> tuple[int, int] | None:
        """A page that comes after the key ``before`` and begins with the first of ``tokens``, held by the caller from
        now on, and how many."""
        best = None
        for page in islice(reversed(self._after.get(before, {})), _LOOKS):
            count = _common(self._known[page][2], tokens)
            if count > (best[1] if best else 0):
                best = page, count
        if best is not None:
            self._hold(best[0])
        return best

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)

    def remember(self, page: int, key: bytes, before: bytes, tokens: Sequence[int]) -> None:
        """``page``, which the caller holds, is full and holds what ``key`` says: ``tokens`` after what ``before``
        says, a key or the salt."""
        if key not in self._by_key and page not in self._known:
            self._by_key[key] = page
            self._known[page] = key, before, tokens
            self._after.setdefault(before, {})[page] = None

    def release(self, pages: Sequence[int]) -> None:
        """The caller holds them no more."""
        for page in reversed(pages):  # the end of a row is of less use than its beginning
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._known:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """No page is known any more; those that are held stay so."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._by_key.clear()
        self._known.clear()
        self._after.clear()
