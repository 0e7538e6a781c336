"""The loss kernels against ``F.cross_entropy`` and autograd in fp64, at odd sizes and extreme logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise import assert_same_bytes_on_any_threads
from torch import Tensor, nn

from tunegate.kernels import cross_entropy, native
from tunegate.kernels.cross_entropy import (
    Head,
    argmax_logits,
    linear_cross_entropy,
    linear_cross_entropy_op,
    softmax_gradient_,
    target_log_probs,
)

KINDS = [(1.0, None), (0.25, None), (3.0, 1.5), (1.0, 30.0)]
needs_kernels = pytest.mark.skipif(native.library() is None, reason="without the C++ kernels the module's forward runs")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(losses, gradient) in fp64 by autograd."""
    inputs = logits.double().requires_grad_()
    z = inputs * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), inputs)
    return losses.detach(), gradient


@pytest.mark.parametrize(("scale", "softcap"), KINDS)
@given(
    rows=st.integers(0, 9), columns=st.integers(1, 300), size=st.sampled_from([0.1, 3.0, 40.0]), gap=st.integers(0, 3)
)
@settings(max_examples=25, deadline=None)
def test_gradient_in_place(scale, softcap, rows: int, columns: int, size: float, gap: int) -> None:
    held = torch.randn(rows, columns + gap, generator=seeded(columns)) * size
    logits, beyond = held[:, :columns], held[:, columns:].clone()
    labels = torch.randint(columns, (rows,), generator=seeded(rows))
    losses = torch.empty(rows)
    wanted, gradient = exact(logits, labels, scale, softcap)
    softmax_gradient_(logits, labels, losses, scale, softcap)
    # fp32 exponents: an error of 2^-24 |z| in z is a relative error of the probabilities
    largest = min(5 * size * scale, softcap or 1e9)
    slack = 2e-6 * (1 + largest)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=slack)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5 + slack, atol=2e-6 * scale)
    assert torch.equal(held[:, columns:], beyond)


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e30, 0.0, -1e30], [-1e4, -1e4, -1e4], [0.0, -torch.inf, 1.0]])
    losses = torch.empty(3)
    softmax_gradient_(logits, torch.tensor([0, 1, 2]), losses)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0986123, 0.3132617]), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, "fp32"),
        ({"logits": torch.zeros(3, 2).t()}, "contiguous"),
        ({"labels": torch.tensor([0, 3])}, "outside"),
        ({"labels": torch.tensor([-1, 0])}, "outside"),
        ({"labels": torch.tensor([0])}, "labels"),
        ({"losses": torch.zeros(3)}, "losses"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], says: str) -> None:
    given_ = {"logits": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), "losses": torch.zeros(2)}
    with pytest.raises(ValueError, match=says):
        softmax_gradient_(**(given_ | change))


def problem(count: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor, nn.Linear]:
    layer = nn.Linear(48, 1501, bias=bias)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(i)) * 0.3)
    hidden = torch.randn(count, 48, generator=seeded(7)).to(dtype).requires_grad_()
    labels = torch.randint(1501, (count,), generator=seeded(8))
    return hidden, labels, layer.to(dtype).requires_grad_(False)


def wanted_loss(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """The loss in fp64, from the widened weights."""
    bias = None if head.module.bias is None else head.module.bias.double()
    z = F.linear(hidden.double(), head.module.weight.double(), bias) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return F.cross_entropy(z, labels, reduction="sum")


@pytest.mark.parametrize(("scale", "softcap"), KINDS)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_loss_and_gradient(scale, softcap, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 20 * 4 * 1501)
    hidden, labels, layer = problem(50, dtype, bias)
    head = Head(layer, scale, softcap)
    loss, wanted = linear_cross_entropy(hidden, labels, head), wanted_loss(hidden, labels, head)
    # without the kernels the module itself rounds its bf16 logits
    half = 2.0**-9 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(loss.double(), wanted, rtol=half, atol=1e-4)
    (got,), (expected,) = torch.autograd.grad(2 * loss, hidden), torch.autograd.grad(2 * wanted, hidden)
    if dtype == torch.bfloat16:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected.double(), rtol=2.0**-6, atol=2.0**-6 * scale)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize(("scale", "softcap"), KINDS)
