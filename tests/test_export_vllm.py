"""What vLLM makes of an adapter: the table of facts, and the plain adapter that the export writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunegate.adapter.spec import AdapterSpec
from tunegate.export.flat import flatten
from tunegate.export.vllm import as_peft, findings, plain

MODULES = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def levels(config: dict[str, Any], tensors: list[str], vocabulary: int = 1000) -> list[str]:
    found = findings({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **config}, tensors, MODULES, vocabulary)
    return [f"{f.level} {f.what}" for f in found if f.level != "note"]


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"use_dora": True}, [A.replace("lora_A.weight", "lora_magnitude_vector")], ["rejected use_dora", "rejected"]),
        ({"modules_to_save": ["score"]}, [], []),
        ({"modules_to_save": ["lm_head"]}, ["base_model.model.lm_head.weight"], ["rejected modules", "rejected base"]),
        ({"bias": "all"}, [], ["rejected bias"]),
        ({"init_lora_weights": "pissa"}, [], ["rejected init_lora_weights"]),
        ({"r": 600}, [], ["rejected rank 600"]),
        ({"rank_pattern": {"q_proj": 1024}}, [], ["converted rank_pattern", "rejected rank 1024"]),
        ({"use_rslora": True, "alpha_pattern": {"q": 2}}, [A], ["converted use_rslora", "converted alpha_pattern"]),
        ({}, ["base_model.model.model.embed_tokens.base_layer.weight"], ["dropped"]),
        ({}, ["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"], ["dropped"]),
        ({}, ["base_model.model.model.layers.0.self_attn.other.lora_A.weight"], ["rejected"]),
        ({"r": None}, [A], ["rejected adapter_config.json has no r"]),
        ({"target_modules": None, "lora_alpha": None}, [A], ["rejected adapter_config.json has no lora_alpha, target"]),
        ({"r": "8"}, [A], ["rejected not a rank: '8'"]),
        ({"rank_pattern": {"q": 0}}, [A], ["converted", "rejected not a rank: 0"]),
        ({}, ["base_model.model.lm_head.lora_A.weight"], []),
        ({}, [A], []),
    ],
)  # fmt: skip
def test_findings(config: dict[str, Any], tensors: list[str], says: list[str]) -> None:
    found = levels(config, tensors)
    assert len(found) == len(says) and all(any(f.startswith(s) for f in found) for s in says), found


def test_an_adapter_on_a_large_head_is_rejected() -> None:
    head = "base_model.model.lm_head.lora_A.weight"
    assert levels({}, [head], 258_048) == [] and len(levels({}, [head], 258_049)) == 1


def test_the_rank_that_the_server_needs_is_said() -> None:
    notes = [f.what for f in findings({"r": 24}, [], MODULES, 10)]
    assert "rank 24 needs the server's --max-lora-rank 32" in notes


def test_one_rank_and_scale_give_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = AdapterSpec(
        4, 10.0, use_rslora=True, target_modules=("q", "v"), rank_pattern={"v": 2}, alpha_pattern={"v": 3.0}
    )
    state = {}
    for path, rank in (("q", 4), ("v", 2)):
        state[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        state[f"base_model.model.{path}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    flat = flatten(spec, state)
    assert flat.rank == 4 and flat.padded == ("v",) and len(flat.folded) == 1
    made, tensors = as_peft(plain(flat))
    assert float(made.alpha).is_integer() and not made.use_rslora and not made.rank_pattern
    for path in ("q", "v"):
        a, b = (state[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        ours = [tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB"]
        expected = spec.alpha_for(path) / spec.rank_for(path) ** 0.5 * b @ a  # rsLoRA's definition
        torch.testing.assert_close(made.alpha / made.rank * ours[1] @ ours[0], expected)
