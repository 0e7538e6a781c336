"""Frozen weights kept in 16 bits while activations are wider: a linear layer and an embedding.

A bf16 checkpoint that computes in fp32 needs no fp32 copy: the product widens the weight piece by piece on its way
through the cache (``linear.multiply``), the embedding widens the rows it looks up. Both give what the fp32 copy would,
in half the memory. :class:`FrozenProduct` is the product's autograd function, for these and for quantized weights.

Weights get no gradient. Without the C++ kernels and off the CPU the layer widens its whole weight for each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunegate.kernels import native
from tunegate.kernels.linear import Product, QuantizedWeight, Term, multiply


class FrozenProduct(torch.autograd.Function):
    """``x W^T + bias`` for a frozen W (out, in) of any kind the kernels read; backward gives x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        flat = x.reshape(-1, weight.shape[1]).contiguous()
        out = x.new_empty(flat.shape[0], weight.shape[0])
        multiply(Product(out, [Term(flat, weight)], bias=bias))
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.weight.shape
        flat = grads[0].reshape(-1, rows).contiguous()
        out = flat.new_empty(flat.shape[0], columns)
        multiply(Product(out, [Term(flat, ctx.weight, w_is_kn=True)]))
        return out.view(*grads[0].shape[:-1], columns), None, None


class StoredLinear(nn.Module):
    """A frozen linear layer that keeps its weight (out, in) as stored; (..., in) to (..., out) in the input's dtype."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        plain = not torch.is_autocast_enabled(x.device.type) and weight.dtype in native.KERNEL_DTYPES
        if plain and native.library_for(x) is not None and weight.stride(-1) == 1:
            out: Tensor = FrozenProduct.apply(x, weight, bias)
            return out
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        kept = str(self.weight.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"


class StoredEmbedding(nn.Module):
    """A frozen embedding that keeps its weight (rows, width) as stored and returns rows in ``dtype``."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.dtype, self.padding_idx = weight, dtype, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight.detach()).to(self.dtype)

    def extra_repr(self) -> str:
        kept = str(self.weight.dtype).removeprefix("torch.")
        return f"{self.num_embeddings}, {self.embedding_dim}, {kept} read as {str(self.dtype).removeprefix('torch.')}"
