"""Selection, injection and removal on tiny models, and the errors of a wrong selection."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tiny import FAMILIES, tiny_model
from tunegate.adapter.inject import disabled, inject, remove
from tunegate.adapter.layers import DoRALinear, LoRALinear
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError

IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 120, 7]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def warm(injection) -> None:
    """Give every B some value, so that the adapter does something."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_of_a_model(family: str, use_dora: bool) -> None:
    """Fresh = base bit for bit; warm differs; disabled = base; removed = the same objects as before."""
    model = tiny_model(family)
    before, modules = logits(model), dict(model.named_modules())
    base_parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    injection = inject(model, AdapterSpec(4, 8.0, use_dora=use_dora), seed=1)
    assert {type(layer) for layer in injection.modules.values()} == {DoRALinear if use_dora else LoRALinear}
    assert torch.equal(logits(model), before)
    warm(injection)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    for target in (model, injection):
        with disabled(target):
            assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)
    remove(model)
    assert torch.equal(logits(model), before)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[path] is modules[path] for path in modules)
    assert all(torch.equal(p, base_parameters[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_takes_every_linear_layer_but_the_head(family: str) -> None:
    model = tiny_model(family)
    linear = {path for path, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    head = {path for path, m in model.named_modules() if m is model.get_output_embeddings()}
    injection = inject(model, AdapterSpec(2, 4.0), seed=0)
    assert head and set(injection.modules) == linear - head
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in injection.parameters().values()}
    assert injection.trainable == sum(p.numel() for p in trainable)
    assert injection.total == sum(p.numel() for p in model.parameters())


def test_all_linear_leaves_out_a_layer_tied_to_the_input_embeddings() -> None:
    model = tiny_model("llama")
    model.model.extra = nn.Linear(32, 400, bias=False)
    model.model.extra.weight = model.get_input_embeddings().weight
    assert "model.extra" not in inject(model, AdapterSpec(2, 4.0), seed=0).modules


def test_the_start_depends_on_seed_and_path_alone() -> None:
    wide = inject(tiny_model("llama"), AdapterSpec(4, 8.0), seed=7).parameters()
    narrow = inject(tiny_model("llama"), AdapterSpec(4, 8.0, target_modules=("v_proj",)), seed=7).parameters()
    assert narrow and all(torch.equal(narrow[name], wide[name]) for name in narrow)
    other = inject(tiny_model("llama"), AdapterSpec(4, 8.0), seed=8).parameters()
    name = "model.layers.0.self_attn.v_proj.lora_A"
    assert not torch.equal(other[name], wide[name])
    assert not torch.equal(wide[name], wide[name.replace("layers.0", "layers.1")])


def test_parameters_come_in_canonical_order() -> None:
    names = list(inject(tiny_model("qwen2"), AdapterSpec(4, 8.0, use_dora=True), seed=7).parameters())
    assert all(a < b for a, b in pairwise(names))


def test_disabled_restores_after_an_error_and_nests() -> None:
    model = tiny_model("llama")
    injection = inject(model, AdapterSpec(4, 8.0), seed=7)
    with pytest.raises(RuntimeError, match="stop"), disabled(model), disabled(injection):
        raise RuntimeError("stop")
    assert all(layer.enabled for layer in injection.modules.values())


def test_patterns_set_rank_and_scale_and_layers_are_chosen() -> None:
    spec = AdapterSpec(
        4,
        8.0,
        use_rslora=True,
        target_modules=("q_proj", "down_proj"),
        rank_pattern={"layers.1.self_attn.q_proj": 9, r".*q_proj": 2},
        alpha_pattern={"down_proj": 3.0},
        layers_to_transform=(1, 0),
    )
    layers = inject(tiny_model("llama"), spec, seed=0).modules
    got = {path.removeprefix("model.layers."): (layer.rank, layer.scale) for path, layer in layers.items()}
    assert got == {
        "0.self_attn.q_proj": (2, 8 / 2**0.5),
        "0.mlp.down_proj": (4, 1.5),
        "1.self_attn.q_proj": (9, 8 / 3),
        "1.mlp.down_proj": (4, 1.5),
    }


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"target_modules": r".*\.1\..*_proj"}, 7),
        ({"target_modules": ("model.layers.0.mlp.up_proj", "k_proj")}, 3),
        ({"exclude_modules": ("down_proj",)}, 12),
        ({"exclude_modules": r".*\.mlp\..*"}, 8),
        ({"layers_to_transform": (1,)}, 7),
        ({"target_modules": ("lm_head",)}, 1),
        # PEFT's rule: a full path is kept whatever its layer index
        (
            {
                "target_modules": ("model.layers.0.mlp.up_proj", "k_proj"),
                "layers_to_transform": (1,),
                "layers_pattern": ("layers",),
            },
            2,
        ),
    ],
)
def test_selection(selection: dict, expected: int) -> None:
    assert len(inject(tiny_model("llama"), AdapterSpec(4, 8.0, **selection), seed=0).modules) == expected


