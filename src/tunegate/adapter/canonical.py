"""An adapter's canonical bytes, over which its content hash is taken, read from its file to where they belong.

They are the text of what the config means, then for every tensor, in the order of names, the text of its name and
shape and its values in fp32. A file in fp32 is read into them by a few calls, with room left for the texts, so that all
of it is hashed in one go and nothing is read twice; values of 16 bits are widened on their way. A tensor's values may
begin at any address there: :meth:`Canonical.tensor` copies them out, the kernels take them as they lie.

It checks nothing: a header has been found sound, and fit for its base, before anything is read.
"""

from __future__ import annotations

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
    def pieces(self) -> list[tuple[bytes, TensorEntry]]:
        """The tensors in the order of names, and the text before each."""
        ordered = (self.entries[name] for name in sorted(self.entries))
        return [(_text(entry.name, entry.shape), entry) for entry in ordered]


@dataclass(frozen=True)
class Canonical:
    """``data``: all bytes. ``places``: where each tensor's values begin, and its shape."""

    data: Bytes
    places: Mapping[str, tuple[int, tuple[int, ...]]]

    def hash(self) -> str:
        threads = blake3.AUTO if self.data.nbytes > 1 << 20 else 1
        return "b3:" + blake3(self.data.data, max_threads=threads).hexdigest()

    def tensor(self, name: str) -> Tensor:
        """A copy, fp32."""
        place, shape = self.places[name]
        values = self.data[place : place + 4 * int(np.prod(shape, dtype=np.int64))].copy()
        return torch.from_numpy(values).view(torch.float32).view(shape)

    def state(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.places}


def read_canonical(
    handle: BinaryIO, header: Header, config: Mapping[str, Any], memory: Bytes | None = None
) -> Canonical:
    """The canonical bytes of the file that is open as ``handle``, in ``memory`` where it is large enough. Not mapped: such
    a file could change after it was checked. :class:`~tunegate.errors.InputError` if the file ends too early."""
    text = _meaning(config)
    size = len(text) + sum(len(name) + 4 * _count(entry) for name, entry in header.pieces)
    data = fresh_bytes(size) if memory is None or memory.nbytes < size else memory[:size]
    view = data.data
    view[: len(text)] = text
    at, places, parts = len(text), {}, []
    for name, entry in header.pieces:
        view[at : at + len(name)] = name
        at += len(name)
        end = at + 4 * _count(entry)
        places[entry.name] = at, entry.shape
        parts.append((entry, view[at:end]))
        at = end
    for run in _runs(parts):
        if run[0][0].dtype == "F32":
            read_scattered(handle.fileno(), [part for _, part in run], run[0][0].start, handle.name)
        else:
            for entry, part in run:
                _widen(handle, entry, part)
    return Canonical(data, places)


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


def _count(entry: TensorEntry) -> int:
    return (entry.end - entry.start) // DTYPES[entry.dtype].itemsize


def _runs(parts: list[tuple[TensorEntry, memoryview]]) -> list[list[tuple[TensorEntry, memoryview]]]:
    """Tensors of one type that lie one behind the other in the file."""
    runs: list[list[tuple[TensorEntry, memoryview]]] = []
    for entry, part in parts:
        last = runs[-1][-1][0] if runs else None
        if last is not None and last.end == entry.start and last.dtype == entry.dtype:
            runs[-1].append((entry, part))
        else:
            runs.append([(entry, part)])
    return runs


def _widen(handle: BinaryIO, entry: TensorEntry, part: memoryview) -> None:
    narrow = np.empty(entry.end - entry.start, np.uint8)
    read_into(handle.fileno(), narrow.data, entry.start, handle.name)
    part[:] = torch.from_numpy(narrow).view(DTYPES[entry.dtype]).float().numpy().view(np.uint8).data
