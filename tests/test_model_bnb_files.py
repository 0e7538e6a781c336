"""bitsandbytes' files of 4 and 8 bits: written and read as bitsandbytes does, damage and other kinds named."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunegate.errors import InputError
from tunegate.kernels.formats import BLOCKS, Recipe
from tunegate.kernels.nf4 import dequantize, quantize
from tunegate.model import bnb_files
from tunegate.model.bnb_files import pack, packed_entries, quantized_names, stored_quantization, unpack
from tunegate.model.weights import TensorEntry

NAME = "model.layers.0.mlp.up_proj.weight"
RECIPES = [Recipe(form, block, double) for form in ("nf4", "fp4") for block in (64, 4096) for double in (False, True)]
INT8 = Recipe.of("int8")
SCALES, LAYOUT = NAME.replace(".weight", ".SCB"), NAME.replace(".weight", ".weight_format")
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def read(parts: dict[str, Tensor]):
    stored = quantized_names(parts)
    assert list(stored) == [NAME]
    return unpack(stored[NAME], parts.__getitem__)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_parts_are_those_of_bitsandbytes(recipe, dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(66, 130, dtype)
    options = {"quant_type": recipe.format, "blocksize": recipe.block, "compress_statistics": recipe.double}
    codes, state = functional.quantize_4bit(weight, **options)
    wanted = {NAME: codes} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    made = pack(NAME, quantize(weight, recipe))
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name
    state = functional.QuantState.from_dict({k: v for k, v in made.items() if k != NAME}, device=torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(made[NAME], state), dequantize(read(wanted)))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    recipe=st.builds(Recipe, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKS), st.booleans()) | st.just(INT8),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@settings(max_examples=60)
def test_what_is_packed_is_unpacked(rows, columns, recipe, dtype) -> None:
    weight = quantize(matrix(rows, columns, dtype), recipe)
    entries = packed_entries(NAME, (rows, columns), recipe, 256)
    parts = pack(NAME, weight, state_bytes=entries[-1].end - entries[-1].start)
    assert {e.name: (e.shape, e.end - e.start) for e in entries} == {
        name: (tuple(t.shape), t.nbytes) for name, t in parts.items()
    }
    again = read(parts)
    assert again.recipe == recipe and again.shape == (rows, columns)
    assert again.dtype == (torch.float32 if recipe == INT8 else dtype)  # which an int8 file does not say
    assert torch.equal(dequantize(again, dtype=dtype), dequantize(weight))


def test_codes_stored_under_another_dtype_are_the_same_bytes() -> None:
    weight = quantize(matrix(8, 64))
    parts = pack(NAME, weight)
    parts[NAME] = weight.codes.view(torch.bfloat16).view(-1, 1)
    assert torch.equal(read(parts).codes, weight.codes)


def test_int4_has_no_file_format() -> None:
    with pytest.raises(ValueError, match="int4 has no file format"):
        pack(NAME, quantize(matrix(2, 64), Recipe("int4")))


def state(**changes: object) -> Tensor:
    value = json.loads(pack(NAME, quantize(matrix(8, 64)))[STATE].numpy().tobytes())
    value |= changes
    value = {k: v for k, v in value.items() if v is not None}
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


DAMAGED = {
    "quant_type": ({STATE: state(quant_type="fp4")}, "quant_type nf4"),
    "shape": ({STATE: state(shape=[8, 65])}, "bytes of codes"),
    "shape's kind": ({STATE: state(shape=[512])}, "two whole numbers"),
    "a huge shape": ({STATE: state(shape=[2**40, 2**40])}, "two whole numbers"),
    "blocksize": ({STATE: state(blocksize=63)}, "blocksize: one of"),
    "dtype": ({STATE: state(dtype="int8")}, "dtype: one of"),
    "no dtype": ({STATE: state(dtype=None)}, "dtype: one of"),
    "nested_blocksize": ({STATE: state(nested_blocksize=64)}, "nested_blocksize 256"),
    "offset": ({STATE: state(nested_offset="much")}, "nested_offset"),
    "infinite offset": ({STATE: state(nested_offset=float("inf"))}, "nested_offset"),
    "not JSON": ({STATE: torch.tensor([123, 34], dtype=torch.uint8)}, "a JSON object"),
    "not an object": ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "a JSON object"),
    "not bytes": ({STATE: torch.zeros(4)}, "JSON as uint8"),
    "too few codes": ({NAME: torch.zeros(255, 1, dtype=torch.uint8)}, "256 bytes of codes"),
    "too few scales": ({f"{NAME}.absmax": torch.zeros(7, dtype=torch.uint8)}, "8 uint8"),
    "scales of another kind": ({f"{NAME}.absmax": torch.zeros(8)}, "8 uint8"),
    "another table": ({f"{NAME}.quant_map": torch.linspace(-1, 1, 16)}, "sixteen values of nf4"),
    "a short map": ({f"{NAME}.nested_quant_map": torch.zeros(255)}, "256 floating-point"),
    "NaN": ({f"{NAME}.nested_absmax": torch.tensor([float("nan")])}, "finite numbers"),
}


DAMAGED_ROWS = {
    "codes of another dtype": ({NAME: torch.zeros(8, 64, dtype=torch.uint8)}, "a matrix of int8"),
    "flat codes": ({NAME: torch.zeros(512, dtype=torch.int8)}, "a matrix of int8"),
    "too few scales": ({SCALES: torch.zeros(7)}, "8 floating-point numbers"),
    "scales of integers": ({SCALES: torch.zeros(8, dtype=torch.int32)}, "8 floating-point numbers"),
    "NaN": ({SCALES: torch.full((8,), float("nan"))}, "finite numbers"),
    "a negative scale": ({SCALES: torch.full((8,), -1.0)}, "magnitudes"),
    "another layout": ({LAYOUT: torch.tensor(2, dtype=torch.uint8)}, "codes row after row"),
}


@pytest.mark.parametrize("changed", DAMAGED_ROWS)
def test_damage_of_int8_is_named(changed) -> None:
    changes, says = DAMAGED_ROWS[changed]
    with pytest.raises(InputError) as error:
        read(pack(NAME, quantize(matrix(8, 64), INT8)) | changes)
    assert says in str(error.value) and next(iter(changes)) in str(error.value)


def test_int8_files_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(66, 130)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.clone())
    made = pack(NAME, quantize(weight, INT8))
    assert set(made) == {NAME, SCALES, LAYOUT} and made[LAYOUT].item() == 0
    assert torch.equal(made[NAME], codes) and torch.equal(made[SCALES], scales)
    assert read({NAME: codes, SCALES: scales}).recipe == INT8  # files without a layout are row after row too
    with pytest.raises(InputError, match="not whole"):
        quantized_names([SCALES])


@pytest.mark.parametrize("changed", DAMAGED)
def test_damage_is_named(changed) -> None:
    changes, says = DAMAGED[changed]
    parts = pack(NAME, quantize(matrix(8, 64))) | changes
    with pytest.raises(InputError) as error:
        read(parts)
    assert says in str(error.value) and NAME in str(error.value)


def test_weights_that_lack_a_part_are_all_named() -> None:
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2))
    names = [n for name in (one, two) for n in pack(name, quantize(matrix(8, 64)))]
    names.remove(f"{one}.absmax")
    names.remove(f"{two}.nested_quant_map")
    with pytest.raises(InputError) as error:
        quantized_names([*names, "other.weight.quant_state.bitsandbytes__int4"])
    text = str(error.value)
    assert f"{one}.absmax" in text and f"{two}.nested_quant_map" in text and "'int4'" in text


def entries(*names: str, dtype: str = "BF16") -> list[TensorEntry]:
    return [TensorEntry(name, dtype, (2, 2), 0, 8) for name in names]


EIGHT_BIT = bnb_files.quantization_config(INT8, ["lm_head"], torch.bfloat16)
FOUR_BIT = bnb_files.quantization_config(Recipe(), ["lm_head"], torch.bfloat16)


def test_what_is_accepted() -> None:
    plain, bnb = entries("a.weight"), entries("a.weight", "a.weight.quant_state.bitsandbytes__nf4")
    assert stored_quantization({}, plain, "x") is False
    assert stored_quantization({"quantization_config": FOUR_BIT}, bnb, "x") is True
    assert stored_quantization({"text_config": {"quantization_config": FOUR_BIT}}, bnb, "x") is True
    assert stored_quantization({}, bnb, "x") is True  # the tensors say it themselves
    rows = [*entries("a.weight", dtype="I8"), *entries("a.SCB", dtype="F32")]
    assert stored_quantization({"quantization_config": EIGHT_BIT}, rows, "x") is True
    assert stored_quantization({}, rows, "x") is True
    assert bnb_files.stored_in_config({"quantization_config": EIGHT_BIT}) == ("int8", False, ("lm_head",))
    assert bnb_files.stored_in_config({"quantization_config": FOUR_BIT}) == ("nf4", True, ("lm_head",))
    older = {k: v for k, v in FOUR_BIT.items() if k != "quant_method"}
    assert stored_quantization({"quantization_config": older}, bnb, "x") is True


@pytest.mark.parametrize(
    ("config", "stored", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, entries("a.qweight"), "as GPTQ"),
        ({"quant_method": "awq"}, entries("a.qweight"), "as AWQ"),
        ({"quant_method": "fp8"}, entries("a.weight", dtype="F8_E4M3"), "as FP8"),
        ({"quant_method": "compressed-tensors"}, entries("a.weight"), "as 'compressed-tensors'"),
        ({"quant_method": "mxfp4"}, entries("a_blocks"), "as 'mxfp4'"),
        (EIGHT_BIT, entries("a.weight"), "bitsandbytes 8-bit, and none is"),
        (None, entries("a.qweight", "a.qzeros"), "as GPTQ or AWQ"),
        (None, entries("a.weight", dtype="I8"), "as integers"),
        (None, entries("a.weight", dtype="F8_E5M2"), "as FP8"),
        (["nf4"], entries("a.weight"), "as something unknown"),
        (FOUR_BIT, entries("a.weight"), "and none is"),
    ],
)
def test_other_kinds_are_refused_with_the_way_out(config, stored, says) -> None:
    with pytest.raises(InputError) as error:
        stored_quantization({} if config is None else {"quantization_config": config}, stored, "the/base")
    assert says in str(error.value) and "the/base" in str(error.value) and error.value.problems[0].fix
