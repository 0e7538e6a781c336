"""Dropout whose mask is a function of (seed, row, column) and is stored nowhere.

Row t gets a 64-bit key from the seed (SplitMix64's finalizer, Steele, Lea & Flood 2014); columns 2j and 2j + 1 get the
low and high 16 bits of a 32-bit multiply-xorshift hash of j under that key. An element is dropped if its draw is below
round(rate * 65536), and what is kept is scaled by the inverse of the share that is kept in truth. The backward draws
the mask again. The twin computes the same bits, so a run may move between machines with and without the kernels.

It keeps no random state: two calls with one seed give one mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.elementwise import check_rows, rows

_LOW = 0xFFFFFFFF
_ALL = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def dropped(x: Tensor, out: Tensor, *, rate: float, seed: int, row_offset: int = 0) -> None:
    """out = mask(x), the kept elements scaled. x, out: (T, K) fp32 or bf16, any row stride; ``out`` may be ``x``.

    Row t of ``x`` is row ``row_offset + t`` of the mask, so a batch may be processed in parts. 0 <= seed < 2^64.
    """
    _run(x, out, rate, seed, row_offset, adds=False)


def add_dropped(x: Tensor, out: Tensor, *, rate: float, seed: int, row_offset: int = 0) -> None:
    """out += mask(x): the backward of :func:`dropped` with the same rate, seed and row offset."""
    _run(x, out, rate, seed, row_offset, adds=True)


def kept_mask(rows: int, columns: int, *, rate: float, seed: int, row_offset: int = 0) -> Tensor:
    """The mask itself in plain PyTorch: (rows, columns) bool, True where an element is kept."""
    first, second = _row_keys(seed, row_offset, rows)
    h = (torch.arange((columns + 1) // 2) + first[:, None]) & _LOW
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _LOW
    h = h ^ second[:, None]
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _LOW
    h = h ^ (h >> 16)
    draws = torch.stack((h & 0xFFFF, h >> 16), dim=2).flatten(1)[:, :columns]
    return draws >= _threshold(rate)


def _run(x: Tensor, out: Tensor, rate: float, seed: int, row_offset: int, adds: bool) -> None:
    check_rows("x", x, x)
    check_rows("out", out, x, written=True)
    threshold = _threshold(rate)
    if not 0 <= seed <= _ALL or row_offset < 0:
        raise ValueError(f"seed must be in [0, 2^64) and row_offset not negative, got {seed} and {row_offset}")
    scale = 65536 / (65536 - threshold)
    lib = native.library_for(x)
    if lib is None:
        mask = kept_mask(*x.shape, rate=rate, seed=seed, row_offset=row_offset).to(x.device)
        kept = torch.where(mask, x.float() * scale, 0.0)
        out.copy_(out.float() + kept if adds else kept)
        return
    shape = tuple(x.shape)
    lib.dropout(shape, x.dtype == torch.bfloat16, rows(x), rows(out), seed, row_offset, threshold, scale, adds)


def _threshold(rate: float) -> int:
    threshold = round(rate * 65536) if 0 <= rate < 1 else 65536
    if threshold == 65536:
        raise ValueError(f"a dropout rate must be in [0, 1) and at most 65535/65536, got {rate}")
    return threshold


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    value &= _ALL
    return value - (1 << 64) if value >> 63 else value


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # torch shifts signed numbers: drop the copies of the sign


def _row_keys(seed: int, row_offset: int, rows: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys a row, as int64 (rows,). int64 products wrap as the kernel's unsigned ones do."""
    mixed_seed = _mixed(torch.tensor(_signed(seed + _GOLDEN)))
    keys = _mixed(mixed_seed + (torch.arange(rows) + (row_offset + 1)) * _signed(_GOLDEN))
    return keys & _LOW, _shifted(keys, 32)
