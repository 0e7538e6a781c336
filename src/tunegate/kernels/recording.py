"""Kernel calls recorded once and made again without Python.

Inside :func:`recording` every native call is done and kept, addresses and all; :meth:`Recording.run` repeats them on
the same memory, which then holds other values. What Python does in between is not seen: an operation of torch that
belongs to the sequence goes through :func:`also`, and a tensor that only this function knows through :func:`hold`.

Only matrix products, norms, rotary positions, gated products, decode attention and segments are recorded; there is one
recording at a time on each thread, of what it does there. Whether a recording is complete is for the caller to prove.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tunegate.kernels import native


class Recording:
    """A sequence of native calls and torch operations."""

    def __init__(self, library: Any):
        self._library = library
        self._parts: list[Callable[[], Any]] = []
        self._held: list[Tensor] = []
        self._recorder: Any = None

    def run(self) -> None:
        self._library = native.library()  # tells the kernels of torch's present number of threads
        for part in self._parts:
            part()

    def _begin(self) -> None:
        self._recorder = self._library.Recorder()
        self._recorder.begin()

    def _end(self) -> None:
        self._recorder.end()
        if len(self._recorder):
            self._parts.append(self._recorder.run)


class _Now(threading.local):
    recording: Recording | None = None


_now = _Now()


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Record what the kernels do inside. Needs the compiled kernels."""
    library = native.library()
    if library is None or _now.recording is not None:
        raise RuntimeError("nothing to record with, or a recording is under way")
    _now.recording = made = Recording(library)
    made._begin()
    try:
        yield made
    finally:
        made._end()
        _now.recording = None


def also(operation: Callable[[], Any]) -> None:
    """Do ``operation`` now, and again at its place in a recording under way."""
    now = _now.recording
    if now is None:
        operation()
        return
    now._end()
    operation()
    now._parts.append(operation)
    now._begin()


def hold(tensor: Tensor) -> Tensor:
    """``tensor``, kept as long as a recording under way that uses its memory."""
    if _now.recording is not None:
        _now.recording._held.append(tensor)
    return tensor