def test_the_operator_with_every_kind_of_head(scale, softcap) -> None:
    hidden, labels, layer = problem(50)
    loss, gradient = linear_cross_entropy_op(hidden, layer.weight, labels, scale, softcap, layer.bias, rows=20)
    wanted = wanted_loss(hidden, labels, Head(layer, scale, softcap))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, hidden)[0], rtol=1e-4, atol=1e-5 * scale)


@needs_kernels
def test_bf16_logits_are_not_rounded() -> None:
    for scale, softcap in KINDS:
        hidden, labels, layer = problem(50, torch.bfloat16)
        head = Head(layer, scale, softcap)
        loss = linear_cross_entropy(hidden, labels, head)
        wanted = wanted_loss(hidden, labels, head)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-4)
        got, expected = (torch.autograd.grad(x, hidden)[0].double() for x in (loss, wanted))
        torch.testing.assert_close(got, expected, rtol=2.0**-6, atol=2.0**-6 * scale)
        plain, exact = hidden.detach(), hidden.detach().double()
        z = F.linear(exact, layer.weight.double(), layer.bias.double()) * scale
        assert torch.equal(argmax_logits(plain, head), z.argmax(1))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        found = target_log_probs(plain, labels, head).double()
        torch.testing.assert_close(found, z.log_softmax(1).gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "softcap"), KINDS)
@pytest.mark.parametrize("count", [0, 1, 37])
def test_log_probabilities_and_greedy_choice(scale, softcap, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", 16)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 1)  # blocks of 1024 columns: 1024 and 477
    hidden, labels, layer = problem(count)
    hidden = hidden.detach()
    head = Head(layer, scale, softcap)
    z = F.linear(hidden.double(), layer.weight.double(), layer.bias.double()) * scale
    ids = argmax_logits(hidden, head)
    assert ids.dtype == torch.int64 and torch.equal(ids, z.argmax(1))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    got = target_log_probs(hidden, labels, head)
    assert got.dtype == torch.float32
    wanted = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_first_is_chosen() -> None:
    layer = nn.Linear(4, 3000, bias=False).requires_grad_(False)
    layer.weight.zero_()
    layer.weight[[5, 6, 2500]] = 1.0
    assert argmax_logits(torch.ones(3, 4), Head(layer)).tolist() == [5, 5, 5]


def test_an_ignored_label_still_counts_nothing() -> None:
    hidden, labels, layer = problem(6)
    labels[2] = -100
    kept = labels != -100
    loss = linear_cross_entropy(hidden, labels, Head(layer))
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[kept], labels[kept], Head(layer)))


def test_the_same_bytes_on_any_number_of_threads() -> None:
    if native.library() is None:
        pytest.skip("torch's own sums depend on the number of threads")
    hidden, labels, layer = problem(33)

    def run() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, labels, Head(layer))
        (gradient,) = torch.autograd.grad(loss, hidden)
        plain = hidden.detach()
        return (
            loss.detach()[None],
            gradient,
            target_log_probs(plain, labels, Head(layer)),
            argmax_logits(plain, Head(layer)),
        )

    assert_same_bytes_on_any_threads(run)


def test_the_buffer_survives_inference_mode() -> None:
    hidden, labels, layer = problem(5)
    if hasattr(cross_entropy._kept, "buffers"):
        del cross_entropy._kept.buffers
    with torch.inference_mode():
        first = linear_cross_entropy(hidden.detach(), labels, Head(layer)).item()
    loss = linear_cross_entropy(hidden, labels, Head(layer))
    loss.backward()
    assert loss.item() == first and hidden.grad is not None


def test_the_operator() -> None:
    hidden, labels, layer = problem(9)
    arguments = (hidden, layer.weight, labels, 0.5, 20.0, layer.bias)
    loss, gradient = torch.ops.tunegate.linear_cross_entropy(*arguments)
    wanted = wanted_loss(hidden, labels, Head(layer, 0.5, 20.0))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient)
    torch.library.opcheck(
        linear_cross_entropy_op,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    with pytest.raises(RuntimeError, match="does not train the head"):
        weight = layer.weight.clone().requires_grad_()
        linear_cross_entropy_op(hidden, weight, labels)[0].backward()
