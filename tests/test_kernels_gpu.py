"""Attention and 4 bits on CUDA, as far as a machine without one can tell: the calls that the libraries get, against
functions of their signatures in plain PyTorch, and bitsandbytes' own CPU code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tunegate.errors import InputError
from tunegate.kernels import Layout, Plan, attention, gpu
from tunegate.kernels.formats import Recipe
from tunegate.kernels.linear import dequantize as by_definition
from tunegate.kernels.nf4 import DequantizedProduct, QuantizedLinear, quantize


def rows_apart(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], scale: float, window: tuple[int, int], softcap: float
) -> Tensor:
    """Varlen attention by its definition: query i of a row with n queries and m keys stands at key i + m - n, and sees
    the keys from ``window[0]`` before that place to ``window[1]`` after it (-1: no limit)."""
    assert all(e.dtype == torch.int32 for e in ends)
    outs = []
    for a, b, c, d in zip(ends[0][:-1], ends[0][1:], ends[1][:-1], ends[1][1:], strict=True):
        mine, keys, values = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        keys, values = (x.repeat_interleave(len(mine) // len(x), dim=0) for x in (keys, values))
        scores = mine @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        ahead = torch.arange(d - c)[None, :] - place
        seen = (ahead <= window[1]) if window[1] >= 0 else torch.ones_like(ahead, dtype=torch.bool)
        if window[0] >= 0:
            seen &= ahead >= -window[0]
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    assert not dropout_p and causal and deterministic and alibi_slopes is None and block_table is None
    assert not return_attn_probs and softmax_scale is not None and q.is_contiguous() and k.is_contiguous()
    check_longest(cu_seqlens_q, max_seqlen_q)
    check_longest(cu_seqlens_k, max_seqlen_k)
    window = (window_size[0], 0 if window_size[1] < 0 else min(window_size[1], 0))
    return rows_apart(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, window, softcap)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert scale is not None and enable_gqa == (query.shape[1] != key.shape[1])
    check_longest(cu_seq_q, max_q)
    check_longest(cu_seq_k, max_k)
    return rows_apart(query, key, value, (cu_seq_q, cu_seq_k), scale, window_size, 0.0)


def check_longest(ends: Tensor, longest: int) -> None:
    assert int(ends.diff().max()) == longest


LIBRARIES = {"flash-attn": gpu.from_flash_attn(flash_attn_varlen_func), "torch": gpu.from_torch(varlen_attn)}
LAYOUTS = [(Layout((7, 1, 12, 5)), False), (Layout((4, 6, 1, 9), prefix=4), False), (Layout((4, 6, 9), prefix=4), True)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("layout", "cached"), LAYOUTS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_varlen_library_gives_the_twins_attention(
    name: str, layout: Layout, cached: bool, window: int | None, softcap: float | None
) -> None:
    library = LIBRARIES[name]
    if softcap is not None and not library.softcap:
        pytest.skip("torch's own has no soft cap")
    generator = torch.Generator().manual_seed(0)
    plan = Plan(layout, cached_prefix=cached)
    queries = layout.tokens - (layout.prefix if cached else 0)
    shapes = ((queries, 4, 16), (layout.tokens, 2, 16), (layout.tokens, 2, 16))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    wanted = attention(*tensors, plan, scale=0.3, window=window, softcap=softcap)
    got = gpu.attention(library, *tensors, plan.sequences, 0.3, window, softcap)
    close = 1e-5 if softcap else 1e-9  # the twin's softmax is fp32 where it caps
    assert torch.allclose(got, wanted, atol=close)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((got * weights).sum(), tensors), torch.autograd.grad((wanted * weights).sum(), tensors),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(mine, theirs, atol=close)


def test_torchs_own_kernel_takes_these_calls() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    library = gpu.choose("torch", None, varlen.varlen_attn)
    plan = Plan(Layout((4, 6, 1, 9), prefix=4), "meta")
    q, k, v = (torch.empty(20, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    assert gpu.takes(library, q, k, v, None)
    assert gpu.attention(library, q, k, v, plan.sequences, 0.125, 5, None).shape == (20, 4, 64)


def test_what_no_kernel_takes_is_left_to_the_twin() -> None:
    flash, own = LIBRARIES["flash-attn"], LIBRARIES["torch"]

    def tensor(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(3, 2, dim, device="meta", dtype=dtype)

    fits = tensor()
    assert gpu.takes(flash, fits, fits, fits, 30.0) and gpu.takes(own, fits, fits, fits, None)
    assert not gpu.takes(own, fits, fits, fits, 30.0)
    for bad in (tensor(dtype=torch.float32), tensor(12), tensor(264)):
        assert not gpu.takes(flash, bad, bad, bad, None)
    assert not gpu.takes(flash, tensor(192), tensor(192), tensor(128), None)  # DeepSeek's heads
    assert not gpu.takes(gpu.choose("twin", None, None), fits, fits, fits, None)


def test_the_best_that_is_installed_is_chosen() -> None:
    def old(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("never called")

    def name(wanted: str, flash: Callable[..., Any] | None, own: Callable[..., Any] | None) -> str:
        return gpu.choose(wanted, flash, own).name

    assert name("", flash_attn_varlen_func, varlen_attn) == "flash-attn"
    assert name("torch", flash_attn_varlen_func, varlen_attn) == "torch"
    assert name("", None, varlen_attn) == "torch"
    assert name("", old, varlen_attn) == "torch"
    assert name("", old, None) == "twin"
    assert "too old" in gpu.choose("", old, None).reason and "no torch" in gpu.choose("", old, None).reason
    with pytest.raises(InputError, match="flash-attn cannot be had"):
        gpu.choose("flash-attn", None, varlen_attn)
    with pytest.raises(InputError, match="expected: flash-attn, torch or twin"):
        gpu.choose("fastest", None, None)


# --- 4 bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_reads_our_codes(name: str, double: bool, dtype: torch.dtype) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    weight = quantize(torch.randn(96, 128, generator=torch.Generator().manual_seed(1)), Recipe(name, 64, double))
    got = gpu.dequantize(library, weight, dtype)
    assert got is not None and got.dtype == dtype
    assert torch.allclose(got.float(), by_definition(weight).view(96, 128).to(dtype).float(), rtol=1e-2, atol=1e-6)


def test_what_bitsandbytes_does_not_know_is_left_to_the_twin() -> None:
    weight = torch.randn(8, 64)
    library = object()  # never asked
    assert gpu.dequantize(None, quantize(weight), torch.float32) is None
    assert gpu.dequantize(library, quantize(weight, Recipe("int4")), torch.float32) is None
    assert gpu.dequantize(library, quantize(weight, Recipe("nf4", 32)), torch.float32) is None
    assert gpu.dequantize(library, quantize(weight[:1, :63]), torch.float32) is None
    assert gpu.dequantize(library, quantize(weight), torch.float64) is None


def test_the_product_keeps_no_matrix_for_its_backward_pass() -> None:
    layer = QuantizedLinear(quantize(torch.randn(24, 64)), torch.randn(24))
    x = torch.randn(5, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = DequantizedProduct.apply(x, layer.quantized, layer.bias)
    wanted = F.linear(x, layer.dequantize(), layer.bias)
    assert torch.allclose(out, wanted, atol=1e-5) and kept == []
    grad = torch.randn_like(out)
    (mine,) = torch.autograd.grad(out, x, grad)
    (theirs,) = torch.autograd.grad(wanted, x, grad)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_fakes_have_the_libraries_arguments() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    theirs = inspect.signature(varlen.varlen_attn).parameters
    assert set(inspect.signature(varlen_attn).parameters) <= set(theirs)
    flash = pytest.importorskip("flash_attn")
    theirs = inspect.signature(flash.flash_attn_varlen_func).parameters
    assert set(inspect.signature(flash_attn_varlen_func).parameters) <= set(theirs)
