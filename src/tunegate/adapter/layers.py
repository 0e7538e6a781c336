"""LoRA and DoRA as wrappers around the frozen layer they adapt.

LoRA (Hu et al. 2021, arXiv 2106.09685): ``y = base(x) + s * (drop(x) A^T) B^T`` with A: (r, in), B: (out, r) and
B = 0 at the start, so step 0 gives the base's output bit for bit.

DoRA (Liu et al. 2024, arXiv 2402.09353): a magnitude m: (out,) per output row on top of that,
``y = t + (m/n - 1) * (t - bias)`` with ``t = base(x) + s * (drop(x) A^T) B^T``, which is
``base + (m/n - 1)(base - bias) + (m/n) s B A x``. The row norm n = ||W + s B A|| is a constant for autograd (section
4.3 of the paper) and is computed without forming W + s B A:
``n^2 = ||W||^2 + 2 s diag(W A^T B^T) + s^2 diag(B (A A^T) B^T)``. m starts as n, from the same formula, so m/n is
exactly 1 at step 0.

Choices. The bias is not scaled (as in PEFT). Dropout acts on the LoRA branch alone; PEFT's DoRA recomputes the base
product on the dropped input, so the two are equal at dropout 0 only. A, B and m are fp32 masters; they are cast to
the input's dtype for the product, and gradients reach the masters through the cast.

What a base layer must offer: a call that returns a new tensor, ``in_features`` and ``out_features`` (or
transformers' ``Conv1D``), an optional ``bias``, and its weight as a ``weight`` of shape (out, in) or, for quantized
layers, a ``dequantize()`` that returns one.

It does not hold more than one adapter per layer, merge in place, or share work between neighbouring layers.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunegate.kernels import native
from tunegate.kernels.linear import Product, QuantizedWeight, Term, multiply

_CHUNK_ELEMENTS = 1 << 22  # rows of a 16-bit weight are widened to fp32 in pieces of at most 16 MiB


def is_conv1d(layer: nn.Module) -> bool:
    """Whether ``layer`` is transformers' Conv1D, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that can carry an adapter, or None if it cannot."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_conv1d(layer):
        return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not all(isinstance(size, int) for size in sizes):
        return None
    weight = getattr(layer, "weight", None)
    if callable(getattr(layer, "dequantize", None)) or (isinstance(weight, Tensor) and weight.shape == sizes[::-1]):
        return sizes  # type: ignore[return-value]
    return None


def base_weight(layer: nn.Module) -> Tensor:
    """The frozen weight as (out, in), in the layer's dtype: a view where the layer stores it plainly."""
    dequantize: Any = getattr(layer, "dequantize", None)
    if callable(dequantize):
        return dequantize()
    weight = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if is_conv1d(layer) else weight


