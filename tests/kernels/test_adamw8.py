"""8-bit moments against values by hand, the plain twin, fp32 AdamW, and bitsandbytes where it is installed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import assert_same_bytes_on_any_threads
from torch import Tensor, nn

from tunegate.kernels import adamw8, native
from tunegate.kernels.adamw import FusedAdamW
from tunegate.kernels.adamw8 import BLOCK, LEAST, codebook, dequantize, moment_bytes, quantize
from tunegate.kernels.nf4 import dynamic_map

SHAPES = [(4096,), (4097,), (17, 251), (64, 65), (16384,), (16385,), (3, 13337), (5000,)]
STATE = ("state1", "state2", "absmax1", "absmax2")


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch):
    """Runs a function without the C++ kernels."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function(*args)

    return run


def parameters(shapes=SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(shapes=SHAPES, seed: int = 0) -> list[Tensor]:
    """Over nine decades, with zeros, blocks of zeros, a constant block and a block that 1 / scale overflows for."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        flat = torch.randn(math.prod(shape), generator=generator)
        flat *= 10 ** (-9 * torch.rand(flat.shape, generator=generator))
        flat[torch.rand(flat.shape, generator=generator) < 0.1] = 0
        flat[BLOCK : 2 * BLOCK] = 0
        flat[2 * BLOCK : 3 * BLOCK] = -0.25
        flat[3 * BLOCK : 4 * BLOCK] *= 1e-30
        made.append(flat.bfloat16().float().view(shape))
    return made


def take_steps(optimizer: FusedAdamW, first: int, last: int) -> None:
    members = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for parameter, gradient in zip(members, gradients([p.shape for p in members], step), strict=True):
            parameter.grad = gradient
        optimizer.step()


# --- the codes --------------------------------------------------------------------------------------------------------


def test_the_maps_by_hand() -> None:
    """Decade 1e-6: the signed map has the middle of [0.1, 1], the unsigned one those of its two halves."""
    signed, unsigned = dynamic_map(), dynamic_map(signed=False)
    for values in (signed, unsigned):
        assert values.shape == (256,) and torch.equal(values, values.sort().values) and values[-1] == 1
    assert signed[127] == 0 and signed[128] == pytest.approx(0.55e-6)
    assert torch.equal(signed[:127].flip(0), -signed[128:255])  # no -1
    assert unsigned[0] == 0
    assert unsigned[1:3].tolist() == pytest.approx([0.325e-6, 0.775e-6])
    assert codebook(True).bounds[0] == pytest.approx(0.275e-6)
    assert codebook(False).bounds[0] == pytest.approx(0.1625e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_a_values_code_is_its_own_and_a_tie_goes_to_the_smaller_magnitude(signed: bool) -> None:
    values = dynamic_map(signed)
    codes, absmax = quantize(values * 8, signed=signed)
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8)) and absmax.tolist() == [8.0]
    assert torch.equal(dequantize(codes, absmax, signed=signed), values * 8)
    bounds = codebook(signed).bounds[:-1][: 255 if not signed else 127]
    ties, _ = quantize(torch.cat([torch.ones(1), bounds]), signed=signed)
    zero = 127 if signed else 0
    assert torch.equal(ties[1:].long(), torch.arange(zero, zero + len(bounds)))
    if signed:
        ties, _ = quantize(torch.cat([torch.ones(1), -bounds]), signed=True)
        assert torch.equal(ties[1:].long(), torch.arange(127, 127 - len(bounds), -1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.booleans(), st.integers(0, 2**32), st.floats(-30, 30))
def test_every_code_is_the_nearest(n: int, signed: bool, seed: int, decade: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** (-8 * torch.rand(n, generator=generator)) * 10**decade
    values = values if signed else values.abs()
    codes, absmax = quantize(values, signed=signed)
    scales = absmax.repeat_interleave(BLOCK)[:n].double()
    exact = values.double() / scales
    distances = (exact[:, None] - dynamic_map(signed).double()).abs()
    taken = distances.gather(1, codes.long()[:, None])[:, 0]
    assert bool((taken <= distances.amin(1) + 1e-6 * exact.abs()).all())
    torch.testing.assert_close(
        dequantize(codes, absmax, signed=signed).double(), dynamic_map(signed).double()[codes.long()] * scales,
        rtol=1e-6, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_bitsandbytes(signed: bool) -> None:
    """Its generic path takes the nearest value in fp64; nothing but values that fp32 puts on a bound may differ."""
    functional = pytest.importorskip("bitsandbytes.functional")
    code = functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_map(signed), code)
    values = torch.cat([g.view(-1) for g in gradients()])
    values = values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK)
    values = values[values.abs().amax(1) > 1e-30]  # it divides zeros by zero
    values = (values if signed else values.abs()).reshape(-1)
    ours, absmax = quantize(values, signed=signed)
    theirs, their_absmax = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, BLOCK)
    assert torch.equal(absmax, their_absmax)
    away = (ours.int() - theirs.int()).abs()
    assert away.max() <= 1 and (away > 0).float().mean() < 1e-3
    wanted = torch.ops.bitsandbytes.dequantize_blockwise(ours, absmax, code, BLOCK, torch.float32)
    assert torch.equal(dequantize(ours, absmax, signed=signed), wanted)


# --- the step ---------------------------------------------------------------------------------------------------------


def test_kernel_and_twin_have_the_same_codes(twin) -> None:
    """Betas and gradients whose products fp32 holds exactly: fused or not, moments are the same numbers."""
    one, other = parameters(), parameters()
    options = {"lr": 1e-2, "betas": (0.75, 0.5), "eight_bit": True, "weight_decay": 0.1}
    ours, plain = FusedAdamW(one, **options), FusedAdamW(other, **options)
    for step in range(6):
        take_steps(ours, step, step + 1)
        twin(take_steps, plain, step, step + 1)
        for a, b in zip(one, other, strict=True):
            for name in STATE:
                assert torch.equal(ours.state[a][name], plain.state[b][name]), (step, tuple(a.shape), name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kernel_and_twin_agree_at_the_usual_betas(twin) -> None:
    """A rounding of a moment may turn a code; gradients of one size, so that a code is 1 % of it."""
    shapes = [(4097,), (33, 257)]
    one, other = parameters(shapes), parameters(shapes)
    ours, plain = (FusedAdamW(p, lr=1e-3, eight_bit=True) for p in (one, other))

    def run(optimizer, members):
        generator = torch.Generator().manual_seed(7)
        for _ in range(20):
            for p in members:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    run(ours, one)
    twin(run, plain, other)
    for a, b in zip(one, other, strict=True):
        away = (ours.state[a]["state1"].int() - plain.state[b]["state1"].int()).abs()
        assert (away > 0).float().mean() < 0.01 and away.max() <= 2
        assert (a - b).abs().max() < 1e-3  # of 20 steps of 1e-3
        assert (a - b).abs().mean() < 1e-6


def test_a_step_is_the_same_bytes_on_any_number_of_threads() -> None:
    def run():
        members = parameters()
        optimizer = FusedAdamW(members, lr=1e-2, eight_bit=True)
        take_steps(optimizer, 0, 4)
        return (*[p.detach() for p in members], *[optimizer.state[p][name] for p in members for name in STATE])

    assert_same_bytes_on_any_threads(run)


def test_the_first_step_is_that_of_fp32() -> None:
    """Moments are rounded after the update, so nothing is lost before the second step."""
    one, other = parameters(), parameters()
    take_steps(FusedAdamW(one, lr=1e-2, eight_bit=True), 0, 1)
    take_steps(FusedAdamW(other, lr=1e-2), 0, 1)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_small_tensors_are_those_of_fp32() -> None:
    shapes = [(LEAST - 1,), (16, 8), (0,), (1,)]
    one, other = parameters(shapes), parameters(shapes)
    ours, plain = FusedAdamW(one, lr=1e-2, eight_bit=True), FusedAdamW(other, lr=1e-2)
    for optimizer in (ours, plain):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
        assert set(ours.state[a]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("count", [LEAST - 1, LEAST, LEAST + 1, 40001])
def test_a_states_bytes_are_those_foretold(count: int) -> None:
    parameter = nn.Parameter(torch.ones(count))
    optimizer = FusedAdamW([parameter], eight_bit=True)
    parameter.grad = torch.ones(count)
    optimizer.step()
    held = sum(t.nbytes for name, t in optimizer.state[parameter].items() if name != "step")
    assert held == moment_bytes(count, eight_bit=True)
    assert moment_bytes(count, eight_bit=False) == 8 * count


def test_a_loaded_run_goes_on_to_the_same_bytes() -> None:
    members = parameters()
    optimizer = FusedAdamW(members, lr=1e-2, eight_bit=True)
    take_steps(optimizer, 0, 4)
    again = [nn.Parameter(p.detach().clone()) for p in members]
    resumed = FusedAdamW(again, lr=1e-2, eight_bit=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, 4, 7)
    take_steps(resumed, 4, 7)
    for a, b in zip(members, again, strict=True):
        assert torch.equal(a, b)
        for name in STATE:
            assert torch.equal(optimizer.state[a][name], resumed.state[b][name])


def test_a_state_of_another_kind_is_named() -> None:
    parameter = nn.Parameter(torch.ones(LEAST))
    parameter.grad = torch.ones(LEAST)
    plain = FusedAdamW([parameter])
    plain.step()
    optimizer = FusedAdamW([parameter], eight_bit=True)
    optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(
        ValueError, match=r"state1 must be a contiguous torch.uint8 tensor of 4096 elements, got nothing"
    ):
        optimizer.step()


# --- what it learns ---------------------------------------------------------------------------------------------------


def _curve(seed: int, *, eight_bit: bool) -> Tensor:
    """Losses of 100 steps of a small network; ``seed`` draws the batches, weights and task are the same."""
    fixed = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.randn(s, generator=fixed) / s[1] ** 0.5) for s in ((128, 64), (128, 128), (8, 128))]
    rule = torch.randn(64, 8, generator=fixed)
    optimizer = FusedAdamW(weights, lr=3e-3, eight_bit=eight_bit)
    batches = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(100):
        x = torch.randn(32, 64, generator=batches)
        hidden = torch.tanh(torch.tanh(x @ weights[0].t()) @ weights[1].t())
        loss = nn.functional.cross_entropy(hidden @ weights[2].t(), (x @ rule).argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_the_loss_curve_is_that_of_fp32_within_noise() -> None:
    """At the same batches the two curves lie nearer than two fp32 curves at other batches, by far."""
    plain = [_curve(seed, eight_bit=False) for seed in (1, 2, 3)]
    packed = [_curve(seed, eight_bit=True) for seed in (1, 2, 3)]
    noise = torch.stack([(plain[i] - plain[j]).abs().mean() for i, j in ((0, 1), (0, 2), (1, 2))]).mean()
    for a, b in zip(plain, packed, strict=True):
        assert a[-20:].mean() < 0.7 * a[:5].mean()
        assert not torch.equal(a, b)
        assert (a - b).abs().mean() < 0.2 * noise
        assert (a[-20:].mean() - b[-20:].mean()).abs() < 0.5 * noise


def test_a_run_is_that_of_bitsandbytes() -> None:
    """Its CPU codes come from 65,536 equidistant points: gradients of one size, of which they are near enough."""
    optim = pytest.importorskip("bitsandbytes.optim")
    shapes = [(64, 64), (5000,), (16, 8)]
    one, other = parameters(shapes), parameters(shapes)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours = FusedAdamW(one, eight_bit=True, **options)
    theirs = optim.AdamW8bit(other, min_8bit_size=LEAST, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        for a, b in zip(one, other, strict=True):
            a.grad = (0.5 + torch.rand(a.shape, generator=generator)) * torch.where(a > 0, 1.0, -1.0)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() < 0.02 * 30e-3
        if a.numel() >= LEAST:
            assert set(ours.state[a]) == set(theirs.state[b]) - {"qmap1", "qmap2"}
            away = (ours.state[a]["state1"].int() - theirs.state[b]["state1"].int()).abs()
            assert away.max() <= 1 and (away > 0).float().mean() < 0.05
    assert adamw8.BLOCK == 256
