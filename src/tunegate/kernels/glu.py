"""Gated activations: act(gate) * up (Shazeer 2020, arXiv:2002.05202), forward and backward.

The activation and its slope come from one exponential in fp32, and each result is rounded once. "gelu" is the exact
form through the normal distribution, "gelu_tanh" its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415).

It does not hold the projections, and ungated activations are not here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.elementwise import check_rows, flattened, rows

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def gated(gate: Tensor, up: Tensor, out: Tensor, activation: str) -> None:
    """out = act(gate) * up; all (T, I) of one dtype, fp32 or bf16, any row stride. ``out`` may be an input."""
    number = _activation(activation)
    check_rows("gate", gate, gate)
    check_rows("up", up, gate)
    check_rows("out", out, gate, written=True)
    lib = native.library_for(gate)
    if lib is None:
        out.copy_(_value_and_slope(gate.float(), activation)[0] * up.float())
        return
    lib.gated(tuple(gate.shape), gate.dtype == torch.bfloat16, rows(gate), rows(up), rows(out), number)


def gated_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str
) -> None:
    """grad_gate = grad_out * up * act'(gate), grad_up = grad_out * act(gate); all (T, I) of one dtype.

    grad_gate and grad_up may each be any one of the three inputs, but not the same one.
    """
    number = _activation(activation)
    check_rows("gate", gate, gate)
    for name, tensor in (("grad_out", grad_out), ("up", up)):
        check_rows(name, tensor, gate)
    for name, tensor in (("grad_gate", grad_gate), ("grad_up", grad_up)):
        check_rows(name, tensor, gate, written=True)
    lib = native.library_for(gate)
    if lib is None:
        value, slope = _value_and_slope(gate.float(), activation)
        grad = grad_out.float()
        to_gate, to_up = grad * up.float() * slope, grad * value
        grad_gate.copy_(to_gate)
        grad_up.copy_(to_up)
        return
    lib.gated_backward(
        tuple(gate.shape),
        gate.dtype == torch.bfloat16,
        rows(grad_out),
        rows(gate),
        rows(up),
        rows(grad_gate),
        rows(grad_up),
        number,
    )


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS.index(name)


def _value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu":
        below = torch.special.ndtr(x)
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    factor = math.sqrt(8 / math.pi)  # twice the usual one: 0.5 (1 + tanh u) is sigmoid(2 u)
    kept = x.clamp(-20, 20)  # beyond, the cube could overflow and the sigmoid is 0 or 1
    s = torch.sigmoid(factor * (kept + 0.044715 * kept**3))
    return x * s, s + kept * s * (1 - s) * factor * (1 + 3 * 0.044715 * kept**2)


@torch.library.custom_op("tunegate::gated", mutates_args=())
def gated_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for (..., I), as a new contiguous tensor."""
    flat = flattened(gate)
    out = torch.empty_like(flat)
    gated(flat, flattened(up), out, activation)
    return out.view(gate.shape)


@torch.library.custom_op("tunegate::gated_backward", mutates_args=())
def _backward_op(grad_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    flat = flattened(gate)
    grad_gate, grad_up = torch.empty_like(flat), torch.empty_like(flat)
    gated_backward(flattened(grad_out), flat, flattened(up), grad_gate, grad_up, activation)
    return grad_gate.view(gate.shape), grad_up.view(gate.shape)


@gated_op.register_fake
def _(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward_op.register_fake
def _(_: Tensor, gate: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, up = ctx.saved_tensors
    return *_backward_op(grad_out, gate, up, ctx.activation), None


gated_op.register_autograd(_gradient, setup_context=_keep)
