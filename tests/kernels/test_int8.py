"""int8 weights against values derived by hand, the plain twin, and bitsandbytes where it is installed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import assert_same_bytes_on_any_threads
from torch import Tensor, nn

from tunegate.kernels import native
from tunegate.kernels.formats import Recipe
from tunegate.kernels.linear import Product, QuantizedWeight, Term, multiply
from tunegate.kernels.nf4 import QuantizedLinear, dequantize, dequantize_rows, quantize

INT8 = Recipe.of("int8")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    scale = torch.rand(rows, 1, generator=generator)
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def by_twin(function, *args):
    """The function's result without the C++ kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return function(*args)


def both(weight: Tensor) -> tuple[QuantizedWeight, QuantizedWeight]:
    return quantize(weight, INT8), by_twin(quantize, weight, INT8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 30), (7, 129), (33, 1000), (300, 64)], ids=str)
def test_bit_equal_to_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(*shape, dtype)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.clone())
    wanted = functional.int8_vectorwise_dequant(codes, scales)
    for made in both(weight):
        assert torch.equal(made.codes.view(shape), codes) and torch.equal(made.absmax, scales)
        assert torch.equal(dequantize(made, dtype=torch.float32), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 40), columns=st.integers(1, 90), exponent=st.integers(-30, 30))
@settings(max_examples=50, deadline=None)
def test_kernels_equal_the_twin(dtype: torch.dtype, rows: int, columns: int, exponent: int) -> None:
    weight = (matrix(rows, columns) * 2.0**exponent).to(dtype)
    if not weight.isfinite().all():
        return
    made, wanted = both(weight)
    assert torch.equal(made.codes, wanted.codes) and torch.equal(made.absmax, wanted.absmax)
    whole = by_twin(dequantize, made)
    start, stop = rows // 3, rows - rows // 4
    part = dequantize_rows(made, start, stop, torch.empty(stop - start, columns, dtype=dtype))
    assert torch.equal(dequantize(made), whole) and torch.equal(part, whole[start:stop])
    step = made.absmax[:, None].double() / 127
    back = dequantize(made, dtype=torch.float32).double()
    assert ((back - weight.double()).abs() <= step * 0.5001).all()  # each element is the nearest code


def test_codes_by_hand() -> None:
    """A row's own magnitude is 127; halves go to the even code; both signs alike."""
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 0.0, 62.4], [0, 0, 0, 0, 0, 0, 0, 0, -2.0]])
    for made in both(weight):
        assert made.codes.tolist() == [127, 0, 2, 2, 0, -2, -127, 0, 62, *[0] * 8, -127]
        assert made.absmax.tolist() == [127.0, 2.0] and made.block == 9 and made.blocks == 2
        assert made.recipe == INT8 and made.bits_per_parameter() == 8 + 32 / 9
        torch.testing.assert_close(dequantize(made)[:, -1], torch.tensor([62.0, -2.0]))


@pytest.mark.parametrize("columns", [16, 5])
def test_rows_without_a_reciprocal_are_zeros(columns: int) -> None:
    weight = torch.zeros(3, columns)
    weight[1], weight[2, 0] = 1e-40, 1.0
    for made in both(weight):
        assert made.codes[: 2 * columns].count_nonzero() == 0 and made.codes[2 * columns] == 127
        assert dequantize(made)[:2].count_nonzero() == 0
    assert quantize(torch.zeros(0, columns), INT8).codes.numel() == 0
    assert dequantize(quantize(torch.zeros(3, 0), INT8)).shape == (3, 0)


def test_what_is_refused() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for columns in (64, 65):
            weight = torch.zeros(2, columns)
            weight[1, -1] = bad
            for run in (quantize, lambda *a: by_twin(quantize, *a)):
                with pytest.raises(ValueError, match="NaN or infinity"):
                    run(weight, INT8)
    made = quantize(matrix(4, 6), INT8)
    out = torch.empty(2, 4)
    for codes, scales, says in (
        (made.codes.view(torch.uint8), made.absmax, "torch.int8 of 24"),
        (made.codes[:-1], made.absmax, "torch.int8 of 24"),
        (made.codes, made.absmax[:3], "absmax"),
        (made.codes, None, "absmax False"),
    ):
        bad = QuantizedWeight(codes, (4, 6), scales, format="int8", block=6)
        with pytest.raises(ValueError, match=says):
            multiply(Product(out, [Term(matrix(2, 6), bad)]))


def test_the_recipe() -> None:
    assert str(INT8) == "int8" and Recipe.parse("int8") == INT8 == Recipe.from_json({**INT8.to_json(), "keep": []})
    assert INT8.to_json() == {"format": "int8", "block": 0, "double": False} and INT8.bits_per_parameter == 8
    assert Recipe.of("nf4") == Recipe() and Recipe.of("fp4", 128, False) == Recipe("fp4", 128, False)
    for text in ("int8-64", "int8-double", "int8-0", "int4"):
        with pytest.raises(ValueError):
            Recipe.parse(text)
    for wrong in (lambda: Recipe.of("int8", 64), lambda: Recipe.of("int8", double=True), lambda: Recipe("nf4", 0)):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [96, 33])
def test_the_layer_and_its_gradient_are_those_of_the_dequantized_weight(bias: bool, columns: int) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(columns, 41, bias=bias), INT8)
    x = matrix(10, columns).view(2, 5, columns).requires_grad_()
    upstream = matrix(10, 41).view(2, 5, 41)
    wanted = nn.functional.linear(x, layer.dequantize(), layer.bias)
    (want_grad,) = torch.autograd.grad(wanted, x, upstream, retain_graph=True)
    for got in (layer(x), by_twin(layer, x)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(layer(x), x, upstream)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5)
    assert not list(layer.parameters()) and "int8, 8." in repr(layer)
    again = QuantizedLinear.from_linear(nn.Linear(columns, 41, bias=bias), INT8)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and again.quantized.recipe == INT8


def test_the_same_bytes_on_any_number_of_threads() -> None:
    weight = matrix(700, 130)

    def run() -> tuple[Tensor, ...]:
        made = quantize(weight, INT8)
        assert made.absmax is not None
        return made.codes, made.absmax, dequantize(made)

    assert_same_bytes_on_any_threads(run)
