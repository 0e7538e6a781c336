"""What a base's config says about positions: how far they go, and where its rotary frequencies change with length.

Most rotary scalings (linear, YaRN, Llama 3) are one set of frequencies for every row. LongRoPE has two, and the longest
row of a call decides for all of them; dynamic NTK has one for each length.

It computes no frequencies: the model does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunegate.errors import InputError
from tunegate.kernels import Layout


def rows_of(layout: Layout, rows: list[int]) -> tuple[Tensor, Layout]:
    """The tokens of some of a layout's rows, a shared prefix first, and the layout that these have by themselves."""
    shared = bool(layout.prefix)
    spans = [*([0] if shared else []), *(row + shared for row in rows)]
    index = torch.cat([torch.arange(layout.starts[n], layout.starts[n] + layout.lengths[n]) for n in spans])
    return index, Layout(tuple(layout.lengths[n] for n in spans), layout.prefix)


def _rope(config: Any) -> list[dict[str, Any]]:
    """The settings of the model's rotary positions, one for each kind of layer where they differ."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or ([found] if found else [])


def position_table(config: Any) -> int | None:
    """How many positions the model can read; None where they are computed (rotary) or not needed.

    With dynamic NTK scaling every length above the table has frequencies of its own, for all its tokens: no batch of
    rows and no cache can have them, so the table ends there too.
    """
    rope = _rope(config)
    if rope and not any("dynamic" in str(one.get("rope_type")) for one in rope):
        return None
    return getattr(config, "max_position_embeddings", None)


def long_above(config: Any) -> int | None:
    """LongRoPE (arXiv:2402.13753): the length above which a row is rotated by the long factors, all of it."""
    limits = {
        int(one.get("original_max_position_embeddings") or config.max_position_embeddings)
        for one in _rope(config)
        if one.get("rope_type") == "longrope"
    }
    if len(limits) > 1:
        raise InputError(
            "the base's layers change their rotary frequencies at different lengths",
            where="config.json: rope_parameters",
            expected="one original_max_position_embeddings",
            got=", ".join(map(str, sorted(limits))),
        )
    return limits.pop() if limits else None
