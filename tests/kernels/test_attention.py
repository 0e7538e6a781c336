"""The native varlen and decode kernels against one plain masked softmax per row, in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunegate.kernels import DecodeStore, Layout, Plan, attention, decode_attention, native, varlen

needs_native = pytest.mark.skipif(native.library() is None, reason="the kernels are switched off or not built")


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    prefix: int = 0
    heads: int = 2
    kv_heads: int = 2
    dim: int = 32
    value_dim: int = 0
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def starts(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v inside one qkv buffer, as a projection leaves them."""
        value_dim, total = self.value_dim or self.dim, self.starts[-1]
        widths = (self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * value_dim)
        buffer = torch.randn(total, sum(widths), generator=torch.Generator().manual_seed(total)).to(self.dtype)
        q, k, v = buffer.split(widths, dim=1)
        return (
            q.unflatten(1, (self.heads, self.dim)),
            k.unflatten(1, (self.kv_heads, self.dim)),
            v.unflatten(1, (self.kv_heads, value_dim)),
        )


def plain(q: Tensor, k: Tensor, v: Tensor, case: Case, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one sequence in fp64; q are the last of its tokens."""
    place = torch.arange(len(k))
    ahead = place[len(k) - len(q) :, None] - place[None, :]
    seen = (ahead >= 0) & (ahead < (case.window or len(k)))
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def oracle(q: Tensor, k: Tensor, v: Tensor, case: Case, scale: float, skipped: int = 0) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for row, (start, end) in enumerate(zip(case.starts, case.starts[1:], strict=False)):
        if row == 0 and skipped:
            continue
        own = slice(start, end)
        shared = slice(0, case.prefix if row else 0)
        keys, values = torch.cat([k[shared], k[own]]), torch.cat([v[shared], v[own]])
        out, lse = plain(q[start - skipped : end - skipped], keys, values, case, scale)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs), torch.cat(sums)


def op(q: Tensor, k: Tensor, v: Tensor, case: Case, scale: float, skipped: int = 0) -> tuple[Tensor, Tensor]:
    starts = torch.tensor(case.starts)
    out, lse = torch.ops.tunegate.varlen_attention(
        q, k, v, starts, case.prefix, skipped, scale, case.window or -1, case.softcap or 0.0
    )
    return out, lse


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """fp32: sums of some hundred terms. bf16: each result is rounded once more, 2^-8 of its size; the inputs of the
    backward (out, grad_out) as well, so its sums carry some roundings of 2^-9 of their largest terms."""
    tolerance = 2e-5 if dtype == torch.float32 else 2**-6
    size = float(wanted.abs().max())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * max(size, 1.0))


def check(case: Case, skipped: int = 0) -> None:
    q, k, v = case.tensors()
    q, scale = q[skipped:], 1.7 * case.dim**-0.5
    mine = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = op(*mine, case, scale, skipped)
    wanted, wanted_lse = oracle(*exact, case, scale, skipped)
    close(out, wanted.detach(), case.dtype)
    torch.testing.assert_close(lse.double(), wanted_lse.detach(), rtol=1e-5, atol=1e-5)
    seen = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    found = torch.autograd.grad(out, mine, seen)
    for got, other in zip(found, torch.autograd.grad(wanted, exact, seen.double()), strict=True):
        close(got, other, case.dtype)


CASES = [
    Case((1,)),
    Case((1, 1, 1), heads=3, kv_heads=1),
    Case((1, 2, 1), prefix=1),
    Case((55, 20, 100, 1, 33), heads=9, kv_heads=3, dim=64),
    Case((13, 55, 20, 100, 1, 33), prefix=13, heads=3, kv_heads=1, dim=64),
    Case((150, 7, 300), prefix=150, heads=4, kv_heads=1, dim=80),
    Case((700, 5), heads=2, kv_heads=1, dim=32),
    Case((530,), heads=1, kv_heads=1, dim=64, window=70),
    Case((140, 40, 20, 90), prefix=140, heads=2, kv_heads=1, window=60),
    Case((40, 40, 20), prefix=40, heads=2, kv_heads=1, window=30, softcap=1.5),
    Case((40, 131), heads=8, kv_heads=1, dim=96, softcap=2.0),
    Case((70, 31), heads=3, kv_heads=3, dim=128, value_dim=64),
    Case((70, 31), heads=8, kv_heads=2, dim=40, value_dim=72),
    Case((140, 31), heads=4, kv_heads=4, dim=256),
    Case((17, 3), prefix=17, heads=4, kv_heads=2, dim=8, value_dim=24, window=1),
]


def told(case: Case) -> str:
    return f"{case.lengths}p{case.prefix}h{case.heads}/{case.kv_heads}d{case.dim}w{case.window}c{case.softcap}"


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=told)
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(Case(**{**case.__dict__, "dtype": dtype}))


@needs_native
@pytest.mark.parametrize("case", [c for c in CASES if c.prefix], ids=told)
def test_queries_after_a_cached_prefix(case: Case) -> None:
    check(case, skipped=case.prefix)


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from([(2, 2), (3, 1), (4, 1), (8, 1)]),
    st.sampled_from([8, 16, 32, 48]),
    st.none() | st.integers(1, 50),
    st.none() | st.just(1.5),
)
def test_any_layout(
    lengths: list[int],
    prefix: int,
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    rows = (prefix, *lengths) if prefix else tuple(lengths)
    check(Case(rows, prefix, *heads, dim, 0, window, softcap))


@needs_native
def test_the_op_passes_torchs_own_checks() -> None:
    case = Case((9, 4, 7), prefix=9, heads=4, kv_heads=2, dim=16)
    q, k, v = (x.clone().requires_grad_() for x in case.tensors())
    arguments = (q, k, v, torch.tensor(case.starts), case.prefix, 0, 0.3, 5, 2.0)
    torch.library.opcheck(torch.ops.tunegate.varlen_attention, arguments)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [Case((1100, 40), heads=3, kv_heads=1), Case((300, *range(20, 60)), 300, 4, 2)])
def test_the_same_bytes_on_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    """Rows long enough to be cut into chunks, and a prefix whose gradient is summed in slices."""
    case = Case(**{**case.__dict__, "dtype": dtype})
    q, k, v = (x.clone().requires_grad_() for x in case.tensors())
    seen = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out, _ = op(q, k, v, case, 0.3)
            found.append((out, *torch.autograd.grad(out, (q, k, v), seen)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("window, softcap", [(None, None), (9, None), (9, 1.5)])
@pytest.mark.parametrize("prefix", [0, 11])
def test_attention_is_its_twin(
    prefix: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What callers use, native against the grouped SDPA; twin with twin where the kernels are off."""
    lengths = (prefix, 20, 7, 1, 33) if prefix else (20, 7, 1, 33)
    case = Case(lengths, prefix, heads=6, kv_heads=2, dim=16)
    q, k, v = (x.clone().requires_grad_() for x in case.tensors())
    plan = Plan(Layout(lengths, prefix))
    seen = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        out = attention(q, k, v, plan, scale=0.3, window=window, softcap=softcap)
        with torch.no_grad():
            again = attention(q, k, v, plan, scale=0.3, window=window, softcap=softcap)
        return [out.detach(), again, *torch.autograd.grad(out, (q, k, v), seen)]

    mine = run()
    monkeypatch.setattr(varlen, "supports", lambda *_: False)
    for got, wanted in zip(mine, run(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(9, 3, 64, 64), (2, 2, 40, 24), (8, 1, 80, 80)])
@pytest.mark.parametrize("prefix, window, softcap", [(0, None, None), (37, None, 2.0), (150, 40, None), (5, 3, 1.5)])
def test_decoding_is_its_twin(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, value_dim: int, prefix: int, window: int, softcap: float
) -> None:
    """Twin in fp64 on the same numbers; places no row has filled hold NaN."""
    lengths = torch.tensor([1, 5, 30, 2, 3, 4, 17, 29, 8, 9, 1])
    generator = torch.Generator().manual_seed(prefix)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = len(lengths)
    store = DecodeStore(
        random(prefix, kv_heads, dim),
        random(prefix, kv_heads, value_dim),
        random(rows, kv_heads, 32, dim),
        random(rows, kv_heads, 32, value_dim),
    )
    query = random(rows, heads, 2 * dim)[..., :dim]
    exact = DecodeStore(*(x.double() for x in (store.prefix_key, store.prefix_value, store.key, store.value)))
    options = {"scale": 0.2, "window": window, "softcap": softcap}
    wanted = decode_attention(query.double(), exact, lengths, **options)
    if native.library() is not None:
        for row, length in enumerate(lengths.tolist()):
            store.key[row, :, length:] = store.value[row, :, length:] = math.nan
    got = decode_attention(query, store, lengths, **options)
    # the twin rounds its bf16 scores and weights as well; the kernel the result, and weights before a matrix unit
    rounded = 2**-7 if native.describe()[0].removeprefix("emulated") in ("amx", "avx512bf16", "bf16") else 2**-8
    tolerance = 2e-5 if dtype == torch.float32 else rounded if native.library() is not None else 2**-5
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    case = Case((5, 3))
    q, k, v = case.tensors()
    rows, options = varlen.Rows(torch.tensor(case.starts)), varlen.Options(1.0)
    out, lse = torch.empty(8, 2, 32), torch.empty(8, 2)
    with pytest.raises(ValueError, match="k: expected"):
        varlen.attention_forward(q, k[1:], v, rows, options, out=out, lse=lse)
    with pytest.raises(ValueError, match="lse: expected"):
        varlen.attention_forward(q, k, v, rows, options, out=out, lse=lse.double())
    with pytest.raises(ValueError, match="multiples of 8"):
        varlen.attention_forward(q[..., :30], k[..., :30], v, rows, options, out=out, lse=lse)
    saved = varlen.Saved(q, k, v, out, lse)
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    with pytest.raises(ValueError, match="workspace: expected"):
        varlen.attention_backward(out, saved, rows, options, grads, torch.empty(3))


@pytest.mark.parametrize(
    "starts, prefix, skipped", [([0], 0, 0), ([1, 2], 0, 0), ([0, 2, 2], 0, 0), ([0, 2, 3], 3, 0), ([0, 2, 3], 2, 1)]
)
def test_rows_that_are_none(starts: list[int], prefix: int, skipped: int) -> None:
    with pytest.raises(ValueError, match=r"starts|prefix|skipped"):
        varlen.Rows(torch.tensor(starts), prefix, skipped)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    size=st.sampled_from([4, 8, 16]),
    dims=st.sampled_from([(8, 8), (16, 24), (64, 64), (40, 80)]),
    window=st.sampled_from([None, 1, 7, 33]),
    softcap=st.sampled_from([None, 2.0]),
    prefix=st.sampled_from([0, 5]),
    is_new=st.booleans(),
)
def test_keys_in_scattered_pages_are_those_of_a_row(
    dtype, lengths, size, dims, window, softcap, prefix, is_new
) -> None:
    g = torch.Generator().manual_seed(sum(lengths))
    rows, heads, kv_heads = len(lengths), 6, 2
    most = -(-max(lengths) // size)
    pages = torch.randperm(rows * most + 3, generator=g)[: rows * most].view(rows, most).contiguous()
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    key, value = (draw(rows * most + 3, kv_heads, size, d) for d in dims)
    query, before = draw(rows, heads, dims[0]), (draw(prefix, kv_heads, dims[0]), draw(prefix, kv_heads, dims[1]))
    new = (draw(rows, kv_heads, dims[0]), draw(rows, kv_heads, dims[1])) if is_new else None
    counts = torch.tensor(lengths)
    dense = [part[pages].transpose(1, 2).flatten(2, 3).clone() for part in (key, value)]
    if new is not None:
        for part, own in zip(dense, new, strict=True):
            part[torch.arange(rows), :, counts - 1] = own
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    exact = DecodeStore(*(part.double() for part in (*before, *dense)))
    wanted = decode_attention(query.double(), exact, counts, **options)
    out = torch.empty(rows, heads, dims[1], dtype=dtype)
    places = varlen.Places(pages, counts, size)
    varlen.decode(query, before, (key, value), places, varlen.Options(**options), out=out, new=new)
    assert float((out.double() - wanted).abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2)
    if new is not None:
        last = pages[torch.arange(rows), (counts - 1) // size]
        assert torch.equal(key[last, :, (counts - 1) % size], new[0])
        assert torch.equal(value[last, :, (counts - 1) % size], new[1])


@needs_native
@pytest.mark.parametrize("tokens", [2, 17, 40])
def test_new_tokens_of_one_row_see_each_other(tokens: int) -> None:
    """A piece of a prompt, a token a row on the same pages, is causal attention over it and what was there."""
    g = torch.Generator().manual_seed(tokens)
    heads, kv_heads, dim, size, past = 6, 2, 16, 8, 5
    pages = torch.tensor([[3, 1, 5, 0, 2, 6]])
    key, value = (torch.randn(7, kv_heads, size, dim, generator=g) for _ in range(2))
    query = torch.randn(tokens, heads, dim, generator=g)
    new = (torch.randn(tokens, kv_heads, dim, generator=g), torch.randn(tokens, kv_heads, dim, generator=g))
    k, v = (
        torch.cat([part[pages[0]].transpose(0, 1).flatten(1, 2)[:, :past], own.transpose(0, 1)], dim=1)
        for part, own in zip((key, value), new, strict=True)
    )
    seen = torch.ones(tokens, past + tokens).tril(past).bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), *(x.repeat_interleave(heads // kv_heads, 0) for x in (k, v)), attn_mask=seen
    ).transpose(0, 1)
    places = varlen.Places(pages.repeat(tokens, 1), past + 1 + torch.arange(tokens), size)
    out, nothing = torch.empty_like(query), (key.new_empty(0, kv_heads, dim), key.new_empty(0, kv_heads, dim))
    varlen.decode(query, nothing, (key, value), places, varlen.Options(dim**-0.5), out=out, new=new)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@needs_native
def test_places_that_do_not_exist_are_refused() -> None:
    table, counts = torch.tensor([[0, 1]]), torch.tensor([5])
    for wrong in (
        lambda: varlen.Places(table, torch.tensor([9]), 4),
        lambda: varlen.Places(table, torch.tensor([0]), 4),
        lambda: varlen.Places(table - 1, counts, 4),
        lambda: varlen.Places(table.int(), counts, 4),
    ):
        with pytest.raises(ValueError, match=r"lengths|table"):
            wrong()
    query, pages = torch.randn(1, 2, 8), torch.randn(1, 1, 4, 8)  # one page, and the table names a second one
    nothing = (torch.empty(0, 1, 8), torch.empty(0, 1, 8))
    with pytest.raises(ValueError, match="pages"):
        varlen.decode(
            query, nothing, (pages, pages), varlen.Places(table, counts, 4), varlen.Options(1.0), out=query.clone()
        )
