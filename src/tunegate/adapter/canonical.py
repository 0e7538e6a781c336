"""An adapter's canonical bytes, over which its content hash is taken, read from its file to where they belong.

They are the text of what the config means, then for every tensor, in the order of names, the text of its name and
shape and its values in fp32. A file in fp32 is read into them by a few calls, with room left for the texts, so that all
of it is hashed in one go and nothing is read twice; values of 16 bits are widened on their way. A tensor's values may
begin at any address there: :meth:`Canonical.tensor` copies them out, the kernels take them as they lie.

It checks nothing: a header has been found sound, and fit for its base, before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from tunegate.adapter.peft_config import canonical
from tunegate.files import canonical_json, read_into, read_scattered
from tunegate.model.weights import TensorEntry

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Header:
    """What the header of a tensors' file says; all ``dtype`` are of :data:`DTYPES` where it is to be read."""

    entries: Mapping[str, TensorEntry]

    @classmethod
    def of(cls, entries: Iterable[TensorEntry]) -> Header:
        return cls({entry.name: entry for entry in entries})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def spans(self) -> tuple[_Span, ...]:
        """The tensors in the order of names, with their places among the canonical bytes after the config's."""
        found, at = [], 0
        for name in sorted(self.entries):
            entry = self.entries[name]
            text = _text(name, entry.shape)
            begin = at + len(text)
            at = begin + 4 * math.prod(entry.shape)
            found.append(_Span(text, begin, at, entry))
        return tuple(found)

    @cached_property
    def runs(self) -> tuple[tuple[_Span, ...], ...]:
        """Spans of one type that lie one behind the other in the file too."""
        runs: list[list[_Span]] = []
        for span in self.spans:
            last = runs[-1][-1].entry if runs else None
            if last is not None and last.end == span.entry.start and last.dtype == span.entry.dtype:
                runs[-1].append(span)
            else:
                runs.append([span])
        return tuple(map(tuple, runs))

    @cached_property
    def places(self) -> dict[str, _Span]:
        return {span.entry.name: span for span in self.spans}


@dataclass(frozen=True)
class _Span:
    """``text`` ends where the values' bytes begin; they go up to ``end``."""

    text: bytes
    begin: int
    end: int
    entry: TensorEntry


@dataclass(frozen=True)
class Canonical:
    """``data``: all bytes, of which those of the tensors begin at ``start``."""

    data: Bytes
    start: int
    header: Header

    def hash(self) -> str:
        threads = blake3.AUTO if self.data.nbytes > 1 << 20 else 1
        return "b3:" + blake3(self.data.data, max_threads=threads).hexdigest()

    def tensor(self, name: str) -> Tensor:
        """A copy, fp32."""
        span = self.header.places[name]
        values = self.data[self.start + span.begin : self.start + span.end].copy()
        return torch.from_numpy(values).view(torch.float32).view(span.entry.shape)

    def state(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.header.places}


def read_canonical(
    handle: BinaryIO, header: Header, config: Mapping[str, Any], memory: Bytes | None = None
) -> Canonical:
    """The canonical bytes of the file that is open as ``handle``, in ``memory`` where it is large enough. Not mapped:
    such a file could change after it was checked. :class:`~tunegate.errors.InputError` if the file ends too early."""
    text = _meaning(config)
    start = len(text)
    size = start + max((span.end for span in header.spans), default=0)
    data = fresh_bytes(size) if memory is None or memory.nbytes < size else memory[:size]
    data.data[:start] = text
    view = data.data[start:]
    for span in header.spans:
        view[span.begin - len(span.text) : span.begin] = span.text
    for run in header.runs:
        parts = [view[span.begin : span.end] for span in run]
        if run[0].entry.dtype == "F32":
            read_scattered(handle.fileno(), parts, run[0].entry.start, handle.name)
        else:
            for span, part in zip(run, parts, strict=True):
                _widen(handle, span.entry, part)
    return Canonical(data, start, header)


def fresh_bytes(size: int) -> Bytes:
    """Uninitialised memory from torch: numpy's is asked for in huge pages, and the first touch of one takes longest."""
    return torch.empty(size, dtype=torch.uint8).numpy()


def content_hash(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """The same hash of an adapter in memory, fp32 tensors by name."""
    hasher = blake3(_meaning(config))
    for name, tensor in sorted(state.items()):
        hasher.update(_text(name, tensor.shape))
        hasher.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return "b3:" + hasher.hexdigest()


def _meaning(config: Mapping[str, Any]) -> bytes:
    return canonical_json(canonical(config)).encode("utf-8")


def _text(name: str, shape: Iterable[int]) -> bytes:
    return canonical_json([name, list(shape)]).encode("utf-8")


def _widen(handle: BinaryIO, entry: TensorEntry, part: memoryview) -> None:
    narrow = np.empty(entry.end - entry.start, np.uint8)
    read_into(handle.fileno(), narrow.data, entry.start, handle.name)
    part[:] = torch.from_numpy(narrow).view(DTYPES[entry.dtype]).float().numpy().view(np.uint8).data
