"""A decoder layer computed by the kernels, with its backward pass written out.

For input x (T, H): ``y = x + o(attention(rope(qkv(norm(x)))))``, ``out = y + down(act(gate) * up)`` with gate and up
of ``norm(y)``; Gemma 2 and 3 norm each branch once more before it is added. Projections that share an input are one
call (q|k|v, gate|up), a low-rank branch is one more summand of the product it belongs to, and residuals, biases and
DoRA's gains are added on the way out.

What the backward pass needs is either kept (attention inputs and output, gate, up, the residual stream) or, with
``recompute``, computed again from the layer's input. Norms and the gated product are always computed again: they are
cheaper than the memory. Dropout masks come from a seed and are never stored. Frozen weights get no gradient.

DoRA (arXiv:2402.09353, section 4.3, norm held constant): with ``t = x W^T + s B A x`` and ``c = m / n``,
``dt = c * dy`` and ``dm = sum(dy * t) / n = sum(dy * (y - bias)) / m``.

It does not choose where memory comes from (``workspace``), nor what a layer computes (``fused_shape``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tunegate.engine.fused_shape import Norm, Projection, Shape
from tunegate.engine.workspace import Workspace
from tunegate.kernels.dropout import add_dropped, dropped
from tunegate.kernels.gain import gain_backward, partial_floats
from tunegate.kernels.glu import gated, gated_backward
from tunegate.kernels.linear import Product, Term, multiply
from tunegate.kernels.norm import rms_norm, rms_norm_backward
from tunegate.kernels.recording import also, hold
from tunegate.kernels.rope import rope_
from tunegate.kernels.segments import Segments, Target, add_segments

_MODULES = 16  # room for a layer's projections between two layers' dropout seeds


class Attention(Protocol):
    """Attention over the rows of the batch at hand; q (T, heads, D), k and v (T, kv heads, D)."""

    def forward(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, /) -> None: ...

    def backward(
        self, shape: Shape, grad_out: Tensor, saved: Saved, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None: ...


@dataclass
class Projections:
    """The adapted layers of one decoder layer, in the order in which :func:`backward` returns their gradients."""

    qkv: list[Projection]
    out: list[Projection]
    gate_up: list[Projection]
    down: list[Projection]

    def all(self) -> list[Projection]:
        return [*self.qkv, *self.out, *self.gate_up, *self.down]


@dataclass
class Saved:
    """What a layer's backward pass reads. Tensors lie in the pass's workspace."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor
    attended: Tensor
    lse: Tensor
    y: Tensor
    gate: Tensor
    up: Tensor
    branches: tuple[Tensor | None, Tensor | None]  # outputs of o and down, where a norm or DoRA reads them
    inverse: dict[str, Tensor] = field(default_factory=dict)  # inverse RMS of each norm
    low: dict[str, list[Tensor | None]] = field(default_factory=dict)  # scale * drop(x) A^T of each group


@dataclass(frozen=True)
class Context:
    """One layer in one pass: its shape and projections, rotary tables, dropout seed, attention and scratch memory."""

    shape: Shape
    projections: Projections
    cos: Tensor
    sin: Tensor
    seed: int
    attention: Attention
    scratch: Workspace


def _low_rank(
    c: Context, x: Tensor, group: Sequence[Projection], keep: Workspace, first: int
) -> list[Tensor | None]:  # fmt: skip
    """The low-rank activations (T, r) of every projection of ``group`` on x (T, in)."""
    low: list[Tensor | None] = []
    downs = []
    with c.scratch.scope():
        for number, p in enumerate(group):
            if not p.parameters:
                low.append(None)
                continue
            h = keep.take(len(x), p.rank, dtype=x.dtype)
            source = x
            if p.dropout:
                source = c.scratch.take(*x.shape, dtype=x.dtype)
                dropped(x, source, rate=p.dropout, seed=c.seed + first + number)
            downs.append(Product(h, [Term(source, p.parameters[0].detach())], alpha=p.scale))
            low.append(h)
        if downs:
            multiply(*downs)
    return low