@pytest.mark.parametrize(
    ("selection", "parts"),
    [
        ({"target_modules": ("q_prj", "v_proj")}, ["no module matches", "'q_prj'", "did you mean 'q_proj'"]),
        ({"target_modules": r".*attn\.q"}, ["no module matches", "q_proj"]),
        ({"target_modules": ("self_attn",)}, ["model.layers.0.self_attn", "cannot carry an adapter"]),
        ({"target_modules": ("embed_tokens",)}, ["model.embed_tokens", "Embedding"]),
        ({"exclude_modules": ("lm_haed",)}, ["exclude_modules", "'lm_haed'"]),
        ({"exclude_modules": r".*_proj"}, ["leave nothing"]),
        ({"rank_pattern": {"q_porj": 2}}, ["rank_pattern", "'q_porj'", "did you mean 'q_proj'"]),
        ({"alpha_pattern": {"w2": 2}}, ["alpha_pattern", "no target uses this key"]),
        ({"rank_pattern": {".*_proj": 2, "q_proj": 3}}, ["'q_proj'", "an earlier key matches first"]),
        ({"layers_to_transform": (0, 5)}, ["no such layer", "from 0 to 1", "5"]),
        ({"rank": 40}, ["rank exceeds", "40", "32 x 32"]),
    ],
)
def test_a_wrong_selection_names_the_way_out_and_leaves_the_model_alone(selection: dict, parts: list[str]) -> None:
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    modules = dict(model.named_modules())
    with pytest.raises(InputError) as caught:
        inject(model, AdapterSpec(**{"rank": 4, "alpha": 8.0, **selection}), seed=0)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_expression_that_backtracks_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunegate.adapter.spec._SECONDS_PER_MATCH", 0.05)
    with pytest.raises(InputError, match="needs too long"):
        AdapterSpec(4, 8.0, target_modules=r".*(a|aa)+[^a]").selects("model." + "a" * 80, True)


def test_problems_are_reported_together() -> None:
    spec = AdapterSpec(40, 8.0, target_modules=("q_prj", "v_proj"), rank_pattern={"zzz": 2}, layers_to_transform=(1, 9))
    with pytest.raises(InputError) as caught:
        inject(tiny_model("llama"), spec, seed=0)
    assert len(caught.value.problems) == 4


def test_a_second_adapter_is_refused() -> None:
    model = tiny_model("llama")
    inject(model, AdapterSpec(4, 8.0), seed=0)
    with pytest.raises(InputError, match="already carries an adapter"):
        inject(model, AdapterSpec(4, 8.0), seed=0)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"rank": 0, "alpha": -1.0, "dropout": 1.0}, 3),
        ({"rank": True, "alpha": float("nan")}, 2),
        ({"target_modules": ()}, 1),
        ({"target_modules": ("q_proj", "")}, 1),
        ({"target_modules": "q_proj(", "exclude_modules": "["}, 2),
        ({"rank_pattern": {"(": 0}, "alpha_pattern": {"a": "x"}}, 3),
        ({"layers_to_transform": ()}, 1),
        ({"layers_to_transform": (-1,)}, 1),
        ({"target_modules": ".*q_proj", "layers_to_transform": (1,)}, 1),
        ({"layers_pattern": ("h",)}, 1),
    ],
)
def test_a_spec_without_sense_lists_every_problem(values: dict, count: int) -> None:
    with pytest.raises(InputError) as caught:
        AdapterSpec(**{"rank": 4, "alpha": 8.0, **values})
    assert len(caught.value.problems) == count, str(caught.value)


def test_a_copied_model_keeps_its_adapter() -> None:
    model = tiny_model("llama")
    warm(inject(model, AdapterSpec(4, 8.0, use_dora=True), seed=0))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
