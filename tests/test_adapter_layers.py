"""The two layers against dense arithmetic: their forward, gradients, start, norm and merge."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunegate.adapter.layers import DoRALinear, LoRALinear, base_weight, drop_out, features

KINDS = {"lora": LoRALinear, "dora": DoRALinear}


class Packed(nn.Module):
    """A stand-in for a quantized layer: no ``weight``, only ``dequantize``."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.bias = inner.bias
        self.register_buffer("codes", inner.weight.detach().clone())

    def dequantize(self) -> torch.Tensor:
        return self.codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes, self.bias)


def make_base(kind: str, inner: int = 12, outer: int = 7) -> nn.Module:
    torch.manual_seed(3)
    if kind == "conv1d":
        base: nn.Module = Conv1D(outer, inner)
        nn.init.normal_(base.weight)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(inner, outer, bias=kind != "no-bias")
        base = Packed(base) if kind == "packed" else base
    return base.requires_grad_(False)


BASES = ("bias", "no-bias", "conv1d", "packed")


def make(method: str, base: nn.Module, *, rank: int = 3, scale: float = 1.7, trained: bool = True, **more):
    layer = KINDS[method](base, rank=rank, scale=scale, generator=torch.Generator().manual_seed(5), **more)
    if trained:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            if method == "dora":
                layer.lora_magnitude_vector.mul_(torch.rand(layer.out_features, generator=generator) + 0.5)
    return layer


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def dense(layer, x: torch.Tensor, a, b, m) -> torch.Tensor:
    """The definition, with W + s B A formed; the norm is constant for autograd."""
    weight = base_weight(layer.base) + layer.scale * b @ a
    if m is not None:
        weight = weight * (m / torch.linalg.norm(weight, dim=1).detach()).unsqueeze(1)
    return nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", KINDS)
def test_forward_and_gradients_equal_the_dense_definition(method: str, kind: str) -> None:
    layer = make(method, make_base(kind)).double().float()
    x = torch.randn(2, 5, 12, requires_grad=True)
    out = layer(x)
    cotangent = torch.randn_like(out)
    wanted = [x, *layer.adapter_parameters().values()]
    got = torch.autograd.grad(out, wanted, cotangent)
    twins = [t.detach().clone().requires_grad_() for t in wanted]
    expected = dense(layer, twins[0], twins[1], twins[2], twins[3] if method == "dora" else None)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, torch.autograd.grad(expected, twins, cotangent), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", KINDS)
def test_step_zero_is_the_base_bit_for_bit(method: str, kind: str, dtype: torch.dtype) -> None:
    base = make_base(kind).to(dtype)
    layer = make(method, base, trained=False, dropout=0.3).train()
    x = torch.randn(4, 9, 12).to(dtype)
    assert torch.equal(bits(layer(x)), bits(base(x)))
    assert {p.dtype for p in layer.adapter_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_dora_norm_equals_the_norm_of_the_formed_weight(kind: str, dtype: torch.dtype) -> None:
    layer = make("dora", make_base(kind, 40, 33).to(dtype), rank=8, scale=0.3)
    formed = base_weight(layer.base).double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    expected = torch.linalg.norm(formed, dim=1).float()
    torch.testing.assert_close(layer.row_norm(), expected, rtol=2e-6, atol=0)


def test_dora_norm_widens_a_16_bit_weight_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("dora", make_base("bias", 40, 33).bfloat16())
    whole = layer.row_norm()
    monkeypatch.setattr("tunegate.adapter.layers._CHUNK_ELEMENTS", 100)  # two rows a piece, the last one odd
    torch.testing.assert_close(layer.row_norm(), whole, rtol=1e-6, atol=0)


def test_dora_norm_is_fp32_under_autocast() -> None:
    layer = make("dora", make_base("bias", 40, 33))
    expected = layer.row_norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.row_norm(), expected)