def _project(
    c: Context, x: Tensor, group: Sequence[Projection], outs: Sequence[Tensor], keep: Workspace, first: int,
    add: Tensor | None = None, factor: float = 1.0,
) -> list[Tensor | None]:  # fmt: skip
    """Every projection of ``group`` on x (T, in) into ``outs``; returns their low-rank activations (T, r)."""
    low = _low_rank(c, x, group, keep, first)
    products = []
    for p, small, out in zip(group, low, outs, strict=True):
        terms = [Term(x, p.weight)]
        if small is not None:
            terms.append(Term(small, p.parameters[1].detach()))
        bias = p.bias if p.bias is None or factor == 1.0 else hold(p.bias * factor)
        gain = None if p.gain is None else hold(p.gain)
        products.append(Product(out, terms, alpha=factor, add=add, bias=bias, column_scale=gain))
    multiply(*products)
    segments = _segments(group)
    if segments is not None:
        targets = [Target(out, p.served.column, p.bias) for p, out in zip(group, outs, strict=True) if p.served]
        add_segments(x, segments, targets)
    return low


def _segments(group: Sequence[Projection]) -> Segments | None:
    """Adapters that rows of this pass have of their own on ``group``."""
    served = group[0].served
    return None if served is None else served.served.now.segments


def _project_backward(
    c: Context, grads: Sequence[Tensor], x: Tensor, group: Sequence[Projection], low: Sequence[Tensor | None],
    outs: Sequence[Tensor | None], grad_x: Tensor | None, first: int,
) -> list[Tensor]:  # fmt: skip
    """Gradient with respect to x into ``grad_x`` (None: nobody needs it), and of the adapters' parameters.

    ``outs`` are the projections' outputs, read for DoRA's magnitudes only.
    """
    found: list[Tensor] = []
    terms, products, later = [], [], []
    small = []
    for number, (p, grad, h, out) in enumerate(zip(group, grads, low, outs, strict=True)):
        if p.gain is not None:
            assert out is not None
            scaled = c.scratch.take(*grad.shape, dtype=grad.dtype)
            with c.scratch.scope():
                memory = c.scratch.take(partial_floats(*grad.shape))
                sums = gain_backward(grad, out, p.bias, p.gain, scaled, workspace=memory)
            found_magnitude, grad = sums / p.parameters[2].detach(), scaled
        if h is not None:
            a, b = p.parameters[0].detach(), p.parameters[1].detach()
            g = c.scratch.take(len(x), p.rank, dtype=x.dtype)
            small.append(Product(g, [Term(grad, b, w_is_kn=True)], alpha=p.scale))
            source = x
            if p.dropout:
                source = c.scratch.take(*x.shape, dtype=x.dtype)
                dropped(x, source, rate=p.dropout, seed=c.seed + first + number)
                later.append((g, a, p.dropout, c.seed + first + number))
            grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
            products.append(Product(grad_a, [Term(g, source, w_is_kn=True, x_is_km=True)]))
            products.append(Product(grad_b, [Term(grad, h, w_is_kn=True, x_is_km=True)]))
            found += [grad_a, grad_b]
            if p.gain is not None:
                found.append(found_magnitude)
            if not p.dropout:
                terms.append(Term(g, a, w_is_kn=True))
        terms.append(Term(grad, p.weight, w_is_kn=True))
    if small:
        multiply(*small)
    if grad_x is None:
        multiply(*products) if products else None
        return found
    multiply(Product(grad_x, terms), *products)
    for g, a, rate, seed in later:
        wide = c.scratch.take(*x.shape, dtype=x.dtype)
        multiply(Product(wide, [Term(g, a, w_is_kn=True)]))
        add_dropped(wide, grad_x, rate=rate, seed=seed)
    return found


def _norm(norm: Norm, x: Tensor, out: Tensor, inverse: Tensor) -> None:
    rms_norm(x, norm.weight, norm.eps, out, inverse, offset=norm.offset)


