"""Which decoder layers keep their activations, so that a training step fits a budget.

A fused layer keeps what its backward pass reads (:func:`saved_bytes`, exact), or only its input, and is then computed
again. Layers recomputed give the same bytes, so the choice changes time and memory and nothing else. With a budget,
as few layers as possible are recomputed; if all of them are not enough, their inputs go to a file that the system
writes out and reads back (``offload``).

Counted are resident memory so far, what the optimizer and gradients add, kept activations, one layer's recomputed
activations, the kernels' scratch and the loss's logits. Evaluation is not: its batches are cut to the same number of
tokens and keep no activations. Layers that are not fused have no exact figure, and a budget is refused for them.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunegate.engine.fused_layer import Projections
from tunegate.engine.fused_shape import Shape
from tunegate.engine.workspace import ALIGN, BLOCK_BYTES
from tunegate.errors import InputError
from tunegate.kernels.cross_entropy import CHUNK_BYTES


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


def saved_bytes(layer: Layer, tokens: int, itemsize: int) -> int:
    """Bytes that :func:`tunegate.engine.fused_layer.forward` keeps for a backward pass, the layer's output included."""
    shape, groups = layer.shape, layer.projections
    wide = [layer.hidden, layer.hidden]  # the output, and the stream between attention and MLP
    wide += [p.shape[0] for p in (*groups.qkv, *groups.gate_up)]
    wide += [p.rank for p in groups.all() if p.parameters]
    wide += [shape.heads * shape.head_dim]
    single = [1, 1, shape.heads]  # two norms' inverse RMS, and the softmax's log-sum-exp
    for norm, heads in ((shape.query_norm, shape.heads), (shape.key_norm, shape.kv_heads)):
        if norm is not None:
            wide.append(heads * shape.head_dim)
            single.append(heads)
    for group, after in ((groups.out, shape.after_attention), (groups.down, shape.after_mlp)):
        if after is not None or group[0].gain is not None:
            wide.append(group[0].shape[0])
        if after is not None:
            single.append(1)
    return sum(_aligned(tokens * n * itemsize) for n in wide) + sum(_aligned(tokens * n * 4) for n in single)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def scratch_bytes(layer: Layer, tokens: int, itemsize: int) -> int:
    """An upper bound of what a layer's backward pass holds beside its saved activations."""
    groups = layer.projections
    inner = max(p.shape[1] for p in groups.down)
    gate_up = sum(p.shape[0] for p in groups.gate_up)
    widest = max(p.shape[0] for p in groups.all())
    per_token = 6 * layer.hidden + 2 * inner + gate_up + sum(p.shape[0] for p in groups.qkv)
    per_token += sum(p.rank for p in groups.all())
    if any(p.dropout for p in groups.all()):
        per_token += 4 * max(p.shape[1] for p in groups.all())
    if any(p.gain is not None for p in groups.all()):
        per_token += gate_up + 2 * widest
    return tokens * per_token * itemsize


def resident_bytes() -> int:
    """Memory that this process holds now; its peak so far where the system does not say (macOS)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Need:
    """What a step adds to resident memory, bytes. ``kept`` and ``inputs`` hold one figure a layer."""

    fixed: int
    kept: tuple[int, ...]
    inputs: tuple[int, ...]

    def total(self, saving: Saving) -> int:
        n = saving.recompute
        held = sum(self.kept[n:]) + (2 * max(self.inputs) if saving.offload else sum(self.inputs[:n]))
        return self.fixed + _in_blocks(held) + (_in_blocks(max(self.kept[:n])) if n else 0)


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def step_need(layers: Sequence[Layer], tokens: int, itemsize: int, trained: int) -> Need:
    """What a step over ``tokens`` computed tokens adds. ``trained``: bytes of gradients and moments."""
    scratch = max(_in_blocks(scratch_bytes(layer, tokens, itemsize)) for layer in layers)
    loss = 2 * CHUNK_BYTES + 2 * tokens * layers[0].hidden * itemsize
    kept = tuple(saved_bytes(layer, tokens, itemsize) for layer in layers)
    inputs = tuple(_aligned(tokens * layer.hidden * itemsize) for layer in layers)
    return Need(trained + scratch + loss, kept, inputs)


def choose(budget: int, resident: int, need: Need, least: int = 0) -> Saving:
    """The saving with the fewest recomputed layers, ``least`` or more, that stays within ``budget``.

    :class:`InputError` if none does.
    """
    count = len(need.kept)
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
