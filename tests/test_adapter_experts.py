"""``all-linear`` on mixtures of experts: what it adapts, what it leaves out and says so, and that it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tunegate.adapter.inject import find_targets, inject, left_out
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine.runner import Runner
from tunegate.model.experts import fused_experts, is_router
from tunegate.model.streaming import quantizable

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 400, "max_position_embeddings": 64, "num_experts_per_tok": 2,
         "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SHARED = {"shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"}
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "Qwen2Moe": (
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        ATTENTION | SHARED,
    ),
    "Qwen3Moe": ({"num_experts": 4, "moe_intermediate_size": 16}, ATTENTION),
    "Mixtral": ({"num_local_experts": 4}, ATTENTION),
}


def build(family: str) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family][0])
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_takes_the_linear_layers_that_are_no_routers(family: str) -> None:
    model, spec = build(family), AdapterSpec(4, 8.0)
    targets, problems = find_targets(model, spec)
    assert not problems  # the shared expert's gate is one wide: rank 4 would not fit it
    wanted = {
        f"model.layers.{n}.{'mlp' if 'expert' in name else 'self_attn'}.{name}"
        for n in range(2)
        for name in FAMILIES[family][1]
    }
    assert set(targets) == wanted
    said = left_out(model, spec)
    assert said is not None and "every router and the experts of 2 layers" in said
    assert left_out(model, AdapterSpec(4, 8.0, target_modules=("q_proj",))) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_what_it_took(family: str) -> None:
    runner = Runner(build(family))
    injection = inject(runner.model, AdapterSpec(4, 8.0), seed=0)
    said = left_out(runner.model, injection.spec)
    assert said is not None and "experts" in said
    rows = [Rendered(str(n), tuple(range(5, 17 + n)), (False,) * 6 + (True,) * (6 + n)) for n in range(3)]
    runner.loss_sum(make_batch(rows, share_prefix=runner.shares_prefix)).backward()
    for name, parameter in injection.parameters().items():
        assert parameter.grad is not None, name
        if name.endswith("lora_B"):
            assert parameter.grad.abs().max() > 0, name


def test_a_named_router_is_adapted() -> None:
    """Names are the user's own choice: only all-linear keeps off."""
    targets, problems = find_targets(build("Qwen2Moe"), AdapterSpec(1, 2.0, target_modules=("shared_expert_gate",)))
    assert len(targets) == 2 and not problems


def test_experts_by_name_are_an_input_error_not_a_traceback() -> None:
    _, problems = find_targets(build("Mixtral"), AdapterSpec(4, 8.0, target_modules=("experts",)))
    assert [problem.got for problem in problems] == ["MixtralExperts"] * 2


class Block(nn.Module):
    """A block as older checkpoints have it: linear layers for router and experts."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.gate = nn.ModuleDict({"wg": nn.Linear(8, 4)})
        self.up_proj = nn.Linear(8, 8)
        if experts:
            self.experts = nn.ModuleList([nn.Linear(8, 8)])


def test_a_gate_routes_only_beside_experts() -> None:
    model = nn.ModuleDict({"mixture": Block(experts=True), "plain": Block(experts=False)})
    routers = {
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and is_router(model, path)
    }
    assert routers == {"mixture.gate.wg"}
    assert fused_experts(model) == []
    targets, _ = find_targets(model, AdapterSpec(2, 4.0))
    assert set(targets) == {"mixture.up_proj", "mixture.experts.0", "plain.gate.wg", "plain.up_proj"}


def test_no_router_is_quantized() -> None:
    assert not {path for path in quantizable(build("Qwen2Moe"), ()) if "gate" in path.replace("gate_proj", "")}
