"""Adapters of different rows in one batch: the kernel against plain PyTorch, and rows that do not notice each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.kernels import native, segments
from tunegate.kernels.segments import (
    Factors,
    FactorTable,
    Segment,
    Segments,
    Target,
    _lay_out_twin,
    add_segments,
    lay_out,
)


def factors(rank: int, k: int, n: int, dtype: torch.dtype, *, dora: bool, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, k, generator=g), torch.randn(rank, n, generator=g)
    gain = 0.5 + torch.rand(n, generator=g) if dora else None
    return Factors(a.to(dtype), b.to(dtype), 0.25 + seed, gain)


def expected(x, out, bias, f: Factors):
    """The definition, in fp64."""
    low = f.scale * (x.double() @ f.a.double().t()) @ f.b.double()
    if f.gain is None:
        return out.double() + low
    bias = torch.zeros(out.shape[1]) if bias is None else bias
    return (out.double() - bias.double() + low) * f.gain.double() + bias.double()


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(-1, 3)), min_size=1, max_size=5),
    k=st.sampled_from([8, 24, 33, 100]),
    sizes=st.lists(st.sampled_from([5, 16, 136, 200]), min_size=1, max_size=3),
    with_bias=st.booleans(),
)
def test_every_row_gets_its_own_adapter(dtype, factor_dtype, rows, k, sizes, with_bias) -> None:
    table = FactorTable(len(sizes), factor_dtype)
    for slot, rank in enumerate((4, 7, 1, 16)):
        skipped = slot == 1 and len(sizes) > 1  # this one does not adapt every projection
        columns = {c: factors(rank, k, n, factor_dtype, dora=slot % 2 == 1, seed=slot) for c, n in enumerate(sizes)}
        table.add({c: f for c, f in columns.items() if not (skipped and c == 0)})
    found, begin = [], 0
    for count, slot in rows:
        if slot >= 0:
            found.append(Segment(begin, begin + count, slot))
        begin += count
    g = torch.Generator().manual_seed(7)
    x = torch.randn(begin, k + 3, generator=g).to(dtype)[:, :k]
    outs = [torch.randn(begin, n, generator=g).to(dtype) for n in sizes]
    biases = [torch.randn(n, generator=g) if with_bias else None for n in sizes]
    wanted = [out.double().clone() for out in outs]
    for s in found:
        for column, f in (table.slots[s.slot] or {}).items():
            own = slice(s.begin, s.end)
            wanted[column][own] = expected(x[own], outs[column][own], biases[column], f)
    add_segments(
        x, Segments(table, found), [Target(o, c, b) for c, (o, b) in enumerate(zip(outs, biases, strict=True))]
    )
    for out, right in zip(outs, wanted, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((out.double() - right).abs().max() / (1 + right.abs().max())) < tolerance


def test_the_twin_says_the_same(monkeypatch) -> None:
    table = FactorTable(1)
    table.add({0: factors(3, 8, 12, torch.float32, dora=True, seed=1)})
    x, out, bias = torch.randn(5, 8), torch.randn(5, 12), torch.randn(12)
    wanted = expected(x[1:4], out[1:4], bias, table.slots[0][0])
    monkeypatch.setattr(segments.native, "library_for", lambda *_: None)
    before = out.clone()
    add_segments(x, Segments(table, [Segment(1, 4, 0)]), [Target(out, 0, bias)])
    assert torch.allclose(out[1:4].double(), wanted, atol=1e-5)
    assert torch.equal(out[0], before[0]) and torch.equal(out[4], before[4])


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    table = FactorTable(1)
    for slot in range(3):
        table.add({0: factors(16, 72, 100, torch.float32, dora=False, seed=slot)})
    x, base = torch.randn(15, 72), torch.randn(15, 100)
    together = base.clone()
    add_segments(x, Segments(table, [Segment(0, 4, 2), Segment(4, 11, 0), Segment(11, 15, 1)]), [Target(together, 0)])
    for row in range(15):
        alone = base[row : row + 1].clone()
        slot = 2 if row < 4 else 0 if row < 11 else 1
        add_segments(x[row : row + 1], Segments(table, [Segment(0, 1, slot)]), [Target(alone, 0)])
        assert torch.equal(alone[0], together[row])


def test_slots_are_used_again() -> None:
    table = FactorTable(1)
    slots = [table.add({0: factors(2, 8, 8, torch.float32, dora=False, seed=n)}) for n in range(20)]
    assert slots == list(range(20))
    table.remove(3)
    assert table.add({0: factors(5, 8, 8, torch.float32, dora=False, seed=99)}) == 3
    assert table.facts([0, 3]) == (5, {0}, set()) and table.room_rank == 64
    table.add({0: factors(65, 8, 8, torch.float32, dora=False, seed=7)})
    assert table.room_rank == 128  # what was recorded for 64 ends here, and not before


@pytest.mark.parametrize("wrong", ["dtype", "rank", "gain", "column", "layout"])
def test_factors_that_do_not_fit_are_refused(wrong: str) -> None:
    table = FactorTable(2)
    f = factors(2, 8, 6, torch.float32, dora=True, seed=0)
    bad = {
        "dtype": Factors(f.a.bfloat16(), f.b, 1.0),
        "rank": Factors(f.a[:1], f.b, 1.0),
        "gain": Factors(f.a, f.b, 1.0, f.gain[:3]),
        "column": f,
        "layout": Factors(f.a.t().contiguous().t(), f.b, 1.0),
    }[wrong]
    with pytest.raises(ValueError, match="column"):
        table.add({2 if wrong == "column" else 0: bad})


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 7),
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, float("nan"), float("inf"), float("-inf"), -1e6]),
)
def test_values_are_laid_out_from_any_address(ahead, shapes, dtype, planted) -> None:
    g = torch.Generator().manual_seed(ahead)
    values = [torch.randn(n, m, generator=g) for n, m, _ in shapes]
    if planted is not None:
        values[-1][-1, -1] = planted
    data = np.concatenate([np.zeros(ahead, np.uint8), *(v.numpy().reshape(-1).view(np.uint8) for v in values)])
    parts, at = [], 0
    for value, (_, _, turned) in zip(values, shapes, strict=True):
        parts.append((ahead + 4 * at, at + 3, *value.shape, turned))
        at += value.numel()
    memory, twin = (torch.full((at + 4,), 0.25, dtype=dtype) for _ in range(2))
    largest = lay_out(data, memory, np.array(parts))
    laid = [(value.t() if turned else value).reshape(-1) for value, (_, _, turned) in zip(values, shapes, strict=True)]
    edge = torch.full((3,), 0.25)
    wanted = torch.cat([edge, *laid, edge[:1]]).to(dtype)
    assert torch.equal(memory.nan_to_num(0.5), wanted.nan_to_num(0.5))
    for kind in (False, True):
        mine = [float(v.abs().max()) for v, (_, _, turned) in zip(values, shapes, strict=True) if turned is kind]
        assert largest[kind] == max((m if math.isfinite(m) else math.inf for m in mine), default=0.0)
    assert _lay_out_twin(data, twin, np.array(parts)) == largest
    assert torch.equal(twin.nan_to_num(0.5), memory.nan_to_num(0.5))


def test_nothing_is_read_or_written_outside() -> None:
    data, memory = np.zeros(40, np.uint8), torch.zeros(12)
    for part in ((1, 0, 2, 5), (-1, 0, 1, 1), (37, 0, 1, 1), (0, 3, 2, 5), (0, -1, 1, 1), (0, 0, -1, -1)):
        with pytest.raises(ValueError, match="a matrix outside"):
            lay_out(data, memory, np.array([(*part, 0)]))
    with pytest.raises(ValueError, match="expected contiguous"):
        lay_out(data, torch.zeros(2, 5), np.array([(0, 0, 2, 5, 0)]))
    assert lay_out(data, memory, np.array([(0, 2, 2, 5, 1), (0, 0, 0, 3, 1)])) == (0.0, 0.0)
    assert lay_out(data, memory, np.empty((0, 5), np.int64)) == (0.0, 0.0)
