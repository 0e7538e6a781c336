"""PEFT is the oracle: equal logits and gradients for the same factors, files in both directions, equal name rules."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from tiny import tiny_model
from tunegate.adapter.files import adapter_hash, load_adapter, load_state, read_state, save_adapter
from tunegate.adapter.inject import Injection, inject
from tunegate.adapter.spec import AdapterSpec

IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 120, 7], [9, 1, 250, 3, 77, 140, 6, 31]])
NEOX = ("query_key_value", "dense_4h_to_h")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2 with bias": ("qwen2", {}),
    "gpt2 with Conv1D": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"target_modules": NEOX}),
    "rslora": ("llama", {"use_rslora": True, "alpha": 2.5}),
    "dora without bias": ("llama", {"use_dora": True}),
    "dora with bias": ("qwen2", {"use_dora": True}),
    "dora with Conv1D": ("gpt2", {"use_dora": True}),
    "dora with rslora": ("gpt_neox", {"use_dora": True, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2, r".*\.mlp\..*": 5},
            "alpha_pattern": {r"^model\.layers\.0\..*": 5.0, "k_proj": 7.5},
        },
    ),
    "dora with patterns": ("qwen2", {"use_dora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 9}}),
    "one layer": ("llama", {"target_modules": ("q_proj", "down_proj"), "layers_to_transform": (1,)}),
    "one layer, its list named": (
        "gpt2",
        {"target_modules": ("c_attn",), "layers_to_transform": (0,), "layers_pattern": ("h",)},
    ),
    "regex": ("qwen2", {"target_modules": r".*\.0\..*(q|up)_proj"}),
    "regex with exclusion": ("llama", {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"}),
    "names with exclusion": ("llama", {"exclude_modules": ("down_proj", "layers.0.self_attn.q_proj")}),
    "full path": ("llama", {"target_modules": ("model.layers.0.mlp.up_proj", "v_proj")}),
    "the head": ("gpt_neox", {"target_modules": ("lm_head",)}),
}  # fmt: skip


def peft_config(spec: AdapterSpec) -> LoraConfig:
    def listed(value: Any) -> Any:
        return list(value) or None if isinstance(value, tuple) else value

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        target_modules=listed(spec.target_modules),
        exclude_modules=listed(spec.exclude_modules),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        layers_to_transform=listed(spec.layers_to_transform),
        layers_pattern=listed(spec.layers_pattern),
        task_type="CAUSAL_LM",
    )


def peft_tensors(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """PEFT's parameters by the names of its files."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            found[f"{path}.lora_A.weight"] = layer.lora_A[adapter].weight
            found[f"{path}.lora_B.weight"] = layer.lora_B[adapter].weight
            if adapter in layer.lora_magnitude_vector:
                found[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter].weight
    return found


def pair(case: str) -> tuple[nn.Module, nn.Module, Injection]:
    """The same random adapter on the same base: (PEFT's model, ours, our injection)."""
    family, options = CASES[case]
    spec = AdapterSpec(**{"rank": 4, "alpha": 8.0, **options})
    ours, theirs = tiny_model(family), tiny_model(family)
    injection = inject(ours, spec, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about Conv1D and then does what we do
        theirs = get_peft_model(theirs, peft_config(spec))
    theirs.eval()
    tensors = peft_tensors(theirs)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in sorted(tensors.items()):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.ndim == 2 else parameter * (1 + noise))
    load_state(injection, tensors)  # refuses unless both cover exactly the same modules with the same ranks
    return theirs, ours, injection


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_pefts(case: str) -> None:
    theirs, ours, injection = pair(case)
    close(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(tiny_model(CASES[case][0])), atol=1e-3)
    for model in (theirs, ours):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in peft_tensors(theirs).items()}
    layers = injection.modules.items()
    mine = {
        f"base_model.model.{path}.{name}": p.grad for path, m in layers for name, p in m.adapter_parameters().items()
    }
    assert {name.removesuffix(".weight") for name in gradients} == set(mine)
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0
        close(mine[name.removesuffix(".weight")], gradient)


