"""What keeps an adapter from answering, and that everything is told at once."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from registry_fixtures import Place
from registry_folders import change_card, decision, fingerprint, write_card
from served import make_adapter, make_peft, served_base
from tiny import tiny_base
from tunegate.adapter.card import FILES, MANIFEST, load_card
from tunegate.adapter.files import adapter_hash
from tunegate.data.template import CHATML
from tunegate.errors import InputError, Problem
from tunegate.files import hash_file, write_json
from tunegate.model.fingerprint import fingerprint_base
from tunegate.registry.adding import add
from tunegate.registry.bases import supersede
from tunegate.registry.entries import Entity
from tunegate.registry.intake import read_folder
from tunegate.registry.pulling import pull
from tunegate.registry.states import promote, retire
from tunegate.serve.admission import House, admit
from tunegate.serve.base import ServedBase, open_base

NF4 = {"format": "nf4", "block": 64, "double": True, "keep": [], "stored": False}


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ServedBase:
    return served_base(tiny_llama)


@pytest.fixture
def house(base: ServedBase) -> House:
    return House(base)


@pytest.fixture
def adapter(tmp_path: Path, base: ServedBase) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def refused(folder: Path, house: House) -> list[Problem]:
    with pytest.raises(InputError) as error:
        admit(folder, house)
    return error.value.problems


def only(folder: Path, house: House) -> Problem:
    (problem,) = refused(folder, house)
    return problem


def rewrite(folder: Path, change: Any) -> Path:
    """The same adapter with other tensors, its card and manifest brought in line."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    card = load_card(folder)
    return write_card(folder, replace(card, adapter={**card.adapter, "hash": adapter_hash(folder)}))


def test_a_shipped_adapter_is_admitted_under_its_own_hash(adapter: Path, house: House) -> None:
    found = admit(adapter, house)
    assert (found.key, found.standing, found.template, found.folder) == (adapter_hash(adapter), "ship", None, adapter)
    assert found.created == 1767323045  # 2026-01-02T03:04:05Z


# --- the base ----------------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_nothing_allows_it(tmp_path: Path, base: ServedBase, adapter: Path) -> None:
    other = served_base(tiny_base(tmp_path / "other", "llama", seed=1))
    problem = only(adapter, House(other, allow_ungated=True))
    assert problem.what == "the adapter was trained on another base" and "(weights differ)" in problem.got
    assert "allow" not in problem.fix


def test_the_quantization_must_be_that_of_the_training(tmp_path: Path, base: ServedBase, adapter: Path) -> None:
    quantized = open_base(base.resolved, NF4)
    problem = only(adapter, House(quantized))
    assert (problem.expected, json.loads(problem.got)) == ("no quantization", NF4)
    trained = make_adapter(tmp_path / "nf4", quantized)
    assert admit(trained, House(quantized)).standing == "ship"
    other = {**NF4, "block": 128}
    assert json.loads(only(trained, House(open_base(base.resolved, other))).got) == other


def test_the_template_of_the_training_is_the_one_that_counts(tmp_path: Path, base: ServedBase) -> None:
    own = make_adapter(tmp_path / "own", base, template="plain")
    found = admit(own, House(base))
    assert found.template == "plain"
    assert base.renderer("plain").prompt_ids([{"role": "user", "content": "x"}]) != base.renderer().prompt_ids(
        [{"role": "user", "content": "x"}]
    )
    card = load_card(own)
    changed = change_card(own, config={**card.config, "base": {"name": "tiny", "template": None}})
    problems = refused(changed, House(base))
    assert [p.what.split(",")[0] for p in problems] == [f"golden prompt {n} gives other tokens" for n in (1, 2)]


def test_a_template_that_is_none_is_told_and_not_raised(adapter: Path, house: House) -> None:
    card = load_card(adapter)
    broken = change_card(adapter, config={**card.config, "base": {"template": "{% if %}"}})
    assert "template" in str(refused(broken, house)[0])
    assert "config.base.template" in only(change_card(adapter, config={"base": {"template": 3}}), house).what


@pytest.mark.parametrize(
    "entry",
    [
        {"ids": [1]},
        {"messages": "x", "ids": [1]},
        {"messages": [3], "ids": [1]},
        {"text": "x", "ids": [-1]},
        {"text": "x", "ids": ["1"]},
        {"text": "x", "ids": [1 << 31]},
        {"messages": [{"role": "user"}], "tools": 3, "ids": [1]},
    ],
)
def test_golden_prompts_that_are_none(adapter: Path, house: House, entry: dict[str, Any]) -> None:
    golden = load_card(adapter).template["golden"]
    change_card(adapter, template={"hash": "b3:0", "golden": [*golden, entry]})
    assert "template.golden" in only(adapter, house).what


