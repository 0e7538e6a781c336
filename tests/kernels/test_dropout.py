from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import DTYPES, assert_same_bytes_on_any_threads, rows

from tunegate.kernels.dropout import add_dropped, dropped, kept_mask


def reference_draw(seed: int, row: int, column: int) -> int:
    """The 16-bit draw by Python integers, written from the definition."""
    word, half = 2**64 - 1, 2**32 - 1

    def mixed(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mixed((mixed((seed + golden) & word) + (row + 1) * golden) & word)
    h = (column // 2 + (key & half)) & half
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & half
    h ^= key >> 32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & half
    h ^= h >> 16
    return h >> 16 if column % 2 else h & 0xFFFF


seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=30, deadline=None)
@given(
    seeds, st.integers(0, 2**40), st.integers(0, 9), st.integers(1, 100), st.floats(0, 0.99), st.sampled_from(DTYPES)
)
def test_mask_scale_and_addition(seed, row_offset, count, columns, rate, dtype):
    x = rows(count, columns, dtype, 1, gap=3).abs() + 0.5
    out, before = rows(count, columns, dtype, 2, gap=1), rows(count, columns, dtype, 3)
    threshold = round(rate * 65536)
    mask = kept_mask(count, columns, rate=rate, seed=seed, row_offset=row_offset)
    dropped(x, out, rate=rate, seed=seed, row_offset=row_offset)
    assert torch.equal(out != 0, mask)
    wide = torch.where(mask, x.float() * (65536 / (65536 - threshold)), 0.0)
    assert torch.equal(out, wide.to(dtype))
    total = before.clone()
    add_dropped(x, total, rate=rate, seed=seed, row_offset=row_offset)
    close = {"rtol": 1e-6, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(total, (before.float() + wide).to(dtype), **close)
    for row in range(min(count, 2)):
        draws = [reference_draw(seed, row_offset + row, column) >= threshold for column in range(columns)]
        assert draws == mask[row].tolist()


def test_a_batch_in_parts_has_one_mask_and_backward_is_the_transpose():
    x, grad = rows(64, 50, torch.float32, 1), rows(64, 50, torch.float32, 2)
    whole, parts, back = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(x)
    dropped(x, whole, rate=0.3, seed=9)
    for start in range(0, 64, 20):
        dropped(x[start : start + 20], parts[start : start + 20], rate=0.3, seed=9, row_offset=start)
    assert torch.equal(whole, parts)
    add_dropped(grad, back, rate=0.3, seed=9)
    torch.testing.assert_close((whole * grad).sum(), (x * back).sum())
    dropped(whole, whole, rate=0.0, seed=1)
    assert torch.equal(whole, parts)


def kept(rate: float, seed: int) -> torch.Tensor:
    return kept_mask(512, 512, rate=rate, seed=seed).double()


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_draws_look_independent(rate, seed):
    """Each statistic below is N(0, 1) for independent draws; 5 sigma, over some 150 of them, is one in ten thousand."""
    mask = kept(rate, seed)
    noise = (mask - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    assert abs(noise.sum().item()) / 512 < 5
    for other in (kept(rate, seed + 1), kept(rate, (seed + 0x9E3779B97F4A7C15) % 2**64), kept(rate, seed ^ 1 << 32)):
        assert abs((noise * (other - (1 - rate))).sum().item()) / (rate * (1 - rate)) ** 0.5 / 512 < 5
    for row_shift in (0, 1, 2, 64):
        for column_shift in (0, 1, 2, 3, 8, 16, 64):
            if row_shift or column_shift:
                pair = noise * noise.roll((row_shift, column_shift), (0, 1))
                assert abs(pair.sum().item()) / 512 < 5
    for sums in (noise.sum(0), noise.sum(1)):  # chi-square with 512 degrees of freedom, as a normal
        chi = (sums.square() / 512).sum().item()
        assert abs(chi - 512) / (2 * 512) ** 0.5 < 5


def test_draws_are_uniform():
    """Chi-square of where draws fall among 64 equal bins, by masks at 63 rates."""
    counts = torch.stack([kept_mask(256, 256, rate=k / 64, seed=3).sum() for k in range(64)]).double()
    bins = counts - torch.cat((counts[1:], counts.new_zeros(1)))
    expected = 256 * 256 / 64
    chi = ((bins - expected).square() / expected).sum().item()
    assert abs(chi - 63) / (2 * 63) ** 0.5 < 5


def test_same_bytes_on_any_number_of_threads():
    x = rows(301, 576, torch.bfloat16, 1)

    def run():
        out = x.clone()
        dropped(x, out, rate=0.1, seed=4)
        add_dropped(x, out, rate=0.1, seed=5)
        return (out,)

    assert_same_bytes_on_any_threads(run)


def test_wrong_inputs_are_named():
    x = torch.zeros(2, 4)
    for rate in (-0.1, 1.0, 1 - 1e-9, float("nan")):
        with pytest.raises(ValueError, match="dropout rate"):
            dropped(x, x, rate=rate, seed=0)
    with pytest.raises(ValueError, match="seed must"):
        dropped(x, x, rate=0.1, seed=-1)
