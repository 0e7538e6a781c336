"""Quantized checkpoints: bitsandbytes' safetensors read and written, every other kind refused by name.

In 4 bits bitsandbytes stores a linear layer's weight ``X.weight`` as packed codes ((n + 1) / 2, 1) with its parts
beside it: ``.absmax`` (fp32, or uint8 codes when doubly quantized), ``.quant_map`` (the sixteen values),
``.nested_absmax`` and ``.nested_quant_map`` (double quantization), and ``.quant_state.bitsandbytes__nf4`` or ``__fp4``:
a JSON object as bytes, with block size, shape, dtype and the mean of the scales. In 8 bits ``X.weight`` is int8 (n, k)
with ``X.SCB``, the rows' largest magnitudes in fp32 (n,), and mostly ``X.weight_format``, 0 for codes that lie row
after row; the dtype that the weight had is not told. config.json carries ``quantization_config``, from which
transformers and vLLM know which layers were left alone.

Files come from outside: every part's dtype and size is checked against the shape before it is used. Layout:
bitsandbytes 0.50 ``QuantState.as_dict(packed=True)`` and ``Linear8bitLt``; 4-bit weights stored under another dtype
(``bnb_4bit_quant_storage``, for FSDP) are read as the bytes they are. It reads no files itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunegate.errors import InputError, Problem
from tunegate.kernels.formats import BLOCKS, INT8, NESTED_BLOCK, Recipe, table
from tunegate.kernels.linear import QuantizedWeight
from tunegate.model.weights import TensorEntry

STORED_FORMATS = ("nf4", "fp4", INT8)
_STATE = ".quant_state.bitsandbytes__"
_ROWS, _LAYOUT = ".SCB", ".weight_format"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_MOST_STATE_BYTES = 1 << 16
_READ = {"bitsandbytes 4-bit": "nf4", "bitsandbytes 8-bit": INT8}  # kinds, and what a plan takes them for
_ORIGINAL = (
    "name the original 16-bit checkpoint (its id usually stands on this one's page); `tunegate quantize` or "
    "`base.quantization: nf4` make 4 bits of it, int8 makes 8"
)
_PLAIN_INTEGERS = "integers"
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# Tensors that only a checkpoint of that kind holds.
_MARKS = {".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".weight_scale_inv": "FP8"}


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in a checkpoint: ``name`` is ``X.weight``, ``format`` nf4, fp4 or int8, ``parts`` the names of
    what lies beside it; that of a 4-bit weight's JSON is the last one."""

    name: str
    format: str
    double: bool
    parts: tuple[str, ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor it consists of, the weight first."""
        return (self.name, *self.parts)

    @property
    def codes_per_byte(self) -> int:
        return 1 if self.format == INT8 else 2


def _stored_at(name: str, present: Collection[str]) -> StoredWeight | None:
    """The weight that a tensor of this name belongs to, where only a quantized weight has such a tensor."""
    weight, mark, kind = name.partition(_STATE)
    if mark:
        double = f"{weight}.nested_absmax" in present or f"{weight}.nested_quant_map" in present
        parts = tuple(f"{weight}.{part}" for part in (_PARTS if double else _PARTS[:2]))
        return StoredWeight(weight, kind, double, (*parts, name))
    if name.endswith(_ROWS):
        module = name.removesuffix(_ROWS)
        layout = (module + _LAYOUT,) if module + _LAYOUT in present else ()
        return StoredWeight(f"{module}.weight", INT8, False, (name, *layout))
    return None


def quantized_names(names: Iterable[str]) -> dict[str, StoredWeight]:
    """Weight name -> what is stored, for the quantized weights among a checkpoint's tensor names.

    :class:`InputError` names every weight that lacks a part.
    """
    present = set(names)
    found: dict[str, StoredWeight] = {}
    problems = []
    for name in sorted(present):
        stored = _stored_at(name, present)
        if stored is None:
            continue
        if stored.format not in STORED_FORMATS:
            expected = " or ".join(form for form in STORED_FORMATS if form != INT8)
            problems.append(Problem("unknown 4-bit format", name, expected, repr(stored.format)))
        elif missing := [n for n in stored.tensor_names if n not in present]:
            lacks = f"no {', '.join(missing)}"
            problems.append(Problem("a quantized weight is not whole", stored.name, "its parts", lacks))
        elif stored.name in found:
            problems.append(Problem("a weight is stored in two formats", stored.name))
        found[stored.name] = stored
    if problems:
        raise InputError(problems)
    return found


def stored_recipe(names: Iterable[str]) -> dict[str, Any] | None:
    """How a checkpoint with tensors of these names is quantized, as a card tells it; None if it is not."""
    first = next(iter(quantized_names(names).values()), None)
    if first is None:
        return None
    return {**Recipe.of(first.format, double=first.double).to_json(), "keep": [], "stored": True}


def pack(name: str, weight: QuantizedWeight, *, state_bytes: int = 0) -> dict[str, Tensor]:
    """Tensor name -> tensor of a weight as bitsandbytes writes it, in its order.

    ``state_bytes`` pads the JSON with spaces to at least so many bytes, for files whose header is written first.
    ValueError for INT4, which bitsandbytes has no file format for.
    """
    if weight.format not in STORED_FORMATS:
        raise ValueError(f"{weight.format} has no file format; expected {' or '.join(STORED_FORMATS)}")
    if weight.format == INT8:
        assert weight.absmax is not None
        module, layout = name.removesuffix(".weight"), torch.zeros((), dtype=torch.uint8)
        return {name: weight.codes.view(weight.shape), module + _ROWS: weight.absmax, module + _LAYOUT: layout}
    state: dict[str, Any] = {
        "quant_type": weight.format,
        "blocksize": weight.block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    parts = {"absmax": weight.absmax, "quant_map": table(weight.format).values.clone()}
    if weight.absmax is None:
        assert weight.nested_absmax is not None and weight.nested_code is not None
        parts["absmax"] = weight.absmax_codes
        parts |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": weight.nested_code.clone()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": weight.offset}
    text = json.dumps(state).encode("utf-8").ljust(state_bytes)
    made = {name: weight.codes.view(-1, 1)}
    made |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    made[name + _STATE + weight.format] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return made


def packed_entries(name: str, shape: tuple[int, int], recipe: Recipe, state_bytes: int) -> list[TensorEntry]:
    """Names, dtypes, shapes and sizes of what :func:`pack` makes, in its order; positions count from 0."""
    n = shape[0] * shape[1]
    rows: list[tuple[str, str, tuple[int, ...]]]
    if recipe.format == INT8:
        module = name.removesuffix(".weight")
        rows = [(name, "I8", shape), (module + _ROWS, "F32", (shape[0],)), (module + _LAYOUT, "U8", ())]
    else:
        blocks = -(-n // recipe.block)
        rows = [(name, "U8", ((n + 1) // 2, 1)), (f"{name}.absmax", "U8" if recipe.double else "F32", (blocks,))]
        rows.append((f"{name}.quant_map", "F32", (16,)))
        if recipe.double:
            rows.append((f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
            rows.append((f"{name}.nested_quant_map", "F32", (256,)))
        rows.append((name + _STATE + recipe.format, "U8", (state_bytes,)))
    entries, position = [], 0
    for part, dtype, sizes in rows:
        end = position + math.prod(sizes) * (4 if dtype == "F32" else 1)
        entries.append(TensorEntry(part, dtype, sizes, position, end))
        position = end
    return entries


def unpack(stored: StoredWeight, get_tensor: Callable[[str], Tensor]) -> QuantizedWeight:
    """The weight whose parts ``get_tensor(name)`` returns; :class:`InputError` if they do not fit together."""
    tensors = {name: get_tensor(name) for name in stored.tensor_names}
    if stored.format == INT8:
        return _unpack_rows(stored, tensors)
    state = _state_of(tensors[stored.parts[-1]], stored)
    shape, block, dtype = _described(state, stored)
    blocks = -(-shape[0] * shape[1] // block)
    codes = tensors[stored.name].contiguous().view(-1).view(torch.uint8)
    if codes.numel() != (shape[0] * shape[1] + 1) // 2:
        raise _misfit(stored.name, f"{(shape[0] * shape[1] + 1) // 2} bytes of codes for {shape}", codes.numel())
    values = _numbers(tensors, f"{stored.name}.quant_map", 16)
    if not torch.allclose(values, table(stored.format).values, rtol=0, atol=1e-4):  # rounded in old files
        raise _misfit(f"{stored.name}.quant_map", f"the sixteen values of {stored.format}", values.tolist())
    made = QuantizedWeight(codes, shape, format=stored.format, block=block, dtype=dtype)
    if not stored.double:
        made.absmax = _numbers(tensors, f"{stored.name}.absmax", blocks)
        return made
    scales = tensors[f"{stored.name}.absmax"].contiguous().view(-1)
    if scales.dtype != torch.uint8 or scales.numel() != blocks:
        raise _misfit(f"{stored.name}.absmax", f"{blocks} uint8", f"{scales.numel()} {scales.dtype}")
    made.absmax_codes = scales
    made.nested_code = _numbers(tensors, f"{stored.name}.nested_quant_map", 256)
    made.nested_absmax = _numbers(tensors, f"{stored.name}.nested_absmax", -(-blocks // NESTED_BLOCK))
    made.offset = float(state["nested_offset"])
    return made


def _unpack_rows(stored: StoredWeight, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """An int8 weight. Its dtype is fp32, which holds every value: the file does not say what it was."""
    codes = tensors[stored.name]
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
        raise _misfit(stored.name, "a matrix of int8", f"{codes.dtype} {tuple(codes.shape)}")
    for name in stored.parts[1:]:
        layout = tensors[name]
        if layout.numel() != 1 or layout.item() != 0:
            raise _misfit(name, "0: codes row after row", layout.tolist())
    absmax = _numbers(tensors, stored.parts[0], len(codes))
    if (absmax < 0).any():
        raise _misfit(stored.parts[0], "magnitudes", f"a least value of {absmax.min().item():g}")
    rows, columns = codes.shape
    return QuantizedWeight(codes.contiguous().view(-1), (rows, columns), absmax, format=INT8, block=columns)


def _misfit(where: str, expected: str, got: object) -> InputError:
    return InputError(
        "a quantized weight's parts do not fit together", where=where, expected=expected, got=str(got)[:200],
        fix="the checkpoint is damaged or of an unknown version: fetch it again, or use the original",
    )  # fmt: skip


def _numbers(tensors: Mapping[str, Tensor], name: str, n: int) -> Tensor:
    """A finite fp32 vector of n."""
    tensor = tensors[name]
    if not tensor.is_floating_point() or tensor.numel() != n:
        raise _misfit(name, f"{n} floating-point numbers", f"{tensor.numel()} {tensor.dtype}")
    values = tensor.reshape(-1).float().contiguous()
    if not torch.isfinite(values).all():
        raise _misfit(name, "finite numbers", "NaN or infinity")
    return values


def _state_of(tensor: Tensor, stored: StoredWeight) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.numel() > _MOST_STATE_BYTES:
        raise _misfit(stored.parts[-1], "JSON as uint8, at most 64 KiB", f"{tensor.numel()} {tensor.dtype}")
    try:
        state = json.loads(tensor.contiguous().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise _misfit(stored.parts[-1], "a JSON object", error) from None
    if not isinstance(state, dict):
        raise _misfit(stored.parts[-1], "a JSON object", type(state).__name__)
    return state


def _described(state: Mapping[str, Any], stored: StoredWeight) -> tuple[tuple[int, int], int, torch.dtype]:
    """(shape, block size, dtype) as the JSON says, checked."""
    where, shape, block = stored.parts[-1], state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != stored.format:
        raise _misfit(where, f"quant_type {stored.format}", repr(state.get("quant_type")))
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and 0 < s < 2**31 for s in shape):
        raise _misfit(where, "shape: two whole numbers", repr(shape))
    if type(block) is not int or block not in BLOCKS:
        raise _misfit(where, f"blocksize: one of {BLOCKS}", repr(block))
    dtype = state.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _misfit(where, f"dtype: one of {', '.join(_DTYPES)}", repr(dtype))
    if stored.double:
        offset = state.get("nested_offset")
        if state.get("nested_blocksize") != NESTED_BLOCK or state.get("nested_dtype") != "float32":
            got = f"{state.get('nested_blocksize')!r}, {state.get('nested_dtype')!r}"
            raise _misfit(where, f"nested_blocksize {NESTED_BLOCK}, nested_dtype float32", got)
        if type(offset) not in (int, float) or not math.isfinite(offset):  # type: ignore[arg-type]
            raise _misfit(where, "nested_offset: a finite number", repr(offset))
    return (shape[0], shape[1]), block, _DTYPES[dtype]


def quantization_config(recipe: Recipe, kept: Sequence[str], compute_dtype: torch.dtype) -> dict[str, Any]:
    """config.json's ``quantization_config``, in the keys that transformers writes itself.

    ``kept`` are the paths of linear layers that are not quantized, the head among them: transformers replaces every
    other one. It does not hold the block size, which each 4-bit weight carries.
    """
    rows = recipe.format == INT8  # then what is said of 4 bits are transformers' defaults
    return {
        "bnb_4bit_compute_dtype": "float32" if rows else str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if rows else recipe.format,
        "bnb_4bit_use_double_quant": recipe.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(kept),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not rows,
        "load_in_8bit": rows,
        "quant_method": "bitsandbytes",
    }


def config_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """What config.json alone tells: a quantization that is not read here (GPTQ, AWQ, FP8, ...)."""
    said = _said(config)
    kind = _kind_said(said) if said else ""
    if not kind or kind in _READ:
        return []
    return [_refused(kind, where, f"quantization_config {json.dumps(said, default=str)[:120]}")]


def stored_in_config(config: Mapping[str, Any]) -> tuple[str, bool, tuple[str, ...]] | None:
    """(nf4 or int8, double quantization, layers left alone) of a checkpoint whose config.json says that it is
    bitsandbytes' 4 or 8 bits; None for every other."""
    said = _said(config)
    if not isinstance(said, dict) or (form := _READ.get(_kind_said(said))) is None:
        return None
    kept = said.get("llm_int8_skip_modules")
    double = form != INT8 and said.get("bnb_4bit_use_double_quant") is True
    return form, double, tuple(map(str, kept)) if isinstance(kept, list) else ()


def stored_quantization(config: Mapping[str, Any], entries: Sequence[TensorEntry], where: str) -> bool:
    """Whether a checkpoint holds bitsandbytes' 4-bit or 8-bit weights; False where it is not quantized at all.

    ``config`` is config.json, ``entries`` all tensors, ``where`` names the folder in errors. :class:`InputError` for
    every other kind of quantization, from what the config says and from the tensors themselves.
    """
    problems = config_problems(config, where)
    holds = any(_stored_at(entry.name, ()) is not None for entry in entries)
    marked = sorted(
        (e for e in entries if _mark(e)), key=lambda e: _mark(e) == _PLAIN_INTEGERS
    )  # the least telling last
    if not problems and not holds and marked:
        found = f"{len(marked)} tensors such as {marked[0].name!r} ({marked[0].dtype})"
        problems = [_refused(_mark(marked[0]), where, found)]
    if not problems and _said(config) and not holds:
        what = f"config.json says that the weights are {_kind_said(_said(config))}, and none is"
        fix = "remove `quantization_config` from config.json if these are the full weights, or fetch the base again"
        got = f"{len(entries)} tensors without"
        problems = [Problem(what, where, f"tensors named ...{_STATE}nf4 or ...{_ROWS}", got, fix)]
    if problems:
        raise InputError(problems)
    return holds


def _refused(kind: str, where: str, got: str) -> Problem:
    what = f"the base is quantized already, as {kind}, which is not read here"
    return Problem(what, where, "16- or 32-bit weights, or bitsandbytes' 4 or 8 bits", got, _ORIGINAL)


def _said(config: Mapping[str, Any]) -> object:
    text = config.get("text_config")
    return config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)


def _kind_said(said: object) -> str:
    """The kind of quantization that a ``quantization_config`` names, in words."""
    if not isinstance(said, dict):
        return "something unknown"
    method = str(said.get("quant_method") or "").lower()
    if method in ("bitsandbytes", ""):
        if said.get("load_in_8bit") or said.get("_load_in_8bit"):
            return "bitsandbytes 8-bit"
        if said.get("load_in_4bit") or said.get("_load_in_4bit"):
            return "bitsandbytes 4-bit"
    return {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "": "something unknown"}.get(method, repr(method))


def _mark(entry: TensorEntry) -> str:
    """The kind of quantization that a tensor gives away, or nothing."""
    if entry.dtype.startswith("F8"):
        return "FP8"
    if entry.name.endswith(".weight") and entry.dtype in _INTEGERS:
        return _PLAIN_INTEGERS
    return next((kind for mark, kind in _MARKS.items() if entry.name.endswith(mark)), "")
