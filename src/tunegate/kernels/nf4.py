"""Quantized weights, bit for bit in bitsandbytes' formats, and the linear layer that computes from them.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): blocks along the flat index (64 elements by default) are divided by
their largest magnitude and each element becomes the nearest of 16 values, the lower one in a tie; two codes a byte, the
first in the high nibble. Double quantization stores the scales, less their mean, as 8-bit codes of a dynamic map in
blocks of 256: 4.127 bits a parameter instead of 4.5. A :class:`~tunegate.kernels.formats.Recipe` names the values (NF4,
FP4 or INT4), the block size and whether the scales are quantized; 8-bit codes and scales are made in ``int8``.

bitsandbytes' rules for 4 bits on CPUs that the format alone does not fix: a full block is multiplied by the fp32
reciprocal of its scale, a short last block is divided by it; the 8-bit code is the one nearest to the closest of 65536
points from -1 to 1, not to the value itself; a block of 256 equal scales gets code 0; FP4's second zero stands for what
is just above zero. The mean is ``torch.mean``'s, taken on one thread.

It does not train the weight or quantize activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunegate.kernels import gpu, int8, native
from tunegate.kernels.formats import INT8, NESTED_BLOCK, Recipe, table
from tunegate.kernels.linear import QuantizedWeight, dequantize_range
from tunegate.kernels.stored import FrozenProduct

_POINTS = 65536
_LEAST_ABSMAX = 1e-38
_PIECE = 1 << 20  # elements widened at once: a multiple of every block size
_MEAN_CHUNK = 32768  # torch sums longer tensors on several threads, with other roundings for each number of them


@cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 8-bit dynamic map (Dettmers 2015, arXiv 1511.04561; 2022, arXiv 2110.02861): (256,) fp32, ascending.

    For each decimal exponent e = -6..0, the midpoints of 2^(e+6) equal parts of [0.1, 1], times 10^e, with both
    signs; then 0 and 1. Unsigned: twice as many parts, no negative values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middle = (bounds[:-1] + bounds[1:]) / 2
        values += ((10 ** (i - 6)) * middle).tolist()
        values += (-(10 ** (i - 6)) * middle).tolist() if signed else []
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _nearest_code() -> Tensor:
    """For each of 65536 equidistant points from -1 to 1 the nearest code of the dynamic map: (65536,) uint8."""
    code = dynamic_map()
    points = (torch.arange(_POINTS, dtype=torch.float64) / (_POINTS - 1) * 2 - 1).float()
    return torch.searchsorted((code[1:] + code[:-1]) * 0.5, points).to(torch.uint8)


@torch.no_grad()
def quantize(weight: Tensor, recipe: Recipe = Recipe()) -> QuantizedWeight:  # noqa: B008 (frozen)
    """Codes and scales of a finite (n, k) matrix in fp32, bf16 or fp16; fp64 is rounded to fp32 first.

    Temporary memory: nothing beyond the result for fp32 and bf16 on the kernels' path; elsewhere, of 4 bits, some
    pieces of :data:`_PIECE` elements. Raises ValueError for NaN and infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a floating-point matrix is quantized, not {weight.dtype} {tuple(weight.shape)}")
    if weight.element_size() == 1:
        raise ValueError(f"{weight.dtype} values mean nothing without their scales; give the weight in 16 or 32 bits")
    if weight.dtype == torch.float64:
        weight = weight.float()
    dense = weight.detach().contiguous()
    if recipe.format == INT8:
        codes, absmax = int8.codes_of(dense if dense.dtype in native.KERNEL_DTYPES else dense.float())
    else:
        codes, absmax = _codes_of(dense.view(-1), recipe)
    if absmax.numel() and not math.isfinite(float(absmax.max())):  # a NaN is the largest of all
        raise ValueError("the weight holds NaN or infinity, which no code stands for; check the model's files")
    shape = (weight.shape[0], weight.shape[1])
    block = recipe.block or shape[1]
    made = QuantizedWeight(codes, shape, absmax, format=recipe.format, block=block, dtype=weight.dtype)
    if recipe.double and absmax.numel():
        _quantize_scales(made)
    return made