@pytest.mark.parametrize("case", [case for case in CASES if "dora" in case])
def test_the_initial_magnitude_equals_pefts(case: str) -> None:
    family, options = CASES[case]
    spec = AdapterSpec(**{"rank": 4, "alpha": 8.0, **options})
    ours = read_state(inject(tiny_model(family), spec, seed=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_tensors(get_peft_model(tiny_model(family), peft_config(spec)))
    for name in (name for name in theirs if name.endswith("vector")):
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save(case: str, tmp_path: Path) -> None:
    _, ours, injection = pair(case)
    save_adapter(tmp_path, injection, base_name="tiny/base")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # missing or surplus keys are only warnings in PEFT; Conv1D is declared
        loaded = PeftModel.from_pretrained(tiny_model(CASES[case][0]), tmp_path)
    close(logits(loaded), logits(ours))
    tensors = peft_tensors(loaded)
    state = read_state(injection)
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(case: str, tmp_path: Path) -> None:
    theirs, _, _ = pair(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    fresh = tiny_model(CASES[case][0])
    injection = load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(theirs))
    tensors = peft_tensors(theirs)
    assert all(torch.equal(t, tensors[name]) for name, t in read_state(injection).items())


def test_a_trip_through_peft_keeps_the_hash(tmp_path: Path) -> None:
    _, _, injection = pair("dora with bias")
    save_adapter(tmp_path / "ours", injection, base_name="tiny/base")
    loaded = PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert adapter_hash(tmp_path / "theirs") == adapter_hash(tmp_path / "ours")


def test_the_config_has_exactly_pefts_fields(tmp_path: Path) -> None:
    _, _, injection = pair("llama")
    save_adapter(tmp_path, injection, base_name="tiny/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) == set(LoraConfig(target_modules=["q"]).to_dict())


def test_a_merged_base_equals_pefts_merge() -> None:
    for case in ("patterns", "dora with bias", "dora with Conv1D"):
        theirs, _, injection = pair(case)
        merged = copy.deepcopy(theirs).merge_and_unload()
        for path, layer in injection.modules.items():
            weight = merged.get_submodule(path).weight
            torch.testing.assert_close(
                layer.merged_weight(), weight.t() if "Conv1D" in case else weight, rtol=1e-4, atol=1e-5
            )


_part = st.sampled_from(["model", "layers", "h", "0", "1", "12", "q_proj", "proj", "a+b", "attn", "experts"])
_path = st.lists(_part, min_size=1, max_size=7).map(".".join)
_expression = st.one_of(
    _path,
    st.sampled_from(
        [r".*proj", "^model", r".*\.(0|1)\..*", r"q_proj|attn", "[", ".*", "", r"\d+", "model.layers.0.*", "a+b"]
    ),
)


def compiles(expression: str) -> bool:
    import re

    try:
        re.compile(rf"({expression})")
    except re.error:
        return False
    return True


_valid = _expression.filter(compiles)


@settings(max_examples=400)
@given(path=_path, keys=st.lists(_valid, max_size=4, unique=True))
def test_pattern_keys_match_as_in_peft(path: str, keys: list[str]) -> None:
    values = {key: n + 1 for n, key in enumerate(keys)}
    spec = AdapterSpec(99, 98.0, rank_pattern=values, alpha_pattern=values)
    expected = values.get(get_pattern_key(values.keys(), path))
    assert spec.rank_for(path) == (expected or 99)
    assert spec.alpha_for(path) == (expected or 98.0)


@settings(max_examples=600)
@given(
    path=_path,
    targets=st.one_of(_valid.filter(bool), st.lists(_path, min_size=1, max_size=3)),
    excluded=st.one_of(_valid, st.lists(_path, max_size=2)),
    layers=st.none() | st.lists(st.sampled_from([0, 1, 12]), min_size=1, max_size=2),
    pattern=st.sampled_from([None, "layers", "h", "experts"]),
)
def test_targets_are_selected_as_in_peft(
    path: str, targets: str | list[str], excluded: str | list[str], layers: list[int] | None, pattern: str | None
) -> None:
    if isinstance(targets, str):
        layers = None
    pattern = pattern if layers else None
    config = LoraConfig(
        target_modules=targets, exclude_modules=excluded, layers_to_transform=layers, layers_pattern=pattern
    )
    spec = AdapterSpec(
        4,
        8.0,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
        layers_to_transform=tuple(layers) if layers else None,
        layers_pattern=(pattern,) if pattern else (),
    )
    assert spec.selects(path, False) == bool(check_target_module_exists(config, path))
