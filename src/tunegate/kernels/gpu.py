"""On CUDA: which library computes attention and 4-bit weights, and why.

attention   ``flash_attn`` (Dao 2023, varlen), else the flash attention that torch carries
            (``torch.nn.attention.varlen``), else the twin: SDPA over groups of rows of similar length. Both flash
            kernels take rows end to end, 16 bits and head dims up to 256; only ``flash_attn`` knows a soft cap. A
            shared prefix is repeated in front of each row's keys, since neither reads one prefix for many rows.
4 bits      ``bitsandbytes`` dequantizes NF4 and FP4, whose codes and scales it shares with us bit for bit, else the
            twin. The matrix exists for one product at a time and is made again in the backward pass.

``TUNEGATE_GPU_ATTENTION`` (flash-attn, torch, twin) forces a choice; ``TUNEGATE_KERNELS=off`` means the twin for all.
Sums of gradients over a repeated prefix are in no fixed order on CUDA, so a seed gives the same bytes only without it.

It imports nothing before it is asked, and does not look at the norms and gated products: see ``engine.liger``.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunegate.errors import InputError
from tunegate.kernels import native
from tunegate.kernels.formats import NESTED_BLOCK, table
from tunegate.kernels.linear import QuantizedWeight

FLASH, TORCH, TWIN = "flash-attn", "torch", "twin"
VARIABLE = "TUNEGATE_GPU_ATTENTION"
LARGEST_DIM = 256
BNB_FORMATS = ("nf4", "fp4")


@dataclass(frozen=True)
class Sequences:
    """Rows as a varlen kernel takes them: ``cu_queries`` and ``cu_keys`` (rows + 1,) int32, where each begins, and the
    longest of each. ``key_index`` (keys,) says which token each key is; None where keys lie as tokens do."""

    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    key_index: Tensor | None = None


def sequences(lengths: tuple[int, ...], prefix: int, skipped: int, device: torch.device | str) -> Sequences:
    """``lengths`` of a run's rows; with ``prefix`` row 0 has that length and stands before every other row's keys.
    ``skipped`` (0 or prefix): the run has no queries for the prefix."""
    rows = list(lengths[1:]) if skipped else list(lengths)
    keys = [n if number == 0 and not skipped else n + prefix for number, n in enumerate(rows)] if prefix else rows
    index = None
    if prefix:
        start, parts = 0, []
        for number, length in enumerate(lengths):
            own = torch.arange(start, start + length)
            start += length
            if number == 0:
                parts += [] if skipped else [own]
            else:
                parts += [torch.arange(prefix), own]
        index = torch.cat(parts).to(device)

    def ends(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)

    return Sequences(ends(rows), ends(keys), max(rows), max(keys), index)


@dataclass(frozen=True)
class Attention:
    """A varlen attention: ``call(q, k, v, sequences, scale, window, softcap)``, shapes (T, heads, D). Queries are
    aligned with the last keys of their row and see nothing after themselves."""

    name: str
    call: Callable[[Tensor, Tensor, Tensor, Sequences, float, int | None, float | None], Tensor] | None
    reason: str
    softcap: bool = False


def from_flash_attn(function: Callable[..., Any]) -> Attention:
    """``flash_attn.flash_attn_varlen_func``, version 2.6 or newer (soft cap)."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        out: Tensor = function(
            q, k, v, cu_seqlens_q=s.cu_queries, cu_seqlens_k=s.cu_keys, max_seqlen_q=s.longest_query,
            max_seqlen_k=s.longest_key, softmax_scale=scale, causal=True, window_size=_window(window),
            softcap=softcap or 0.0, deterministic=True,
        )  # fmt: skip
        return out

    return Attention(FLASH, call, "flash_attn is installed", softcap=True)


