"""4-bit formats against values derived by hand, the plain twin, and bitsandbytes where it is installed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import assert_same_bytes_on_any_threads
from torch import Tensor, nn

from tunegate.kernels import native, nf4
from tunegate.kernels.formats import BLOCKS, FP4_VALUES, INT4_VALUES, NF4_VALUES, VALUES, Recipe, table
from tunegate.kernels.linear import Product, QuantizedWeight, Term, multiply

SHAPES = [(1, 1), (1, 64), (3, 64), (5, 30), (7, 129), (33, 1000), (257, 64), (300, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINGLE = Recipe(double=False)
PARTS = ("codes", "absmax", "absmax_codes", "nested_code", "nested_absmax")
MIDPOINTS = (torch.tensor(NF4_VALUES)[1:] + torch.tensor(NF4_VALUES)[:-1]) / 2


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    scale = torch.rand(shape[0], 1, generator=generator)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def bits(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8)


def assert_same(got: QuantizedWeight, wanted: QuantizedWeight) -> None:
    for name in PARTS:
        a, b = bits(getattr(got, name)), bits(getattr(wanted, name))
        assert (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)), name
    assert got.offset == wanted.offset


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch):
    """Runs a function without the C++ kernels."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function(*args, **kwargs)

    return run


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    return pytest.importorskip("bitsandbytes.functional")


def assert_as_bitsandbytes(bitsandbytes, weight: Tensor, recipe: Recipe, twin) -> None:
    kind = {"quant_type": recipe.format, "compress_statistics": recipe.double, "blocksize": recipe.block}
    codes, state = bitsandbytes.quantize_4bit(weight, **kind)
    wanted = bitsandbytes.dequantize_4bit(codes, state)
    for made in (nf4.quantize(weight, recipe), twin(nf4.quantize, weight, recipe)):
        assert torch.equal(made.codes, codes.flatten())
        if recipe.double:
            assert torch.equal(made.absmax_codes, state.absmax) and made.offset == state.offset.item()
            assert torch.equal(made.nested_absmax, state.state2.absmax)
            assert torch.equal(made.nested_code, state.state2.code)
        else:
            assert torch.equal(made.absmax, state.absmax)
        assert torch.equal(nf4.dequantize(made), wanted.view(weight.shape))
        assert made.recipe == recipe


