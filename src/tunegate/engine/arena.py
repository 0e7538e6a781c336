"""The sizes of :class:`tunegate.engine.workspace.Workspace`, without its memory.

Blocks of 64 MiB (or one tensor, if that is larger) are filled one behind the other in 64-byte steps; a tensor that
does not fit in what is left of a block goes to the next one. ``reserved`` is what the engine would report; ``touched``
is what becomes resident: every block up to the highest byte handed out, in huge pages of 2 MiB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tunegate.engine import workspace

_ALIGN = 64
_PAGE = 2 << 20


class Arena:
    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._used: list[int] = []
        self._block, self._offset = 0, 0

    def take(self, count: int, itemsize: int = 4) -> None:
        """Room for ``count`` elements of ``itemsize`` bytes."""
        wanted = -(-count * itemsize // _ALIGN) * _ALIGN
        while self._block < len(self._sizes) and self._offset + wanted > self._sizes[self._block]:
            self._block, self._offset = self._block + 1, 0
        if self._block == len(self._sizes):
            self._sizes.append(max(workspace.BLOCK_BYTES, -(-wanted // _PAGE) * _PAGE))
            self._used.append(0)
        self._offset += wanted
        self._used[self._block] = max(self._used[self._block], self._offset)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is taken inside is given back at the end."""
        before = self._block, self._offset
        yield
        self._block, self._offset = before

    @property
    def used(self) -> int:
        """Bytes up to the highest one handed out, block by block."""
        return sum(self._used)

    @property
    def reserved(self) -> int:
        return sum(self._sizes)

    @property
    def touched(self) -> int:
        return sum(min(size, -(-used // _PAGE) * _PAGE) for size, used in zip(self._sizes, self._used, strict=True))
