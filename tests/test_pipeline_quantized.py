"""A run on an NF4 base: the recipe is part of the run, of the card, and of what an adapter is checked against."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from task import call, write_task
from tunegate.files import read_json, read_jsonl
from tunegate.plan.memory import weight_bytes

NF4 = ("--set", "base.quantization=nf4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    task = write_task(tmp_path_factory.mktemp("qlora"), tiny_llama)
    said = call("run", task, *NF4)
    assert said.code == 0, said.err
    assert "linear layers in nf4" in said.err
    assert "of 39,584 parameters" in said.err  # as on the plain base
    return task


def adapter(task: Path) -> Path:
    (found,) = (task.parent / "runs" / "task").glob("run-*/adapter")
    return found


def test_the_card_names_the_recipe_and_the_original_fingerprint(finished: Path, tiny_llama: Path) -> None:
    from dataclasses import asdict

    from tunegate.model.fingerprint import fingerprint_base

    base = read_json(adapter(finished) / "card.json")["base"]
    assert base["recipe"] == {"format": "nf4", "block": 64, "double": True, "keep": [], "stored": False}
    assert base["fingerprint"] == asdict(fingerprint_base(tiny_llama))


def test_another_quantization_is_another_run_and_refuses_the_adapter(finished: Path) -> None:
    folder = adapter(finished)
    said = call("eval", finished, "--adapter", folder)
    assert said.code == 2 and "another quantization of this base" in said.err
    said = call("eval", finished, "--adapter", folder, "--allow-base-mismatch", "--json")
    assert said.code == 0 and json.loads(said.out)["settings"]["base_mismatch_allowed"] is True
    assert call("gate", finished).code == 2  # no run of the task as the file has it
    assert call("gate", finished, *NF4).code == 0


def test_a_run_again_does_nothing_again(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in adapter(finished).iterdir()}
    assert call("run", finished, *NF4).code == 0
    assert before == {p: p.stat().st_mtime_ns for p in adapter(finished).iterdir()}


def test_the_saved_adapter_scores_as_it_did(finished: Path) -> None:
    said = call("eval", finished, "--adapter", adapter(finished), *NF4, "--json")
    assert said.code == 0
    best = read_json(adapter(finished).parent / "train" / "run.json")["best_score"]
    items = read_jsonl(next((finished.parent / "runs" / "task").glob("eval-*/adapter-valid.items.jsonl")))
    scores = [item["scores"]["accuracy"] for item in items][:12]
    assert sum(scores) / len(scores) == pytest.approx(best)


def test_a_run_on_int8_and_a_merge_onto_the_weights_it_saw(tmp_path: Path, tiny_llama: Path) -> None:
    int8 = ("--set", "base.quantization=int8")
    task = write_task(tmp_path, tiny_llama)
    said = call("run", task, *int8)
    assert said.code == 0 and "linear layers in int8" in said.err, said.err
    recipe = {"format": "int8", "block": 0, "double": False, "keep": [], "stored": False}
    assert read_json(adapter(task) / "card.json")["base"]["recipe"] == recipe
    said = call("merge", adapter(task), "-o", tmp_path / "merged", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["onto"] == "weights as int8 gives them back"


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_stored_base_answers_as_one_quantized_while_loading(form: str, tmp_path: Path, tiny_llama: Path) -> None:
    import torch

    from tunegate.engine.generate import Sampling, generate
    from tunegate.engine.runner import Runner
    from tunegate.kernels.formats import Recipe
    from tunegate.model.loading import load_model

    assert call("quantize", tiny_llama, tmp_path / "base", "--format", form).code == 0
    stored = load_model(tmp_path / "base", dtype=torch.float32)
    recipe = {**Recipe.of(form).to_json(), "keep": []}
    loaded = load_model(tiny_llama, dtype=torch.float32, recipe=recipe)
    dense = load_model(tiny_llama, dtype=torch.float32)
    for name, layer in loaded.named_modules():
        if hasattr(layer, "quantized"):
            dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13], *([n, n + 1] for n in range(20, 40))]
    answers = [generate(Runner(model), prompts, Sampling(8, ())) for model in (stored, loaded, dense)]
    assert answers[0] == answers[1] == answers[2]


def test_what_is_wrong_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path, tiny_llama)
    said = call("check", task, "--set", "base.quantization=int8", "--set", "base.quantization_block=128")
    assert said.code == 2 and "base.quantization_block" in said.err and "one scale for each row" in said.err
    said = call("check", task, "--set", "base.quantization=nf5")
    assert said.code == 2 and "base.quantization" in said.err and "nf4" in said.err


def test_a_base_stored_in_4_bits_is_taken_as_it_is(tmp_path: Path, tiny_llama: Path) -> None:
    assert call("quantize", tiny_llama, tmp_path / "base").code == 0
    task = write_task(tmp_path / "task", tmp_path / "base")
    said = call("run", task, "--json")
    assert said.code == 0, said.err
    card = read_json(adapter(task) / "card.json")
    assert card["base"]["recipe"] == {"format": "nf4", "block": 64, "double": True, "keep": [], "stored": True}
    original = write_task(tmp_path / "original", tiny_llama)
    assert card["base"]["parameters"] == _parameters(original)
    said = call("check", task, *NF4)
    assert said.code == 2 and "stored quantized already" in said.err
    said = call("merge", adapter(task), "-o", tmp_path / "merged")
    assert said.code == 2 and "16-bit original" in said.err


def test_a_base_stored_in_4_bits_is_planned_as_it_is(tmp_path: Path, tiny_llama: Path) -> None:
    """By task and by flags as the run itself sees it, and as large as quantizing while loading makes it."""
    from tunegate.config import load_config
    from tunegate.pipeline.planning import plan_prepared, plan_task
    from tunegate.pipeline.prepare import prepare
    from tunegate.pipeline.reporter import Silent

    assert call("quantize", tiny_llama, tmp_path / "base", "--no-double-quant", "--skip", "k_proj").code == 0
    assert call("quantize", tiny_llama, tmp_path / "rows", "--format", "int8").code == 0
    rows = plan_task(load_config(write_task(tmp_path / "int8", tmp_path / "rows")), Silent()).inputs
    assert rows.quantization == "int8" and not rows.double_quant
    task = write_task(tmp_path / "task", tmp_path / "base")
    light = plan_task(load_config(task), Silent()).inputs
    whole = plan_prepared(prepare(load_config(task), Silent())).inputs
    assert (light.quantization, light.double_quant) == ("nf4", False)
    assert (whole.quantization, whole.double_quant, whole.unquantized) == ("nf4", False, light.unquantized)
    original = write_task(tmp_path / "original", tiny_llama)
    settings = ["base.quantization=nf4", "base.double_quantization=false", "base.keep_unquantized=[k_proj]"]
    wanted = plan_task(load_config(original, settings), Silent()).inputs
    assert weight_bytes(light) == weight_bytes(wanted) != weight_bytes(replace(wanted, unquantized=()))

    said = json.loads(call("plan", task, "--json").out)
    assert set(said["memory"]["gpu"]) == {"qlora", "qdora"} and said["devices"][0]["method"] == "qlora"
    flags = ("--rows", "100", "--tokens", "64", "--device", "l4")
    (device,) = json.loads(call("plan", "--base", tmp_path / "base", *flags, "--json").out)["devices"]
    assert device["method"] == "qlora"
    said = call("plan", "--base", tmp_path / "base", *flags, "--method", "lora")
    assert said.code == 2 and "stored quantized" in said.err
    said = call("plan", task, *NF4)
    assert said.code == 2 and "stored quantized already" in said.err


def _parameters(task: Path) -> int:
    from tunegate.config import load_config
    from tunegate.pipeline.base import load_base
    from tunegate.pipeline.reporter import Silent

    return load_base(load_config(task), Silent(), "cpu").parameters
