"""Backward of a gain per output column, DoRA's m/n (Liu et al. 2024, arXiv:2402.09353), in one pass.

With ``y = gain * t + bias`` and gradient dy: ``dt = gain * dy``, and the gain's magnitude needs
``sum over rows of dy * (y - bias)``. Both come from reading dy and y once. The forward pass needs no kernel: there the
gain is ``linear.Product.column_scale``.

It does not divide by the magnitude; the caller does, on (columns,) values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.elementwise import check_rows, rows

CHUNK = 64  # rows summed at once, whatever the threads


def partial_floats(count: int, columns: int) -> int:
    """fp32 elements of workspace for ``count`` rows."""
    return -(-count // CHUNK) * columns


def gain_backward(
    grad: Tensor, out: Tensor, bias: Tensor | None, gain: Tensor, scaled: Tensor, *, factor: float = 1.0,
    workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``scaled = factor * grad * gain``; returns ``sum(factor * grad * (out - bias), rows)``, (columns,) fp32.

    grad, out, scaled (T, columns) of one dtype, fp32 or bf16, any row stride; scaled may be grad. bias and gain
    (columns,). ``workspace`` holds at least :func:`partial_floats` fp32.
    """
    check_rows("grad", grad, grad)
    check_rows("out", out, grad)
    check_rows("scaled", scaled, grad, written=True)
    gain = gain.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    lib = native.library_for(grad)
    if lib is None:
        wide = grad.float() * factor
        sums = (wide * (out.float() if bias is None else out.float() - bias)).sum(0)
        scaled.copy_(wide * gain)
        return sums
    needed = partial_floats(*grad.shape)
    partial = torch.empty(needed) if workspace is None else workspace
    if partial.numel() < needed or partial.dtype != torch.float32 or not partial.is_contiguous():
        raise ValueError(f"workspace must be {needed} contiguous fp32, got {partial.dtype} {tuple(partial.shape)}")
    sums = torch.empty(grad.shape[1])
    vectors = (native.address(bias), gain.data_ptr(), sums.data_ptr(), partial.data_ptr())
    lib.gain_backward(
        tuple(grad.shape), grad.dtype == torch.bfloat16, rows(grad), rows(out), rows(scaled), *vectors, factor
    )
    return sums
