"""Formats of quantized weights: which values a code stands for, and how a weight was quantized.

A weight is cut into blocks along its flat index; each element becomes the code of the value nearest to it over the
block's largest magnitude (absmax). The 4-bit formats differ in their sixteen values:

- ``nf4``: quantiles of a normal distribution, with an exact zero (Dettmers et al. 2023, QLoRA, arXiv 2305.14314,
  appendix E), in ascending order.
- ``fp4``: one sign, two exponent and one mantissa bit as bitsandbytes reads them: code 1 is 1/192, codes 2 to 7 are
  8, 12, 4, 6, 2 and 3 twelfths, codes 8 to 15 the same with a minus. Code 8 is a second zero.
- ``int4``: symmetric integers, value (code - 8) / 7. Code 0 is never made, so the range is -1 to 1.

``int8`` has signed bytes, value code / 127, and one scale for each row of the weight: what LLM.int8() stores (Dettmers
et al. 2022, arXiv 2208.07339). Its block is the row, and its scales are fp32.

A :class:`Recipe` names format, block size and whether the scales are quantized too; its text form goes into hashes
and onto cards. It computes nothing on weights: see ``nf4``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # weights that share a scale, unless a recipe says otherwise
NESTED_BLOCK = 256  # scales that share a scale of scales
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_VALUES = tuple(v / 12 for v in _FP4_TWELFTHS) + tuple(0.0 - v / 12 for v in _FP4_TWELFTHS)
INT4_VALUES = tuple((code - 8) / 7 for code in range(16))
VALUES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES, "int4": INT4_VALUES}
INT8 = "int8"
FORMATS = (*VALUES, INT8)
INT8_STEP = 7.874015718698502e-3  # 1 / 127 in fp32, by which LLM.int8() multiplies


@dataclass(frozen=True, slots=True)
class Table:
    """A format as tensors on the CPU that live as long as the process, so that kernels may hold their addresses.

    ``values`` (16,) fp32 by code. ``bounds`` (15,) fp32: the midpoints between neighbours in ascending order; an
    element's rank is the number of bounds that it lies above, so a tie goes to the lower value. ``order`` (16,)
    uint8: the code of each rank.
    """

    values: Tensor
    bounds: Tensor
    order: Tensor


@cache
def table(name: str) -> Table:
    """The tensors of the 4-bit format ``name``."""
    values = torch.tensor(VALUES[name], dtype=torch.float32)
    order = torch.argsort(values, stable=True)
    ranked = values[order]
    return Table(values, (ranked[:-1] + ranked[1:]) / 2, order.to(torch.uint8))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a weight is quantized. ``block``: elements that share a scale; 0, a whole row, for int8 and for it alone.
    ``double``: the scales less their mean are 8-bit codes in blocks of 256 (QLoRA).

    Raises ValueError for what does not exist. :meth:`of` fills in what a format leaves open.
    """

    format: str = "nf4"
    block: int = BLOCK
    double: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}; expected {', '.join(FORMATS)}")
        if type(self.double) is not bool:
            raise ValueError(f"double is {self.double!r}; expected True or False")
        if self.format == INT8:
            if type(self.block) is not int or self.block != 0 or self.double:
                raise ValueError("int8 has one fp32 scale for each row: no block size and no double quantization")
        elif type(self.block) is not int or self.block not in BLOCKS:
            raise ValueError(f"block size {self.block!r}; expected one of {', '.join(map(str, BLOCKS))}")

    @classmethod
    def of(cls, format: str, block: int | None = None, double: bool | None = None) -> Recipe:
        """The recipe of a format with what is asked for, None being its default; ValueError where it has no choice."""
        rows = format == INT8
        return cls(format, (0 if rows else BLOCK) if block is None else block, (not rows) if double is None else double)

    def __str__(self) -> str:
        """``nf4-64-double``, ``nf4-64`` or ``int8``: stable, and read back by :meth:`parse`."""
        return self.format + (f"-{self.block}" if self.block else "") + ("-double" if self.double else "")

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe of a text form; ValueError for any other text."""
        found = re.fullmatch(r"([a-z0-9]+)(?:-([1-9][0-9]*))?(-double)?", text, re.ASCII)
        if found is None or (found[2] is None and found[1] != INT8):
            raise ValueError(f"not a recipe: {text!r}; expected a text such as {Recipe()}, fp4-128 or {INT8}")
        return cls(found[1], int(found[2] or 0), found[3] is not None)

    def to_json(self) -> dict[str, Any]:
        return {"format": self.format, "block": self.block, "double": self.double}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """The recipe in an object with ``format``, ``block`` and ``double``, whatever else it holds; ValueError if one
        is missing or does not exist."""
        missing = [key for key in ("format", "block", "double") if key not in value]
        if missing:
            raise ValueError(f"not a recipe: {', '.join(missing)} missing")
        return cls(value["format"], value["block"], value["double"])

    @property
    def code_bits(self) -> int:
        """Bits of an element's code."""
        return 8 if self.format == INT8 else 4

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for an element of a large weight, scales included; those of whole rows count as nothing."""
        scale = 8 + 32 / NESTED_BLOCK if self.double else 32
        return self.code_bits + (scale / self.block if self.block else 0)