def test_a_card_without_golden_prompts_proves_nothing(adapter: Path, house: House) -> None:
    change_card(adapter, template={"hash": "b3:0", "golden": []})
    assert "no golden prompts" in only(adapter, house).what


@given(
    content=st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
    role=st.text(max_size=5) | st.integers(), tools=st.none() | st.lists(st.integers(), max_size=2),
)  # fmt: skip
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_golden_prompt_holds_is_refused_in_words(
    adapter: Path, house: House, content: Any, role: Any, tools: Any
) -> None:
    golden = [{"messages": [{"role": role, "content": content}], "tools": tools, "ids": [1]}]
    change_card(adapter, template={"hash": "b3:0", "golden": golden})
    assert refused(adapter, house)


def test_a_card_may_hold_numbers_that_are_none(adapter: Path, house: House) -> None:
    text = (adapter / "card.json").read_text().replace('"recipe": null', '"recipe": {"block": NaN}')
    (adapter / "card.json").write_text(text)
    write_json(adapter / MANIFEST, {name: hash_file(adapter / name) for name in FILES})
    assert "another quantization" in only(adapter, house).what


# --- the gate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["hold", "inconclusive"])
def test_what_the_gate_held_answers_only_where_that_is_allowed(
    tmp_path: Path, base: ServedBase, house: House, verdict: str
) -> None:
    held = make_adapter(tmp_path / "held", base, verdict=verdict)
    problem = only(held, house)
    assert problem.what == f"the gate says {verdict}" and "min_score: as it is" in problem.got
    assert admit(held, House(base, allow_ungated=True)).standing == f"{verdict} (ungated)"


def test_a_verdict_that_its_rules_do_not_give_is_refused(tmp_path: Path, base: ServedBase, house: House) -> None:
    held = make_adapter(tmp_path / "held", base, verdict="hold")
    forged = change_card(held, decision=replace(decision("hold"), verdict="ship"))
    assert only(forged, House(base, allow_ungated=True)).what == "the decision does not follow from its rules"


def test_an_adapter_without_a_card_is_unverified(tmp_path: Path, base: ServedBase, house: House) -> None:
    plain = make_peft(tmp_path / "plain", base)
    assert "no card" in only(plain, house).what
    found = admit(plain, House(base, allow_ungated=True))
    assert (found.standing, found.key) == ("unverified", adapter_hash(plain))


def test_an_override_counts_where_the_registry_keeps_it(tmp_path: Path, base: ServedBase, house: House) -> None:
    held = make_adapter(tmp_path / "held", base, verdict="hold")
    registry = Place(str(tmp_path / "registry"), None).open()
    version = add(registry, read_folder(held)).version
    assert only(held, House(base, registry)).what == "the gate says hold"
    promote(registry, version.ref, why="needed", override="the customer waits")
    standing = "hold (override: the customer waits)"
    assert admit(held, House(base, registry)).standing == standing
    pull(registry, version.ref, tmp_path / "pulled")
    assert admit(tmp_path / "pulled", house).standing == standing  # without a registry: what was pulled says so itself
    other = make_adapter(tmp_path / "other", base, seed=1, verdict="hold")
    shutil.copy(tmp_path / "pulled" / "registry.json", other)
    assert only(other, house).what == "the gate says hold"  # the words of another adapter


def test_a_flagged_or_retired_adapter_is_refused_as_a_folder_too(tmp_path: Path, base: ServedBase) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    registry = Place(str(tmp_path / "registry"), None).open()
    version = add(registry, read_folder(adapter)).version
    house = House(base, registry)
    assert admit(adapter, house).version == version.adapter
    retire(registry, version.ref, why="old")
    assert only(adapter, house).what == "the version is retired"
    new = fingerprint(9)
    supersede(registry, base.at_hand.fingerprint.total, Entity(new.total, "base", "newer", {}), why="a leak")
    problems = refused(adapter, house)
    assert len(problems) == 2 and "superseded by newer" in problems[0].what
    unknown = make_adapter(tmp_path / "unknown", base, seed=1)
    assert "the base is flagged" in only(unknown, house).what


