"""Attention over flat layouts and decoding stores, against one plain softmax per row in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunegate.kernels import DecodeStore, Layout, Plan, attention, decode_attention, similar_lengths
from tunegate.kernels.attention import PADDING_ALLOWED

HEADS, KV_HEADS, DIM = 4, 2, 3


@dataclass(frozen=True)
class Case:
    layout: Layout
    window: int | None = None
    softcap: float | None = None
    kv_heads: int = KV_HEADS

    @property
    def rows(self) -> list[list[int]]:
        """Every row as the tokens it consists of, the shared prefix included."""
        starts, lengths = self.layout.starts, self.layout.lengths
        own = [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
        if not self.layout.prefix:
            return own
        return [own[0], *(own[0] + row for row in own[1:])]


def tensors(case: Case, seed: int = 0, value_dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, DIM), (case.kv_heads, DIM), (case.kv_heads, value_dim))
    return tuple(
        torch.randn(case.layout.tokens, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Causal attention of one sequence, head by head, by the definition."""
    length, heads, _ = q.shape
    ahead = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (ahead >= 0) & (ahead < (window or length))
    out = []
    for head in range(heads):
        shared = head * k.shape[1] // heads
        scores = q[:, head] @ k[:, shared].T * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        out.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, shared])
    return torch.stack(out, 1)


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Each row alone with its own copy of the prefix; the prefix's own outputs come from its own row."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    for number, row in enumerate(case.rows):
        whole = plain(q[row], k[row], v[row], scale, case.window, case.softcap)
        kept = row if number == 0 else row[case.layout.prefix :]
        out = out.index_put((torch.tensor(kept),), whole[len(row) - len(kept) :])
    return out


def check(case: Case, scale: float = 0.7, value_dim: int = DIM) -> None:
    q, k, v = tensors(case, value_dim=value_dim)
    seen = torch.randn(
        case.layout.tokens, HEADS, value_dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    got = attention(q, k, v, Plan(case.layout), scale=scale, window=case.window, softcap=case.softcap)
    wanted = reference(case, q, k, v, scale)
    # the soft-capped product takes its softmax in fp32
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if case.softcap is None else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, wanted, **tolerance)
    mine = torch.autograd.grad(got, (q, k, v), seen)
    for one, other in zip(mine, torch.autograd.grad(wanted, (q, k, v), seen), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)
_cases = st.builds(
    lambda lengths, prefix, window, softcap, kv_heads: Case(
        Layout((prefix, *lengths) if prefix else tuple(lengths), prefix), window, softcap, kv_heads
    ),
    _lengths,
    st.integers(0, 6),
    st.none() | st.integers(1, 8),
    st.none() | st.just(1.5),
    st.sampled_from([1, 2, 4]),
)


@settings(max_examples=120)
@given(_cases)
def test_forward_and_gradients_equal_one_softmax_a_row(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(Layout((1,))),
        Case(Layout((1, 1, 1))),
        Case(Layout((7,))),
        Case(Layout((13, 1, 5, 12, 2))),
        Case(Layout((13, 1, 5, 12, 2)), kv_heads=1),
        Case(Layout((13, 1, 5, 12, 2)), window=3),
        Case(Layout((13, 1, 5, 12, 2)), softcap=2.0),
        Case(Layout((5, 1, 5, 12, 2), 5)),
        Case(Layout((5, 1, 5, 12, 2), 5), window=1),
        Case(Layout((5, 1, 5, 12, 2), 5), window=4, softcap=2.0),
    ],
    ids=lambda case: f"{case.layout.lengths}/{case.layout.prefix} w{case.window} c{case.softcap} kv{case.kv_heads}",
)
def test_named_layouts(case: Case) -> None:
    check(case)


def test_values_may_be_wider_than_keys() -> None:
    check(Case(Layout((4, 3, 6), 4)), value_dim=5)


def test_a_shared_prefix_equals_copies_of_it_gradients_included() -> None:
    prefix, own = 4, (3, 1, 6)
    shared = Case(Layout((prefix, *own), prefix))
    q, k, v = tensors(shared)
    copies = [token for row in shared.rows[1:] for token in row]
    flat = Layout(tuple(prefix + n for n in own))
    got = attention(q, k, v, Plan(shared.layout), scale=0.5)
    unshared = attention(q[copies], k[copies], v[copies], Plan(flat), scale=0.5)
    torch.testing.assert_close(got[copies], unshared, rtol=1e-9, atol=1e-9)
    seen = torch.randn_like(unshared)
    ours = torch.autograd.grad(got[copies], (q, k, v), seen)
    theirs = torch.autograd.grad(unshared, (q, k, v), seen)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(_lengths, st.integers(1, 6), st.none() | st.integers(1, 8), st.none() | st.just(1.5))
def test_a_cached_prefix_gives_what_the_whole_run_gives(
    own: list[int], prefix: int, window: int | None, softcap: float | None
) -> None:
    layout = Layout((prefix, *own), prefix)
    q, k, v = tensors(Case(layout))
    options = {"scale": 0.5, "window": window, "softcap": softcap}
    whole = attention(q, k, v, Plan(layout), **options)
    rest = attention(q[prefix:], k, v, Plan(layout, cached_prefix=True), **options)
    assert torch.equal(rest, whole[prefix:])


