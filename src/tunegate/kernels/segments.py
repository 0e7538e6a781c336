"""Low-rank updates of different adapters on different rows of one batch.

For every :class:`Segment`, a run of rows with one adapter, ``out = gain * (out - bias + scale * (x A^T) B^T) + bias``:
the base's product has been made for all rows at once, and each row gets its own adapter on top (Punica,
arXiv:2310.18547; S-LoRA, arXiv:2311.03285). ``gain`` is DoRA's magnitude over its norm, 1 for LoRA. Projections that
share an input are one call. A row's result does not depend on the other rows.

Factors live in a :class:`FactorTable`: a line for each adapter, a column for each projection of the model, entries as
the kernels read them; :func:`lay_out` brings them there from a file's bytes. Adapters may be added and removed while a
pass runs that does not use them. It adds no dropout and has no gradients.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.linear import _TYPES, _matrix
from tunegate.kernels.recording import hold

MOST_TARGETS = 4
_USUAL_RANK = 64  # what is recorded for it goes on being used, whatever adapters up to this rank come
_FIELDS = 5  # a, b, gain, rank, scale
_FIRST = 128  # slots of a new table: a larger one lies elsewhere, and what was recorded on the old one is lost


_NOTHING: tuple[int, frozenset[int], frozenset[int]] = (0, frozenset(), frozenset())


@dataclass(frozen=True)
class Factors:
    """One adapter on one projection: ``a`` (r, in), ``b`` (r, out), which is B transposed, both fp32 or both bf16 and
    contiguous; ``gain`` (out,) fp32 or None."""

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.a, self.b, self.gain) if t is not None)


class FactorTable:
    """Adapters by slot. ``columns``: projections of the model. ``dtype``: fp32 or bf16, of all factors. ``slots`` that
    there is room for at first."""

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32, slots: int = _FIRST):
        self.columns, self.dtype = columns, dtype
        self.slots: list[dict[int, Factors] | None] = []
        self._facts: list[tuple[int, frozenset[int], frozenset[int]]] = []  # rank, columns, those with gains, by slot
        self.numbers = torch.zeros(slots, columns, _FIELDS, dtype=torch.int64)
        self._outgrown: list[Tensor] = []  # a pass may be reading them

    def add(self, factors: dict[int, Factors]) -> int:
        """Put an adapter, by column, in a free slot and return it. From one thread at a time."""
        for column, f in factors.items():
            shapes = f.a.dim() == f.b.dim() == 2 and f.a.shape[0] == f.b.shape[0]
            dense = f.a.is_contiguous() and f.b.is_contiguous() and f.a.dtype == f.b.dtype == self.dtype
            if not 0 <= column < self.columns or not shapes or not dense:
                raise ValueError(f"column {column}: a {tuple(f.a.shape)} {f.a.dtype}, b {tuple(f.b.shape)} {f.b.dtype}")
            if f.gain is not None and (f.gain.shape != f.b.shape[1:] or f.gain.dtype != torch.float32):
                raise ValueError(f"column {column}: gain {tuple(f.gain.shape)} {f.gain.dtype}")
        slot = next((n for n, taken in enumerate(self.slots) if taken is None), len(self.slots))
        if slot == len(self.slots):
            self.slots.append(None)
            self._facts.append(_NOTHING)
        if slot >= len(self.numbers):
            grown = torch.zeros(2 * slot, self.columns, _FIELDS, dtype=torch.int64)
            grown[: len(self.numbers)] = self.numbers
            self._outgrown.append(self.numbers)
            self.numbers = grown
        entries = [
            (f.a.data_ptr(), f.b.data_ptr(), native.address(f.gain), f.rank, _bits(f.scale)) for f in factors.values()
        ]
        self.numbers[slot, list(factors)] = torch.tensor(entries, dtype=torch.int64).view(-1, _FIELDS)
        self.slots[slot] = factors
        gains = frozenset(column for column, f in factors.items() if f.gain is not None)
        self._facts[slot] = max((f.rank for f in factors.values()), default=0), frozenset(factors), gains
        return slot

    def remove(self, slot: int) -> None:
        self.numbers[slot] = 0
        self.slots[slot], self._facts[slot] = None, _NOTHING

    def facts(self, slots: Iterable[int]) -> tuple[int, frozenset[int], frozenset[int]]:
        """The largest rank among these adapters, the columns that any of them has, and those with DoRA's gain."""
        found = {self._facts[slot] for slot in slots}
        ranks, columns, gains = zip(*found, strict=True) if found else ((0,), (), ())
        return max(ranks), frozenset().union(*columns), frozenset().union(*gains)

    @property
    def room_rank(self) -> int:
        """A rank that no adapter is above, and that seldom changes."""
        largest = max((rank for rank, _, _ in list(self._facts)), default=0)
        return max(_USUAL_RANK, 1 << (largest - 1).bit_length())


