"""Safetensors files read and written tensor by tensor, at bounded memory.

Reading is positioned reads into a buffer, not a mapping: the pages of a mapped file count as the process's own memory.
Writing puts the header first, computed from names, dtypes and shapes that are known beforehand, then every tensor's
bytes in order; the file is complete, flushed and of the announced size, or an error.

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


def fill(descriptor: int, entry: TensorEntry, buffer: Tensor, path: Path) -> None:
    """Read the entry's bytes into ``buffer`` (bytes,) uint8. ``path`` is named where the file is too short."""
    read_into(descriptor, memoryview(buffer.numpy()), entry.start, path)  # type: ignore[arg-type]


def size_of(entry: TensorEntry) -> int:
    return entry.end - entry.start


class ShardWriter:
    """One safetensors file, its tensors given in the order of ``entries`` (positions in them are ignored).

    ``hash`` is the content hash of what was written so far, as ``files.hash_file`` gives it.
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry]):
        self.path, self._entries, self._next = path, list(entries), 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for entry in self._entries:
            offsets = [position, position + size_of(entry)]
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the reference writer has it
        self._hasher = blake3(max_threads=blake3.AUTO)
        self._handle = path.open("wb")
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._handle.write(data)
        self._hasher.update(data)

    @property
    def hash(self) -> str:
        return "b3:" + self._hasher.hexdigest()

    def write(self, name: str, data: Tensor) -> None:
        """The next tensor's bytes, in its announced dtype, as any contiguous tensor of as many bytes."""
        entry = self._entries[self._next]
        if entry.name != name or data.nbytes != size_of(entry) or not data.is_contiguous():
            raise ValueError(f"expected {entry.name} of {size_of(entry)} bytes, got {name} of {data.nbytes}")
        self._put(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        self._next += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._handle:
            if kind is None:
                if self._next != len(self._entries):
                    raise ValueError(f"{len(self._entries) - self._next} tensors of {self.path} were not written")
                self._handle.flush()
                os.fsync(self._handle.fileno())
