"""Memory for activations that is asked for once and used again by every later step.

A :class:`Workspace` hands out tensors from large blocks, one behind the other; ``mark`` and ``release`` give the
newest ones back. A forward pass with gradients borrows a workspace for what its backward pass needs; it returns to
the pool when nothing refers to the pass any more, so two graphs that live at the same time never share memory.

Blocks are mapped with transparent huge pages where the system offers them, or from a file without a name, whose pages
can be put away. Nothing is freed before the process ends or the pool is dropped, and a tensor taken here must not
outlive its pass. CPU only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tunegate.files import explain_os_error

BLOCK_BYTES = 64 << 20
ALIGN = 64


def _new_block(size: int, folder: Path | None) -> tuple[Tensor, mmap.mmap]:
    if folder is not None:
        with explain_os_error(folder), tempfile.TemporaryFile(dir=folder) as handle:  # without a name: gone with us
            os.posix_fallocate(handle.fileno(), 0, size)  # a full disk is an error here and not a signal later
            memory = mmap.mmap(handle.fileno(), size)
        return torch.frombuffer(memory, dtype=torch.uint8), memory
    # private: Python's default is shared memory, which rarely gets huge pages
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8), memory


class Workspace:
    """Blocks of bytes and the place up to which they are taken. With a ``folder`` they lie in a nameless file there."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._blocks: list[Tensor] = []
        self._maps: list[mmap.mmap] = []
        self._block, self._offset = 0, 0
        self._peak = (0, 0)

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised contiguous tensor."""
        count = 1
        for size in shape:
            count *= size
        wanted = -(-count * dtype.itemsize // ALIGN) * ALIGN
        while self._block < len(self._blocks) and self._offset + wanted > len(self._blocks[self._block]):
            self._block, self._offset = self._block + 1, 0
        if self._block == len(self._blocks):
            block, memory = _new_block(max(BLOCK_BYTES, -(-wanted // (2 << 20)) * (2 << 20)), self.folder)
            self._blocks.append(block)
            self._maps.append(memory)
        piece = self._blocks[self._block][self._offset : self._offset + count * dtype.itemsize]
        self._offset += wanted
        self._peak = max(self._peak, (self._block, self._offset))
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

    def put_away(self, tensor: Tensor) -> None:
        """Let the system take the pages of a tensor from a file's block; reading it brings them back."""
        if self.folder is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for block, memory in zip(self._blocks, self._maps, strict=True):
            start = tensor.data_ptr() - block.data_ptr()
            if 0 <= start < len(block):
                first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    memory.madvise(mmap.MADV_DONTNEED, first, last - first)
                return

    def overwrite(self) -> None:
        """Fill with NaN what was taken and given back: for proving that nobody relies on it."""
        for number in range(self._block, self._peak[0] + 1):
            begin = self._offset if number == self._block else 0
            end = self._peak[1] if number == self._peak[0] else len(self._blocks[number])
            self._blocks[number][begin:end] = 0xFF

    def reserved(self) -> int:
        """Bytes held from the system."""
        return sum(len(block) for block in self._blocks)


class Lease:
    """A workspace borrowed from a pool for as long as this object is referred to."""

    def __init__(self, pool: list[Workspace], folder: Path | None = None):
        self._pool = pool
        self.workspace = pool.pop() if pool else Workspace(folder)

    def __del__(self) -> None:
        self.workspace.release((0, 0))
        self._pool.append(self.workspace)
