from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import DTYPES, assert_rounded, assert_same_bytes_on_any_threads, rows
from torch.nn import functional as F

from tunegate.kernels import glu
from tunegate.kernels.glu import ACTIVATIONS, gated, gated_backward

TORCH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def exact(grad_out, gate, up, activation):
    """out and both gradients by torch's own activation and autograd in fp64."""
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    out = TORCH[activation](gate) * up
    return out.detach(), *torch.autograd.grad(out, (gate, up), grad_out.double())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([0, 5]),
    st.sampled_from([0.1, 2.0, 8.0]),
)
def test_forward_and_backward_are_torchs(count, columns, dtype, activation, gap, scale):
    gate = rows(count, columns, dtype, 1, gap=gap, scale=scale)
    up, grad_out = rows(count, columns, dtype, 2, gap=gap), rows(count, columns, dtype, 3, gap=2 * gap)
    out, grad_gate, grad_up = (rows(count, columns, dtype, 4 + k, gap=k) for k in range(3))
    wants = exact(grad_out, gate, up, activation)
    gated(gate, up, out, activation)
    gated_backward(grad_out, gate, up, grad_gate, grad_up, activation)
    for got, want in zip((out, grad_gate, grad_up), wants, strict=True):
        assert_rounded(got, want, slack=3e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_of_a_fine_grid(activation):
    gate = torch.cat((torch.linspace(-30, 30, 60001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e15, -1e15])))[None]
    ones = torch.ones_like(gate)
    out, slope, value = (torch.empty_like(gate) for _ in range(3))
    gated(gate, ones, out, activation)
    gated_backward(ones, gate, ones, slope, value, activation)
    want, want_slope, _ = exact(ones, gate, ones, activation)
    assert torch.equal(out, value)
    # relative to the gate: act(x) / x is a probability
    assert ((out.double() - want).abs() <= 4e-7 * gate.abs() + 1e-37).all()
    kept = gate.abs() < 1e4  # torch's own slope of gelu_tanh overflows to NaN beyond
    assert ((slope.double() - want_slope).abs()[kept] <= 2e-6).all()
    assert torch.isfinite(slope).all()
    nan = torch.full((1, 3), float("nan"))
    gated_backward(torch.ones(1, 3), nan.clone(), torch.ones(1, 3), out[:, :3], value[:, :3], activation)
    assert out[:, :3].isnan().all() and value[:, :3].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_is_its_twin_and_outputs_may_be_inputs(activation, dtype):
    grad_out, gate, up = (rows(21, 77, dtype, seed, scale=2) for seed in (1, 2, 3))
    value, slope = glu._value_and_slope(gate.float(), activation)
    results = [torch.empty_like(gate) for _ in range(3)]
    gated(gate, up, results[0], activation)
    gated_backward(grad_out, gate, up, results[1], results[2], activation)
    wants = value * up.float(), grad_out.float() * up.float() * slope, grad_out.float() * value
    for got, want in zip(results, wants, strict=True):
        assert_rounded(got, want.double(), slack=3e-6)
    for first, second in (("gate", "up"), ("grad_out", "up"), ("gate", "grad_out"), ("up", "gate")):
        own = {"grad_out": grad_out.clone(), "gate": gate.clone(), "up": up.clone()}
        gated_backward(own["grad_out"], own["gate"], own["up"], own[first], own[second], activation)
        assert torch.equal(own[first], results[1]) and torch.equal(own[second], results[2])
    own_gate = gate.clone()
    gated(own_gate, up, own_gate, activation)
    assert torch.equal(own_gate, results[0])


def test_same_bytes_on_any_number_of_threads():
    grad_out, gate, up = (rows(101, 1000, torch.float32, seed) for seed in (1, 2, 3))

    def run():
        results = [torch.empty_like(gate) for _ in range(3)]
        gated(gate, up, results[0], "gelu")
        gated_backward(grad_out, gate, up, results[1], results[2], "silu")
        return tuple(results)

    assert_same_bytes_on_any_threads(run)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_has_a_fake_and_a_gradient(activation):
    gate, up = (rows(6, 40, torch.float32, seed).view(2, 3, 40).requires_grad_() for seed in (1, 2))
    torch.library.opcheck(torch.ops.tunegate.gated.default, (gate, up, activation))
    out, want = torch.ops.tunegate.gated(gate, up, activation), TORCH[activation](gate) * up
    torch.testing.assert_close(out, want)
    got, expected = (torch.autograd.grad(o.square().sum(), (gate, up)) for o in (out, want))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_wrong_inputs_are_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="silu, gelu_tanh, gelu"):
        gated(x, x, x, "relu")
    with pytest.raises(ValueError, match="up must be"):
        gated(x, torch.zeros(2, 5), x, "silu")