def _bits(value: float) -> int:
    """The eight bytes of a double as an integer."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@dataclass(frozen=True)
class Segment:
    """Rows ``begin`` up to ``end`` have the adapter in ``slot``."""

    begin: int
    end: int
    slot: int


class Segments:
    """The rows of one pass that have adapters; rows in no segment are the base's own.

    With ``memory`` (1 + 3 * rows,) int64, where the kernels will read the segments, any adapter of the table may take
    part: a recorded pass is for all that come. ``columns`` that may be adapted, ``gains`` those of DoRA.
    """

    def __init__(self, table: FactorTable, segments: Sequence[Segment], memory: Tensor | None = None):
        self.table, self.segments = table, tuple(segments)
        flat = [number for s in segments for number in (s.begin, s.end, s.slot)]
        self.numbers = torch.tensor([len(segments), *flat], dtype=torch.int64)
        self.most_rank, self.columns, self.gains = table.facts({s.slot for s in segments})
        if memory is not None:
            memory[: len(self.numbers)] = self.numbers
            self.numbers, self.columns = memory, frozenset(range(table.columns))
            self.gains = self.columns if self.gains else frozenset()
            self.most_rank = table.room_rank


@dataclass(frozen=True)
class Target:
    """A projection's output (rows, n) over all rows of the pass, its bias and its column of the table."""

    out: Tensor
    column: int
    bias: Tensor | None = None


def add_segments(x: Tensor, segments: Segments, targets: Sequence[Target]) -> None:
    """Update the ``targets`` of the input ``x`` (rows, k), fp32 or bf16, in place."""
    targets = [t for t in targets if t.column in segments.columns]
    if not targets:
        return
    if len(targets) > MOST_TARGETS:
        raise ValueError(f"{len(targets)} projections of one input; expected at most {MOST_TARGETS}")
    outs = [t.out for t in targets]
    library = native.library_for(x, *outs)
    if library is None:
        _twin(x, segments, targets)
        return
    rows, k, stride, kind = _matrix(x, "x")
    table = segments.table
    flat = []
    for t in targets:
        out_rows, n, out_stride, out_kind = _matrix(t.out, "out")
        if out_rows != rows or out_kind != kind:
            raise ValueError(f"out is {t.out.dtype} {tuple(t.out.shape)}; expected {rows} rows of {x.dtype}")
        bias_kind = 0 if t.bias is None else _TYPES[t.bias.dtype]
        flat.append((t.out.data_ptr(), out_stride, n, native.address(t.bias), bias_kind, t.column))
    wide = rows * k if kind else 0
    work = hold(torch.empty(len(targets) * rows * segments.most_rank + wide))
    library.add_segments(
        (x.data_ptr(), stride, rows, k, kind),
        (table.numbers.data_ptr(), table.columns, segments.most_rank, _TYPES[table.dtype]),
        segments.numbers.data_ptr(),
        flat,
        work.data_ptr(),
    )


def lay_out(
    data: np.ndarray[Any, np.dtype[np.uint8]], memory: Tensor, parts: np.ndarray[Any, np.dtype[np.int64]]
) -> tuple[float, float]:
    """Copy fp32 matrices that begin anywhere in ``data`` to places in ``memory`` (elements,), fp32 or bf16. A line of
    ``parts`` (n, 5) is a matrix: its first byte, its first element there, rows, columns, and 1 if it is transposed.
    Returns the largest magnitude of those that are not transposed and of those that are, infinite if some value is not
    finite. On this thread alone."""
    if memory.dim() != 1 or not memory.is_contiguous() or memory.dtype not in _TYPES:
        raise ValueError(f"{tuple(memory.shape)} {memory.dtype}; expected contiguous fp32 or bf16 elements")
    parts = np.ascontiguousarray(parts, np.int64).reshape(-1, 5)
    begin, to, rows, columns, _ = parts.T
    sizes = rows * columns
    if (parts < 0).any() or (begin + 4 * sizes > data.nbytes).any() or (to + sizes > memory.numel()).any():
        raise ValueError(f"a matrix outside of {data.nbytes} bytes or {memory.numel()} elements")
    library = native.library_for(memory)
    if library is None:
        return _lay_out_twin(data, memory, parts)
    where = data.ctypes.data, memory.data_ptr(), parts.ctypes.data, len(parts)
    straight, turned = np.array(library.lay_out(*where, _TYPES[memory.dtype]), np.uint32).view(np.float32).tolist()
    return (straight if np.isfinite(straight) else np.inf), (turned if np.isfinite(turned) else np.inf)


def _lay_out_twin(
    data: np.ndarray[Any, np.dtype[np.uint8]], memory: Tensor, parts: np.ndarray[Any, np.dtype[np.int64]]
) -> tuple[float, float]:
    largest = [0.0, 0.0]
    lines: Any = parts.tolist()
    for begin, to, rows, columns, transposed in lines:
        values = torch.from_numpy(data[begin : begin + 4 * rows * columns].copy()).view(torch.float32)
        values = values.view(rows, columns)
        memory[to : to + rows * columns] = (values.t() if transposed else values).reshape(-1)
        most = float(values.abs().max()) if values.numel() else 0.0
        largest[transposed] = max(largest[transposed], most if np.isfinite(most) else np.inf)
    return largest[0], largest[1]


def _twin(x: Tensor, segments: Segments, targets: Sequence[Target]) -> None:
    for s in segments.segments:
        factors = segments.table.slots[s.slot] or {}
        rows = slice(s.begin, s.end)
        for t in targets:
            f = factors.get(t.column)
            if f is None:
                continue
            low = f.scale * (x[rows].float() @ f.a.to(x.device).float().t()) @ f.b.to(x.device).float()
            out = t.out[rows].float() + low
            if f.gain is not None:
                bias = 0.0 if t.bias is None else t.bias.float()
                out = (out - bias) * f.gain.to(x.device) + bias
            t.out[rows] = out.to(t.out.dtype)
