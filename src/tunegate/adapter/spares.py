"""Memory for the factors of the next adapters, touched before it is needed.

The system gives out memory page by page as it is first touched, which takes longer than to fill it, and in a virtual
machine several times longer. So a thread of low priority touches as much as the last adapter took, for two more like
it. Large adapters have none: their memory would lie idle.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_KEPT = 2
LARGEST = 64 << 20  # bytes of one
_AT_ONCE = 1 << 17  # elements that are touched at a time
_LOWER = 5  # of the thread's priority (nice)


class Spares:
    """:meth:`take` and :meth:`refill` from one thread."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._kept: list[Tensor] = []  # the last one may still be under way
        self._size = 0
        self._lock = threading.Lock()
        self._touching = ThreadPoolExecutor(1, "spares", initializer=_step_back)

    def take(self, size: int) -> Tensor:
        """Memory for so many elements, (size,), uninitialised."""
        with self._lock:
            if size != self._size:
                self._size, self._kept = size, []
            if self._kept:
                return self._kept.pop(0)
        return torch.empty(size, dtype=self.dtype)

    def refill(self) -> None:
        """Have memory for the next ones; returns at once."""
        if self._size * self.dtype.itemsize > LARGEST:
            return
        while len(self._kept) < _KEPT:
            made = torch.empty(self._size, dtype=self.dtype)
            with self._lock:
                self._kept.append(made)
            self._touching.submit(self._touch, made)

    def _touch(self, made: Tensor) -> None:
        for part in made.split(_AT_ONCE):
            with self._lock:
                if not any(made is kept for kept in self._kept):
                    return  # taken: from now on it is written to
                part.zero_()


def _step_back() -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):  # threads have priorities of their own on Linux alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWER)
