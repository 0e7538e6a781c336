"""Shapes: counts against transformers' own classes and against published sizes; the closed formula against both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import FAMILIES, tiny_config, tiny_model
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError
from tunegate.plan.shapes import llama_shape, shape_of_folder, shape_of_model, shape_of_sizes

# (sizes, tied, parameters as their makers count them)
KNOWN = {
    "Llama-3.1-8B": ((32, 4096, 32, 8, 128, 14336, 128256), False, 8_030_261_248),
    "Llama-3.2-3B": ((28, 3072, 24, 8, 128, 8192, 128256), True, 3_212_749_824),
    "Llama-2-70B": ((80, 8192, 64, 8, 128, 28672, 32000), False, 68_976_648_192),
    "Llama-2-7B": ((32, 4096, 32, 32, 128, 11008, 32000), False, 6_738_415_616),
    "SmolLM2-135M": ((30, 576, 9, 3, 64, 1536, 49152), True, 134_515_008),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_closed_formula_gives_the_published_counts(name: str) -> None:
    sizes, tied, count = KNOWN[name]
    assert llama_shape(name, sizes, tied=tied).parameters == count


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_loaded_model(family: str) -> None:
    model = tiny_model(family)
    shape = shape_of_model(model, family)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.embedding == model.get_input_embeddings().weight.numel()
    assert (shape.head == 0) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_model_has_the_same_shape(family: str, tmp_path: Path) -> None:
    tiny_config(family, architectures=[type(tiny_model(family)).__name__]).save_pretrained(tmp_path)
    found, wanted = shape_of_folder(tmp_path, "x"), shape_of_model(tiny_model(family), "x")
    assert found == replace(wanted, stored=found.stored)  # a config need not say how its weights are stored


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
def test_trained_parameters_are_those_of_the_injection(family: str, dora: bool) -> None:
    from tunegate.plan.memory import PlanInputs

    model = tiny_model(family)
    spec = AdapterSpec(rank=4, alpha=8.0, use_dora=dora, rank_pattern={r"(layers|h)\.0\..*": 2})
    shape = shape_of_model(model, family)
    p = PlanInputs(shape, shape.targets(spec), 64, 8, method="dora" if dora else "lora")
    assert p.trainable == inject(model, spec, seed=0).trainable


def test_chosen_layers_and_modules_are_counted_like_the_injection() -> None:
    model = tiny_model("llama")
    spec = AdapterSpec(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj"), layers_to_transform=(1,))
    targets = shape_of_model(model, "x").targets(spec)
    assert sum(t.rank * (t.inputs + t.outputs) for t in targets) == inject(model, spec, seed=0).trainable


@given(
    layers=st.integers(1, 4), hidden=st.sampled_from([32, 64, 96]),
    groups=st.sampled_from([1, 2, 4]), per=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([8, 16]), inner=st.integers(1, 200), vocab=st.integers(10, 500), tied=st.booleans(),
)  # fmt: skip
def test_the_formula_agrees_with_transformers(
    layers: int, hidden: int, groups: int, per: int, dim: int, inner: int, vocab: int, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = groups * per
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=dim, intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        found = shape_of_model(AutoModelForCausalLM.from_config(config), "x")
    formula = llama_shape("x", (layers, hidden, heads, groups, dim, inner, vocab), tied=tied)
    assert found == formula


@given(
    params=st.integers(200, 400_000).map(lambda n: n * 1_000_000), vocab=st.sampled_from([32_000, 128_256]),
    tied=st.booleans(),
)  # fmt: skip
def test_a_size_alone_gives_a_model_of_that_size(params: int, vocab: int, tied: bool) -> None:
    try:
        shape = shape_of_sizes({"params": params, "vocab": vocab}, tied=tied)
    except InputError as error:  # a small model with a large vocabulary
        assert "no room" in str(error)
        return
    assert abs(shape.parameters / params - 1) < 0.02
    assert any(text.startswith("layers") for text in shape.assumed)


def test_sizes_by_flags_name_what_was_assumed() -> None:
    shape = shape_of_sizes({"params": 70_000_000_000, "layers": 80, "hidden": 8192})
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (64, 8, 128)
    assert [text.split()[0] for text in shape.assumed] == ["head_dim", "heads", "kv_heads", "vocab", "intermediate"]
    assert shape_of_sizes({"layers": 32, "hidden": 4096}).parameters > 5e9


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({}, "size is not given"),
        ({"layers": 4}, "size is not given"),
        ({"params": 10**9, "layers": 32, "hidden": 8192}, "no room"),
        ({"params": 10**9, "heads": 6, "kv_heads": 4}, "number of key heads"),
        ({"params": -5}, "not a size"),
        ({"params": 10**10, "layers": 32, "hidden": 4096, "intermediate": 1024}, "do not give the parameter count"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        shape_of_sizes(sizes)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn", "llama3", "linear"])
def test_rotary_scaling_changes_no_size(kind: str, tmp_path: Path) -> None:
    """Bases whose context was stretched: their tables are computed, and hold no parameters."""
    family, half = ("phi3", 8) if kind == "longrope" else ("llama", 8)
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "original_max_position_embeddings": 64, "factor": 4.0}
    extra = {
        "longrope": {"short_factor": [1.0] * half, "long_factor": [2.0] * half},
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }.get(kind, {})
    plain = tiny_config(family, architectures=[type(tiny_model(family)).__name__])
    plain.save_pretrained(tmp_path)
    wanted = shape_of_folder(tmp_path, "x")
    head_dim = wanted.head_dim
    extra = {key: value[: head_dim // 2] if isinstance(value, list) else value for key, value in extra.items()}
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {**scaling, **extra}
    config["max_position_embeddings"] = 256
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of_folder(tmp_path, "x") == wanted


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be used"):
        shape_of_folder(tmp_path, "x")


def test_an_eight_billion_model_needs_no_memory_for_its_shape(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=32, hidden_size=4096, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14336, vocab_size=128256,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert shape_of_folder(tmp_path, "Llama-3.1-8B").parameters == KNOWN["Llama-3.1-8B"][2]
