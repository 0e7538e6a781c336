from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import DTYPES, assert_rounded, assert_same_bytes_on_any_threads, rows

from tunegate.kernels import rope
from tunegate.kernels.rope import rope_


def heads(tokens, count, dim, dtype, seed, gap=0):
    """(tokens, count, dim) with foreign elements between heads and between tokens."""
    wide = rows(tokens, (count + (gap > 0)) * (dim + gap), dtype, seed)
    return wide.view(tokens, count + (gap > 0), dim + gap)[:, :count, :dim]


def exact(x, cos, sin, inverse):
    """The linear map as a matrix per token, in fp64."""
    rotated = cos.shape[1]
    half = rotated // 2
    matrix = torch.eye(x.shape[2], dtype=torch.float64).repeat(len(x), 1, 1)
    i = torch.arange(half)
    matrix[:, i, i] = cos[:, :half].double()
    matrix[:, i, i + half] = -sin[:, :half].double()
    matrix[:, i + half, i + half] = cos[:, half:].double()
    matrix[:, i + half, i] = sin[:, half:].double()
    return torch.einsum("thi,toi->tho", x.double(), matrix.transpose(1, 2) if inverse else matrix)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 7),
    st.integers(1, 4),
    st.integers(1, 60),
    st.integers(0, 30),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0, 3]),
)
def test_is_the_linear_map_and_its_transpose(tokens, count, dim, half, dtype, angle_dtype, inverse, gap):
    rotated = 2 * min(half, dim // 2)
    x = heads(tokens, count, dim, dtype, 1, gap)
    cos, sin = (rows(tokens, rotated, angle_dtype, seed, gap=gap) for seed in (2, 3))  # the halves differ
    want = exact(x, cos, sin, inverse)
    whole = x._base.clone() if x._base is not None else None
    rope_(x, cos, sin, inverse=inverse)
    assert_rounded(x, want, slack=1e-6)
    if gap and tokens:
        now = x._base.view(tokens, count + 1, dim + gap)
        before = whole.view_as(now)
        assert torch.equal(now[:, count:], before[:, count:]) and torch.equal(now[..., dim:], before[..., dim:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_transformers(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = heads(50, 9, 64, dtype, 1), heads(50, 3, 64, dtype, 2)
    angles = torch.outer(torch.arange(50.0), 10000 ** (-torch.arange(32.0) / 32)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wants = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for x, want in zip((q, k), wants, strict=True):
        original = x.clone()
        rope_(x, cos, sin)
        # bf16: theirs rounds each product and the sum, three roundings of values up to |x1| + |x2|
        close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-6}
        torch.testing.assert_close(x, want[0].transpose(0, 1), **close)
        rope_(x, cos, sin, inverse=True)
        torch.testing.assert_close(x, original, rtol=2**-6, atol=2e-6 if dtype == torch.float32 else 2**-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_native_is_its_twin(dtype, inverse):
    x, cos, sin = heads(9, 3, 50, dtype, 1), rows(9, 48, dtype, 2), rows(9, 48, dtype, 3)
    twin = x.clone()
    rope._twin(twin, cos, sin, inverse)
    rope_(x, cos, sin, inverse=inverse)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(x, twin, **close)


def test_same_bytes_on_any_number_of_threads():
    x, cos, sin = heads(301, 9, 64, torch.bfloat16, 1), rows(301, 64, torch.float32, 2), rows(301, 64, torch.float32, 3)

    def run():
        own = x.clone()
        rope_(own, cos, sin)
        return (own,)

    assert_same_bytes_on_any_threads(run)


def test_operator_has_a_fake_and_a_gradient():
    x = heads(5, 2, 12, torch.float32, 1).clone().requires_grad_()
    cos, sin = rows(5, 8, torch.float32, 2), rows(5, 8, torch.float32, 3)
    torch.library.opcheck(torch.ops.tunegate.rope.default, (x, cos, sin))
    grad_out = heads(5, 2, 12, torch.float32, 4)
    (grad,) = torch.autograd.grad(torch.ops.tunegate.rope(x, cos, sin), x, grad_out)
    assert_rounded(grad, exact(grad_out, cos, sin, True), slack=1e-6)
    with pytest.raises(ValueError, match="detach"):
        torch.ops.tunegate.rope(x, cos.clone().requires_grad_(), sin)


def test_wrong_inputs_are_named():
    x, angles = torch.zeros(4, 2, 8), torch.zeros(4, 8)
    for match, call in {
        "x must be": lambda: rope_(x[0], angles, angles),
        "cos must be": lambda: rope_(x, torch.zeros(4, 7), torch.zeros(4, 7)),
        "at most 8": lambda: rope_(x, torch.zeros(4, 10), torch.zeros(4, 10)),
        "sin must be": lambda: rope_(x, angles, torch.zeros(3, 8)),
        "inner stride 1": lambda: rope_(x.transpose(1, 2).contiguous().transpose(1, 2), angles, angles),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