@pytest.mark.parametrize("recipe", [Recipe(), SINGLE, Recipe("fp4", 4096)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_do_not_depend_on_the_pieces_that_are_widened(dtype, recipe, twin, monkeypatch) -> None:
    weight = matrix((300, 301), dtype)
    wanted = nf4.quantize(weight, recipe)
    monkeypatch.setattr(nf4, "_PIECE", 8192)
    for made in (nf4.quantize(weight, recipe), twin(nf4.quantize, weight, recipe)):
        assert_same(made, wanted)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_to_bitsandbytes(bitsandbytes, shape, dtype, double, twin) -> None:
    assert_as_bitsandbytes(bitsandbytes, matrix(shape, dtype), Recipe(double=double), twin)


@pytest.mark.parametrize("recipe", [Recipe(f, b, d) for f in ("nf4", "fp4") for b in BLOCKS for d in (False, True)])
def test_every_recipe_is_bit_equal_to_bitsandbytes(bitsandbytes, recipe, twin) -> None:
    for shape in ((7, 130), (70, 300), (5, 4096)):
        for dtype in DTYPES:
            assert_as_bitsandbytes(bitsandbytes, matrix(shape, dtype), recipe, twin)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_tables_are_bitsandbytes(bitsandbytes, name) -> None:
    assert torch.equal(table(name).values, bitsandbytes.get_4bit_type(name, device="cpu"))


def test_the_dynamic_map_is_bitsandbytes(bitsandbytes) -> None:
    assert torch.equal(nf4.dynamic_map(), bitsandbytes.create_dynamic_map())


def test_the_dynamic_map_by_hand() -> None:
    code = nf4.dynamic_map()
    assert code.shape == (256,) and torch.equal(code, code.sort().values) and code.unique().numel() == 256
    assert code[127] == 0 and code[255] == 1
    assert code[128].item() == pytest.approx(0.55e-6)  # one part of [0.1, 1], times 10^-6
    assert code[254].item() == pytest.approx(1 - 0.9 / 128)  # the last of 64 midpoints
    assert torch.equal(code[:127], -code[128:255].flip(0))


def test_every_value_has_its_own_code_and_the_first_is_in_the_high_nibble(twin) -> None:
    weight = torch.tensor(NF4_VALUES).repeat(4).view(1, 64) * 2.0
    for made in (nf4.quantize(weight, SINGLE), twin(nf4.quantize, weight, SINGLE)):
        assert made.codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
        assert made.absmax is not None and made.absmax.tolist() == [2.0]
        assert torch.equal(nf4.dequantize(made), weight)


@pytest.mark.parametrize("columns", [64, 63])  # a full block, and a short one
def test_a_tie_goes_to_the_lower_value(columns: int, twin) -> None:
    infinity = torch.tensor(torch.inf)
    for step, above in ((MIDPOINTS, 0), (MIDPOINTS.nextafter(infinity), 1), (MIDPOINTS.nextafter(-infinity), 0)):
        weight = torch.zeros(1, columns)
        weight[0, 0], weight[0, 1:16] = 1.0, step
        for made in (nf4.quantize(weight, SINGLE), twin(nf4.quantize, weight, SINGLE)):
            codes = torch.stack((made.codes >> 4, made.codes & 15), 1).view(-1)[1:16]
            assert codes.tolist() == [i + above for i in range(15)]


def test_zeros_equal_blocks_and_an_odd_size(twin) -> None:
    for quantize in (nf4.quantize, lambda *a, **k: twin(nf4.quantize, *a, **k)):
        made = quantize(torch.zeros(2, 32), SINGLE)
        assert set(made.codes.tolist()) == {0x77} and made.absmax.tolist() == [0.0]
        assert quantize(torch.ones(1, 3), SINGLE).codes.tolist() == [0xFF, 0xF7]  # the spare nibble is 0.0
        equal = quantize(torch.full((4, 64), 0.5))
        assert equal.absmax_codes.tolist() == [0] * 4 and equal.offset == 0.5
        assert torch.equal(nf4.dequantize(equal), torch.full((4, 64), 0.5))
        empty = quantize(torch.zeros(0, 64))
        assert empty.codes.numel() == 0 and nf4.dequantize(empty).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    form=st.sampled_from(sorted(VALUES)),
    block=st.sampled_from(BLOCKS),
    double=st.booleans(),
)
@settings(max_examples=75, deadline=None)
def test_kernels_equal_the_twin(
    dtype: torch.dtype, rows: int, columns: int, form: str, block: int, double: bool
) -> None:
    weight, recipe = matrix((rows, columns), dtype), Recipe(form, block, double)
    made = nf4.quantize(weight, recipe)
    start, stop = rows // 3, rows - rows // 4
    part = nf4.dequantize_rows(made, start, stop, torch.empty(stop - start, columns, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        assert_same(made, nf4.quantize(weight, recipe))
        whole = nf4.dequantize(made)
    assert torch.equal(nf4.dequantize(made), whole) and torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("form", sorted(VALUES))
@pytest.mark.parametrize("block", BLOCKS)
def test_products_read_every_format_and_block(form: str, block: int) -> None:
    for n, k in ((70, 96), (33, 130)):
        made, x = nf4.quantize(matrix((n, k)), Recipe(form, block)), matrix((5, k))
        back, forth = torch.empty(5, k), torch.empty(5, n)
        multiply(Product(forth, [Term(x, made)]), Product(back, [Term(matrix((5, n)), made, w_is_kn=True)]))
        dense = nf4.dequantize(made)
        torch.testing.assert_close(forth, x @ dense.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back, matrix((5, n)) @ dense, rtol=1e-5, atol=1e-5)


def test_fp4_and_int4_by_hand(twin) -> None:
    """FP4's codes are sign, exponent and mantissa, not ranks; INT4 is the rounded multiple of a seventh."""
    fp4 = torch.tensor([12, 8, 6, 4, 3, 2, 0.0625, 0, -12, -8, -6, -4, -3, -2, -0.0625, 0.01] * 2).view(1, 32)
    int4 = torch.tensor([7.0, -7, 3, -3, 0, 1, -1, 2, 6.4, 6.6, -6.4, -6.6, 0.4, 0.6, -0.4, -0.6] * 2).view(1, 32)
    for run in (nf4.quantize, lambda *a: twin(nf4.quantize, *a)):
        made = run(fp4, Recipe("fp4", 32, False))
        assert made.codes[:8].tolist() == [0x32, 0x54, 0x76, 0x10, 0xBA, 0xDC, 0xFE, 0x98]
        made = run(int4, Recipe("int4", 32, False))
        assert made.codes[:8].tolist() == [0xF1, 0xB5, 0x89, 0x7A, 0xEF, 0x21, 0x89, 0x87]
        wanted = torch.tensor([7.0, -7, 3, -3, 0, 1, -1, 2, 6, 7, -6, -7, 0, 1, 0, -1] * 2)
        torch.testing.assert_close(nf4.dequantize(made).view(-1), wanted)
    assert FP4_VALUES[3] == 1 and FP4_VALUES[11] == -1 and INT4_VALUES[8] == 0 and INT4_VALUES[1] == -1


# What bitsandbytes 0.50.2 makes of GOLDEN (multiples of 1/64), so that a wrong table fails without it too.
GOLDEN = (((torch.arange(96) * 7919) % 193 - 96) / 64).view(2, 48)
GOLDENS = [
    (
        Recipe("nf4", 32, False),
        "00011112233445667899abbccddeeefff0011112233445667889abbccddeeefff0011112223445567889abbccddeeeff",
        "0000c03f0000c03f0000be3f",
    ),
    (
        Recipe("nf4", 64, False),
        "00011112233445667899abbccddeeefff0011112233445667889abbccddeeefff0011112223445567889abbccddeeeff",
        "0000c03f0000be3f",
    ),
    (
        Recipe("fp4", 32, False),
        "bbbaaaadddccfee901667445552222333bbaaaadddccfee991667445552222333bbbaaaaddccffe99166744555222233",
        "0000c03f0000c03f0000be3f",
    ),
    (
        Recipe("fp4", 64, False),
        "bbbaaaadddccfee901667445552222333bbaaaadddccfee991667445552222333bbbaaaaddccffe99166744555222233",
        "0000c03f0000be3f",
    ),
]


@pytest.mark.parametrize(("recipe", "codes", "scales"), GOLDENS, ids=str)
def test_golden_codes(recipe, codes, scales, twin) -> None:
    for made in (nf4.quantize(GOLDEN, recipe), twin(nf4.quantize, GOLDEN, recipe)):
        assert made.codes.numpy().tobytes().hex() == codes
        assert made.absmax is not None and made.absmax.numpy().tobytes().hex() == scales


def test_a_recipe_has_one_text_and_refuses_what_does_not_exist() -> None:
    for recipe in [Recipe(f, b, d) for f in VALUES for b in BLOCKS for d in (False, True)]:
        assert Recipe.parse(str(recipe)) == recipe == Recipe.from_json({**recipe.to_json(), "keep": []})
    assert str(Recipe()) == "nf4-64-double" and str(Recipe("fp4", 128, False)) == "fp4-128"
    assert Recipe().bits_per_parameter == 4 + 8 / 64 + 32 / (64 * 256)
    for text in ("nf4", "nf4-64-Double", "nf4-65", "nf5-64", "nf4-064", "nf4-64-double "):
        with pytest.raises(ValueError):
            Recipe.parse(text)
    for value in ({"format": "nf4", "block": 64}, {"format": "nf4", "block": "64", "double": True}):
        with pytest.raises(ValueError):
            Recipe.from_json(value)


def test_other_dtypes() -> None:
    weight = matrix((8, 64))
    assert_same(nf4.quantize(weight.double()), nf4.quantize(weight))
    assert nf4.quantize(weight.double()).dtype == torch.float32
    with pytest.raises(ValueError, match="without their scales"):
        nf4.quantize(weight.to(torch.float8_e4m3fn))


def test_the_same_bytes_on_any_number_of_threads() -> None:
    weight = matrix((700, 3200))  # 35000 scales: more than torch averages on one thread

    def run() -> tuple[Tensor, ...]:
        made = nf4.quantize(weight)
        parts = [p for p in (made.codes, made.absmax_codes, made.nested_absmax) if p is not None]
        return (*parts, torch.tensor([made.offset]), nf4.dequantize(made))

    assert_same_bytes_on_any_threads(run)


def test_sizes_and_errors() -> None:
    made = nf4.quantize(matrix((512, 512)))
    assert made.bits_per_parameter() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert nf4.quantize(matrix((512, 512)), SINGLE).bits_per_parameter() == 4.5
    for bad in (torch.nan, torch.inf):
        for columns in (64, 65):
            weight = torch.zeros(1, columns)
            weight[0, -1] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                nf4.quantize(weight)
    with pytest.raises(ValueError, match="matrix"):
        nf4.quantize(torch.zeros(4))
    with pytest.raises(ValueError, match=r"rows 0\.\.513"):
        nf4.dequantize_rows(made, 0, 513, torch.empty(513, 512))
    with pytest.raises(ValueError, match="out must be"):
        nf4.dequantize_rows(made, 0, 2, torch.empty(512, 2).t())


def test_a_strided_weight() -> None:
    weight = matrix((96, 130))
    assert_same(nf4.quantize(weight.t()), nf4.quantize(weight.t().contiguous()))


def test_the_operator() -> None:
    made = nf4.quantize(matrix((6, 64)), SINGLE)
    got = torch.ops.tunegate.nf4_dequantize(made.codes, made.absmax, 6, 64, torch.float32)
    assert torch.equal(got, nf4.dequantize(made))
    torch.library.opcheck(nf4.nf4_dequantize, (made.codes, made.absmax, 6, 64, torch.float32))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [96, 33])
def test_the_layer_computes_from_the_dequantized_weight(bias: bool, columns: int) -> None:
    layer = nf4.QuantizedLinear.from_linear(nn.Linear(columns, 41, bias=bias))
    x = matrix((10, columns)).view(2, 5, columns).requires_grad_()
    upstream = matrix((10, 41)).view(2, 5, 41)
    wanted = nn.functional.linear(x, layer.dequantize(), layer.bias)
    got = layer(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(got, x, upstream), torch.autograd.grad(wanted, x, upstream)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not list(layer.parameters())
    again = nf4.QuantizedLinear.from_linear(nn.Linear(columns, 41, bias=bias))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), got)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(70, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64, bias=False)])
        self.lm_head = nn.Linear(64, 70, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.score = nn.Linear(64, 2)


def test_quantizing_a_model_leaves_tied_and_skipped_layers() -> None:
    model = Tied().to(torch.bfloat16)
    assert nf4.quantize_linears(model, skip=("score",)) == ["layers.0", "layers.1"]
    assert isinstance(model.layers[0], nf4.QuantizedLinear) and model.layers[0].dequantize().dtype == torch.bfloat16
    assert type(model.lm_head) is nn.Linear and type(model.score) is nn.Linear
