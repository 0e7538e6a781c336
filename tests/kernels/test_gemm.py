"""Products against fp64 matmul, for every storage, layout and epilogue; the LoRA operator against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.formats import NF4_VALUES
from tunegate.kernels.linear import (
    Product,
    QuantizedWeight,
    Term,
    dequantize,
    lora_linear,
    lora_linear_twin,
    multiply,
)

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
FP32, BF16 = torch.float32, torch.bfloat16


def quantized(n: int, k: int, kind: str, generator: torch.Generator) -> QuantizedWeight:
    """A random matrix in nf4, nested (doubly quantized) nf4 or int8: any codes and scales are valid."""
    if kind == "int8":
        codes = torch.randint(-128, 128, (n * k,), dtype=torch.int8, generator=generator)
        return QuantizedWeight(codes, (n, k), torch.rand(n, generator=generator), format="int8", block=k)
    blocks = -(-n * k // 64)
    codes = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, generator=generator)
    if kind == "nf4":
        return QuantizedWeight(codes, (n, k), absmax=torch.rand(blocks, generator=generator))
    return QuantizedWeight(
        codes,
        (n, k),
        absmax_codes=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        nested_code=torch.linspace(-1, 1, 256),
        nested_absmax=torch.rand(-(-blocks // 256), generator=generator),
        offset=0.5,
    )


def matrix(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, pad: int = 0) -> Tensor:
    """Random rows inside a wider buffer."""
    return torch.randn(rows, columns + pad, generator=generator).to(dtype)[:, :columns]


def make_term(m: int, n: int, k: int, kind: tuple, generator: torch.Generator) -> Term:
    x_dtype, w_kind, w_is_kn, x_is_km = kind
    x = matrix(*((k, m) if x_is_km else (m, k)), x_dtype, generator, pad=3)
    shape = (k, n) if w_is_kn else (n, k)
    if isinstance(w_kind, str):
        return Term(x, quantized(*shape, w_kind, generator), w_is_kn, x_is_km)
    return Term(x, matrix(*shape, w_kind, generator, pad=5), w_is_kn, x_is_km)


def exact(product: Product) -> tuple[Tensor, Tensor]:
    """The product in fp64, and the magnitude that rounding errors scale with."""
    total = torch.zeros(product.out.shape, dtype=torch.float64)
    size = total.clone()
    for term in product.terms:
        x = (term.x.T if term.x_is_km else term.x).double()
        w = (dequantize(term.w) if isinstance(term.w, QuantizedWeight) else term.w).double()
        w = w if term.w_is_kn else w.T
        total += x @ w
        size += x.abs() @ w.abs()
    total, size = total * product.alpha, size * abs(product.alpha)
    if product.column_scale is not None:
        total, size = total * product.column_scale.double(), size * product.column_scale.double().abs()
    for extra in (product.bias, product.add):
        if extra is not None:
            total, size = total + extra.double(), size + extra.double().abs()
    return total, size


def rounds_weights(product: Product) -> bool:
    """Whether this level rounds fp32 weights to bf16 for some term."""
    level = native.describe()[0]
    has_bf16 = level in ("amx", "avx512bf16", "emulatedamx", "emulatedbf16")
    return has_bf16 and any(term.x.dtype == BF16 for term in product.terms)


def check(product: Product) -> None:
    want, size = exact(product)
    multiply(product)
    k = sum(term.x.shape[0 if term.x_is_km else 1] for term in product.terms)
    error = (product.out.double() - want).abs()
    allowed = EPSILON[FP32] * (4 + k**0.5) * size + EPSILON[product.out.dtype] * want.abs()
    if rounds_weights(product):
        allowed = allowed + EPSILON[BF16] * size
    assert not product.out.isnan().any()
    assert (error <= allowed).all(), f"{(error - allowed).max():.3g} too much, k = {k}"


KINDS = [
    kind
    for kind in itertools.product((FP32, BF16), (FP32, BF16, "nf4", "nested", "int8"), (False, True), (False, True))
    if not (kind[3] and kind[1] == "nested")
]
SIZES = [(1, 5, 7), (3, 66, 130), (16, 40, 1100), (17, 33, 65), (97, 130, 70), (200, 97, 401)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(part) for part in kind))
def test_each_kind_of_term(kind: tuple, size: tuple[int, int, int]) -> None:
    m, n, k = size
    generator = torch.Generator().manual_seed(m * n + k)
    out = torch.full((m, n + 2), float("nan"), dtype=kind[0])[:, :n]
    check(Product(out, [make_term(m, n, k, kind, generator)]))


@given(
    size=st.tuples(st.integers(1, 130), st.integers(1, 150), st.integers(1, 450)),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    extras=st.tuples(st.booleans(), st.sampled_from([None, FP32, BF16]), st.booleans()),
    out_dtype=st.sampled_from([FP32, BF16]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sums_and_epilogues(size, kinds, extras, out_dtype) -> None:  # type: ignore[no-untyped-def]
    m, n, k = size
    generator = torch.Generator().manual_seed(m + n + k)
    terms = [make_term(m, n, max(1, k // (i * 7 + 1)), kind, generator) for i, kind in enumerate(kinds)]
    out = matrix(m, n, out_dtype, generator, pad=1)
    add, bias, scale = extras
    product = Product(out, terms, alpha=0.75)
    if add:
        product.add = matrix(m, n, out_dtype, generator, pad=4)
    if bias:
        product.bias = torch.randn(n, generator=generator).to(bias)
    if scale:
        product.column_scale = torch.randn(n, generator=generator)
    check(product)


@pytest.mark.parametrize("m", [5, 120])
def test_accumulates_into_itself(m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(m, 70, generator=generator)
    before = out.clone()
    term = make_term(m, 70, 90, (FP32, BF16, False, False), generator)
    multiply(Product(out, [term], add=out))
    torch.testing.assert_close(out, before + term.x @ term.w.float().T, atol=1e-4, rtol=1e-5)


def test_many_products_and_a_weight_larger_than_the_buffer() -> None:
    generator = torch.Generator().manual_seed(1)
    products = [
        Product(torch.empty(m, n), [make_term(m, n, k, (FP32, FP32, kn, False), generator)])
        for m, n, k, kn in [(110, 4500, 600, False), (2, 600, 64, False), (100, 300, 5000, True), (40, 70, 90, False)]
    ] + [Product(torch.empty(3, 9), [make_term(3, 9, 4, (FP32, FP32, False, False), generator)]) for _ in range(80)]
    expected = [exact(product) for product in products]
    multiply(*products)
    for product, (want, size) in zip(products, expected, strict=True):
        assert ((product.out.double() - want).abs() <= 1e-5 * size).all()


def test_empty_products() -> None:
    multiply(Product(torch.empty(0, 5), [Term(torch.empty(0, 3), torch.randn(5, 3))]))
    multiply(Product(torch.empty(4, 0), [Term(torch.randn(4, 3), torch.empty(0, 3))]))
    for m in (2, 120):
        out = torch.full((m, 5), float("nan"))
        multiply(Product(out, [Term(torch.empty(m, 0), torch.empty(5, 0))], bias=torch.arange(5.0)))
        assert torch.equal(out, torch.arange(5.0).expand(m, 5))
    multiply()


def test_same_bytes_on_any_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(2)
        outs = []
        for m, n, k in [(1, 300, 500), (9, 500, 70), (64, 576, 576), (300, 200, 900), (16, 700, 1300)]:
            for kind in KINDS:
                out = torch.empty(m, n, dtype=kind[0])
                multiply(Product(out, [make_term(m, n, k, kind, generator)]))
                outs.append(out)
        return outs

    before = torch.get_num_threads()
    try:
        runs = [run(threads) for threads in ((1, 2, 3) if native.library() else (2, 2))]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_dequantize_reads_high_nibble_first() -> None:
    codes = torch.tensor([0x0F, 0x7A] + [0x77] * 31, dtype=torch.uint8)
    weight = dequantize(QuantizedWeight(codes, (1, 66), absmax=torch.tensor([2.0, 3.0])))
    assert weight[0, :4].tolist() == [2 * NF4_VALUES[i] for i in (0, 15, 7, 10)]
    assert weight[0, 4:].abs().max() == 0


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (Product(torch.empty(2, 3), []), "0 terms"),
        (Product(torch.empty(2, 3), [Term(torch.empty(2, 4), torch.empty(3, 5))]), "inner sizes"),
        (Product(torch.empty(2, 3), [Term(torch.empty(2, 4).double(), torch.empty(3, 4))]), "float64"),
        (Product(torch.empty(2, 3), [Term(torch.empty(4, 2).T, torch.empty(3, 4))]), "contiguous"),
        (Product(torch.empty(2, 3), [Term(torch.empty(2, 4), torch.empty(3, 4))], bias=torch.empty(4)), "bias"),
        (
            Product(torch.empty(2, 3), [Term(torch.empty(2, 4), torch.empty(3, 4))], add=torch.empty(2, 3).bfloat16()),
            "add",
        ),
        (
            Product(torch.empty(2, 3), [Term(torch.empty(2, 4), QuantizedWeight(torch.empty(6).byte(), (3, 4)))]),
            "neither",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_says_what_it_cannot_take(product: Product, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiply(product)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (4, 40)], ids=str)
def test_lora_linear_and_its_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, 50, generator=generator).to(dtype).requires_grad_()
    weight, bias = torch.randn(30, 50, generator=generator).to(dtype), torch.randn(30, generator=generator)
    a = torch.randn(6, 50, generator=generator, requires_grad=True)
    b = torch.randn(30, 6, generator=generator, requires_grad=True)
    upstream = torch.randn(*shape, 30, generator=generator).to(dtype)
    got = lora_linear(x, weight, bias, a, b, 0.5)
    got_grads = torch.autograd.grad(got, (x, a, b), upstream)
    doubles = [t.detach().double().requires_grad_() for t in (x, a, b)]
    want = lora_linear_twin(doubles[0], weight.double(), bias.double(), doubles[1], doubles[2], 0.5)
    want_grads = torch.autograd.grad(want, doubles, upstream.double())
    for ours, theirs in zip((got, *got_grads), (want, *want_grads), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < (1e-6 if dtype == FP32 else 2 * EPSILON[BF16])
    torch.library.opcheck(
        torch.ops.tunegate.lora_linear.default,
        (x, weight, bias, a, b, 0.5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "nested", "int8"])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (33, 100), (150, 448), (7, 4), (96, 836), (40, 391)])
def test_a_rows_bytes_do_not_depend_on_how_many_share_its_product(kind: str, n: int, k: int) -> None:
    """A few rows, some rows and many rows take different kernels; each output is the same sum in the same order."""
    g = torch.Generator().manual_seed(n)
    x, h, low = torch.randn(260, k, generator=g), torch.randn(260, 6, generator=g), torch.randn(n, 6, generator=g)
    plain = torch.randn(n, k, generator=g)
    weight = {"fp32": plain, "bf16": plain.to(BF16)}.get(kind)
    w = quantized(n, k, kind, g) if weight is None else weight

    def product(rows: int) -> Tensor:
        out = torch.empty(rows, n)
        multiply(Product(out, [Term(x[:rows], w), Term(h[:rows], low)], alpha=0.5))
        return out

    whole = product(260)
    for rows in (1, 2, 3, 4, 5, 6, 8, 9, 15, 16, 17, 24, 25, 32, 33, 48, 64, 65, 96, 97, 255, 256, 257):
        assert torch.equal(product(rows), whole[:rows]), rows
