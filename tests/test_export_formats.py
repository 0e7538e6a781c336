"""Exports: every format read back by the tool it is for, where that is installed, and compared with the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from task import Said, call, write_task
from test_export_merge import KINDS, peft_adapter
from tiny import tiny_base
from tunegate.adapter.files import adapter_hash
from tunegate.export import llama_cpp
from tunegate.export.plan import plan_merge
from tunegate.export.readers import installed
from tunegate.files import hash_file, read_json
from tunegate.model.fingerprint import hash_weights
from tunegate.model.origin import origin_of

FORMATS = ("peft", "gguf", "gguf-lora", "ollama", "mlx", "vllm")
TENSORS = "adapter_model.safetensors"
HERE = {
    "peft": installed("peft"),
    "mlx-lm": installed("mlx", "mlx_lm"),
    "transformers": installed("accelerate"),
    "llama.cpp": llama_cpp.available(),
}


def needs(reader: str) -> None:
    if not HERE.get(reader, True):
        pytest.skip(f"{reader} is not installed")


def export(adapter: Path, to: str, out: Path, *more: object) -> Said:
    return call("export", adapter, "--to", to, "-o", out, *more)


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    task = write_task(tmp_path_factory.mktemp("export"), tiny_llama)
    said = call("run", task)
    assert said.code == 0, said.err
    (found,) = (task.parent / "runs" / "task").glob("run-*/adapter")
    return found


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_carries_card_proof_and_hashes(to: str, carded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = export(carded, to, out)
    assert said.code == 0, said.err
    report = read_json(out / "export.json")
    assert report["changed"] == report["modules"] == 14 and report["verified"]
    assert report["parity"]["mean_kl"] < 1e-3 and report["parity"]["same_answers"] == 1.0
    assert report["parity"]["moved"] > 10 * report["parity"]["mean_kl"]
    assert report["adapter"]["hash"] == read_json(carded / "card.json")["adapter"]["hash"]
    assert (out / "card.json").read_bytes() == (carded / "card.json").read_bytes()
    names = {p.name for p in out.iterdir()} - {"export.json"}
    assert report["files"] == {name: hash_file(out / name) for name in names}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert export(carded, to, out).code == 2  # exists


def test_below_the_limits_nothing_is_left(carded: Path, tmp_path: Path) -> None:
    said = export(carded, "gguf", tmp_path / "out", "--max-kl", 0)
    assert said.code == 1 and "is not the adapter on its base" in said.err
    assert not list(tmp_path.iterdir())


def test_an_ollama_folder_stops_and_opens_turns_as_training_did(carded: Path, tmp_path: Path) -> None:
    assert export(carded, "ollama", tmp_path / "out").code == 0
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop """<|im_end|>"""' in text and "FROM ./model.gguf" in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert text.count("SYSTEM") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--to", "peft", "--outtype", "q8_0", "--onto", "original", "-o"), ("--outtype", "--onto")),
        (("--to", "gguf-lora", "--outtype", "bf16", "-o"), ("--outtype",)),
        (("--for", "vllm", "-o"), ("--to vllm",)),
    ],
)
def test_a_choice_that_a_format_has_not_is_said(
    arguments: tuple[str, ...], says: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    said = call("export", adapter, "--base", tiny_llama, *arguments, tmp_path / "out")
    assert said.code == 2 and all(part in said.err for part in says) and not (tmp_path / "out").exists()


def test_what_vllm_would_refuse_is_not_exported_for_it(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter", rank_pattern={"q_proj": 513})
    said = export(adapter, "vllm", tmp_path / "out", "--base", tiny_llama)
    assert said.code == 2 and "rank 513" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_dora_for_vllm_says_what_it_was_merged_from(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter", use_dora=True)
    assert export(adapter, "vllm", tmp_path / "out", "--base", tiny_llama).code == 0
    found = origin_of(tmp_path / "out", hash_weights(tmp_path / "out"))
    assert found is not None and found["adapters"][0]["hash"] == adapter_hash(adapter)


@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_a_merge_is_planned_once(to: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def plan(*given: object, **named: object) -> object:
        planned.append(named["checkpoint"])
        return plan_merge(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("tunegate.pipeline.formats.plan_merge", plan)
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter", use_dora=True)
    assert export(adapter, to, tmp_path / "out", "--base", tiny_llama).code == 0
    assert planned == [to == "vllm"]


def test_the_check_for_vllm_writes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    dora = peft_adapter(tiny_llama, tmp_path / "dora", use_dora=True)
    said = call("export", dora, "--for", "vllm", "--base", tiny_llama, "--json")
    found = [f for f in json.loads(said.out)["findings"] if f["level"] == "rejected"]
    assert said.code == 1 and len(found) == 2 and "14 tensors, such as" in found[1]["what"]  # their magnitudes
    plain = peft_adapter(tiny_llama, tmp_path / "plain")
    assert call("export", plain, "--for", "vllm", "--base", tiny_llama).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dora", "plain"]


# --- every kind of adapter in every format, read by the tool itself ---------------------------------------------


@pytest.mark.parametrize(
    ("to", "reader"),
    [
        ("peft", "peft"), ("peft", "tunegate"), ("vllm", "peft"), ("mlx", "mlx-lm"), ("mlx", "safetensors"),
        ("gguf", "llama.cpp"), ("gguf", "transformers"), ("gguf", "gguf"), ("gguf-lora", "gguf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind: str, to: str, reader: str, tiny_llama: Path, tmp_path: Path) -> None:
    needs(reader)
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter", **KINDS[kind])
    if kind == "dora" and to == "vllm":
        reader = "tunegate"
    said = export(adapter, to, tmp_path / "out", "--base", tiny_llama, "--reader", reader)
    if kind == "dora" and to == "gguf-lora":
        assert said.code == 2 and "--to gguf" in said.err and not (tmp_path / "out").exists()
        return
    assert said.code == 0, said.err
    report = read_json(tmp_path / "out" / "export.json")
    parity = report["parity"]
    assert report["reader"] == reader and report["changed"] == report["modules"] == 14
    exact = to != "gguf"  # f16 weights, and in llama.cpp f16 activations: top tokens of random weights may be near ties
    assert parity["mean_kl"] < (1e-7 if exact else 1e-4)
    assert parity["agreement"] >= (1.0 if exact else 0.95) and (parity["same_answers"] == 1.0 or not exact)
    config = tmp_path / "out" / "adapter_config.json"
    if to == "vllm":
        assert config.exists() == (kind != "dora")
    if to == "vllm" and kind != "dora":
        written = read_json(config)
        assert not written["use_rslora"] and not written["rank_pattern"] and not written["alpha_pattern"]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_mlx_has_the_same_modules_in_other_families(family: str, tmp_path: Path) -> None:
    needs("mlx-lm")
    window = {"sliding_window": 512} if family == "gemma2" else {}  # mlx-lm's Gemma 2 attends to everything
    base = tiny_base(tmp_path / "base", family, **window)
    config = read_json(base / "config.json")
    rope = config["rope_parameters"]  # mlx-lm reads the older key
    config["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    config["sliding_window_pattern"] = 2
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = peft_adapter(base, tmp_path / "adapter")
    said = export(adapter, "mlx", tmp_path / "out", "--base", base, "--reader", "mlx-lm")
    assert said.code == 0, said.err
    assert read_json(tmp_path / "out" / "export.json")["parity"]["mean_kl"] < 1e-6


@pytest.mark.parametrize("outtype", ["bf16", "q8_0"])
def test_coarser_numbers_are_measured(outtype: str, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    limits = ("--max-kl", 0.05, "--min-agreement", 0.8)
    said = export(
        adapter, "gguf", tmp_path / "out", "--base", tiny_llama, "--outtype", outtype, "--reader", "gguf", *limits
    )
    assert said.code == 0, said.err
    assert 1e-8 < read_json(tmp_path / "out" / "export.json")["parity"]["mean_kl"] < 0.05


# --- an adapter trained on 4 bits ---------------------------------------------------------------------------------


def test_a_qlora_adapter_is_exported_onto_what_it_saw(tmp_path: Path, tiny_llama: Path) -> None:
    task = write_task(tmp_path / "task", tiny_llama)
    assert call("run", task, "--set", "base.quantization=nf4").code == 0
    (adapter,) = (task.parent / "runs" / "task").glob("run-*/adapter")
    means = {}
    for onto in ("trained", "original"):
        out = tmp_path / onto
        said = export(adapter, "gguf", out, "--onto", onto, "--reader", "gguf", "--max-kl", 10, "--min-agreement", 0)
        assert said.code == 0, said.err
        means[onto] = read_json(out / "export.json")["parity"]["mean_kl"]
    assert means["trained"] < 1e-4 < means["original"]


# --- bad input ----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def changed(adapter: Path, change: Change) -> None:
    save_file(change(load_file(adapter / TENSORS)), adapter / TENSORS, metadata={"format": "pt"})


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


BAD: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != first(t)}, "a tensor is missing"),
    "extra": (lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(4, 4)}, "no adapted module takes"),
    "nan": (lambda t: {**t, first(t): t[first(t)] * float("nan")}, "not finite"),
    "shape": (lambda t: {**t, first(t): torch.ones(4, 5)}, "wrong shape"),
    "path": (lambda t: {**t, "../../x.lora_A.weight": torch.ones(4, 4)}, "is a path out of the folder"),
}


@pytest.mark.parametrize("to", ["peft", "gguf"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_told_and_nothing_written(kind: str, to: str, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    change, says = BAD[kind]
    changed(adapter, change)
    said = export(adapter, to, tmp_path / "out", "--base", tiny_llama)
    assert said.code == 2 and says in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_links_out_of_the_adapter_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    moved = shutil.move(adapter / TENSORS, tmp_path / "elsewhere.safetensors")
    (adapter / TENSORS).symlink_to(moved)
    for command in (("export", adapter, "--to", "peft"), ("merge", adapter)):
        said = call(*command, "-o", tmp_path / "out", "--base", tiny_llama)
        assert said.code == 2 and "a link leads out of the folder" in said.err and not (tmp_path / "out").exists()


def test_a_hub_cache_may_link_to_its_blobs(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    adapter = peft_adapter(tiny_llama, model / "snapshots" / "abc")
    (model / "blobs").mkdir()
    shutil.move(adapter / TENSORS, model / "blobs" / "1")
    (adapter / TENSORS).symlink_to(Path("../../blobs/1"))
    assert export(adapter, "peft", tmp_path / "out", "--base", tiny_llama).code == 0


def test_a_truncated_shard_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    adapter = peft_adapter(base, tmp_path / "adapter")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    said = export(adapter, "gguf", tmp_path / "out", "--base", base)
    assert said.code == 2 and "not a sound safetensors file" in said.err and not (tmp_path / "out").exists()


def test_a_base_with_paths_for_names_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    adapter = peft_adapter(base, tmp_path / "adapter")
    path = base / "model.safetensors"
    save_file({**load_file(path), "../../evil": torch.ones(2)}, path, metadata={"format": "pt"})
    said = call("merge", adapter, "-o", tmp_path / "out", "--base", base)
    assert said.code == 2 and "a path out of the folder" in said.err and not (tmp_path / "out").exists()


def test_a_link_out_of_the_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    adapter, secret = peft_adapter(base, tmp_path / "adapter"), tmp_path / "secret"
    secret.touch()
    (base / "notes.txt").symlink_to(secret)
    for command in (("export", adapter, "--to", "gguf"), ("merge", adapter)):
        said = call(*command, "-o", tmp_path / "out", "--base", base)
        assert said.code == 2 and "out of the base's folder" in said.err and not (tmp_path / "out").exists()


def test_another_base_is_refused(carded: Path, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", "llama", seed=5)
    said = export(carded, "gguf-lora", tmp_path / "out", "--base", other)
    assert said.code == 2 and "another base" in said.err and not (tmp_path / "out").exists()
    said = export(carded, "gguf-lora", tmp_path / "out", "--base", other, "--allow-base-mismatch")
    assert said.code == 0 and read_json(tmp_path / "out" / "export.json")["base_mismatch_allowed"]


def test_a_link_in_the_place_of_the_output_is_not_followed(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / ".out.partial").symlink_to(precious)
    for command in (("export", adapter, "--to", "peft"), ("merge", adapter)):
        assert call(*command, "-o", tmp_path / "out", "--base", tiny_llama).code == 2
    assert (precious / "file").exists()


def test_what_cannot_be_done_is_told_with_the_choices(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    said = export(adapter, "gguf", tmp_path / "out", "--base", tiny_llama, "--reader", "nothing")
    assert said.code == 2 and "gguf" in said.err
    assert call("export", adapter, "--to", "gguf", "--base", tiny_llama).code == 2
    base = tiny_base(tmp_path / "base", "gpt2")
    adapter = peft_adapter(base, tmp_path / "other")
    for to in ("gguf", "gguf-lora", "mlx"):
        said = export(adapter, to, tmp_path / "out", "--base", base)
        assert said.code == 2 and "gpt2" in said.err and not (tmp_path / "out").exists()


def test_a_reader_that_fails_is_told_in_its_own_words(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunegate.export import readers

    def fail(*_: object) -> None:
        raise KeyError("rope_theta")

    monkeypatch.setattr(readers, "load_gguf", fail)
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    said = export(adapter, "gguf", tmp_path / "out", "--base", tiny_llama, "--reader", "gguf")
    assert said.code == 1 and "gguf cannot read the export" in said.err and "rope_theta" in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
@pytest.mark.real_base
@pytest.mark.parametrize(
    ("to", "reader"),
    [
        ("ollama", "llama.cpp"),
        ("gguf", "llama.cpp"),
        ("gguf", "gguf"),
        ("gguf", "transformers"),
        ("mlx", "mlx-lm"),
        ("vllm", "peft"),
    ],
)
def test_the_packaged_base(to: str, reader: str, tmp_path: Path) -> None:
    from tunegate.model.packaged import packaged_base

    needs(reader)
    base = packaged_base()
    adapter = peft_adapter(base, tmp_path / "adapter", noise=0.03, use_rslora=True)
    limits = ("--max-kl", 0.01, "--min-agreement", 0.9)
    numbers = ("--outtype", "q8_0") if to == "ollama" else ()
    said = export(adapter, to, tmp_path / "out", "--base", base, "--reader", reader, *numbers, *limits)
    assert said.code == 0, said.err
    report = read_json(tmp_path / "out" / "export.json")
    assert report["changed"] == report["modules"] == 210 and report["parity"]["moved"] > 0.02
    rounded = to == "ollama"  # to q8_0, and random factors leave near ties; the limits above hold
    assert report["parity"]["same_answers"] == 1.0 or rounded
    assert report["parity"]["mean_kl"] < 1e-4 or rounded
    if to == "ollama":
        text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
        assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in text and "{{ .Prompt }}" not in text
