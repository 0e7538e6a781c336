"""Which pages hold the keys and values of which row, and which can be used again.

A page holds ``size`` consecutive tokens of one row. A full page is known by what it holds: its own tokens, those of all
pages before it, and a salt (the adapter that computed it); a new row that begins with the same tokens holds the same
pages and does not compute them (the hash chains of vLLM's prefix cache). Pages that nobody holds keep their contents
until they are needed, the longest unused first.

It moves no tensors: pages are numbers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b


def page_keys(tokens: Sequence[int], size: int, salt: bytes, *, after: Sequence[bytes] = ()) -> list[bytes]:
    """The key of every full page of ``tokens``; ``after`` are those of its first pages, known already."""
    keys = list(after)
    for number in range(len(keys), len(tokens) // size):
        before = keys[-1] if keys else salt
        own = array("q", tokens[number * size : (number + 1) * size]).tobytes()
        keys.append(blake2b(own, digest_size=16, key=before[:64]).digest())
    return keys


class PagePool:
    """``pages`` pages of ``size`` tokens."""

    def __init__(self, pages: int, size: int):
        self.pages, self.size = pages, size
        self._free = deque(range(pages))
        self._holders = [0] * pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
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
            del self._by_key[self._key_of.pop(page)]
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
            self._holders[page] += 1
            self._idle.pop(page, None)
            found.append(page)
        return found

    def remember(self, page: int, key: bytes) -> None:
        """``page``, which the caller holds, is full and holds what ``key`` says."""
        if key not in self._by_key and page not in self._key_of:
            self._by_key[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """The caller holds them no more."""
        for page in reversed(pages):  # the end of a row is of less use than its beginning
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """No page is known any more; those that are held stay so."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._by_key.clear()
        self._key_of.clear()
