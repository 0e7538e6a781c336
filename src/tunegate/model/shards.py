"""Safetensors files read and written tensor by tensor, at bounded memory.

Reading is positioned reads into a buffer, not a mapping: the pages of a mapped file count as the process's own memory.
Writing puts the header first, computed from names, dtypes and shapes that are known beforehand, then every tensor's
bytes at their place; the file is complete, flushed and of the announced size, or an error.

Format: https://github.com/huggingface/safetensors (README, "Format"). It does not rename or publish files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from blake3 import blake3
from torch import Tensor

from tunegate.files import read_into
from tunegate.model.weights import TensorEntry

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HAND_OVER = 32 << 20  # bytes after which the system is asked to begin writing, so that the last flush is short


def fill(descriptor: int, entry: TensorEntry, buffer: Tensor, path: Path) -> None:
    """Read the entry's bytes into ``buffer`` (bytes,) uint8. ``path`` is named where the file is too short."""
    read_into(descriptor, memoryview(buffer.numpy()), entry.start, path)  # type: ignore[arg-type]


def size_of(entry: TensorEntry) -> int:
    return entry.end - entry.start


class ShardWriter:
    """One safetensors file with its tensors in the order of ``entries`` (positions in them are ignored).

    ``hash`` is the content hash of what was written so far, as ``files.hash_file`` gives it, if that was in order.
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry]):
        self.path, self._waiting = path, dict[str, tuple[TensorEntry, int]]()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for entry in entries:
            self._waiting[entry.name] = entry, position
            offsets = [position, position + size_of(entry)]
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the reference writer has it
        self._hasher, self._hashed, self._written = blake3(max_threads=blake3.AUTO), 0, 0
        self._handed = 0
        self._handle = path.open("wb")
        self._put(0, len(text).to_bytes(8, "little") + text)
        self._data = self._hashed

    def _put(self, position: int, data: bytes | memoryview) -> None:
        self._handle.seek(position)
        self._handle.write(data)
        self._written += len(data)
        if position == self._hashed:
            self._hasher.update(data)
            self._hashed += len(data)
            if self._hashed - self._handed >= _HAND_OVER and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._handle.fileno(), self._handed, 0, os.POSIX_FADV_DONTNEED)
                self._handed = self._hashed

    @property
    def hash(self) -> str:
        if self._written != self._hashed:
            raise ValueError(f"the tensors of {self.path} were not written in order")
        return "b3:" + self._hasher.hexdigest()

    def write(self, name: str, data: Tensor) -> None:
        """A tensor's bytes, once, in its announced dtype, as any contiguous tensor of as many bytes."""
        entry, position = self._waiting.pop(name, (None, 0))
        if entry is None or data.nbytes != size_of(entry) or not data.is_contiguous():
            expected = "none of this name" if entry is None else f"{size_of(entry)} bytes"
            raise ValueError(f"{name}: expected {expected}, got {data.nbytes}")
        self._put(self._data + position, memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._handle:
            if kind is None:
                if self._waiting:
                    raise ValueError(f"{len(self._waiting)} tensors of {self.path} were not written")
                self._handle.flush()
                os.fsync(self._handle.fileno())