def from_torch(function: Callable[..., Any]) -> Attention:
    """``torch.nn.attention.varlen.varlen_attn`` as of torch 2.11: windows and grouped heads."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        assert softcap is None
        out: Tensor = function(
            q, k, v, s.cu_queries, s.cu_keys, s.longest_query, s.longest_key, scale=scale,
            window_size=_window(window), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out

    return Attention(TORCH, call, "flash attention of torch itself")


def _window(window: int | None) -> tuple[int, int]:
    """Keys to the left and right of a query's own; ours counts the query's own key."""
    return (-1 if window is None else window - 1, 0)


def choose(wanted: str, flash: Callable[..., Any] | None, own: Callable[..., Any] | None) -> Attention:
    """The attention for ``wanted`` (a name, or empty for the best); ``flash`` and ``own`` are what is installed."""
    if wanted not in ("", FLASH, TORCH, TWIN):
        raise InputError(f"unknown {VARIABLE}", expected=f"{FLASH}, {TORCH} or {TWIN}", got=wanted)
    if wanted == TWIN:
        return Attention(TWIN, None, f"{VARIABLE}={TWIN}")
    missing = {FLASH: "softcap", TORCH: "enable_gqa"}
    given = {FLASH: flash, TORCH: own}
    why = []
    for name, make in ((FLASH, from_flash_attn), (TORCH, from_torch)):
        function = given[name]
        if wanted not in ("", name):
            continue
        if function is None:
            why.append(f"no {name}")
        elif missing[name] not in inspect.signature(function).parameters:
            why.append(f"{name} is too old (its varlen function has no {missing[name]})")
        else:
            return make(function)
    if wanted:
        raise InputError(f"{VARIABLE}={wanted} cannot be had", got="; ".join(why), fix=f"unset {VARIABLE}")
    return Attention(TWIN, None, "; ".join(why))


@cache
def attention_library() -> Attention:
    """What this process uses. Imports ``flash_attn`` where it is installed."""
    if native.switched_off():
        return Attention(TWIN, None, native.SWITCHED_OFF)
    return choose(
        os.environ.get(VARIABLE, ""),
        _function("flash_attn", "flash_attn_varlen_func"),
        _function("torch.nn.attention.varlen", "varlen_attn"),
    )


def _function(module: str, name: str) -> Callable[..., Any] | None:
    """The function, or None where it cannot be imported: a build for another torch fails to load."""
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError):
        return None
    return found


def takes(library: Attention, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether ``library`` computes this: 16 bits, equal head dims that are multiples of 8 up to 256."""
    dim = q.shape[-1]
    return (
        library.call is not None
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and dim == v.shape[-1]
        and dim % 8 == 0
        and dim <= LARGEST_DIM
        and (softcap is None or library.softcap)
    )


def attention(
    library: Attention, q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """``library``'s attention of (T, heads, D) tensors, where :func:`takes` said yes."""
    assert library.call is not None
    if s.key_index is not None:
        k, v = k[s.key_index], v[s.key_index]
    q, k, v = (x.contiguous() for x in (q, k, v))
    return library.call(q, k, v, s, scale, window, softcap)


# --- 4 bits ------------------------------------------------------------------------------------------------------


@cache
def bitsandbytes() -> Any:
    """``bitsandbytes.functional`` where it is installed, else None."""
    if native.switched_off():
        return None
    try:
        import bitsandbytes.functional as found
    except Exception:  # its import looks for CUDA libraries and fails in many ways
        return None
    return found


def dequantize(library: Any, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor | None:
    """The (n, k) matrix by bitsandbytes, from our codes and scales as they lie; None where it has no such format."""
    even = 2 * weight.codes.numel() == weight.numel
    known = weight.format in BNB_FORMATS and weight.block >= 64
    if library is None or not even or not known or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    nested, absmax = None, weight.absmax
    if absmax is None:
        nested = library.QuantState(
            absmax=weight.nested_absmax, blocksize=NESTED_BLOCK, code=weight.nested_code, dtype=torch.float32
        )
        absmax = weight.absmax_codes
    device = weight.codes.device
    state = library.QuantState(
        absmax=absmax,
        shape=torch.Size(weight.shape),
        code=table(weight.format).values.to(device),
        blocksize=weight.block,
        quant_type=weight.format,
        dtype=dtype,
        offset=torch.tensor(weight.offset, device=device) if nested is not None else None,
        state2=nested,
    )
    out: Tensor = library.dequantize_4bit(weight.codes.view(-1, 1), state)
    return out


def describe() -> dict[str, str]:
    """Operation → implementation and reason, for ``tunegate doctor``."""
    found = attention_library()
    four_bits = "bitsandbytes" if bitsandbytes() is not None else "twin (no bitsandbytes)"
    return {"attention": f"{found.name} ({found.reason})", "4 bits": four_bits}
