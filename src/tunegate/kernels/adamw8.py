"""AdamW's moments in 8 bits: blockwise dynamic quantization of the state (Dettmers et al. 2022, arXiv:2110.02861).

Blocks of 256 elements along the flat index share an fp32 scale, their largest magnitude (absmax). The running mean of
the gradient is stored by the signed dynamic map, that of its square by the unsigned one; each value over its block's
scale becomes the nearest code, the one of smaller magnitude in a tie. A step widens a block's codes to fp32, updates
moments and parameters by AdamW's formula, and rounds the moments again: the update itself never sees rounded new
moments. Maps, block size and the smallest tensor are bitsandbytes', so a state means the same there.

A moment below 2.8e-7 (1.6e-7 for squares) of its block's largest becomes 0, as in the paper. Not here: tensors of fewer
than 4,096 elements, which stay fp32 (``adamw``), and states that leave the device's memory (bitsandbytes' paged ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tunegate.kernels import native
from tunegate.kernels.nf4 import dynamic_map

BLOCK = 256  # elements that share a scale
LEAST = 4096  # smaller tensors stay fp32: their memory is nothing, and there are norms and biases among them
CODES = ("state1", "state2")
_ZERO = 127  # the signed map's code of 0
_LEAST_SCALE = 1e-38  # below it 1 / scale may overflow; such a block is zeros
_LOWEST, _ONE = 104 << 7, 127 << 7  # the upper 16 bits of 2^-23, which is below every bound, and of 1


def moment_bytes(count: int, *, eight_bit: bool) -> int:
    """Bytes of the two moments of a tensor of ``count`` fp32 elements."""
    return 2 * count + 8 * -(-count // BLOCK) if eight_bit and count >= LEAST else 8 * count


@dataclass(frozen=True)
class Codebook:
    """A dynamic map, for as long as the process lives, so that the kernel may hold its addresses.

    ``values`` (256,) fp32 by code. ``bounds`` fp32: midpoints between neighbouring magnitudes, ascending, then
    infinity; a magnitude's rank is the number of bounds that it lies above. ``starts`` (2945,) uint8: for the upper 16
    bits of a magnitude from 2^-23 to 1 the rank of the smallest such magnitude. No two bounds share those bits, so
    one comparison finds the rank.
    """

    values: Tensor
    bounds: Tensor
    starts: Tensor

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self.values.data_ptr(), self.bounds.data_ptr(), self.starts.data_ptr()


@cache
def codebook(signed: bool) -> Codebook:
    values = dynamic_map(signed)
    magnitudes = values[_ZERO:] if signed else values
    bounds = (magnitudes[1:] + magnitudes[:-1]) / 2
    smallest = (torch.arange(_LOWEST, _ONE + 1, dtype=torch.int32) << 16).view(torch.float32)
    starts = torch.bucketize(smallest, bounds).to(torch.uint8)
    return Codebook(values, F.pad(bounds, (0, 1), value=math.inf), starts)


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes (n,) uint8, absmax (ceil(n / 256),) fp32) of a flat fp32 tensor."""
    n = values.numel()
    blocks = F.pad(values, (0, -n % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * torch.where(absmax > _LEAST_SCALE, 1.0 / absmax, 0.0)[:, None]
    ranks = torch.bucketize(scaled.abs(), codebook(signed).bounds[:-1].to(values.device))
    codes = torch.where(scaled < 0, _ZERO - ranks.clamp(max=_ZERO), _ZERO + ranks) if signed else ranks
    return codes.view(-1)[:n].to(torch.uint8), absmax


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """The flat fp32 tensor that :func:`quantize` made codes of."""
    n = codes.numel()
    values = codebook(signed).values.to(codes.device)[codes.view(-1).long()]
    return (F.pad(values, (0, -n % BLOCK)).view(-1, BLOCK) * absmax[:, None]).view(-1)[:n]


@dataclass(frozen=True)
class Packed:
    """A parameter, its gradient and its state; ``group`` is an index into the hyperparameters."""

    parameter: Tensor
    gradient: Tensor
    codes: tuple[Tensor, Tensor]
    absmax: tuple[Tensor, Tensor]
    step: Tensor
    group: int


def ready(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: int) -> Packed:
    """``state``'s tensors, made where it is empty; ValueError if they are of another parameter."""
    count = parameter.numel()
    blocks = -(-count // BLOCK)
    if not state:
        state["step"] = torch.tensor(0.0)
        for number in "12":
            state[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"absmax{number}"] = torch.zeros(blocks, device=parameter.device)
    wanted = {"step": (1, torch.float32)}
    wanted |= dict.fromkeys(CODES, (count, torch.uint8))
    wanted |= dict.fromkeys(("absmax1", "absmax2"), (blocks, torch.float32))
    for name, (elements, dtype) in wanted.items():
        tensor = state.get(name)
        if tensor is None or tensor.numel() != elements or tensor.dtype is not dtype or not tensor.is_contiguous():
            got = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(
                f"the 8-bit optimizer state's {name} must be a contiguous {dtype} tensor of {elements} elements, "
                f"got {got}; was it loaded for other parameters, or from 32-bit states?"
            )
    codes, absmax = (state["state1"], state["state2"]), (state["absmax1"], state["absmax2"])
    return Packed(parameter, gradient, codes, absmax, state["step"], group)


def step(work: list[Packed], groups: list[tuple[float, ...]]) -> None:
    """One update of ``work`` in place. ``groups``: lr, beta1, beta2, eps and weight decay of each."""
    if not work:
        return
    lib = native.library()
    if lib is None or not all(one.parameter.is_cpu for one in work):
        for one in work:
            _step_twin(one, groups[one.group])
        return
    rows = []
    for one in work:
        tensors = (one.parameter, one.gradient, *one.codes, *one.absmax, one.step)
        rows.append((*[t.data_ptr() for t in tensors], one.parameter.numel(), one.group))
    lib.adamw8(rows, groups, codebook(True).addresses, codebook(False).addresses)
    torch.autograd.graph.increment_version([one.parameter for one in work])  # as an in-place operation does


def _step_twin(one: Packed, group: tuple[float, ...]) -> None:
    lr, beta1, beta2, eps, decay = group
    one.step.add_(1)
    count = float(one.step)
    parameter, gradient = one.parameter.view(-1), one.gradient.view(-1)
    first = dequantize(one.codes[0], one.absmax[0], signed=True)
    second = dequantize(one.codes[1], one.absmax[1], signed=False)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = second.sqrt().div_(math.sqrt(1 - beta2**count)).add_(eps)
    parameter.mul_(1 - lr * decay).addcdiv_(first, denominator, value=-lr / (1 - beta1**count))
    for moment, codes, absmax, signed in zip((first, second), one.codes, one.absmax, (True, False), strict=True):
        made, scales = quantize(moment, signed=signed)
        codes.view(-1).copy_(made)
        absmax.copy_(scales)
