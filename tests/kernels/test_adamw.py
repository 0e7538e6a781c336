from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import assert_same_bytes_on_any_threads

from tunegate.kernels import adamw
from tunegate.kernels.adamw import FusedAdamW, clip_and_scale_

SHAPES = [(16, 576), (1,), (40000,), (7, 3), (0,), (128, 16), (16384,)]


def tensors(seed: int, shapes=SHAPES, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def groups(parameters):
    return [
        {"params": parameters[:3], "lr": 1e-2, "weight_decay": 0.1},
        {"params": parameters[3:], "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def pair():
    own, theirs = ([t.requires_grad_() for t in tensors(1)] for _ in range(2))
    return own, theirs, FusedAdamW(groups(own)), torch.optim.AdamW(groups(theirs))


def steps(own, theirs, optimizers, first, last):
    for step in range(first, last):
        for k, (a, b, g) in enumerate(zip(own, theirs, tensors(100 + step), strict=True)):
            skipped = k == 3 and step < 5  # a tensor that joins late has a step count of its own
            a.grad, b.grad = (None, None) if skipped else (g.clone(), g.clone())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.97  # a schedule
            optimizer.step()


def assert_equal_runs(own, theirs):
    for a, b in zip(own, theirs, strict=True):
        # 50 steps of up to lr = 1e-2, each within some fp32 ulps of torch's
        torch.testing.assert_close(a, b, rtol=1e-6, atol=5e-6)


def test_fifty_steps_are_torchs():
    own, theirs, *optimizers = pair()
    steps(own, theirs, optimizers, 0, 50)
    assert_equal_runs(own, theirs)


def test_twin_is_torchs(monkeypatch):
    monkeypatch.setattr(adamw.native, "library", lambda: None)
    own, theirs, *optimizers = pair()
    steps(own, theirs, optimizers, 0, 50)
    assert_equal_runs(own, theirs)


def test_state_goes_to_torch_and_back():
    own, theirs, ours, torchs = pair()
    steps(own, theirs, [ours, torchs], 0, 7)
    mine, other = ours.state_dict(), torchs.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert {k: {n: (t.shape, t.dtype) for n, t in v.items()} for k, v in mine["state"].items()} == {
        k: {n: (t.shape, t.dtype) for n, t in v.items()} for k, v in other["state"].items()
    }
    assert [mine["state"][k]["step"].item() for k in (0, 3)] == [7, 2]
    ours.load_state_dict(copy.deepcopy(other))
    torchs.load_state_dict(copy.deepcopy(mine))
    steps(own, theirs, [ours, torchs], 7, 20)
    assert_equal_runs(own, theirs)


def test_a_loaded_run_goes_on_to_the_same_bytes():
    own, theirs, ours, _ = pair()
    steps(own, theirs, [ours], 0, 5)
    again = [p.detach().clone().requires_grad_() for p in own]
    resumed = FusedAdamW(groups(again))
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    steps(own, again, [ours, resumed], 5, 9)
    for a, b in zip(own, again, strict=True):
        assert torch.equal(a, b)


def test_a_step_is_the_same_bytes_on_any_number_of_threads():
    def run():
        own, theirs, ours, _ = pair()
        steps(own, theirs, [ours], 0, 6)
        return (*[p.detach() for p in own], *[ours.state[p]["exp_avg_sq"] for p in own])

    assert_same_bytes_on_any_threads(run)


def test_closure_frozen_and_strided_gradients():
    parameter, frozen = torch.ones(6, 5, requires_grad=True), torch.ones(3)
    other = torch.ones(6, 5, requires_grad=True)
    ours, theirs = FusedAdamW([parameter, frozen]), torch.optim.AdamW([other])
    gradient = torch.randn(5, 6).t()
    other.grad = gradient

    def closure():
        parameter.grad = gradient
        return 2.5

    version = parameter._version
    assert ours.step(closure) == 2.5
    assert parameter._version > version  # what was computed from the old values can tell
    theirs.step()
    torch.testing.assert_close(parameter, other)
    assert torch.equal(frozen, torch.ones(3))


def test_wrong_inputs_are_named():
    for bad in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 3).t()):
        with pytest.raises(ValueError, match="contiguous fp32"):
            FusedAdamW([bad.requires_grad_()])
    parameter = torch.zeros(4, requires_grad=True)
    optimizer = FusedAdamW([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[parameter]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="4 elements"):
        optimizer.step()
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdamW([torch.zeros(2)], amsgrad=True)
    with pytest.raises(ValueError, match="contiguous"):
        clip_and_scale_([torch.zeros(3, 2).t()], 1.0, None)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9, math.inf])
@pytest.mark.parametrize("scale", [1.0, 0.125, 1 / 3])
def test_scaling_norm_and_clipping_are_torchs(scale, max_norm, native, monkeypatch):
    if not native:
        monkeypatch.setattr(adamw.native, "library", lambda: None)
    gradients, theirs = tensors(2), [t.requires_grad_() for t in tensors(3)]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient * scale
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in theirs))
    torch.nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    norm = clip_and_scale_(gradients, scale, max_norm)
    assert norm == pytest.approx(exact, rel=1e-12)
    for gradient, parameter in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40000), max_size=12))
def test_norm_is_the_same_on_any_number_of_threads(sizes):
    def run():
        gradients = tensors(5, [(size,) for size in sizes])
        norm = clip_and_scale_(gradients, 0.7, 1.0)
        return torch.tensor([norm], dtype=torch.float64), *gradients

    assert_same_bytes_on_any_threads(run)


def test_what_is_not_finite_is_told():
    for value in (math.nan, math.inf):
        gradients = tensors(6)
        gradients[2][123] = value
        assert not math.isfinite(clip_and_scale_(gradients, 1.0, 1.0))
    tiny = [torch.full((100,), 1e-30)]
    assert clip_and_scale_(tiny, 1.0, None) == pytest.approx(1e-29, rel=1e-6)  # squares that fp32 does not hold
    assert clip_and_scale_([], 1.0, 1.0) == 0.0
