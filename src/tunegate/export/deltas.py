"""What adapters add to one weight matrix, in fp32, alone or combined.

LoRA adds ``s B A`` (Hu et al. 2021). DoRA replaces W by ``(m / n) (W + s B A)`` with n the row norms of that sum (Liu
et al. 2024); its delta is the difference to W. Several adapters combine as weighted deltas: ``linear`` sums, ``ties``
trims each to its largest values, elects a sign per element and averages what agrees (Yadav et al. 2023, arXiv
2306.01708), ``dare_linear`` and ``dare_ties`` first drop values at random and scale up the rest (Yu et al. 2023, arXiv
2311.03099). The formulas are those of PEFT's ``merge_utils``, applied to whole deltas and not to the factors apart.

It reads no files and does not round: the caller stores the sum in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

METHODS = ("linear", "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Update:
    """One adapter on one matrix: a (r, in), b (out, r), magnitude (out,) or None, and the scale of ``b a``."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Mix:
    """How adapters combine: one weight each, the share of values kept, and the seed of random dropping."""

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 0


def delta(weight: Tensor, update: Update) -> Tensor:
    """What ``update`` adds to ``weight`` (out, in); both fp32."""
    added = update.scale * (update.b @ update.a)
    if update.magnitude is None:
        return added
    merged = weight + added
    norm = torch.linalg.vector_norm(merged, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return merged * (update.magnitude / norm)[:, None] - weight


def combined(weight: Tensor, updates: Sequence[Update | None], mix: Mix, path: str) -> Tensor:
    """The sum of all adapters' deltas on ``weight``, combined as ``mix`` says. None: an adapter without this module."""
    deltas = [torch.zeros_like(weight) if u is None else delta(weight, u) for u in updates]
    weights = torch.tensor(mix.weights)
    if mix.method.startswith("dare"):
        deltas = [_dropped(d, mix, f"{path}:{number}") for number, d in enumerate(deltas)]
    if mix.method == "ties":
        deltas = [_largest(d, mix.density) for d in deltas]
    weighted = torch.stack(deltas) * weights.view(-1, 1, 1)
    if mix.method.endswith("ties"):
        return _elected_mean(weighted)
    return weighted.sum(0)


def _largest(values: Tensor, density: float) -> Tensor:
    """``values`` with all but the ``density`` largest magnitudes set to zero."""
    kept = int(density * values.numel())
    if kept >= values.numel():
        return values
    found = values.abs().reshape(-1).topk(kept).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[found] = True
    return torch.where(mask.view_as(values), values, 0.0)


def _dropped(values: Tensor, mix: Mix, key: str) -> Tensor:
    """Each value kept with probability ``density``, and divided by it."""
    seed = int.from_bytes(blake3(f"{mix.seed}:{key}".encode()).digest(length=8), "little") >> 1
    kept = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < mix.density
    return torch.where(kept, values / mix.density, 0.0)


def _elected_mean(weighted: Tensor) -> Tensor:
    """TIES: per element the sign of the sum wins, and the values of that sign are averaged."""
    majority = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == majority
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1.0)
