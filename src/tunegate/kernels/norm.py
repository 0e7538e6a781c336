"""RMS norm over the last dimension, forward and backward for a frozen weight.

out = x * s * (weight + offset) with s = 1 / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467); Gemma
stores its weight as a difference from one, offset 1. Everything inside is fp32 and the result is rounded once.
transformers' LlamaRMSNorm rounds x * s to the storage type before the weight too, so in bf16 the two differ by a
rounding. Per-head norms of queries and keys are the same call on a (tokens * heads, head_dim) view.

It gives no gradient for the weight: the base is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.elementwise import check_rows, check_vector, flattened, rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, inverse_rms: Tensor, *, offset: float = 0.0) -> None:
    """Write the norm of ``x`` to ``out`` and s to ``inverse_rms``.

    x, out: (T, H) fp32 or bf16, any row stride; ``out`` may be ``x``. weight: (H,) fp32 or bf16.
    inverse_rms: (T,) fp32, contiguous, for the backward.
    """
    check_rows("x", x, x)
    check_rows("out", out, x, written=True)
    _check_weight(x, weight, inverse_rms)
    lib = native.library_for(x, weight)
    if lib is None:
        _norm_twin(x, weight, eps, out, inverse_rms, offset)
        return
    lib.rms_norm(
        tuple(x.shape),
        x.dtype == torch.bfloat16,
        rows(x),
        rows(out),
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        inverse_rms.data_ptr(),
        eps,
        offset,
    )


def rms_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    out: Tensor,
    *,
    offset: float = 0.0,
    add: Tensor | None = None,
) -> None:
    """Write ``add`` (or 0) + the gradient of x to ``out``.

    With g = grad_out * (weight + offset) and n = x s it is s (g - n mean(g n)).

    grad_out, x, out, add: (T, H) of one dtype, any row stride; ``out`` may be any of the others.
    inverse_rms: (T,) fp32 as :func:`rms_norm` wrote it.
    """
    check_rows("x", x, x)
    check_rows("grad_out", grad_out, x)
    check_rows("out", out, x, written=True)
    if add is not None:
        check_rows("add", add, x)
    _check_weight(x, weight, inverse_rms)
    lib = native.library_for(x, weight)
    if lib is None:
        _backward_twin(grad_out, x, weight, inverse_rms, out, offset, add)
        return
    lib.rms_norm_backward(
        tuple(x.shape),
        x.dtype == torch.bfloat16,
        rows(grad_out),
        rows(x),
        rows(out),
        rows(add),
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        inverse_rms.data_ptr(),
        offset,
    )


def _check_weight(x: Tensor, weight: Tensor, inverse_rms: Tensor) -> None:
    check_vector("weight", weight, x.shape[1])
    check_vector("inverse_rms", inverse_rms, x.shape[0])
    if inverse_rms.dtype != torch.float32:
        raise ValueError(f"inverse_rms must be fp32, got {inverse_rms.dtype}")


def _norm_twin(x: Tensor, weight: Tensor, eps: float, out: Tensor, inverse_rms: Tensor, offset: float) -> None:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(1) + eps)
    inverse_rms.copy_(inverse)
    out.copy_(wide * inverse[:, None] * (weight.float() + offset))


def _backward_twin(
    grad_out: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, out: Tensor, offset: float, add: Tensor | None
) -> None:
    normed = x.float() * inverse_rms[:, None]
    grad = grad_out.float() * (weight.float() + offset)
    result = (grad - normed * (grad * normed).mean(1, keepdim=True)) * inverse_rms[:, None]
    out.copy_(result if add is None else add.float() + result)


@torch.library.custom_op("tunegate::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Norm of x (..., H) as a new contiguous tensor; differentiable in x only."""
    flat = flattened(x)
    out = torch.empty_like(flat)
    rms_norm(flat, weight, eps, out, x.new_empty(len(flat), dtype=torch.float32), offset=offset)
    return out.view(x.shape)


@torch.library.custom_op("tunegate::rms_norm_backward", mutates_args=())
def _backward_op(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    flat = flattened(x)
    out, inverse_rms = torch.empty_like(flat), x.new_empty(len(flat), dtype=torch.float32)
    rms_norm(flat, weight, eps, out, inverse_rms, offset=offset)  # recomputed: cheaper than keeping it for the graph
    rms_norm_backward(flattened(grad_out), flat, weight, inverse_rms, out, offset=offset)
    return out.view(x.shape)


@rms_norm_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    x, weight, ctx.eps, ctx.offset = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError("tunegate::rms_norm has no gradient for its weight; freeze it with requires_grad_(False)")
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
    x, weight = ctx.saved_tensors
    return _backward_op(grad_out, x, weight, ctx.eps, ctx.offset), None, None, None


rms_norm_op.register_autograd(_gradient, setup_context=_keep)
