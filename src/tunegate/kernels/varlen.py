"""Native varlen causal attention: forward, backward and decode on the C++ kernels, and one torch op around them.

Scores exist in tiles only (flash attention): the forward keeps each query's log-sum-exp, the backward recomputes
the probabilities from it. Query heads that share a key head are computed together, so keys and values are never
repeated; a shared prefix is read where it lies. Sums are cut by data, so any number of threads gives the same bytes.

Tensors are fp32 or bf16, read and written as they lie; softmax and sums are fp32. On AMX and AVX512-BF16 the products
of bf16 tensors run on the matrix units, probabilities rounded to bf16; elsewhere operands are widened in registers.
Head dims are multiples of 8 up to 256; :func:`supports` tells, and callers keep a twin for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tunegate.kernels import native

LARGEST_DIM = 256
UNBOUNDED = 2**30  # a window no row reaches


@dataclass(frozen=True)
class Options:
    """``scale`` on the scores; ``window`` keys a query sees, itself included (None: all); ``softcap`` c*tanh(s/c)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of a run: ``starts`` (rows + 1,) int64 on the CPU, where each begins, and the number of tokens.

    With ``prefix > 0`` row 0 has that length and every other row sees it. ``skipped`` (0 or ``prefix``): queries
    begin after that many tokens, keys always with the first.
    """

    starts: Tensor
    prefix: int = 0
    skipped: int = 0
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        starts = self.starts
        if starts.dtype != torch.int64 or starts.device.type != "cpu" or starts.dim() != 1 or len(starts) < 2:
            raise ValueError(f"starts: expected (rows + 1,) int64 on the CPU, got {_told(starts)}")
        ends = starts.tolist()
        if ends[0] != 0 or any(b <= a for a, b in pairwise(ends)):
            raise ValueError("starts: expected 0 and then growing numbers, the last the number of tokens")
        if self.prefix and self.prefix != ends[1]:
            raise ValueError(f"prefix is {self.prefix}, but row 0 has {ends[1]} tokens")
        if self.skipped not in (0, self.prefix):
            raise ValueError(f"skipped is {self.skipped}; expected 0 or the prefix's length {self.prefix}")
        object.__setattr__(self, "starts", starts.contiguous())
        object.__setattr__(self, "tokens", ends[-1])

    @property
    def queries(self) -> int:
        return self.tokens - self.skipped


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the native kernels take these: present, fp32 or bf16 throughout, dims multiples of 8 up to 256."""
    dims = (q.shape[-1], v.shape[-1])
    return (
        native.library_for(q, k, v) is not None
        and q.dtype == k.dtype == v.dtype
        and all(d % 8 == 0 and 0 < d <= LARGEST_DIM for d in dims)
    )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, options: Options, *, out: Tensor, lse: Tensor
) -> None:
    """Write attention of every query over its row into ``out`` and each query's log-sum-exp into ``lse``.

    q (T, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), out (T, H, Dv): any token and head strides, inner stride 1;
    lse (T, H) fp32 contiguous, natural logarithm of the sum of exp(score). T = Tk - rows.skipped.
    """
    _check_shapes(q, k, v, rows, {"out": (out, v.shape[-1])})
    _check_lse(lse, q)
    _library().attention_forward(
        _shape(q, k, v, rows, options),
        options.scale,
        options.softcap or 0.0,
        rows.starts.data_ptr(),
        len(rows.starts) - 1,
        *(_view(x) for x in (q, k, v, out)),
        lse.data_ptr(),
    )


