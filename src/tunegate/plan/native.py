"""Activation memory of the CPU engine's fused layers, by replaying their allocations.

:func:`replay` walks the layers as ``engine.fused`` and ``engine.fused_layer`` do, in the same order and with the same
lifetimes, on :class:`~tunegate.plan.arena.Arena` instead of memory. ``kept`` lives from the forward to the backward
pass, ``temporary`` holds one layer that is computed again (or computed without gradients), ``scratch`` is used within
a call. Whoever changes what the fused layer takes changes this file too: a test compares the two.

It does not count torch's own tensors around the layers: ``memory`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunegate.kernels.gain import partial_floats
from tunegate.plan.arena import Arena
from tunegate.plan.shapes import ModelShape


@dataclass(frozen=True)
class LayerPass:
    """One pass over ``tokens`` tokens. ``itemsize``: bytes of an activation. ``ranks``: the rank at q, k, v, o, gate,
    up, down (0: not adapted). ``prefix``: tokens shared by the rows. ``recomputed``: layers, counted from
    the first, that keep their input alone."""

    shape: ModelShape
    tokens: int
    itemsize: int
    ranks: tuple[int, int, int, int, int, int, int]
    dropout: bool = False
    dora: bool = False
    prefix: int = 0
    recomputed: int = 0


@dataclass
class Replay:
    kept: Arena = field(default_factory=Arena)
    temporary: Arena = field(default_factory=Arena)
    scratch: Arena = field(default_factory=Arena)

    @property
    def reserved(self) -> int:
        return self.kept.reserved + self.temporary.reserved + self.scratch.reserved

    @property
    def touched(self) -> int:
        return self.kept.touched + self.temporary.touched + self.scratch.touched


_SLICE_TOKENS, _MOST_SLICES, _PARTIAL_FLOATS = 256, 16, 8 << 20  # csrc/bind_attention.cpp

_Group = Sequence[tuple[int, int, int]]  # (in, out, rank) of each projection that one call computes


def replay(p: LayerPass, into: Replay | None = None) -> Replay:
    """Forward and backward over all layers; ``into`` continues with arenas that were used before."""
    memory = into or Replay()
    layers = p.shape.layers
    with memory.kept.scope():
        for layer in range(layers):
            memory.kept.take(p.tokens * p.shape.hidden, p.itemsize)
            if layer >= p.recomputed:
                _forward(p, memory.kept, memory.scratch, saving=True)
            else:
                with memory.temporary.scope():
                    _forward(p, memory.temporary, memory.scratch, saving=False)
        for layer in reversed(range(layers)):
            with memory.scratch.scope(), memory.temporary.scope():
                if layer < p.recomputed:
                    _forward(p, memory.temporary, memory.scratch, saving=True, output=False)
                _backward(p, memory.scratch, first=layer == 0)
    return memory


def replay_evaluation(p: LayerPass, into: Replay) -> Replay:
    """A forward pass without gradients."""
    with into.scratch.scope(), into.temporary.scope():
        _forward(p, into.temporary, into.scratch, saving=False)
    return into


def _groups(p: LayerPass) -> tuple[_Group, _Group, _Group, _Group]:
    s, (q, k, v, o, gate, up, down) = p.shape, p.ranks
    wide, narrow, inner = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate
    if s.packed:
        return (
            [(s.hidden, wide + 2 * narrow, q)],
            [(wide, s.hidden, o)],
            [(s.hidden, 2 * inner, gate)],
            [(inner, s.hidden, down)],
        )
    return (
        [(s.hidden, wide, q), (s.hidden, narrow, k), (s.hidden, narrow, v)],
        [(wide, s.hidden, o)],
        [(s.hidden, inner, gate), (s.hidden, inner, up)],
        [(inner, s.hidden, down)],
    )


def _project(p: LayerPass, group: _Group, keep: Arena, scratch: Arena) -> None:
    with scratch.scope():
        for inputs, _, rank in group:
            if rank:
                keep.take(p.tokens * rank, p.itemsize)
                if p.dropout:
                    scratch.take(p.tokens * inputs, p.itemsize)


def _branch(p: LayerPass, group: _Group, keep: Arena, scratch: Arena, saving: bool, output: bool = True) -> None:
    if p.shape.sandwich or (p.dora and group[0][2] and saving):
        keep.take(p.tokens * group[0][1], p.itemsize)
    _project(p, group, keep, scratch)
    if p.shape.sandwich:
        keep.take(p.tokens)
        if not output:
            with scratch.scope():
                scratch.take(p.tokens * group[0][1], p.itemsize)


def _forward(p: LayerPass, keep: Arena, scratch: Arena, *, saving: bool, output: bool = True) -> None:
    s, tokens, size = p.shape, p.tokens, p.itemsize
    qkv, out, gate_up, down = _groups(p)
    keep.take(tokens)
    for _, outputs, _ in qkv:
        keep.take(tokens * outputs, size)
    with scratch.scope():
        scratch.take(tokens * s.hidden, size)
        _project(p, qkv, keep, scratch)
    if s.head_norms:
        for heads in (s.heads, s.kv_heads):
            keep.take(tokens * heads * s.head_dim, size)
            keep.take(tokens * heads)
    keep.take(tokens * s.heads * s.head_dim, size)
    keep.take(tokens * s.heads)
    keep.take(tokens * s.hidden, size)
    _branch(p, out, keep, scratch, saving)
    keep.take(tokens)
    for _, outputs, _ in gate_up:
        keep.take(tokens * outputs, size)
    with scratch.scope():
        scratch.take(tokens * s.hidden, size)
        _project(p, gate_up, keep, scratch)
        scratch.take(tokens * s.intermediate, size)
        _branch(p, down, keep, scratch, saving, output)


def _project_backward(p: LayerPass, group: _Group, scratch: Arena) -> None:
    adapted = [(inputs, rank) for inputs, _, rank in group if rank]
    for inputs, outputs, rank in (one for one in group if one[2]):
        if p.dora:
            scratch.take(p.tokens * outputs, p.itemsize)
            with scratch.scope():
                scratch.take(partial_floats(p.tokens, outputs))
        scratch.take(p.tokens * rank, p.itemsize)
        if p.dropout:
            scratch.take(p.tokens * inputs, p.itemsize)
    if p.dropout:
        for inputs, _ in adapted:
            scratch.take(p.tokens * inputs, p.itemsize)


def _branch_backward(p: LayerPass, group: _Group, scratch: Arena) -> None:
    if p.shape.sandwich:
        scratch.take(p.tokens * p.shape.hidden, p.itemsize)
    _project_backward(p, group, scratch)


def _backward(p: LayerPass, scratch: Arena, *, first: bool) -> None:
    """``first``: nobody needs the gradient of the first layer's input."""
    s, tokens, size = p.shape, p.tokens, p.itemsize
    qkv, out, gate_up, down = _groups(p)
    row = tokens * s.hidden
    with scratch.scope():
        scratch.take(row, size)
        with scratch.scope():
            scratch.take(tokens * s.intermediate, size)
            scratch.take(tokens * s.intermediate, size)
            _branch_backward(p, down, scratch)
            for _, outputs, _ in gate_up:
                scratch.take(tokens * outputs, size)
            scratch.take(row, size)
            scratch.take(row, size)
            _project_backward(p, gate_up, scratch)
        scratch.take(tokens * s.heads * s.head_dim, size)
        _branch_backward(p, out, scratch)
        _attention_backward(p, qkv, scratch, first)


