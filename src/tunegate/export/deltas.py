"""What adapters add to one weight matrix, in fp32, alone or combined.

LoRA adds ``s B A`` (Hu et al. 2021). DoRA replaces W by ``(m / n) (W + s B A)`` with n the row norms of that sum (Liu
et al. 2024); its delta is the difference to W. Several adapters combine as weighted deltas: ``linear`` sums, ``ties``
trims each to its largest values, elects a sign per element and averages what agrees (Yadav et al. 2023, arXiv
2306.01708), ``dare_linear`` and ``dare_ties`` first drop values at random and scale up the rest (Yu et al. 2023, arXiv
2311.03099). The formulas are those of PEFT's ``merge_utils``, applied to whole deltas and not to the factors apart.

A matrix is worked through a few rows at a time, so that what is in memory does not grow with the number of adapters.
The one thing about TIES that concerns the whole matrix, the magnitude that the largest values reach, is counted
beforehand.

It reads no files and does not round: the caller stores the sum in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
ELEMENTS_AT_ONCE = 1 << 17  # 512 KiB of fp32, for the cache; part of what DARE draws, each piece with its own seed


@dataclass(frozen=True)
class Update:
    """One adapter on one matrix: a (r, in), b (out, r), magnitude (out,) or None, and the scale of ``b a``."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def rows(self, part: slice) -> Update:
        magnitude = None if self.magnitude is None else self.magnitude[part]
        return Update(self.a, self.b[part], self.scale, magnitude)


@dataclass(frozen=True)
class Mix:
    """How adapters combine: one weight each, the share of values kept, and the seed of random dropping."""

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 0


ONE = Mix("linear", (1.0,))  # one adapter as it is


def delta(weight: Tensor, update: Update) -> Tensor:
    """What ``update`` adds to ``weight`` (out, in); both fp32."""
    added = update.scale * (update.b @ update.a)
    if update.magnitude is None:
        return added
    merged = weight + added
    norm = torch.linalg.vector_norm(merged, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return merged * (update.magnitude / norm)[:, None] - weight


class Matrix(Protocol):
    """A weight (out, in) that is read a few rows at a time."""

    @property
    def shape(self) -> Sequence[int]: ...

    def rows(self, part: slice) -> Tensor:
        """(rows, in) fp32."""


@dataclass(frozen=True)
class Dense:
    """A matrix in memory, of any floating-point dtype. Rows that were read may be overwritten."""

    values: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return self.values.shape

    def rows(self, part: slice) -> Tensor:
        return self.values[part].float()


def pieces(matrix: Matrix) -> list[slice]:
    """The rows that are worked on at once."""
    count, size = matrix.shape[0], max(1, ELEMENTS_AT_ONCE // matrix.shape[1])
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def merged_rows(
    matrix: Matrix, updates: Sequence[Update | None], mix: Mix, path: str
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their values with all adapters merged in), fp32, piece by piece.

    None among ``updates`` is an adapter without this module.
    """
    parts = pieces(matrix)
    cuts: list[float] | None = None
    if mix.method == "ties" and mix.density < 1:
        kept = int(mix.density * matrix.shape[0] * matrix.shape[1])
        cuts = [_magnitude_of(kept, matrix, u, parts) for u in updates]
    factors = mix.method == "linear" and all(u is None or u.magnitude is None for u in updates)
    for part in parts:
        own = matrix.rows(part)
        if factors:  # no delta has to be formed: fewer passes over memory
            for weight, update in zip(mix.weights, updates, strict=True):
                if update is not None:
                    own = torch.addmm(own, update.b[part], update.a, alpha=weight * update.scale)
            yield part, own
            continue
        found = [torch.zeros_like(own) if u is None else delta(own, u.rows(part)) for u in updates]
        yield part, own + _combined(found, mix, f"{path}:{part.start}", cuts)


def _combined(deltas: Sequence[Tensor], mix: Mix, key: str, cuts: Sequence[float] | None) -> Tensor:
    """The sum of all adapters' deltas on the same rows, combined as ``mix`` says."""
    if mix.method.startswith("dare"):
        deltas = [_dropped(d, mix, f"{key}:{number}") for number, d in enumerate(deltas)]
    if cuts is not None:
        deltas = [torch.where(d.abs() >= cut, d, 0.0) for d, cut in zip(deltas, cuts, strict=True)]
    weighted = [weight * d for weight, d in zip(mix.weights, deltas, strict=True)]
    if mix.method.endswith("ties"):
        return _elected_mean(torch.stack(tuple(deltas)), torch.stack(weighted))
    return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)


def _magnitude_of(kept: int, matrix: Matrix, update: Update | None, parts: Sequence[slice]) -> float:
    """The ``kept``-th largest magnitude of the delta on ``matrix``; infinity for none.

    The bits of a magnitude, read as a whole number, are in the order of its values: counting the upper half of the
    bits and then the lower half finds it exactly in two passes, without the delta as a whole.
    """
    if kept == 0 or update is None:
        return float("inf")
    upper, wanted = 0, kept
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for part in parts:
            bits = delta(matrix.rows(part), update.rows(part)).abs().view(torch.int32)
            bits = bits[bits >> 16 == upper] & 0xFFFF if shift == 0 else bits >> 16
            counts += torch.bincount(bits.reshape(-1), minlength=1 << 16)
        above = counts.flip(0).cumsum(0).flip(0)  # how many lie at each value or above it
        found = int((above >= wanted).nonzero().max())
        wanted -= int(above[found] - counts[found])
        upper = found if shift else upper << 16 | found
    return float(torch.tensor(upper, dtype=torch.int32).view(torch.float32))


def _dropped(values: Tensor, mix: Mix, key: str) -> Tensor:
    """Each value kept with probability ``density``, and divided by it."""
    seed = int.from_bytes(blake3(f"{mix.seed}:{key}".encode()).digest(length=8), "little") >> 1
    kept = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < mix.density
    return torch.where(kept, values / mix.density, 0.0)


def _elected_mean(deltas: Tensor, weighted: Tensor) -> Tensor:
    """TIES: per element the sign of the sum wins, before weights, and the weighted values of that sign are averaged."""
    majority = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == majority
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1.0)