def test_dora_with_a_zero_row_and_a_cancelled_row_stays_finite() -> None:
    base = make_base("bias")
    with torch.no_grad():
        base.weight[2].zero_()
    layer = make("dora", base, trained=False)
    x = torch.randn(5, 12)
    assert torch.equal(bits(layer(x)), bits(base(x)))
    with torch.no_grad():  # row 4: B A = -W, so that n^2 is zero up to rounding
        layer.lora_A[0] = base.weight[4]
        layer.lora_B[4, 0] = -1 / layer.scale
        layer.lora_B[2] = 0.01
    out = layer(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.adapter_parameters().values())


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", KINDS)
def test_the_merge_contract(method: str, kind: str) -> None:
    """Training leaves the base alone; the merged weight gives the adapted output; merged = base + delta."""
    base = make_base(kind)
    before = base_weight(base).clone()
    layer = make(method, base, trained=False)
    optimizer = torch.optim.AdamW(layer.adapter_parameters().values(), lr=0.05)
    x, target = torch.randn(32, 12), torch.randn(32, 7)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    assert torch.equal(base_weight(base), before)
    merged = layer.merged_weight()
    assert merged.dtype == torch.float32 and torch.equal(merged, layer.merged_weight())
    torch.testing.assert_close(merged, before + layer.delta_weight(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nn.functional.linear(x, merged, layer.bias), layer(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x), base(x), atol=1e-3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.adapter_parameters().values())


@pytest.mark.parametrize("method", KINDS)
def test_a_disabled_layer_is_the_base_bit_for_bit(method: str) -> None:
    layer = make(method, make_base("bias"))
    x = torch.randn(3, 12)
    layer.enabled = False
    assert torch.equal(bits(layer(x)), bits(layer.base(x)))


@pytest.mark.parametrize("method", KINDS)
def test_dropout_acts_on_the_low_rank_branch_alone_and_only_in_training(method: str) -> None:
    layer = make(method, make_base("bias"), dropout=0.5)
    plain = copy.deepcopy(layer)
    plain.dropout = 0.0
    x = torch.randn(6, 12)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    dropped = drop_out(x, 0.5)
    t = layer.base(x) + layer.scale * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    if method == "dora":
        gain = layer.lora_magnitude_vector / layer.row_norm()
        t = gain * (t - layer.bias) + layer.bias
    torch.testing.assert_close(got, t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 333, requires_grad=True)
    out = drop_out(x, rate)
    kept = out[out != 0]
    n, share = x.numel(), 1 - kept.numel() / x.numel()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / n) ** 0.5 + 1 / 65536
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-3, atol=0.0)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())  # the same elements, the same factor


@pytest.mark.parametrize("write", ["in place", "data", "load"])
def test_the_kept_norm_never_outlives_a_change(write: str) -> None:
    layer = make("dora", make_base("bias")).eval()
    x = torch.randn(2, 12)
    with torch.no_grad():
        first = layer(x)
        assert layer._kept_norm is not None and torch.equal(layer(x), first)
    new_b = torch.randn(7, 3)
    if write == "in place":
        with torch.no_grad():
            layer.lora_B.copy_(new_b)
    elif write == "data":  # what version counters do not see: a mode switch drops the norm
        layer.train()
        layer.lora_B.data.copy_(new_b)
        layer.eval()
    else:
        layer.load_state_dict({**layer.state_dict(), "lora_B": new_b})
    with torch.no_grad():
        expected = dense(layer, x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_can_train_forms_the_norm_anew(training: bool) -> None:
    """An optimizer may write where no version counter sees it, so only evaluation without gradients keeps a norm."""
    layer = make("dora", make_base("bias")).train(training)
    x = torch.randn(2, 12)
    with torch.set_grad_enabled(not training):
        layer(x)
        layer.lora_B.data.copy_(torch.randn(7, 3))
        expected = dense(layer, x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_training_keeps_few_bytes_for_backward() -> None:
    """LoRA saves x, x A^T and the factors; nothing of the output's size, and x by reference."""
    rows, inner, outer, rank = 256, 64, 512, 4
    layer = make("lora", make_base("bias", inner, outer), rank=rank)
    x = torch.randn(rows, inner, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    base_bytes = inner * outer * 4
    allowed = x.nbytes + rows * rank * 4 + layer.lora_A.nbytes + layer.lora_B.nbytes + base_bytes
    assert x.untyped_storage().data_ptr() in saved
    assert sum(saved.values()) <= allowed < rows * outer * 4 + allowed


def test_a_starts_like_pefts_and_b_at_zero() -> None:
    layer = make("lora", make_base("bias", 400, 5), rank=5, trained=False)
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound < 1.02 * layer.lora_A.abs().max()
    assert not layer.lora_B.any()


@pytest.mark.parametrize("other", [nn.LayerNorm(8), nn.Embedding(8, 8), nn.ReLU()])
def test_layers_that_cannot_carry_an_adapter(other: nn.Module) -> None:
    assert features(other) is None
    with pytest.raises(TypeError, match=type(other).__name__):
        LoRALinear(other, rank=2, scale=1.0)
