"""Head and loss in one chunked pass, against ``F.cross_entropy`` on the full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tunegate.adapter.layers import DoRALinear, LoRALinear
from tunegate.kernels import Head, cross_entropy, linear_cross_entropy, native, target_log_probs

HIDDEN, VOCABULARY = 8, 50
HEADS = {
    "plain": (1.0, None),
    "scaled": (0.25, None),
    "soft-capped": (1.0, 2.0),
    "scaled and soft-capped": (3.0, 1.5),
}


def layer(bias: bool = True) -> nn.Linear:
    made = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False)


def sample(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (n,), generator=generator)


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    """In fp64 for a plain layer, from its values as they are stored."""
    if isinstance(head.module, nn.Linear):
        bias = None if head.module.bias is None else head.module.bias.double()
        logits = head.scale * F.linear(hidden.double(), head.module.weight.double(), bias)
    else:
        logits = head.scale * head.module(hidden).double()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 16 rows, the smallest there are."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    return 16


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 50])
def test_loss_and_gradient_equal_full_logits(kind: str, n: int, small_chunks: int) -> None:
    head = Head(layer(), *HEADS[kind])
    hidden, labels = sample(n)
    loss = linear_cross_entropy(hidden, labels, head)
    wanted = F.cross_entropy(full_logits(hidden, head), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-5)
    (got,) = torch.autograd.grad(3.0 * loss, hidden)  # the factor shows that backward scales
    (expected,) = torch.autograd.grad(3.0 * wanted, hidden)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_log_probabilities(kind: str, small_chunks: int) -> None:
    head = Head(layer(), *HEADS[kind])
    hidden, labels = sample(37)
    wanted = full_logits(hidden, head).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    got = target_log_probs(hidden, labels, head)
    assert got.dtype == torch.float32 and got.shape == (37,)
    torch.testing.assert_close(got.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-got.sum(), linear_cross_entropy(hidden, labels, head), rtol=1e-6, atol=1e-5)


@given(st.integers(1, 70), st.integers(1, 70))
def test_the_chunk_size_changes_nothing_but_rounding(n: int, rows: int) -> None:
    head = Head(layer())
    hidden, labels = sample(n)
    whole = linear_cross_entropy(hidden, labels, head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_chunk_rows", lambda head: rows)
        chunked = linear_cross_entropy(hidden, labels, head)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    one, other = (torch.autograd.grad(loss, hidden)[0] for loss in (whole, chunked))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_no_logits_beyond_one_chunk(small_chunks: int) -> None:
    seen: list[int] = []
    module = layer()
    module.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    linear_cross_entropy(*sample(50), Head(module))
    assert seen == [16, 16, 16, 2]


def test_chunk_rows_follow_the_vocabulary() -> None:
    assert cross_entropy._chunk_rows(Head(layer())) == 64 * 2**20 // (4 * VOCABULARY)
    big = nn.Linear(1, 1, bias=False)
    big.out_features = 2**24  # 64 MiB of fp32 a row
    assert cross_entropy._chunk_rows(Head(big)) == 16


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("n", [5, 16, 41])
def test_a_trainable_head_learns_too(kind: type[nn.Module], n: int, small_chunks: int) -> None:
    adapter = kind(layer(), rank=3, scale=2.0, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(1))
    head = Head(adapter, 0.5, 3.0)
    assert not head.frozen
    hidden, labels = sample(n)
    inputs = (hidden, *adapter.adapter_parameters().values())
    loss = linear_cross_entropy(hidden, labels, head)
    wanted = F.cross_entropy(full_logits(hidden, head), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-5)
    for got, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_sixteen_bit_hidden_states_give_an_fp32_loss_and_their_own_gradient_type(kind: str, small_chunks: int) -> None:
    head = Head(layer().to(torch.bfloat16), *HEADS[kind])
    hidden, labels = sample(40, torch.bfloat16)
    loss = linear_cross_entropy(hidden, labels, head)
    wanted = F.cross_entropy(full_logits(hidden, head), labels, reduction="sum")
    assert loss.dtype == torch.float32
    rounding = 1e-6 if native.library() is not None else 2.0**-8  # the module's own forward rounds its logits
    torch.testing.assert_close(loss.double(), wanted, rtol=rounding, atol=1e-4)
    got, expected = (torch.autograd.grad(x, hidden)[0] for x in (loss, wanted))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2.0**-6, atol=2.0**-6 * head.scale)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: type) -> None:
    head = Head(layer())
    hidden, labels = sample(20)
    wanted = linear_cross_entropy(hidden, labels, head).item()
    with context():
        assert linear_cross_entropy(hidden.detach(), labels, head).item() == wanted


def test_no_targets_cost_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    assert linear_cross_entropy(hidden, empty, Head(layer())).item() == 0.0
    assert target_log_probs(hidden, empty, Head(layer())).shape == (0,)