def _codes_of(flat: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of a 4-bit format. A piece of whole blocks has the codes that it has in the whole."""
    n = flat.numel()
    if n > _PIECE and native.library_for(flat) is None:
        parts = [_codes_of(flat[i : i + _PIECE], recipe) for i in range(0, n, _PIECE)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])
    if flat.dtype not in native.KERNEL_DTYPES:
        flat = flat.float()
    lib = native.library_for(flat)
    if lib is None:
        return _quantize_twin(flat, recipe)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // recipe.block))
    values = table(recipe.format)
    rank_is_code = torch.equal(values.order, torch.arange(16, dtype=torch.uint8))
    form = (values.bounds.data_ptr(), 0 if rank_is_code else values.order.data_ptr(), recipe.block)
    lib.nf4_quantize(flat.data_ptr(), flat.dtype == torch.float32, n, form, codes.data_ptr(), absmax.data_ptr())
    return codes, absmax


def _quantize_twin(flat: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(codes, absmax) in plain PyTorch."""
    values, block = flat.float(), recipe.block
    n = values.numel()
    full = n // block * block
    blocks = values[:full].view(-1, block)
    absmax = blocks.abs().amax(1) if full else values.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST_ABSMAX))[:, None]).view(-1)
    if full < n:
        last = values[full:].abs().max().clamp(min=_LEAST_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, values[full:] / last])
    form = table(recipe.format)
    ranks = torch.bucketize(F.pad(scaled, (0, n % 2)), form.bounds.to(flat.device))
    codes = form.order.to(flat.device)[ranks]
    return codes[::2] << 4 | codes[1::2], absmax


def _mean(absmax: Tensor) -> float:
    """``torch.mean`` as one thread computes it; bitsandbytes' mean of many scales depends on the threads."""
    threads = torch.get_num_threads()
    if absmax.numel() < _MEAN_CHUNK or threads == 1:
        return absmax.mean().item()
    try:
        torch.set_num_threads(1)
        return absmax.mean().item()
    finally:
        torch.set_num_threads(threads)


def _quantize_scales(weight: QuantizedWeight) -> None:
    """Replace the fp32 scales by 8-bit codes."""
    absmax = weight.absmax
    assert absmax is not None
    weight.offset = _mean(absmax)
    blocks = absmax.numel()
    lib = native.library_for(absmax)
    if lib is not None:
        weight.absmax_codes = torch.empty(blocks, dtype=torch.uint8)
        weight.nested_absmax = torch.empty(-(-blocks // NESTED_BLOCK))
        out = weight.absmax_codes.data_ptr(), weight.nested_absmax.data_ptr()
        lib.nf4_quantize_scales(absmax.data_ptr(), weight.offset, blocks, _nearest_code().data_ptr(), *out)
    else:
        weight.absmax_codes, weight.nested_absmax = _quantize_scales_twin(absmax - weight.offset)
    weight.nested_code = dynamic_map().to(absmax.device)
    weight.absmax = None


def _quantize_scales_twin(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, nested absmax) of scales less their mean."""
    padded = F.pad(scales, (0, -scales.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(1)
    scaled = (padded * (1.0 / largest)[:, None]).clamp(-1, 1)
    half = (scaled + 1) * 0.5
    point = (half.double() * (_POINTS - 1) + 0.5).float()
    codes = _nearest_code().to(scales.device)[point.nan_to_num(0).long()]
    codes = torch.where(largest[:, None] > 0, codes, 0)
    return codes.view(-1)[: scales.numel()], largest


def dequantize(weight: QuantizedWeight, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The (n, k) matrix ``value[code] * scale``, rounded once from fp32 to ``dtype`` (default: the weight's own)."""
    if out is None and weight.codes.is_cuda:
        found = gpu.dequantize(gpu.bitsandbytes(), weight, dtype or weight.dtype)
        if found is not None:
            return found
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.codes.device)
    return dequantize_rows(weight, 0, weight.shape[0], out)


def dequantize_rows(weight: QuantizedWeight, start: int, stop: int, out: Tensor) -> Tensor:
    """Rows start..stop into ``out`` (stop - start, k), dense, of any floating-point dtype. Returns ``out``."""
    rows, columns = weight.shape
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start}..{stop} of a weight with {rows}")
    if out.shape != (stop - start, columns) or not out.is_contiguous():
        raise ValueError(f"out must be dense and {(stop - start, columns)}, got {tuple(out.shape)}, {out.stride()}")
    begin, end = start * columns, stop * columns
    lib = native.library_for(out) if weight.codes.device.type == "cpu" else None
    if lib is not None and weight.format == INT8:
        assert weight.absmax is not None
        int8.decode_into(weight.codes[begin:end], weight.absmax[start:stop], out)
        return out
    if lib is not None:
        scales = (weight.absmax, weight.absmax_codes, weight.nested_code, weight.nested_absmax)
        values = table(weight.format).values.data_ptr()
        view = (weight.codes.data_ptr(), values, weight.block, *map(native.address, scales), weight.offset)
        lib.nf4_dequantize(view, begin, end, out.data_ptr(), out.dtype == torch.float32)
        return out
    return out.copy_(dequantize_range(weight, begin, end).view(out.shape))


