from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import DTYPES, assert_rounded, assert_same_bytes_on_any_threads, rows

from tunegate.kernels import native
from tunegate.kernels.gain import gain_backward


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 150), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0, 5]),
    st.sampled_from([1.0, 0.25]),
)  # fmt: skip
def test_it_is_the_formula_in_fp64(count, columns, dtype, with_bias, gap, factor):
    grad, out = rows(count, columns, dtype, 1, gap=gap), rows(count, columns, dtype, 2, gap=2 * gap)
    generator = torch.Generator().manual_seed(3)
    gain, bias = torch.rand(columns, generator=generator) + 0.5, torch.randn(columns, generator=generator)
    scaled = rows(count, columns, dtype, 4, gap=1)
    centred = out.double() - (bias.double() if with_bias else 0.0)
    wanted = (factor * grad.double() * centred).sum(0)
    wanted_scaled = factor * grad.double() * gain.double()
    sums = gain_backward(grad, out, bias if with_bias else None, gain, scaled, factor=factor)
    assert_rounded(scaled, wanted_scaled, slack=1e-6)
    size = (factor * grad.double() * centred).abs().sum(0)
    assert ((sums.double() - wanted).abs() <= 1e-5 * (1 + size)).all()


def test_in_place_and_on_any_number_of_threads():
    out, gain = rows(300, 65, torch.float32, 2), torch.linspace(0.5, 2.0, 65)

    def run():
        grad = rows(300, 65, torch.float32, 1)
        sums = gain_backward(grad, out, None, gain, grad)
        return sums, grad

    assert_same_bytes_on_any_threads(run)
    sums, scaled = run()
    before = rows(300, 65, torch.float32, 1)
    torch.testing.assert_close(scaled, before * gain)
    torch.testing.assert_close(sums, (before * out).sum(0), rtol=1e-4, atol=1e-4)


def test_wrong_inputs_are_named():
    grad, gain = torch.ones(4, 3), torch.ones(3)
    with pytest.raises(ValueError, match="out must be"):
        gain_backward(grad, torch.ones(4, 2), None, gain, grad)
    if native.library() is None:
        return
    with pytest.raises(ValueError, match="workspace"):
        gain_backward(grad, grad, None, gain, grad.clone(), workspace=torch.ones(1))
