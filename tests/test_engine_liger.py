"""Liger's kernels in a model's layers: what is put in gives the model's own numbers, and what does not goes out again.
The operations are plain PyTorch here; Liger's own run where there is a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import adapt_plain
from tiny import tiny_model
from tunegate.engine import liger
from tunegate.engine.runner import Runner


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


PLAIN = liger.Operations(rms_norm, {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
})  # fmt: skip
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "phi3"]


def gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logits = model(input_ids=ids).logits
    found = torch.autograd.grad(logits.float().square().mean(), list(parameters.values()))
    return logits.detach(), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_compute_what_they_did(family: str) -> None:
    model = tiny_model(family)
    adapt_plain(model)
    ids = torch.arange(3, 20)[None]
    logits, grads = gradients(model, ids)
    layers = liger.LigerLayers(model.base_model, PLAIN)
    assert len(layers.shapes) == layers.count > 0
    layers.install()
    changed = [module for module in model.modules() if "forward" in module.__dict__]
    assert len(changed) >= 3 * layers.count
    got, mine = gradients(model, ids)
    assert torch.allclose(got, logits, atol=1e-5)
    assert all(torch.allclose(mine[name], grads[name], atol=1e-6) for name in grads)
    layers.remove()
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    assert torch.equal(gradients(model, ids)[0], logits)


def test_the_runner_believes_only_what_it_has_seen() -> None:
    runner = Runner(tiny_model("llama"))
    if runner.fused is not None:
        runner.fused.remove()
    assert runner._try_liger(PLAIN) == "Liger's norms and gated products in 2 of 2 layers"

    def wrong(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        return rms_norm(x, weight, eps, offset) * 1.5

    def fails(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        raise OSError("no driver")

    for operation, reason in ((wrong, "logits differ by"), (fails, "OSError: no driver")):
        other = Runner(tiny_model("llama"))
        if other.fused is not None:
            other.fused.remove()
        assert reason in other._try_liger(liger.Operations(operation, {}))
        assert not [m for m in other.model.modules() if "forward" in m.__dict__]
    assert other._try_liger("no Liger kernels (a reason)") == "no Liger kernels (a reason)"


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available(),
    reason="needs liger-kernel and a GPU: its kernels do not run under Triton's interpreter",
)
def test_ligers_own_kernels_are_these() -> None:
    found = liger.operations()
    assert isinstance(found, liger.Operations), found
    x, up, weight, grad = (torch.randn(6, 64, device="cuda").requires_grad_() for _ in range(4))
    calls = [(lambda f: f.rms_norm(x * 1, weight.detach(), 1e-6, 1.0), (x,))]
    calls += [(lambda f, n=name: f.gated[n](x * 1, up * 1), (x, up)) for name in PLAIN.gated]
    for call, inputs in calls:
        results = []
        for operations in (found, PLAIN):
            out = call(operations)
            results.append((out.detach().clone(), *torch.autograd.grad(out, inputs, grad.detach().clone())))
        for mine, theirs in zip(*results, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4)
