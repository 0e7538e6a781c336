"""load_model, load_tokenizer, choose_dtype: what is loaded is whole, frozen and as published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import FAMILIES, tiny_base, tiny_model
from tunegate.errors import InputError
from tunegate.model.loading import choose_dtype, load_model, load_tokenizer
from tunegate.model.resolve import resolve_base


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- models


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_frozen_and_computes_the_same(family, tmp_path):
    base = resolve_base(str(tiny_base(tmp_path / family, family)))
    model = load_model(base, dtype=torch.float32)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():  # the random model is the same at every call: nothing was left out or initialised anew
        assert torch.equal(model(ids).logits, tiny_model(family)(ids).logits)


def test_dtype_is_applied_and_a_path_will_do(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_tied_head_is_not_missing_and_stays_tied(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_refused_by_name(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(folder, dtype=torch.float32)
    assert caught.value.exit_code == 2


def test_an_untied_head_that_is_missing_is_refused(folder):
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        load_model(folder, dtype=torch.float32)


def test_tensors_of_another_shape_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    with pytest.raises(InputError, match="another shape") as caught:
        load_model(folder, dtype=torch.float32)
    assert all(part in str(caught.value) for part in (name, "expected: (64, 32)", "got: (5, 32)"))


def test_pickles_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors weights"):
        load_model(folder, dtype=torch.float32)


def test_models_of_another_kind_are_refused(tmp_path):
    from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    kinds = [
        (T5Config(d_model=32, architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
        (BertConfig(**small, architectures=["BertForMaskedLM"]), "another kind of model"),
        (LlamaConfig(**small, architectures=["LlamaForSequenceClassification"]), "another kind of model"),
        (ViTConfig(**small), "no causal language model"),
    ]
    for number, (config, says) in enumerate(kinds):
        folder = tmp_path / str(number)
        config.save_pretrained(folder)
        with pytest.raises(InputError, match=says):
            load_model(folder, dtype=torch.float32)


def test_an_unknown_model_type_is_refused(folder):
    edit(folder / "config.json", model_type="no_such_type")
    with pytest.raises(InputError, match="no_such_type"):
        load_model(folder, dtype=torch.float32)


# ---- tokenizers


def test_a_fast_tokenizer_loads(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_fast and tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    text = "naïve  x12\n<|im_start|>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_tokenizer_json_is_taken_as_published(folder, name):
    """transformers 5 rebuilt GPT2Tokenizer from its vocabulary, so that digits were no longer split."""
    from tokenizers import Tokenizer, pre_tokenizers

    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    published.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    published.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    tokenizer = load_tokenizer(folder)
    for text in ("a  12", "x\n\n7", "one 3 + 4 = 7"):
        assert tokenizer.encode(text, add_special_tokens=False) == published.encode(text).ids


def test_broken_and_missing_tokenizers_are_input_errors(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        load_tokenizer(folder)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_slow_tokenizer_is_refused(folder):
    from transformers import ByT5Tokenizer

    for path in folder.glob("*token*"):
        path.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(InputError, match="no fast tokenizer") as caught:
        load_tokenizer(folder)
    assert "ByT5Tokenizer" in str(caught.value)


# ---- dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_bf16", torch.bfloat16),
        ("avx2 amx_bf16 amx_tile", torch.bfloat16),
        ("fpu avx avx2 fma f16c", torch.float32),
        ("avx512f avx512_vnni", torch.float32),
    ],
)
def test_auto_on_a_cpu_needs_bf16_instructions(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: x\n")
    dtype, reason = choose_dtype("auto", device="cpu", cpuinfo=tmp_path / "cpuinfo")
    assert dtype is expected and "bf16" in reason


def test_a_request_stands_and_an_unknown_one_is_refused(tmp_path):
    assert choose_dtype("float32")[0] is torch.float32
    assert choose_dtype("bfloat16")[0] is torch.bfloat16
    assert choose_dtype("auto", device="cpu", cpuinfo=tmp_path / "none")[0] is torch.float32
    assert choose_dtype("auto", device="mps")[0] is torch.float32
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        choose_dtype("bfloat")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_needs_native_bf16(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert choose_dtype("auto", device="cuda")[0] is expected


def test_code_beside_a_known_model_type_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    assert type(load_model(folder, dtype=torch.float32)).__module__.startswith("transformers.")
    assert load_tokenizer(folder).is_fast
    edit(folder / "config.json", model_type="no_such_type")
    with pytest.raises(InputError):
        load_model(folder, dtype=torch.float32)