def test_a_cached_prefix_needs_a_prefix() -> None:
    with pytest.raises(ValueError, match="prefix"):
        Plan(Layout((3, 4)), cached_prefix=True)


@pytest.mark.parametrize("lengths, prefix", [((3, 0), 0), ((2, 5), 3), ((-1,), 0)])
def test_bad_layouts(lengths: tuple[int, ...], prefix: int) -> None:
    with pytest.raises(ValueError, match="bad layout"):
        Layout(lengths, prefix)


def test_positions_go_on_after_the_prefix() -> None:
    assert Layout((3, 2, 1)).positions() == [0, 1, 2, 0, 1, 0]
    assert Layout((3, 2, 1), 3).positions() == [0, 1, 2, 3, 4, 3]
    assert Layout((3, 2, 1)).starts == (0, 3, 5)


def test_a_row_does_not_see_its_neighbours() -> None:
    case = Case(Layout((4, 3, 5, 6), 4))
    q, k, v = (t.detach() for t in tensors(case))
    before = attention(q, k, v, Plan(case.layout), scale=1.0)
    start, end = case.layout.starts[2], case.layout.starts[3]
    for tensor in (q, k, v):
        tensor[start:end] += 100.0
    after = attention(q, k, v, Plan(case.layout), scale=1.0)
    others = [t for t in range(case.layout.tokens) if not start <= t < end]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[start:end], after[start:end])


def test_gradients_of_a_shared_prefix_have_the_same_bits_each_time() -> None:
    """Indexing the prefix once per row made torch add its gradients in the order the threads arrived."""
    layout = Layout((24, *(12 + n % 5 for n in range(40))), 24)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.tokens, heads, 32, generator=generator).requires_grad_() for heads in (4, 2, 2))
    seen, plan = torch.randn(layout.tokens, 4, 32, generator=generator), Plan(layout)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad(attention(q, k, v, plan, scale=0.2), (q, k, v), seen) for _ in range(8)]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@given(st.lists(st.integers(1, 400), max_size=60))
def test_groups_hold_every_row_once_and_waste_little(lengths: list[int]) -> None:
    groups = similar_lengths(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert min(lengths[row] for row in group) >= PADDING_ALLOWED * longest
    # a group begins only where the one before cannot take the row, so their number grows with the range alone
    assert len(groups) <= 1 + math.log(400) / -math.log(PADDING_ALLOWED)


def test_groups_by_hand() -> None:
    # 10 takes down to 7; 6 begins a group that takes down to 4.2; equal lengths keep their order
    assert similar_lengths([6, 10, 7, 10, 5, 4]) == [[1, 3, 2], [0, 4], [5]]
    assert similar_lengths([]) == []


# --- decoding -------------------------------------------------------------------------------------------------------


def store_of(prefix: int, rows: int, capacity: int, kv_heads: int, value_dim: int, fill: float) -> DecodeStore:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key, value = random(rows, kv_heads, capacity, DIM), random(rows, kv_heads, capacity, value_dim)
    store = DecodeStore(random(prefix, kv_heads, DIM), random(prefix, kv_heads, value_dim), key, value)
    store.key[:, :, -1] = store.value[:, :, -1] = fill  # a place no row has filled
    return store


def check_decode(
    lengths: list[int],
    prefix: int,
    window: int | None = None,
    softcap: float | None = None,
    kv_heads: int = KV_HEADS,
    value_dim: int = DIM,
) -> None:
    store = store_of(prefix, len(lengths), max(lengths) + 1, kv_heads, value_dim, fill=1e6)
    query = torch.randn(len(lengths), HEADS, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = decode_attention(query, store, torch.tensor(lengths), scale=0.6, window=window, softcap=softcap)
    for row, length in enumerate(lengths):
        k = torch.cat([store.prefix_key, store.key[row, :, :length].transpose(0, 1)])
        v = torch.cat([store.prefix_value, store.value[row, :, :length].transpose(0, 1)])
        q = torch.zeros(len(k), HEADS, DIM, dtype=torch.float64)
        q[-1] = query[row]
        wanted = plain(q, k, v, 0.6, window, softcap)[-1]
        torch.testing.assert_close(got[row], wanted, rtol=1e-5, atol=1e-5)  # its softmax is fp32


@settings(max_examples=120)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 6),
    st.none() | st.integers(1, 12),
    st.none() | st.just(1.5),
    st.sampled_from([1, 2, 4]),
)
def test_decoding_equals_one_softmax_a_row(
    lengths: list[int], prefix: int, window: int | None, softcap: float | None, kv_heads: int
) -> None:
    check_decode(lengths, prefix, window, softcap, kv_heads)


@pytest.mark.parametrize("prefix", [0, 5])
def test_decoding_with_values_wider_than_keys(prefix: int) -> None:
    check_decode([3, 1, 7], prefix, value_dim=5)


def test_decoding_reaches_into_the_prefix_only_as_far_as_the_window() -> None:
    # row lengths 1, 3 and 6 with a window of 4: three, one and none of the prefix's places are seen
    check_decode([1, 3, 6], 5, window=4)