@torch.library.custom_op("tunegate::nf4_dequantize", mutates_args=())
def nf4_dequantize(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in ``dtype`` from NF4 codes and fp32 scales, one for 64; has no gradient."""
    return dequantize(QuantizedWeight(codes.contiguous(), (rows, columns), absmax.float().contiguous(), dtype=dtype))


@nf4_dequantize.register_fake
def _(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return codes.new_empty((rows, columns), dtype=dtype)


class DequantizedProduct(torch.autograd.Function):
    """``x W^T + bias`` where no kernel reads codes: the matrix is made for the product and, for x's gradient, again.
    Kept by autograd, the matrices of all layers would be a copy of the model in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dequantize(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ dequantize(ctx.weight, dtype=grads[0].dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen linear layer with a quantized weight; (..., in) to (..., out) in the input's dtype.

    Gradients reach the input only. :meth:`dequantize` gives the weight, (out, in), in the dtype it had.
    """

    codes: Tensor
    absmax: Tensor | None
    absmax_codes: Tensor | None
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.offset, self.dtype, self.format, self.block = weight.offset, weight.dtype, weight.format, weight.block
        for name in ("codes", "absmax", "absmax_codes", "nested_code", "nested_absmax"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(cls, layer: nn.Linear, recipe: Recipe = Recipe()) -> QuantizedLinear:  # noqa: B008 (frozen)
        """Quantize a layer's weight; its bias stays as it is."""
        return cls(quantize(layer.weight, recipe), layer.bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight's parts, not copied."""
        return QuantizedWeight(
            codes=self.codes,
            shape=(self.out_features, self.in_features),
            absmax=self.absmax,
            absmax_codes=self.absmax_codes,
            nested_code=self.nested_code,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
            format=self.format,
            block=self.block,
            dtype=self.dtype,
        )

    def dequantize(self) -> Tensor:
        return dequantize(self.quantized)

    def get_extra_state(self) -> dict[str, Any]:
        """What the buffers do not hold, for ``state_dict``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"offset": self.offset, "dtype": dtype, "format": self.format, "block": self.block}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.offset, self.dtype = float(state["offset"]), getattr(torch, state["dtype"])
        self.format, self.block = state["format"], state["block"]

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast and native.library_for(x) is not None:
            out: Tensor = FrozenProduct.apply(x, self.quantized, self.bias)
            return out
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if autocast:
            return F.linear(x, dequantize(self.quantized, dtype=x.dtype), bias)
        product: Tensor = DequantizedProduct.apply(x, self.quantized, bias)
        return product

    def extra_repr(self) -> str:
        weight = self.quantized
        bits = f"{weight.recipe}, {weight.bits_per_parameter():.3f} bits per parameter"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}"


def quantize_linears(model: nn.Module, skip: Iterable[str] = (), recipe: Recipe = Recipe()) -> list[str]:  # noqa: B008
    """Replace every ``nn.Linear`` of a model in place, one by one; returns the names of the replaced layers.

    Kept: the output head (``get_output_embeddings()``, if the model has it), any layer whose weight another module
    shares (tied embeddings), and layers whose name ends with one of ``skip``, such as ``"lm_head"``. Peak memory is
    the model plus one quantized layer, if nothing else refers to the weights.
    """
    endings = tuple(skip)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and owners[id(module.weight)] == 1
        if not any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = getattr(owner, child)
        setattr(owner, child, QuantizedLinear.from_linear(layer, recipe).train(layer.training))
    return chosen
