"""Matrix products on CPUs: several sums of products with their epilogues, in one parallel region.

:func:`multiply` computes ``out = column_scale * (alpha * sum of x @ w) + bias + add`` for each :class:`Product`, in
fp32, and rounds to ``out``'s dtype once. A base layer with its adapter is one product of two terms (``x W^T + h B^T``);
query, key and value are three products of one call. Weights may be fp32, bf16 or codes of 4 or 8 bits whatever the
activations are: they are widened in pieces on their way through the cache. Results are the same bytes on any number of
threads.

Beside it: :func:`dequantize`, the plain twin of the kernels' reading of quantized weights, and :func:`lora_linear`, a
stand-alone LoRA layer as a torch operator. Quantizing lives elsewhere, and nothing here allocates except the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tunegate.kernels import native
from tunegate.kernels.formats import BLOCK, INT8, INT8_STEP, NESTED_BLOCK, Recipe, table

MOST_TERMS = 8
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_FOUR_BITS, _INT8 = 2, 3


@dataclass(slots=True)
class QuantizedWeight:
    """A quantized matrix in bitsandbytes' layout: 4 bits (Dettmers et al. 2023, QLoRA) or 8 (2022, LLM.int8()).

    ``codes`` lie flat over the rows of ``shape``: uint8 (ceil(n * k / 2),), two a byte, the first in the high nibble;
    for int8 they are int8 (n * k,). Blocks of ``block`` along the flat index (k for int8: the rows) share a scale:
    ``absmax`` fp32 (blocks,), or doubly quantized ``nested_code[absmax_codes[b]] * nested_absmax[b // 256] + offset``
    with ``absmax_codes`` uint8 (blocks,), ``nested_code`` fp32 (256,) and ``nested_absmax`` fp32 (ceil(blocks / 256),).
    ``format`` says what a code stands for (see ``formats``); ``dtype`` is the type the matrix had, and has again when
    it is dequantized.
    """

    codes: Tensor
    shape: tuple[int, int]
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    nested_code: Tensor | None = None
    nested_absmax: Tensor | None = None
    offset: float = 0.0
    format: str = "nf4"
    block: int = BLOCK
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.block) if self.block else self.shape[0]

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.format, 0 if self.format == INT8 else self.block, self.absmax is None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the 8-bit map, one for all weights, is not counted."""
        parts = (self.codes, self.absmax, self.absmax_codes, self.nested_absmax)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def bits_per_parameter(self) -> float:
        """Bits stored per element, scales included."""
        return 8 * self.nbytes / max(1, self.numel)


@dataclass(slots=True)
class Term:
    """One summand: ``x @ w.T`` with x (m, k) and w (n, k), fp32 or bf16 with rows of stride 1 inside.

    ``w_is_kn``: w is (k, n), the summand ``x @ w``. ``x_is_km``: x is (k, m), the summand uses ``x.T``.
    """

    x: Tensor
    w: Tensor | QuantizedWeight
    w_is_kn: bool = False
    x_is_km: bool = False


@dataclass(slots=True)
class Product:
    """``out = column_scale * (alpha * sum(terms)) + bias + add``; out (m, n) fp32 or bf16.

    ``add`` (m, n) has out's dtype and may be out itself; ``bias`` (n,) is fp32 or bf16; ``column_scale`` (n,) fp32.
    """

    out: Tensor
    terms: list[Term]
    alpha: float = 1.0
    add: Tensor | None = None
    bias: Tensor | None = None
    column_scale: Tensor | None = None


def multiply(*products: Product) -> None:
    """Compute every product into its ``out``.

    The products run together: none may read what another writes. Bf16 activations on a machine with bf16 matrix
    instructions round fp32 weights to bf16; everywhere else products of mixed dtypes are those of the widened values.
    """
    lib = native.library()
    if lib is None:
        for product in products:
            _check_and_flatten(product)
            _multiply_twin(product)
        return
    flat = [_check_and_flatten(product) for product in products]
    if all(product.out.device.type == "cpu" for product in products):
        lib.gemm(flat)
        return
    for product in products:
        _multiply_twin(product)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The fp32 matrix (n, k) of a quantized weight."""
    rows, columns = weight.shape
    return dequantize_range(weight, 0, rows * columns).view(rows, columns)


def dequantize_range(weight: QuantizedWeight, begin: int, end: int) -> Tensor:
    """The flat elements begin..end of a quantized weight in fp32."""
    first, last = (begin // weight.block, -(-end // weight.block)) if end > begin else (0, 0)
    if weight.absmax is not None:
        scales = weight.absmax[first:last]
    else:
        assert weight.absmax_codes is not None and weight.nested_code is not None and weight.nested_absmax is not None
        blocks = torch.arange(first, last, device=weight.codes.device)
        nested = weight.nested_absmax[blocks // NESTED_BLOCK]
        scales = weight.nested_code[weight.absmax_codes[first:last].long()] * nested + weight.offset
    each = scales.repeat_interleave(weight.block)[begin - first * weight.block :][: end - begin]
    if weight.format == INT8:
        return weight.codes[begin:end] * each * INT8_STEP
    codes = weight.codes[begin // 2 : (end + 1) // 2]
    codes = torch.stack((codes >> 4, codes & 15), 1).view(-1)[begin % 2 :][: end - begin].long()
    return table(weight.format).values.to(codes.device)[codes] * each


def _multiply_twin(product: Product) -> None:
    """The same in plain PyTorch: fp32 copies, one matmul a term."""
    total = torch.zeros(product.out.shape, dtype=torch.float32, device=product.out.device)
    for term in product.terms:
        weight = dequantize(term.w) if isinstance(term.w, QuantizedWeight) else term.w.float()
        x = term.x.float()
        total += (x.T if term.x_is_km else x) @ (weight if term.w_is_kn else weight.T)
    total *= product.alpha
    if product.column_scale is not None:
        total *= product.column_scale
    if product.bias is not None:
        total += product.bias.float()
    if product.add is not None:
        total += product.add.float()
    product.out.copy_(total)


def _matrix(tensor: Tensor, what: str) -> tuple[int, int, int, int]:
    """(rows, columns, row stride, type) of a matrix that the kernels can read."""
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise ValueError(f"{what} is {tensor.dtype}; expected float32 or bfloat16")
    try:
        rows, columns = tensor.shape
    except ValueError:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; expected a matrix") from None
    stride, inner = tensor.stride()
    if inner != 1 and columns > 1:
        raise ValueError(f"{what} has strides {tensor.stride()}; its rows must be contiguous: pass {what}.contiguous()")
    return rows, columns, stride, kind


def _vector(tensor: Tensor, n: int, what: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != (n,) or tensor.dtype not in dtypes or not tensor.is_contiguous():
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{what} is {tensor.dtype} {tuple(tensor.shape)}; expected contiguous {names} ({n},)")


def _check_and_flatten(product: Product) -> tuple[int | float, ...]:
    """A product as the numbers that the C++ side reads, in its order; ValueError for what it cannot take."""
    out, add, bias, scale = product.out, product.add, product.bias, product.column_scale
    m, n, out_stride, out_type = _matrix(out, "out")
    add_at = add_stride = bias_at = bias_type = scale_at = 0
    if add is not None:
        rows, columns, add_stride, add_type = _matrix(add, "add")
        if rows != m or columns != n or add_type != out_type:
            raise ValueError(f"add is {add.dtype} {tuple(add.shape)}; expected {out.dtype} {tuple(out.shape)} as out")
        add_at = add.data_ptr()
    if bias is not None:
        _vector(bias, n, "bias", native.KERNEL_DTYPES)
        bias_at, bias_type = bias.data_ptr(), _TYPES[bias.dtype]
    if scale is not None:
        _vector(scale, n, "column_scale", (torch.float32,))
        scale_at = scale.data_ptr()
    terms = product.terms
    if not 1 <= len(terms) <= MOST_TERMS:
        raise ValueError(f"a product has {len(terms)} terms; expected 1 to {MOST_TERMS}: use add for more")
    head: tuple[int | float, ...] = (
        *(out.data_ptr(), out_stride, out_type, m, n, product.alpha),
        *(add_at, add_stride, bias_at, bias_type, scale_at, len(terms)),
    )
    for term in terms:
        head += _flatten_term(term, m, n)
    return head


def _flatten_term(term: Term, m: int, n: int) -> tuple[int | float, ...]:
    x, w = term.x, term.w
    x_rows, x_columns, x_stride, x_type = _matrix(x, "x")
    tail: tuple[int | float, ...] = ()
    if isinstance(w, QuantizedWeight):
        w_rows, w_columns = w.shape
        w_at, w_stride, w_type = w.codes.data_ptr(), w_columns, _INT8 if w.format == INT8 else _FOUR_BITS
        tail = _flatten_scales(w)
    else:
        w_rows, w_columns, w_stride, w_type = _matrix(w, "w")
        w_at = w.data_ptr()
    got_m, k = (x_columns, x_rows) if term.x_is_km else (x_rows, x_columns)
    got_n, w_k = (w_columns, w_rows) if term.w_is_kn else (w_rows, w_columns)
    if got_m != m or got_n != n or k != w_k:
        raise ValueError(
            f"a term gives ({got_m}, {k}) @ ({w_k}, {got_n}) from x {tuple(x.shape)} and w {(w_rows, w_columns)}; "
            f"expected equal inner sizes and a result of ({m}, {n})"
        )
    return (x.data_ptr(), x_stride, x_type, term.x_is_km, w_at, w_stride, w_type, term.w_is_kn, k, *tail)


def _flatten_scales(w: QuantizedWeight) -> tuple[int | float, ...]:
    weights, blocks = w.numel, w.blocks
    dtype, count = (torch.int8, weights) if w.format == INT8 else (torch.uint8, (weights + 1) // 2)
    if w.codes.dtype != dtype or w.codes.numel() != count or not w.codes.is_contiguous():
        raise ValueError(
            f"codes are {w.codes.dtype} of {w.codes.numel()}; expected contiguous {dtype} of {count} "
            f"for shape {w.shape}"
        )
    if w.format == INT8:
        if w.absmax is None or w.block != w.shape[1]:
            raise ValueError(f"an int8 weight of {w.shape} has blocks of {w.block} and absmax {w.absmax is not None}")
        _vector(w.absmax, blocks, "absmax", (torch.float32,))
        return (w.absmax.data_ptr(),)
    head = (table(w.format).values.data_ptr(), w.block.bit_length() - 1)
    if w.absmax is not None:
        _vector(w.absmax, blocks, "absmax", (torch.float32,))
        return (*head, w.absmax.data_ptr(), 0, 0, 0, 0.0)
    if w.absmax_codes is None or w.nested_code is None or w.nested_absmax is None:
        raise ValueError("a 4-bit weight has neither absmax nor all of absmax_codes, nested_code and nested_absmax")
    _vector(w.absmax_codes.view(-1), blocks, "absmax_codes", (torch.uint8,))
    _vector(w.nested_code, 256, "nested_code", (torch.float32,))
    _vector(w.nested_absmax, -(-blocks // NESTED_BLOCK), "nested_absmax", (torch.float32,))
    return (*head, 0, w.absmax_codes.data_ptr(), w.nested_code.data_ptr(), w.nested_absmax.data_ptr(), w.offset)


def lora_linear_twin(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """``x W^T + bias + scale * (x A^T) B^T`` (Hu et al. 2021) in plain PyTorch."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + scale * F.linear(
        F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype)
    )


