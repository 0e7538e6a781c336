"""Rotary positions (Su et al. 2021, arXiv:2104.09864), in place.

transformers' "rotate_half" convention: of a head's first R dims, dim i pairs with dim i + R/2, and
out[:R/2] = x1 cos1 - x2 sin1, out[R/2:R] = x2 cos2 + x1 sin2. The two halves of cos and sin are used as given, which
also covers scaled and sectioned variants; R < D turns only the first dims (partial rotary). The backward is the
transposed map, ``inverse=True``; where cos^2 + sin^2 = 1 it undoes the forward too.

It does not compute cos and sin, and the interleaved convention (pairs of adjacent dims) is not here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.elementwise import check_rows, rows


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """Turn ``x`` (T, heads, D) fp32 or bf16 in place; any token and head stride, inner stride 1.

    cos, sin: (T, R) fp32 or bf16, R even and at most D, any row stride. fp32 inside, rounded once.
    """
    _check(x, cos, sin)
    lib = native.library_for(x, cos)
    if lib is None:
        _twin(x, cos, sin, inverse)
        return
    lib.rope(
        x.data_ptr(),
        (x.shape[0], x.shape[1]),
        (x.stride(0), x.stride(1)),
        cos.shape[1],
        rows(cos),
        rows(sin),
        x.dtype == torch.bfloat16,
        cos.dtype == torch.bfloat16,
        inverse,
    )


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 3 or (x.stride(2) != 1 and x.shape[2] > 1):
        raise ValueError(
            f"x must be (tokens, heads, head_dim) with inner stride 1, got {tuple(x.shape)}, strides {x.stride()}"
        )
    if cos.dim() != 2 or cos.shape[0] != x.shape[0] or cos.shape[1] % 2 or cos.shape[1] > x.shape[2]:
        raise ValueError(
            f"cos must be (tokens, R) = ({x.shape[0]}, even and at most {x.shape[2]}), got {tuple(cos.shape)}"
        )
    check_rows("cos", cos, cos)
    check_rows("sin", sin, cos)


def _twin(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    half = cos.shape[1] // 2
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos[:, None].float(), sin[:, None].float()
    s1, s2 = sin[..., :half], sin[..., half:]
    up, down = (s2, -s1) if inverse else (-s1, s2)
    first, second = x1 * cos[..., :half] + x2 * up, x2 * cos[..., half:] + x1 * down
    x[..., :half] = first.to(x.dtype)
    x[..., half : 2 * half] = second.to(x.dtype)


@torch.library.custom_op("tunegate::rope", mutates_args=())
def rope_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, D) turned, as a new contiguous tensor; differentiable in x only."""
    out = x.clone(memory_format=torch.contiguous_format)
    rope_(out, cos, sin)
    return out


@torch.library.custom_op("tunegate::rope_inverse", mutates_args=())
def _inverse_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    rope_(out, cos, sin, inverse=True)
    return out


@rope_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_inverse_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    _, cos, sin = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise ValueError("tunegate::rope has no gradient for cos and sin; detach them")
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    return _inverse_op(grad_out, *ctx.saved_tensors), None, None


rope_op.register_autograd(_gradient, setup_context=_keep)
