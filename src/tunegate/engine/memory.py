"""Which decoder layers keep their activations, so that a training step fits a budget.

A fused layer keeps what its backward pass reads, or only its input, and is then computed again. Layers recomputed give
the same bytes, so the choice changes time and memory and nothing else. With a budget, as few layers as possible are
recomputed; if all of them are not enough, their inputs go to a file that the system writes out and reads back
(``offload``).

Counted are resident memory so far, what the optimizer and gradients add, the activations (``activations`` replays
them), the kernels' packed weights, and what the loss holds. Evaluation is not: its batches are cut to the same number
of tokens and keep no activations. Layers that are not fused have no exact figure, and a budget is refused for them.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunegate.engine.activations import (
    PREFIX_BYTES,
    LayerPass,
    LayerSizes,
    around_bytes,
    kernel_bytes,
    loss_bytes,
    replay,
)
from tunegate.engine.fused_layer import Projections
from tunegate.engine.fused_shape import Projection, Shape
from tunegate.errors import InputError


@dataclass(frozen=True)
class Saving:
    """``recompute`` layers, counted from the first, keep only their input; ``offload``: in a file."""

    recompute: int
    offload: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Layer:
    """A fused layer's shape and projections; ``hidden`` is the width of the residual stream."""

    shape: Shape
    projections: Projections
    hidden: int

    def on(self, tokens: int, itemsize: int) -> LayerPass:
        """What a pass over ``tokens`` tokens takes in it."""
        shape, groups = self.shape, self.projections
        down = groups.down[0]
        sizes = LayerSizes(
            self.hidden, shape.heads, shape.kv_heads, shape.head_dim, down.shape[1],
            head_norms=shape.query_norm is not None, sandwich=shape.after_mlp is not None, packed=len(groups.qkv) == 1,
        )  # fmt: skip
        q, k, v = _ranks(groups.qkv, 3)
        gate, up = _ranks(groups.gate_up, 2)
        every = groups.all()
        return LayerPass(
            sizes, tokens, itemsize, (q, k, v, groups.out[0].rank, gate, up, down.rank),
            dropout=any(p.dropout for p in every), dora=any(p.gain is not None for p in every),
        )  # fmt: skip


def _ranks(group: Sequence[Projection], count: int) -> list[int]:
    """The rank of each of ``count`` projections, packed into one or not."""
    return [group[n if len(group) == count else 0].rank for n in range(count)]


def resident_bytes() -> int:
    """Memory that this process holds now; its peak so far where the system does not say (macOS)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_freed() -> None:
    """Return the pages of freed memory to the system, where the C library can (glibc's ``malloc_trim``).

    Gradients and moments are hundreds of tensors between others. Freed, their pages stay the process's, and are too
    scattered for the large tensors of an evaluation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Need:
    """What a step adds to resident memory: ``fixed`` bytes, and what the layers take."""

    fixed: int
    layers: tuple[LayerPass, ...]

    def total(self, saving: Saving) -> int:
        return self.fixed + replay(self.layers, saving.recompute, offload=saving.offload).touched


def step_need(layers: Sequence[Layer], tokens: int, itemsize: int, trained: int, vocab: int) -> Need:
    """What a step over ``tokens`` computed tokens adds, if all of them were targets and shared a prefix. ``trained``:
    bytes of gradients and moments."""
    loss = loss_bytes(tokens, vocab, itemsize) + around_bytes(tokens, tokens, layers[0].hidden, itemsize)
    fixed = trained + kernel_bytes(torch.get_num_threads()) + loss + PREFIX_BYTES
    return Need(fixed, tuple(layer.on(tokens, itemsize) for layer in layers))


def choose(budget: int, resident: int, need: Need, least: int = 0) -> Saving:
    """The saving with the fewest recomputed layers, ``least`` or more, that stays within ``budget``.

    :class:`InputError` if none does.
    """
    count = len(need.layers)
    options = [Saving(n) for n in range(least, count + 1)] + [Saving(count, offload=True)]
    for option in options:
        total = resident + need.total(option)
        if total <= budget:
            what = _describe(option, count)
            return Saving(option.recompute, option.offload, f"{what}: {_gb(total)} of {_gb(budget)}")
    smallest = resident + need.total(options[-1])
    raise InputError(
        "no way to keep activations fits the budget",
        where="train.memory",
        expected=f"{_gb(smallest)} or more",
        got=f"{_gb(budget)}, of which {_gb(resident)} are held before the first step",
        fix="lower train.tokens_per_batch (activations), set `base.quantization: nf4` (weights), or lower train.rank",
    )


def _describe(saving: Saving, count: int) -> str:
    if saving.offload:
        return "every layer recomputed, inputs in a file"
    if not saving.recompute:
        return "no layer recomputed"
    return f"{saving.recompute} of {count} layers recomputed"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
