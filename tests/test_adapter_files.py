"""The adapter folder: exact round trips, deterministic bytes, and a refusal for every hostile or half file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tiny import FAMILIES, tiny_model
from tunegate.adapter.files import adapter_hash, load_adapter, load_state, read_spec, read_state, save_adapter
from tunegate.adapter.inject import Injection, disabled, inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError, TunegateError

IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 120, 7]])
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(family: str = "llama", **spec) -> tuple[nn.Module, Injection]:
    model = tiny_model(family)
    injection = inject(model, AdapterSpec(**{"rank": 4, "alpha": 8.0, **spec}), seed=3)
    generator = torch.Generator().manual_seed(4)
    state = {k: 0.2 * torch.randn(t.shape, generator=generator) + t for k, t in read_state(injection).items()}
    load_state(injection, state)
    return model, injection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", trained()[1], base_name="tiny/llama", revision="main")
    return tmp_path / "adapter"


SPECS = {
    "lora": {},
    "rslora": {"use_rslora": True, "alpha": 2.5},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, ".*q_proj": 2, "c_attn": 5},
        "alpha_pattern": {".*[01].*_proj": 5.0, "k_proj": 7.5},
    },
    "layers": {"layers_to_transform": (1,)},
}


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_adapter_loads_to_the_same_model(name: str, tmp_path: Path) -> None:
    options = dict(SPECS[name])
    if name == "patterns":  # keys that overlap, in an order that sorting would change
        options["rank_pattern"] = {"layers.1.self_attn.q_proj": 3, ".*q_proj": 2}
        options["alpha_pattern"] = {"k_proj": 7.5, ".*[01].*_proj": 5.0}
    model, injection = trained(**options)
    save_adapter(tmp_path, injection, base_name="tiny/llama")
    fresh = tiny_model()
    plain = logits(fresh)
    loaded = load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert {p: (m.rank, m.scale) for p, m in loaded.modules.items()} == {
        p: (m.rank, m.scale) for p, m in injection.modules.items()
    }
    with disabled(fresh):
        assert torch.equal(logits(fresh), plain)
    assert list(read_state(loaded)) == list(read_state(injection)) == sorted(read_state(loaded))
    assert all(torch.equal(t, read_state(injection)[n]) for n, t in read_state(loaded).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips(family: str, tmp_path: Path) -> None:
    model, injection = trained(family, use_dora=True)
    save_adapter(tmp_path, injection, base_name="x")
    fresh = tiny_model(family)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (family == "gpt2")
    assert all("." not in name for name in config["target_modules"])  # the short form suffices here


def test_the_files_are_in_pefts_form(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[f"{Q0}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{Q0}.lora_B.weight"].shape == (32, 4)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    text = (folder / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert config["target_modules"] == sorted(config["target_modules"])
    wanted = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "task_type": "CAUSAL_LM", "revision": "main"}
    assert wanted.items() <= config.items() and config["base_model_name_or_path"] == "tiny/llama"
    header = (folder / "adapter_model.safetensors").read_bytes()[8:80]
    assert header.startswith(b'{"__metadata__":{"format":"pt"}')


def test_the_magnitude_has_no_weight_suffix(tmp_path: Path) -> None:
    save_adapter(tmp_path, trained(use_dora=True)[1], base_name="x")
    assert load_file(tmp_path / "adapter_model.safetensors")[f"{Q0}.lora_magnitude_vector"].shape == (32,)


def test_ambiguous_names_are_written_in_full(tmp_path: Path) -> None:
    _, injection = trained(target_modules=("model.layers.0.mlp.up_proj", "q_proj"))
    save_adapter(tmp_path, injection, base_name="x")
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert set(load_adapter(tiny_model(), tmp_path).modules) == set(injection.modules)


def test_a_path_that_ends_another_path_needs_an_expression(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other = Inner(), nn.ModuleDict({"block": Inner()})

    model = Outer()
    injection = inject(model, AdapterSpec(2, 4.0, target_modules="block.q"), seed=0)
    save_adapter(tmp_path, injection, base_name="x", allow_untrained=True)
    assert list(load_adapter(Outer(), tmp_path, allow_untrained=True).modules) == ["block.q"]


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(tmp_path / name, trained(use_dora=True)[1], base_name="x")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_hash_follows_the_meaning_not_the_writing(folder: Path) -> None:
    first = adapter_hash(folder)
    edit_config(
        folder, lambda c: c.update(target_modules=c["target_modules"][::-1], peft_version="9", velora_config=None)
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(reversed(tensors.items())), folder / "adapter_model.safetensors", {"format": "pt", "x": "y"})
    assert adapter_hash(folder) == first
    edit_config(folder, lambda c: c.update(lora_alpha=9))
    second = adapter_hash(folder)
    edit_config(folder, lambda c: c.update(lora_alpha=8))
    assert adapter_hash(folder) == first != second
    tensors[f"{Q0}.lora_B.weight"][0, 0] += 1e-6
    save_file(tensors, folder / "adapter_model.safetensors")
    assert adapter_hash(folder) not in (first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_file_loads_to_fp32(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) for name, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    state = read_state(load_adapter(tiny_model(), folder))
    assert all(t.dtype == torch.float32 and torch.equal(t, tensors[n].float()) for n, t in state.items())


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def cut(keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return edit


def config_text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_bytes(text) and None


def pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
BAD_FILES = {
    "cut in the data": (cut(0.6), ["adapter_model.safetensors", "not a sound safetensors file"]),
    "cut in the header": (cut(0.01), ["not a sound safetensors file"]),
    "empty": (cut(0), ["not a sound safetensors file", "0 bytes"]),
    "pickle": (pickle_only, ["adapter_model.bin", "never read"]),
    "missing tensor": (edit_tensors(lambda t: t.pop(A)), [A, "missing", "[4, 32]"]),
    "renamed tensor": (edit_tensors(lambda t: t.update({A.replace("q_proj", "q_prj"): t.pop(A)})), ["did you mean", A]),
    "extra tensor": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
        ["base_model.model.lm_head.weight", "modules_to_save"],
    ),
    "embedding adapter": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)})),
        ["embed_tokens.lora_embedding_A", "adapters on embeddings"],
    ),
    "unexpected magnitude": (
        edit_tensors(lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)})),
        ["lora_magnitude_vector", "use_dora"],
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({A: torch.ones(4, 31)})), [A, "wrong shape", "[4, 31]"]),
    "huge shape": (edit_tensors(lambda t: t.update({B: torch.ones(1).expand(999, 4).contiguous()})), [B, "[999, 4]"]),
    "wrong type": (edit_tensors(lambda t: t.update({A: t[A].to(torch.int32)})), [A, "wrong type", "I32"]),
    "nan": (edit_tensors(lambda t: t[A].fill_(float("nan"))), [A, "not finite", "128 of 128"]),
    "inf": (edit_tensors(lambda t: t[B][0, 0].fill_(float("inf"))), [B, "not finite", "1 of 128"]),
    "zero B": (
        edit_tensors(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k] and None),
        ["every lora_B is zero"],
    ),
    "config is missing": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        ["adapter_config.json", "no such file"],
    ),
    "config is cut": (config_text(b'{"peft_type": "LO'), ["not valid JSON"]),
    "config is a list": (config_text(b"[1]"), ["not a JSON object"]),
    "config is UTF-16": (config_text('{"peft_type": "LORA"}'.encode("utf-16")), ["not valid JSON"]),
    "config is deep": (config_text(b'{"a":' * 20_000), ["not valid JSON"]),
    "config repeats a key": (config_text(b'{"r": 4, "r": 8}'), ["'r' appears twice"]),
    "config holds NaN": (config_text(b'{"lora_alpha": NaN}'), ["NaN is not JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name_and_the_model_stays_plain(name: str, folder: Path) -> None:
    spoil, parts = BAD_FILES[name]
    spoil(folder)
    model = tiny_model()
    modules = dict(model.named_modules())
    with pytest.raises(InputError) as caught:
        load_adapter(model, folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert dict(model.named_modules()) == modules


BAD_CONFIGS = {
    "peft_type": ("IA3", "another kind"),
    "task_type": ("SEQ_CLS", "another task"),
    "bias": ("lora_only", "biases were trained"),
    "lora_bias": (True, "bias on lora_B"),
    "modules_to_save": (["lm_head"], "full weights"),
    "trainable_token_indices": ([1], "token embeddings"),
    "layer_replication": ([[0, 2]], "repeated layers"),
    "alora_invocation_tokens": ([1, 2], "activated LoRA"),
    "init_lora_weights": ("pissa_niter_4", "changes the base's weights"),
    "megatron_config": ({"a": 1}, "Megatron"),
    "target_parameters": (["mlp.experts"], "bare parameters"),
    "use_qalora": (True, "pooled inputs"),
    "a_new_field": ({"x": 1}, "unknown key"),
    "zero_field": (0, "unknown key"),
    "r": ("4", "wrong type"),
    "use_dora": ("yes", "wrong type"),
    "rank_pattern": ({"q_proj": 0}, "not a rank"),
    "alpha_pattern": ({"(": 1}, "not a regular expression"),
    "target_modules": (None, "no target modules"),
    "exclude_modules": ([1], "wrong type"),
    "lora_dropout": (1.5, "not a dropout"),
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_a_config_that_means_something_else_is_refused(key: str, folder: Path) -> None:
    value, text = BAD_CONFIGS[key]
    edit_config(folder, lambda config: config.update({key: value}))
    with pytest.raises(InputError) as caught:
        load_adapter(tiny_model(), folder)
    assert key in str(caught.value) and text in str(caught.value)


@pytest.mark.parametrize("init", ["olora", "corda", "loftq", "lora_ga", "pissa", "something new"])
def test_initialisations_that_may_change_the_base_are_refused(init: str, folder: Path) -> None:
    edit_config(folder, lambda config: config.update(init_lora_weights=init))
    with pytest.raises(InputError, match="init_lora_weights"):
        read_spec(folder)


def test_all_that_is_wrong_with_a_config_is_said_at_once(folder: Path) -> None:
    wrong = {"bias": "all", "lora_bias": True, "modules_to_save": ["x"], "new": 3, "r": "x"}
    edit_config(folder, lambda config: config.update(wrong))
    with pytest.raises(InputError) as caught:
        read_spec(folder)
    assert len(caught.value.problems) == len(wrong)


def test_defaults_and_empty_unknown_keys_are_accepted(folder: Path) -> None:
    old = {
        "enable_lora": None,
        "merge_weights": False,
        "new_list": [],
        "runtime_config": {"x": False},
        "eva_config": None,
    }
    edit_config(folder, lambda config: config.update(old, init_lora_weights="gaussian", auto_mapping={"a": "b"}))
    load_adapter(tiny_model(), folder)


def test_an_adapter_for_another_base_does_not_load(folder: Path) -> None:
    for other in (tiny_model("llama", intermediate_size=48), tiny_model("gpt2")):
        with pytest.raises(InputError):
            load_adapter(other, folder)


def test_an_untrained_or_broken_adapter_is_not_saved_and_the_old_one_stays(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    fresh = inject(tiny_model(), AdapterSpec(4, 8.0), seed=0)
    with pytest.raises(TunegateError, match="every lora_B is zero"):
        save_adapter(folder, fresh, base_name="x")
    _, broken = trained()
    with torch.no_grad():
        broken.modules["model.layers.0.self_attn.q_proj"].lora_A[0, 0] = float("inf")
    with pytest.raises(TunegateError) as caught:
        save_adapter(folder, broken, base_name="x")
    assert A in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    save_adapter(folder, fresh, base_name="x", allow_untrained=True)
    load_adapter(tiny_model(), folder, allow_untrained=True)


def test_a_write_that_does_not_read_back_replaces_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    _, injection = trained(alpha=9.0)
    save = safetensors.torch.save

    def rotten(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        return save({**tensors, A: tensors[A] + 1}, metadata)

    monkeypatch.setattr(safetensors.torch, "save", rotten)
    with pytest.raises(TunegateError, match="does not read back"):
        save_adapter(folder, injection, base_name="x")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_state_is_a_copy_and_is_checked_whole_before_the_first_write() -> None:
    _, injection = trained()
    state = read_state(injection)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    state[A] += 1
    assert all(torch.equal(tensor, kept[name]) for name, tensor in read_state(injection).items())
    del state[B]
    with pytest.raises(InputError) as caught:
        load_state(injection, {**state, "other": torch.ones(1)})
    assert B in str(caught.value) and "other" in str(caught.value)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in read_state(injection).items())