def _norm_backward(norm: Norm, grad: Tensor, x: Tensor, inverse: Tensor, out: Tensor, add: Tensor | None) -> None:
    rms_norm_backward(grad, x, norm.weight, inverse, out, offset=norm.offset, add=add)


def _split_heads(shape: Shape, outs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (T, heads, D), from one tensor each or from one for all."""
    dim = shape.head_dim
    if len(outs) == 1:
        sizes = [shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim]
        outs = outs[0].split(sizes, dim=1)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in outs)
    return q, k, v


def _halves(outs: Sequence[Tensor]) -> Sequence[Tensor]:
    return outs if len(outs) == 2 else outs[0].chunk(2, dim=1)


def _outputs(group: Sequence[Projection], tokens: int, dtype: torch.dtype, memory: Workspace) -> list[Tensor]:
    return [memory.take(tokens, p.shape[0], dtype=dtype) for p in group]


def _attention_inputs(
    c: Context, x: Tensor, keep: Workspace
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, dict[str, Tensor], list[Tensor | None]]:
    """(projection outputs, q, k, v ready for attention, inverse RMS values, low-rank activations)."""
    shape, tokens = c.shape, len(x)
    inverse = {"attention": keep.take(tokens)}
    outs = _outputs(c.projections.qkv, tokens, x.dtype, keep)
    with c.scratch.scope():
        normed = c.scratch.take(*x.shape, dtype=x.dtype)
        _norm(shape.attention_norm, x, normed, inverse["attention"])
        low = _project(c, normed, c.projections.qkv, outs, keep, 0)
    q, k, v = _split_heads(shape, outs)
    if shape.query_norm is not None and shape.key_norm is not None:
        normed_heads = []
        for name, norm, heads in (("query", shape.query_norm, q), ("key", shape.key_norm, k)):
            out = keep.take(*heads.shape, dtype=x.dtype)
            inverse[name] = keep.take(heads.shape[0] * heads.shape[1])
            _norm(norm, heads.reshape(-1, shape.head_dim), out.view(-1, shape.head_dim), inverse[name])
            normed_heads.append(out)
        q, k = normed_heads
    if shape.rotary:
        rope_(q, c.cos, c.sin)
        rope_(k, c.cos, c.sin)
    return outs, q, k, v, inverse, low


def _branch(
    c: Context, x: Tensor, group: list[Projection], after: Norm | None, residual: Tensor, out: Tensor | None,
    keep: Workspace, first: int, saving: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """``out = residual + factor * after(group(x))``; returns the projection's own output if a backward pass reads
    it, the norm's inverse RMS, and the low-rank activation. Without ``out`` only what is returned is computed."""
    factor = c.shape.residual
    adapted = group[0].gain is not None and saving
    segments = _segments(group)
    if segments is not None:  # what they scale must not hold the residual
        adapted = factor != 1.0 or any(p.served and p.served.column in segments.gains for p in group)
    if after is None and not adapted:
        if out is None:
            return None, None, _low_rank(c, x, group, keep, first)
        return None, None, _project(c, x, group, [out], keep, first, add=residual, factor=factor)
    own = keep.take(len(x), group[0].shape[0], dtype=x.dtype)
    low = _project(c, x, group, [own], keep, first)
    if after is None:
        if out is not None:
            also(lambda: torch.add(residual, own, alpha=factor, out=out))
        return own, None, low
    inverse = keep.take(len(x))
    with c.scratch.scope():
        _norm(after, own, c.scratch.take(*own.shape, dtype=x.dtype) if out is None else out, inverse)
    if out is not None:
        also(lambda: out.mul_(factor).add_(residual) if factor != 1.0 else out.add_(residual))
    return own, inverse, low


def forward(c: Context, x: Tensor, out: Tensor | None, keep: Workspace, *, saving: bool = True) -> Saved:
    """The layer on x (T, H) into ``out``. What :func:`backward` needs is taken from ``keep``; where nobody reads the
    output (None: the layer is computed again), the last product is left out."""
    shape, groups, tokens = c.shape, c.projections, len(x)
    outs, q, k, v, inverse, low = _attention_inputs(c, x, keep)
    attended = keep.take(tokens, shape.heads, v.shape[-1], dtype=x.dtype)
    lse = keep.take(tokens, shape.heads)
    c.attention.forward(shape, q, k, v, attended, lse)
    y = keep.take(*x.shape, dtype=x.dtype)
    flat = attended.flatten(1)
    own_o, after, low_o = _branch(c, flat, groups.out, shape.after_attention, x, y, keep, 4, saving)
    if after is not None:
        inverse["after_attention"] = after
    inverse["mlp"] = keep.take(tokens)
    inner = _outputs(groups.gate_up, tokens, x.dtype, keep)
    with c.scratch.scope():
        normed = c.scratch.take(*x.shape, dtype=x.dtype)
        _norm(shape.mlp_norm, y, normed, inverse["mlp"])
        low_gu = _project(c, normed, groups.gate_up, inner, keep, 8)
        gate, up = _halves(inner)
        product = c.scratch.take(*gate.shape, dtype=x.dtype)
        gated(gate, up, product, shape.activation)
        own_d, after, low_d = _branch(c, product, groups.down, shape.after_mlp, y, out, keep, 12, saving)
    if after is not None:
        inverse["after_mlp"] = after
    raw_q, raw_k, _ = _split_heads(shape, outs)
    lows = {"qkv": low, "out": low_o, "gate_up": low_gu, "down": low_d}
    return Saved(x, q, k, v, raw_q, raw_k, attended, lse, y, gate, up, (own_o, own_d), inverse, lows)


def _branch_backward(
    c: Context, grad: Tensor, x: Tensor, group: list[Projection], after: Norm | None, own: Tensor | None,
    inverse: Tensor | None, low: list[Tensor | None], grad_x: Tensor, first: int,
) -> list[Tensor]:  # fmt: skip
    """Backward of :func:`_branch` without its residual. ``grad`` is left as it is."""
    factor = c.shape.residual
    if after is not None:
        assert own is not None and inverse is not None
        inner = c.scratch.take(*grad.shape, dtype=grad.dtype)
        _norm_backward(after, grad, own, inverse, inner, None)
        inner = inner.mul_(factor) if factor != 1.0 else inner
    elif factor != 1.0:
        inner = c.scratch.take(*grad.shape, dtype=grad.dtype)
        torch.mul(grad, factor, out=inner)
    else:
        inner = grad
    return _project_backward(c, [inner], x, group, low, [own], grad_x, first)


def backward(c: Context, s: Saved, grad_out: Tensor, grad_x: Tensor | None) -> list[Tensor]:
    """d x into ``grad_x`` (T, H; None: not needed); returns adapter gradients in the order of ``Projections.all()``."""
    shape, groups, take, dtype = c.shape, c.projections, c.scratch.take, s.x.dtype
    tokens, hidden = s.x.shape
    with c.scratch.scope():
        grad_y = take(tokens, hidden, dtype=dtype)
        with c.scratch.scope():
            product, grad_product = take(*s.gate.shape, dtype=dtype), take(*s.gate.shape, dtype=dtype)
            gated(s.gate, s.up, product, shape.activation)
            of_down = _branch_backward(
                c, grad_out, product, groups.down, shape.after_mlp, s.branches[1], s.inverse.get("after_mlp"),
                s.low["down"], grad_product, 12,
            )  # fmt: skip
            inner = _outputs(groups.gate_up, tokens, dtype, c.scratch)
            grad_gate, grad_up = _halves(inner)
            gated_backward(grad_product, s.gate, s.up, grad_gate, grad_up, shape.activation)
            normed, grad_normed = take(tokens, hidden, dtype=dtype), take(tokens, hidden, dtype=dtype)
            _norm(shape.mlp_norm, s.y, normed, s.inverse["mlp"])
            outs = [s.gate, s.up] if len(inner) == 2 else [_joined(s.gate, 2 * s.gate.shape[1])]
            of_gate_up = _project_backward(c, inner, normed, groups.gate_up, s.low["gate_up"], outs, grad_normed, 8)
            _norm_backward(shape.mlp_norm, grad_normed, s.y, s.inverse["mlp"], grad_y, grad_out)
        grad_attended = take(*s.attended.shape, dtype=dtype)
        of_out = _branch_backward(
            c, grad_y, s.attended.flatten(1), groups.out, shape.after_attention, s.branches[0],
            s.inverse.get("after_attention"), s.low["out"], grad_attended.flatten(1), 4,
        )  # fmt: skip
        of_qkv = _attention_backward(c, s, grad_attended, grad_y, grad_x)
    return [*of_qkv, *of_out, *of_gate_up, *of_down]


def _joined(first: Tensor, columns: int) -> Tensor:
    """The one tensor, ``columns`` wide, of which ``first`` is the left part."""
    return first.as_strided((first.shape[0], columns), first.stride(), first.storage_offset())


def _attention_backward(
    c: Context, s: Saved, grad_attended: Tensor, grad_y: Tensor, grad_x: Tensor | None
) -> list[Tensor]:
    """From attention's output back to the layer's input; ``grad_y`` is the residual's share."""
    shape, dtype = c.shape, s.x.dtype
    grads = _outputs(c.projections.qkv, len(s.x), dtype, c.scratch)
    into_q, into_k, into_v = _split_heads(shape, grads)
    head_norms = [norm for norm in (shape.query_norm, shape.key_norm) if norm is not None]
    grad_q, grad_k = into_q, into_k
    if head_norms:
        grad_q, grad_k = (c.scratch.take(*part.shape, dtype=dtype) for part in (into_q, into_k))
    c.attention.backward(shape, grad_attended, s, grad_q, grad_k, into_v)
    if shape.rotary:
        rope_(grad_q, c.cos, c.sin, inverse=True)
        rope_(grad_k, c.cos, c.sin, inverse=True)
    if head_norms:
        heads = (("query", grad_q, s.raw_q, into_q), ("key", grad_k, s.raw_k, into_k))
        for norm, (name, grad, raw, into) in zip(head_norms, heads, strict=True):
            flat = (-1, shape.head_dim)
            _norm_backward(norm, grad.view(flat), raw.reshape(flat), s.inverse[name], into.view(flat), None)
    normed = c.scratch.take(*s.x.shape, dtype=dtype)
    grad_normed = None if grad_x is None else c.scratch.take(*s.x.shape, dtype=dtype)
    _norm(shape.attention_norm, s.x, normed, s.inverse["attention"])
    outs = _raw_outputs(c, s)
    found = _project_backward(c, grads, normed, c.projections.qkv, s.low["qkv"], outs, grad_normed, 0)
    if grad_x is not None and grad_normed is not None:
        _norm_backward(shape.attention_norm, grad_normed, s.x, s.inverse["attention"], grad_x, grad_y)
    return found


def _raw_outputs(c: Context, s: Saved) -> list[Tensor | None]:
    """The outputs of q, k, v before rotation and norm, for DoRA's magnitudes; None where nobody reads them. What was
    rotated in place is turned back in place, so attention's own backward pass comes first."""
    group = c.projections.qkv
    if all(p.gain is None for p in group):
        return [None] * len(group)
    if c.shape.rotary and c.shape.query_norm is None:
        rope_(s.raw_q, c.cos, c.sin, inverse=True)
        rope_(s.raw_k, c.cos, c.sin, inverse=True)
    if len(group) == 1:
        return [_joined(s.raw_q.flatten(1), group[0].shape[0])]
    return [part.flatten(1) for part in (s.raw_q, s.raw_k, s.v)]
