from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import DTYPES, assert_rounded, assert_same_bytes_on_any_threads, rows

from tunegate.kernels import norm
from tunegate.kernels.norm import rms_norm, rms_norm_backward

EPS = 1e-5


def exact(x, weight, grad_out, offset, add):
    """Forward, inverse rms and gradient by fp64 autograd."""
    x = x.double().requires_grad_()
    inverse = torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
    out = x * inverse * (weight.double() + offset)
    (grad,) = torch.autograd.grad(out, x, grad_out.double())
    return out.detach(), inverse.detach()[:, 0], grad + (0 if add is None else add.double())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
    st.sampled_from([0, 5]),
)
def test_forward_and_backward_are_the_equations(count, columns, dtype, weight_dtype, offset, adds, gap):
    x, grad_out = (rows(count, columns, dtype, seed, gap=gap) for seed in (1, 2))
    weight = rows(1, columns, weight_dtype, 3)[0].contiguous()
    add = rows(count, columns, dtype, 4, gap=1) if adds else None
    out, grad, inverse = (
        rows(count, columns, dtype, 5, gap=2),
        rows(count, columns, dtype, 6, gap=3),
        torch.empty(count),
    )
    want_out, want_inverse, want_grad = exact(x, weight, grad_out, offset, add)
    rms_norm(x, weight, EPS, out, inverse, offset=offset)
    rms_norm_backward(grad_out, x, weight, inverse, grad, offset=offset, add=add)
    assert_rounded(out, want_out, slack=2e-6)
    torch.testing.assert_close(inverse.double(), want_inverse, rtol=1e-6, atol=0)
    largest = max(1.0, want_inverse.max().item() if count else 1.0)  # one column: s can be large, the gradient cancels
    assert_rounded(grad, want_grad, slack=4e-6 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_agrees_with_transformers(kind, dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = (LlamaRMSNorm if kind == "llama" else GemmaRMSNorm)(96, eps=EPS).to(dtype)
    with torch.no_grad():
        module.weight.copy_(rows(1, 96, torch.float32, 1)[0])
    x = rows(20, 96, dtype, 2).requires_grad_()
    grad_out = rows(20, 96, dtype, 3)
    want = module(x)
    (want_grad,) = torch.autograd.grad(want, x, grad_out)
    offset = 1.0 if kind == "gemma" else 0.0
    out, grad, inverse = torch.empty_like(want), torch.empty_like(want), torch.empty(20)
    with torch.no_grad():
        rms_norm(x, module.weight, EPS, out, inverse, offset=offset)
        rms_norm_backward(grad_out, x, module.weight, inverse, grad, offset=offset)
    # bf16: theirs rounds the normed value and the gradient at each step, two or three half-ulps of 2^-8
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(out, want.detach(), **close)
    torch.testing.assert_close(grad, want_grad, **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_is_its_twin_and_outputs_may_be_inputs(dtype):
    x, grad_out, add = (rows(33, 77, dtype, seed) for seed in (1, 2, 3))
    weight, inverse, twin_inverse = rows(1, 77, dtype, 4)[0], torch.empty(33), torch.empty(33)
    out, twin_out, grad, twin_grad = (torch.empty_like(x) for _ in range(4))
    norm._norm_twin(x, weight, EPS, twin_out, twin_inverse, 0.0)
    norm._backward_twin(grad_out, x, weight, twin_inverse, twin_grad, 0.0, add)
    rms_norm(x, weight, EPS, out, inverse)
    rms_norm_backward(grad_out, x, weight, inverse, grad, add=add)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(out, twin_out, **close)
    torch.testing.assert_close(grad, twin_grad, **close)
    for aliased in ("grad_out", "add", "x"):
        own = {"grad_out": grad_out.clone(), "add": add.clone(), "x": x.clone()}
        rms_norm_backward(own["grad_out"], own["x"], weight, inverse, own[aliased], add=own["add"])
        assert torch.equal(own[aliased], grad)
    own_x = x.clone()
    rms_norm(own_x, weight, EPS, own_x, inverse)
    assert torch.equal(own_x, out)


def test_norm_of_heads_through_a_view():
    heads = rows(6 * 4, 16, torch.float32, 1).view(6, 64)
    weight, out, inverse = torch.ones(16), torch.empty(24, 16), torch.empty(24)
    rms_norm(heads.view(24, 16), weight, EPS, out, inverse)
    want = torch.nn.functional.rms_norm(heads.view(6, 4, 16), (16,), weight, EPS)
    torch.testing.assert_close(out.view(6, 4, 16), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_on_any_number_of_threads(dtype):
    x, grad_out, weight = rows(301, 576, dtype, 1), rows(301, 576, dtype, 2), rows(1, 576, dtype, 3)[0]

    def run():
        out, grad, inverse = torch.empty_like(x), torch.empty_like(x), torch.empty(301)
        rms_norm(x, weight, EPS, out, inverse)
        rms_norm_backward(grad_out, x, weight, inverse, grad, add=x)
        return out, grad, inverse

    assert_same_bytes_on_any_threads(run)


def test_operator_has_a_fake_and_a_gradient():
    x = rows(6, 40, torch.float32, 1).view(2, 3, 40).requires_grad_()
    weight = rows(1, 40, torch.float32, 2)[0]
    torch.library.opcheck(torch.ops.tunegate.rms_norm.default, (x, weight, EPS, 1.0))
    out = torch.ops.tunegate.rms_norm(x, weight, EPS, 1.0)
    want = torch.nn.functional.rms_norm(x, (40,), weight + 1, EPS)
    torch.testing.assert_close(out, want)
    grad_out = rows(6, 40, torch.float32, 3).view(2, 3, 40)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad_out), torch.autograd.grad(want, x, grad_out))
    with pytest.raises(ValueError, match="freeze it"):
        torch.ops.tunegate.rms_norm(x, weight.clone().requires_grad_(), EPS, 1.0)


def test_wrong_inputs_are_named():
    x, weight, inverse = rows(4, 8, torch.float32, 1), torch.ones(8), torch.empty(4)
    for match, call in {
        "out must be": lambda: rms_norm(x, weight, EPS, torch.empty(4, 9), inverse),
        "float32 like": lambda: rms_norm(x, weight, EPS, torch.empty(4, 8, dtype=torch.bfloat16), inverse),
        "weight must be": lambda: rms_norm(x, torch.ones(7), EPS, torch.empty(4, 8), inverse),
        "inverse_rms must be": lambda: rms_norm(x, weight, EPS, torch.empty(4, 8), torch.empty(3)),
        "inner stride 1": lambda: rms_norm(x.t().contiguous().t(), weight, EPS, torch.empty(4, 8), inverse),
        "overlap": lambda: rms_norm(x, weight, EPS, torch.empty(1, 8).expand(4, 8), inverse),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
