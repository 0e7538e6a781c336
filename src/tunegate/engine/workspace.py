"""Memory for activations that is asked for once and used again by every later step.

A :class:`Workspace` hands out tensors from large blocks, one behind the other; ``mark`` and ``release`` give the
newest ones back. A forward pass with gradients borrows a workspace for what its backward pass needs; it returns to
the pool when nothing refers to the pass any more, so two graphs that live at the same time never share memory.

Blocks are mapped with transparent huge pages where the system offers them. Nothing is freed before the process ends,
and a tensor taken here must not outlive its pass. CPU only.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
_ALIGN = 64


def _new_block(size: int) -> Tensor:
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Workspace:
    """Blocks of bytes and the place up to which they are taken."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block, self._offset = 0, 0

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised contiguous tensor."""
        count = 1
        for size in shape:
            count *= size
        wanted = -(-count * dtype.itemsize // _ALIGN) * _ALIGN
        while self._block < len(self._blocks) and self._offset + wanted > len(self._blocks[self._block]):
            self._block, self._offset = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(_new_block(max(BLOCK_BYTES, -(-wanted // (2 << 20)) * (2 << 20))))
        piece = self._blocks[self._block][self._offset : self._offset + count * dtype.itemsize]
        self._offset += wanted
        return piece.view(dtype).view(shape)

    def mark(self) -> tuple[int, int]:
        return self._block, self._offset

    def release(self, mark: tuple[int, int]) -> None:
        """Give back everything taken since ``mark``."""
        self._block, self._offset = mark

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is taken inside is given back at the end."""
        before = self.mark()
        try:
            yield
        finally:
            self.release(before)

    def reserved(self) -> int:
        """Bytes held from the system."""
        return sum(len(block) for block in self._blocks)


class Lease:
    """A workspace borrowed from a pool for as long as this object is referred to."""

    def __init__(self, pool: list[Workspace]):
        self._pool = pool
        self.workspace = pool.pop() if pool else Workspace()

    def __del__(self) -> None:
        self.workspace.release((0, 0))
        self._pool.append(self.workspace)
