"""Fused decoder layers: the same loss and gradients as the model's own layers (PEFT is the oracle in tests/parity),
dropout and recomputation as laws, and what happens where they cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tiny import tiny_model
from tunegate.adapter.inject import disabled, inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine.runner import Runner
from tunegate.engine.workspace import Lease, Workspace
from tunegate.kernels import native

FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C++ kernels are not built")


def rows(count: int = 5, seed: int = 0) -> list[Rendered]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 390, (5 + 3 * number,), generator=generator).tolist()
        made.append(Rendered(str(number), (7, 8, 9, *ids), (False,) * 5 + (True,) * (len(ids) - 2)))
    return made


def built(family: str, dtype: torch.dtype = torch.float32, **spec: Any) -> tuple[Runner, Any]:
    runner = Runner(tiny_model(family).to(dtype))
    injection = inject(runner.model, AdapterSpec(rank=4, alpha=8.0, **spec), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if name.endswith("magnitude_vector"):
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return runner, injection


def gradients(runner: Runner, injection: Any, share: bool = False, seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(seed)
    loss = runner.loss_sum(make_batch(rows(), share_prefix=share))
    loss.backward()
    found = {}
    for name, parameter in injection.parameters().items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return float(loss.detach()), found


def same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], tolerance: float = 2e-4) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name, tensor in one[1].items():
        scale = other[1][name].abs().max().clamp_min(1e-3)
        assert float((tensor - other[1][name]).abs().max() / scale) < tolerance * 10, name


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_model_equals_its_own_layers(family: str, method: dict[str, bool], share: bool) -> None:
    runner, injection = built(family, **method)
    assert runner.fused is not None and len(runner.fused.shapes) == 2, runner.path_reason
    fused = gradients(runner, injection, share)
    runner.fused.remove()
    same(fused, gradients(runner, injection, share))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapters_on_some_layers_only(family: str) -> None:
    runner, injection = built(family, target_modules=("q_proj", "v_proj", "down_proj"), layers_to_transform=(1,))
    fused = gradients(runner, injection)
    assert runner.fused is not None
    runner.fused.remove()
    same(fused, gradients(runner, injection))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("dora", [False, True])
def test_sixteen_bits_stay_near_thirty_two(family: str, dora: bool) -> None:
    """The cosine to the fp32 gradients is as good as that of the model's own bf16 layers, within a little."""
    exact = gradients(*built(family, use_dora=dora))[1]
    runner, injection = built(family, torch.bfloat16, use_dora=dora)
    assert runner.fused is not None, runner.path_reason
    fused = gradients(runner, injection)[1]
    runner.fused.remove()
    plain = gradients(runner, injection)[1]
    for name, wanted in exact.items():
        ours, theirs = (float(cosine_similarity(g[name].flatten(), wanted.flatten(), dim=0)) for g in (fused, plain))
        assert ours > 0.95 and ours > theirs - 0.02, name


def training(injection: Any) -> None:
    for layer in injection.modules.values():
        layer.training = True


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_recomputing_gives_the_same_bytes(family: str, dropout: float) -> None:
    runner, injection = built(family, dropout=dropout)
    training(injection)
    assert runner.fused is not None
    kept = gradients(runner, injection)
    runner.fused.save_less(runner.fused.count)
    again = gradients(runner, injection)
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_dropout_follows_the_seed_and_its_gradient_is_the_masked_functions() -> None:
    runner, injection = built("llama", dropout=0.4)
    training(injection)
    loss, grads = gradients(runner, injection, seed=3)
    assert gradients(runner, injection, seed=3)[0] == loss
    assert gradients(runner, injection, seed=4)[0] != loss
    name = next(n for n in grads if "layers.0" in n and n.endswith("q_proj.lora_A"))
    parameter = injection.parameters()[name]
    place = int(grads[name].abs().argmax())
    step, values = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[place] += sign * step
        values.append(gradients(runner, injection, seed=3)[0])
        with torch.no_grad():
            parameter.view(-1)[place] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(grads[name].view(-1)[place]), rel=0.05)


def test_dropout_masks_differ_between_modules_and_layers() -> None:
    runner, injection = built("llama", dropout=0.5)
    training(injection)
    grads = gradients(runner, injection)[1]
    zero = [set((grads[n] == 0).nonzero()[:, 1].tolist()) for n in grads if n.endswith("q_proj.lora_A")]
    assert len({tuple(sorted(z)) for z in zero}) >= 1  # columns are dropped per token, so no whole column vanishes
    assert all(not z for z in zero)


def test_two_graphs_may_live_at_once() -> None:
    runner, injection = built("llama")
    first, second = make_batch(rows(4, seed=1), share_prefix=False), make_batch(rows(5, seed=2), share_prefix=False)
    apart = {}
    for batch in (first, second):
        runner.loss_sum(batch).backward()
    for name, parameter in injection.parameters().items():
        apart[name], parameter.grad = parameter.grad, None
    (runner.loss_sum(first) + runner.loss_sum(second)).backward()
    for name, parameter in injection.parameters().items():
        torch.testing.assert_close(parameter.grad, apart[name])


def test_a_second_backward_pass_is_refused() -> None:
    runner, _ = built("llama")
    loss = runner.loss_sum(make_batch(rows(), share_prefix=False))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_a_switched_off_or_removed_adapter_leaves_the_base() -> None:
    runner, injection = built("llama")
    batch = make_batch(rows(), share_prefix=False)
    with torch.no_grad():
        adapted = float(runner.loss_sum(batch))
        with disabled(injection):
            off = float(runner.loss_sum(batch))
        remove(runner.model)
        assert float(runner.loss_sum(batch)) == off != adapted


def test_what_the_kernels_cannot_compute_takes_the_layers_own_forward() -> None:
    runner, injection = built("llama", use_dora=True)
    with torch.no_grad():  # the backward pass would divide by this magnitude
        next(p for n, p in injection.parameters().items() if n.endswith("magnitude_vector"))[0] = 0.0
    loss, grads = gradients(runner, injection)
    assert runner.fused is not None
    runner.fused.remove()
    same((loss, grads), gradients(runner, injection))


def test_another_architecture_says_why_it_is_not_fused() -> None:
    assert "GPTNeoXLayer is not a layer the fused path knows" in Runner(tiny_model("gpt_neox")).path_reason


def test_a_layer_that_computes_something_else_is_found_out() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    runner = Runner(model)
    assert "1 of 2 layers fused" in runner.path_reason and "unknown activation" in runner.path_reason


def test_a_steady_step_asks_for_no_new_memory() -> None:
    runner, injection = built("llama")
    gradients(runner, injection)
    assert runner.fused is not None
    before = runner.fused.reserved()
    for _ in range(3):
        gradients(runner, injection)
    assert runner.fused.reserved() == before


def test_a_workspace_gives_back_in_order_and_grows() -> None:
    space = Workspace()
    first = space.take(3, 5)
    with space.scope():
        inner = space.take(100)
        place = inner.data_ptr()
    assert space.take(100).data_ptr() == place
    assert first.shape == (3, 5) and first.data_ptr() % 64 == 0
    big = space.take(40 << 20)
    assert big.numel() == 40 << 20 and space.reserved() >= 160 << 20
    pool: list[Workspace] = []
    lease = Lease(pool)
    borrowed = lease.workspace
    del lease
    assert pool == [borrowed]