def _device(layer: nn.Module) -> torch.device:
    held = next(chain(layer.parameters(), layer.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def _new_pair(
    base: nn.Module, rank: int, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter, int, int]:
    """(A, B, in, out): A by PEFT's kaiming_uniform(a=sqrt(5)), drawn on the CPU for one result everywhere."""
    sizes = features(base)
    if sizes is None:
        raise TypeError(f"{type(base).__name__} cannot carry an adapter: see the base layer's contract")
    a = nn.init.kaiming_uniform_(torch.empty(rank, sizes[0]), a=math.sqrt(5), generator=generator)
    b = torch.zeros(sizes[1], rank)
    device = _device(base)
    return nn.Parameter(a.to(device)), nn.Parameter(b.to(device)), *sizes


def _add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``out + scale * (x A^T) B^T``. Autograd keeps x (by reference), x A^T and the cast factors, nothing of
    ``out``'s size."""
    down = F.linear(x, a.to(x.dtype))  # (..., r)
    up = b.to(down.dtype)
    wide = out.reshape(-1, out.shape[-1])
    return torch.addmm(wide, down.reshape(-1, down.shape[-1]), up.t(), alpha=scale).view(out.shape)


def drop_out(x: Tensor, rate: float) -> Tensor:
    """Dropout, ``rate`` in steps of 1/65536 on the CPU, from torch's global generator.

    torch draws one CPU number per element; four 16-bit draws share a 64-bit one here, which is several times faster.
    """
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    dropped = round(rate * 65536)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    drop = draws.view(torch.int16)[: x.numel()].view(x.shape) < dropped - 32768
    return x.masked_fill(drop, 0.0) * (65536 / (65536 - dropped))


class Wrapper(nn.Module):
    """A module in the place of the linear layer ``base``."""

    base: nn.Module

    @property
    def weight(self) -> Tensor:
        """The base's own weight, for model code that asks a layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)


class LoRALinear(Wrapper):
    """``base(x) + scale * B A drop(x)``; shapes (..., in) -> (..., out), in the base's dtype.

    ``lora_A`` (rank, in) and ``lora_B`` (out, rank) are fp32. ``enabled = False`` gives the plain base.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B, self.in_features, self.out_features = _new_pair(base, rank, generator)
        self.scale = float(scale)
        self.dropout = float(dropout)
        self.enabled = True

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = drop_out(x, self.dropout) if self.dropout and self.training else x
        return _add_low_rank(out, dropped, self.lora_A, self.lora_B, self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scale * B A``, (out, in) fp32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + scale * B A``, (out, in) fp32. The caller adds the bias unchanged."""
        return base_weight(self.base).float() + self.delta_weight()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class DoRALinear(Wrapper):
    """LoRA with a learned magnitude per output row; shapes (..., in) -> (..., out), in the base's dtype.

    ``lora_A`` (rank, in), ``lora_B`` (out, rank) and ``lora_magnitude_vector`` (out,) are fp32. The squared norms of
    W's rows are computed once, here: the base must not change afterwards. ``enabled = False`` gives the plain base.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B, self.in_features, self.out_features = _new_pair(base, rank, generator)
        self.scale = float(scale)
        self.dropout = float(dropout)
        self.enabled = True
        self.squared_norm: Tensor
        self.register_buffer("squared_norm", squared_norm(base), persistent=False)
        self._kept_norm: tuple[tuple[int, ...], Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(self.row_norm())

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "lora_magnitude_vector": self.lora_magnitude_vector,
        }

    def train(self, mode: bool = True) -> DoRALinear:
        self._kept_norm = None
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = drop_out(x, self.dropout) if self.dropout and self.training else x
        out = _add_low_rank(out, dropped, self.lora_A, self.lora_B, self.scale)
        # m/n - 1 is formed in fp32: in 16 bits m/n itself would round to 1 for the small changes training makes.
        gain = (self.lora_magnitude_vector / self.norm() - 1).to(out.dtype)  # (out,)
        bias = self.bias
        return torch.addcmul(out, out if bias is None else out - bias, gain)

    def norm(self) -> Tensor:
        """The row norm, kept between calls only where A and B cannot change: evaluation without gradients.

        Decoding calls the layer once per token, and W A^T costs as much as ``rank`` tokens. The kept value is tied
        to the factors' storage and version, and every training forward or mode switch drops it.
        """
        if self.training or torch.is_grad_enabled() or self.lora_A.is_inference():
            self._kept_norm = None
            return self.row_norm()
        factors = (self.lora_A, self.lora_B)
        key = tuple(part for f in factors for part in (f.data_ptr(), f._version))
        if self._kept_norm is None or self._kept_norm[0] != key:
            self._kept_norm = key, self.row_norm()
        return self._kept_norm[1]

    def row_norm(self) -> Tensor:
        """``||W + scale * B A||`` per output row, (out,) fp32, without forming the sum."""
        return row_norm(self.base, self.squared_norm, self.lora_A, self.lora_B, self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``merged_weight() - W``, (out, in) fp32."""
        return self.merged_weight() - base_weight(self.base).float()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``(m/n) (W + scale * B A)``, (out, in) fp32. The caller adds the bias unchanged."""
        merged = base_weight(self.base).float() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        return merged * (self.lora_magnitude_vector / self.row_norm()).unsqueeze(1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


AdapterLayer = LoRALinear | DoRALinear


def squared_norm(base: nn.Module) -> Tensor:
    """``||W||^2`` per output row of ``base``, (out,) fp32."""
    return torch.linalg.vector_norm(base_weight(base), dim=1, dtype=torch.float32).square()


@torch.no_grad()
def row_norm(base: nn.Module, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``||W + scale * B A||`` per output row of ``base``, (out,) fp32; ``squared`` are the squared norms of W's rows.

    Where the update cancels a row of W, the difference is lost in rounding and may come out negative: n^2 is kept
    above one fp32 rounding unit of ||W||^2, and above the smallest normal number for a row of zeros.
    """
    with torch.autocast(a.device.type, enabled=False):  # the norm is fp32 even under autocast
        a, b = a.float(), b.float()
        added = (_cross(base, a, b, scale) * b).sum(1)
        limits = torch.finfo(torch.float32)
        floor = (squared * limits.eps).clamp_min(limits.tiny)
        return torch.maximum(squared + scale * added, floor).sqrt()


def _cross(layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``2 W A^T + scale * B A A^T`` in fp32, (out, r).

    The kernels read W as it is stored; else 16 bits are widened some rows at a time. All products by the kernels: one
    of torch's between theirs would leave its threads spinning on the kernels' cores.
    """
    quantized = getattr(layer, "quantized", None)
    stored = quantized if isinstance(quantized, QuantizedWeight) else base_weight(layer)
    parts = (a, b, stored.codes if isinstance(stored, QuantizedWeight) else stored)
    if all(part.device.type == "cpu" for part in parts) and native.library_for(a) is not None:
        readable = isinstance(stored, QuantizedWeight) or (
            stored.dtype in native.KERNEL_DTYPES and stored.stride(-1) == 1
        )
        if readable:
            a, rank = a.contiguous(), len(a)
            out, gram = torch.empty(rank, len(b)), torch.empty(rank, rank)
            multiply(Product(out, [Term(a, stored)], alpha=2.0), Product(gram, [Term(a, a)]))
            multiply(Product(out, [Term(gram, b.contiguous())], alpha=scale, add=out))
            return out.t()
    weight = base_weight(layer)
    rows = len(weight) if weight.dtype == torch.float32 else max(1, _CHUNK_ELEMENTS // weight.shape[1])
    times = torch.cat([part.float() @ a.t() for part in weight.split(rows)])
    return 2 * times + scale * (b @ (a @ a.t()))