# --- the files ---------------------------------------------------------------------------------------------------


def test_a_changed_byte_is_noticed(adapter: Path, house: House) -> None:
    path = adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    problems = refused(adapter, house)
    assert {p.what for p in problems} == {"changed since it was published", "the card is of another adapter"}


def test_the_card_of_another_adapter(tmp_path: Path, base: ServedBase, adapter: Path, house: House) -> None:
    other = make_adapter(tmp_path / "other", base, seed=1)
    for name in ("card.json", "README.md"):
        shutil.copy(other / name, adapter)
    write_json(adapter / MANIFEST, {name: hash_file(adapter / name) for name in FILES})
    assert only(adapter, house).what == "the card is of another adapter"


def test_a_missing_and_a_surplus_tensor(adapter: Path, house: House) -> None:
    def change(tensors: dict[str, Any]) -> None:
        moved = tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight")
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] = moved

    problems = refused(rewrite(adapter, change), house)
    assert sorted(p.what for p in problems) == ["a tensor is missing", "no adapted module takes this tensor"]
    assert "layers.1.mlp.up_proj" in problems[0].where and "layers.1.mlp.down_proj" in problems[1].where


def test_a_layer_that_the_base_has_not(adapter: Path, house: House) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for part in "AB":
            name = f"base_model.model.model.layers.{{}}.mlp.up_proj.lora_{part}.weight"
            tensors[name.format(7)] = tensors[name.format(1)]

    assert [p.what for p in refused(rewrite(adapter, change), house)] == ["no adapted module takes this tensor"] * 2


def test_an_adapter_on_the_head_is_to_be_merged(tmp_path: Path, base: ServedBase) -> None:
    head = make_peft(tmp_path / "head", base, targets=("q_proj", "lm_head"))
    problem = only(head, House(base, allow_ungated=True))
    assert "output head" in problem.what and problem.where.endswith("lm_head") and "tunegate merge" in problem.fix


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_more_than_a_lora_is_refused_with_the_way_out(
    tmp_path: Path, base: ServedBase, config: dict[str, Any], key: str
) -> None:
    whole = make_peft(tmp_path / "whole", base, **config)
    problem = only(whole, House(base, allow_ungated=True))
    assert problem.where.endswith(f": {key}") and "merge_and_unload" in problem.fix


def test_a_whole_weight_beside_the_factors(tmp_path: Path, base: ServedBase) -> None:
    folder = make_peft(tmp_path / "whole", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = next(iter(tensors.values()))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "merge_and_unload" in only(folder, House(base, allow_ungated=True)).fix


def test_a_pipe_is_not_waited_for(tmp_path: Path, adapter: Path, house: House) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    assert only(adapter, house).what == "not a regular file"


def test_a_link_out_of_the_folder(tmp_path: Path, adapter: Path, house: House) -> None:
    (tmp_path / "outside.json").write_text("{}")
    (adapter / "extra.json").symlink_to(tmp_path / "outside.json")
    assert only(adapter, house).what == "a link leads out of the folder"


@pytest.mark.parametrize(
    ("files", "says"),
    [({}, "no adapter_config.json, adapter_model.safetensors"), ({"adapter_model.bin": b"x"}, "never read")],
)
def test_what_is_no_adapter(tmp_path: Path, house: House, files: dict[str, bytes], says: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert says in str(only(folder, house))
    assert only(tmp_path / "nothing", house).what == "no such adapter folder"


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path, base: ServedBase) -> None:
    """Another base, another recipe, another template, held, and a tensor missing: five things, one answer."""
    other = served_base(tiny_base(tmp_path / "other", "llama", seed=1, template=CHATML.replace("im_start", "im_end")))
    folder = make_adapter(tmp_path / "adapter", other, verdict="hold", recipe=NF4)
    rewrite(folder, lambda tensors: tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"))
    told = [p.what for p in refused(folder, House(base))]
    expected = [
        "a tensor is missing", "another base", "another quantization", "the gate says hold", "golden prompt 1",
        "golden prompt 2",
    ]  # fmt: skip
    assert len(told) == len(expected) and all(e in t for e, t in zip(expected, told, strict=True)), told


def test_the_fingerprint_is_that_of_the_folder(base: ServedBase, tiny_llama: Path) -> None:
    assert base.at_hand.fingerprint == fingerprint_base(tiny_llama)
    assert base.name == tiny_llama.name and base.at_hand.recipe is None