@dataclass(frozen=True)
class Saved:
    """What the forward read and wrote: q, k, v, out and lse as :func:`attention_forward` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def workspace_floats(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> int:
    """How many fp32 numbers :func:`attention_backward` needs as its workspace."""
    shape = _shape(q, k, v, rows, Options(1.0))
    return int(_library().attention_workspace(shape, rows.starts.data_ptr(), len(rows.starts) - 1))


def attention_backward(
    grad_out: Tensor,
    saved: Saved,
    rows: Rows,
    options: Options,
    grads: tuple[Tensor, Tensor, Tensor],
    workspace: Tensor | None = None,
) -> None:
    """Write the gradients of q, k and v into ``grads``, strided like q, k and v may be.

    ``grad_out`` is (T, H, Dv), strided as well. ``workspace``: at least :func:`workspace_floats` fp32, else
    allocated here. For an fp32 call the sums of grad_q are kept in grad_q itself.
    """
    q, k, v = saved.q, saved.k, saved.v
    value_dim = v.shape[-1]
    _check_shapes(q, k, v, rows, {"out": (saved.out, value_dim), "grad_out": (grad_out, value_dim)})
    _check_lse(saved.lse, q)
    for name, grad, tensor in zip(("grad_q", "grad_k", "grad_v"), grads, (q, k, v), strict=True):
        if grad.shape != tensor.shape or grad.dtype != tensor.dtype or grad.stride(-1) != 1:
            raise ValueError(f"{name}: expected {_told(tensor)} with inner stride 1, got {_told(grad)}")
    needed = workspace_floats(q, k, v, rows)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32)
    elif workspace.dtype != torch.float32 or workspace.numel() < needed or not workspace.is_contiguous():
        raise ValueError(f"workspace: expected {needed} contiguous fp32, got {_told(workspace)}")
    _library().attention_backward(
        _shape(q, k, v, rows, options),
        options.scale,
        options.softcap or 0.0,
        rows.starts.data_ptr(),
        len(rows.starts) - 1,
        [_view(x) for x in (grad_out, q, k, v, saved.out, *grads)],
        saved.lse.data_ptr(),
        workspace.data_ptr(),
    )


@dataclass(frozen=True)
class Places:
    """Where rows keep their keys: ``table`` (rows, most pages) int64 names each row's pages in order, a page holds
    ``size`` keys, ``lengths`` (rows,) int64 counts each row's. Checked once, for all layers of a pass."""

    table: Tensor
    lengths: Tensor
    size: int
    pages: int = field(init=False)  # that exist at least

    def __post_init__(self) -> None:
        rows = len(self.lengths)
        for name, tensor, dims in (("lengths", self.lengths, 1), ("table", self.table, 2)):
            if len(tensor) != rows or tensor.dim() != dims or tensor.dtype != torch.int64 or not tensor.is_contiguous():
                raise ValueError(f"{name}: expected {rows} rows of contiguous int64, got {_told(tensor)}")
        room = self.table.shape[1] * self.size
        if rows and not 1 <= int(self.lengths.min()) <= int(self.lengths.max()) <= room:
            raise ValueError(f"lengths: expected 1 to {room}, got {int(self.lengths.min())}, {int(self.lengths.max())}")
        if rows and int(self.table.min()) < 0:
            raise ValueError(f"table: expected pages from 0 on, got {int(self.table.min())}")
        object.__setattr__(self, "pages", int(self.table.max()) + 1 if rows else 0)


def decode(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    places: Places,
    options: Options,
    *,
    out: Tensor,
    new: tuple[Tensor, Tensor] | None = None,
) -> None:
    """One query a row, (B, H, D), over a shared prefix and the row's own keys, into ``out`` (B, H, Dv).

    ``prefix``: (P, Hkv, D) and (P, Hkv, Dv), P may be 0. ``own``: keys and values in pages, (pages, Hkv, size, D or
    Dv), the inner two dimensions dense; ``places`` says where each row's are, the query's own key included. ``new``:
    (B, Hkv, D) and (B, Hkv, Dv), that key and its value, written to the row's last place first; None: they lie there.
    """
    rows, heads, dim = query.shape
    (prefix_key, prefix_value), (key, value) = prefix, own
    pages, kv_heads, size, value_dim = value.shape
    checks = [
        ("prefix key", prefix_key, (len(prefix_key), kv_heads, dim)),
        ("prefix value", prefix_value, (len(prefix_key), kv_heads, value_dim)),
        ("key", key, (pages, kv_heads, size, dim)),
        ("out", out, (rows, heads, value_dim)),
        ("query", query, (rows, heads, dim)),
    ]
    if new is not None:
        checks += [("new key", new[0], (rows, kv_heads, dim)), ("new value", new[1], (rows, kv_heads, value_dim))]
    for name, tensor, shape in checks:
        if tuple(tensor.shape) != shape or tensor.dtype != query.dtype or tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected {shape} {query.dtype}, inner stride 1, got {_told(tensor)}")
    if heads % kv_heads or key.stride(2) != dim or value.stride(2) != value_dim or value.dtype != query.dtype:
        raise ValueError(f"{heads} heads over keys {_told(key)}, values {_told(value)}: places must lie densely")
    if len(places.lengths) != rows or places.size != size or places.pages > pages:
        raise ValueError(f"places of {len(places.lengths)} rows on {places.pages} pages of {places.size}: {_told(key)}")
    half = query.dtype == torch.bfloat16
    window = min(options.window or UNBOUNDED, UNBOUNDED)
    views = [_view(x) for x in (query, out, prefix_key, prefix_value)]
    views += [(0, 0, 0)] * 2 if new is None else [_view(x) for x in new]
    _library().decode_attention(
        [heads, kv_heads, dim, value_dim, len(prefix_key), 0, window, half],
        options.scale,
        options.softcap or 0.0,
        places.lengths.data_ptr(),
        rows,
        views,
        _view(key),
        _view(value),
        (places.table.data_ptr(), places.table.shape[1], size),
    )