@torch.library.custom_op("tunegate::lora_linear", mutates_args=())
def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """A frozen linear layer with a LoRA adapter: ``x W^T + bias + scale * (x A^T) B^T`` (Hu et al. 2021, eq. 3).

    x (..., k), weight (n, k), bias (n,), lora_a (r, k), lora_b (n, r), each fp32 or bf16; the result (..., n) has x's
    dtype, rounded once. Gradients reach x, lora_a and lora_b; weight and bias stay as they are.
    """
    flat = _rows(x)
    hidden = torch.empty(flat.shape[0], lora_a.shape[0])
    multiply(Product(hidden, [Term(flat, lora_a)], alpha=scale))
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    multiply(Product(out.view(-1, weight.shape[0]), [Term(flat, weight), Term(hidden, lora_b)], bias=bias))
    return out


@lora_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Tensor | float | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("tunegate::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, lora_a, lora_b; the adapter's hidden rows are computed again rather than kept."""
    upstream, flat, rank = _rows(grad), _rows(x), lora_a.shape[0]
    hidden, hidden_grad = torch.empty(flat.shape[0], rank), torch.empty(flat.shape[0], rank)
    multiply(
        Product(hidden, [Term(flat, lora_a)], alpha=scale),
        Product(hidden_grad, [Term(upstream, lora_b, w_is_kn=True)], alpha=scale),
    )
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_a = torch.empty(lora_a.shape, dtype=lora_a.dtype)
    grad_b = torch.empty(lora_b.shape, dtype=lora_b.dtype)
    terms = [Term(upstream, weight, w_is_kn=True), Term(hidden_grad, lora_a, w_is_kn=True)]
    multiply(
        Product(grad_x.view(flat.shape), terms),
        Product(grad_a, [Term(hidden_grad, flat, w_is_kn=True, x_is_km=True)]),
        Product(grad_b, [Term(upstream, hidden, w_is_kn=True, x_is_km=True)]),
    )
    return grad_x, grad_a, grad_b


@_lora_linear_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, _weight: Tensor, lora_a: Tensor, lora_b: Tensor, _scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(lora_a), torch.empty_like(lora_b)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix with contiguous rows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001 (torch passes them by name)
    x, weight, _, lora_a, lora_b, scale = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b)
    ctx.scale = scale


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b = ctx.saved_tensors
    grad_x, grad_a, grad_b = _lora_linear_backward(grad, x, weight, lora_a, lora_b, ctx.scale)
    return grad_x, None, None, grad_a, grad_b, None


lora_linear.register_autograd(_backward, setup_context=_save)