def _attention_backward(p: LayerPass, qkv: _Group, scratch: Arena, first: bool) -> None:
    s, tokens, size = p.shape, p.tokens, p.itemsize
    query, key = tokens * s.heads * s.head_dim, tokens * s.kv_heads * s.head_dim
    if p.dora and any(rank for _, _, rank in qkv):
        scratch.take(query, size)
        scratch.take(key, size)
    for _, outputs, _ in qkv:
        scratch.take(tokens * outputs, size)
    if s.head_norms:
        scratch.take(query, size)
        scratch.take(key, size)
    with scratch.scope():
        scratch.take(attention_floats(p))
    for _ in range(1 if first else 2):
        scratch.take(tokens * s.hidden, size)
    _project_backward(p, qkv, scratch)


def attention_floats(p: LayerPass) -> int:
    """The attention kernel's workspace in fp32 numbers, as ``csrc/bind_attention.cpp`` counts them, but for some
    bytes a row: a delta for each query and head, sums of dq where activations are 16-bit, and each slice's sums of a
    shared prefix's dk and dv."""
    s = p.shape
    delta = p.tokens * s.heads
    sums = p.tokens * s.heads * s.head_dim if p.itemsize == 2 else 0
    partial = p.prefix * s.kv_heads * 2 * s.head_dim
    most = min(_MOST_SLICES, max(1, _PARTIAL_FLOATS // max(1, partial)))
    slices = min(max((p.tokens - p.prefix) // _SLICE_TOKENS, 1), most) + 1 if p.prefix else 0
    return delta + sums + slices * partial