# --- the torch op ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("tunegate::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    prefix: int,
    skipped: int,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of :func:`attention_forward`; window -1 and softcap 0 mean none. Differentiable in q, k and v."""
    q, k, v = (_dense_inside(x) for x in (q, k, v))
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    attention_forward(q, k, v, Rows(starts, prefix, skipped), _options(scale, window, softcap), out=out, lse=lse)
    return out, lse


@varlen_attention.register_fake
def _varlen_attention_shapes(q: Tensor, _k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("tunegate::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad_out: Tensor,
    saved: list[Tensor],
    starts: Tensor,
    prefix: int,
    skipped: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``saved`` is q, k, v, out, lse."""
    q, k, v = (_dense_inside(x) for x in saved[:3])
    grads = (torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype), torch.empty_like(v))
    kept = Saved(q, k, v, saved[3], saved[4])
    rows = Rows(starts, prefix, skipped)
    attention_backward(_dense_inside(grad_out), kept, rows, _options(scale, window, softcap), grads)
    return grads


@varlen_attention_backward.register_fake
def _varlen_attention_backward_shapes(
    _grad_out: Tensor, saved: list[Tensor], *_others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in saved[:3])
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, starts, out, lse = ctx.saved_tensors
    grads = torch.ops.tunegate.varlen_attention_backward(grad_out, [q, k, v, out, lse], starts, *ctx.options)
    return (*grads, *(None,) * (1 + len(ctx.options)))


varlen_attention.register_autograd(_gradients, setup_context=_keep)


# --- checks ---------------------------------------------------------------------------------------------------------


def _options(scale: float, window: int, softcap: float) -> Options:
    return Options(scale, window if window > 0 else None, softcap or None)


def _dense_inside(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _library() -> Any:
    library = native.library()
    if library is None:
        raise RuntimeError(f"the C++ kernels are {native.describe()[1]}; tunegate.kernels.attention has a twin")
    return library


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _told(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} strides {x.stride()}"


def _shape(q: Tensor, k: Tensor, v: Tensor, rows: Rows, options: Options) -> list[int]:
    window = min(options.window or UNBOUNDED, UNBOUNDED)
    half = int(q.dtype == torch.bfloat16)
    return [q.shape[1], k.shape[1], q.shape[2], v.shape[2], rows.prefix, rows.skipped, window, half]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, rows: Rows, others: dict[str, tuple[Tensor, int]]) -> None:
    if not supports(q, k, v):
        raise ValueError(f"expected fp32 or bf16 on the CPU, dims multiples of 8 up to {LARGEST_DIM}, got {_told(q)}")
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} key heads: expected a multiple")
    for name, tensor, shape in (
        ("q", q, (rows.queries, heads, dim)),
        ("k", k, (rows.tokens, kv_heads, dim)),
        ("v", v, (rows.tokens, kv_heads, v.shape[-1])),
        *((name, x, (rows.queries, heads, last)) for name, (x, last) in others.items()),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != q.dtype or tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected {shape} {q.dtype} with inner stride 1, got {_told(tensor)}")


def _check_lse(lse: Tensor, q: Tensor) -> None:
    if lse.shape != q.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse: expected {tuple(q.shape[:2])} fp32 contiguous, got {_told(lse)}")
