"""GGUF: names, layouts, rotary settings and vocabularies, against transformers, the gguf library and llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_export_merge import ONE, peft_adapter
from tiny import CHATML, SPECIAL, tiny_base, tiny_config, tiny_tokenizer
from tunegate.adapter.files import load_adapter
from tunegate.data.render import Renderer
from tunegate.engine.runner import Runner
from tunegate.errors import InputError, TunegateError
from tunegate.export import gguf_file, llama_cpp, parity, readers
from tunegate.export.gguf_families import FAMILIES, family_of, interleave, rope_freqs, separate
from tunegate.export.gguf_vocab import BYTE, CONTROL, UNUSED, vocabulary
from tunegate.export.plan import plan_merge
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.model.packaged import unpermute

BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {},
    "gemma3": {},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "biases": {"attention_bias": True},
}  # fmt: skip
llama = pytest.mark.skipif(not llama_cpp.available(), reason="llama.cpp is not installed")


def made(tmp_path: Path, name: str) -> tuple[Path, Path]:
    family = name if name in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3") else "llama"
    if name == "gemma":
        base = gemma_base(tmp_path / "base")
    else:
        base = tiny_base(tmp_path / "base", family, **BASES[name])
    return base, peft_adapter(base, tmp_path / "adapter")


def gemma_base(folder: Path) -> Path:
    """Gemma 1 has no place in ``tiny``: it is not among the families whose training is compared with PEFT."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = GemmaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def exported(
    base: Path, adapter: Path, path: Path, outtype: str = "f16", adapted: bool = True
) -> tuple[Path, Renderer]:
    plan = plan_merge(base, [adapter], path.with_suffix(".out"), ONE)
    if not adapted:
        plan = replace(plan, updates={}, paths={})
    renderer = Renderer(load_tokenizer(base))
    layout = gguf_file.lay_out(plan, vocabulary(renderer, plan.config.vocab_size, str(base)), outtype)
    changed = gguf_file.write_model(layout, path, {"general.name": "tiny"})
    assert changed == len(plan.updates)
    assert abs(path.stat().st_size / gguf_file.file_bytes(layout) - 1) < 0.15
    return path, renderer


def compared(base: Path, adapter: Path, renderer: Renderer, subject: parity.Subject) -> parity.Parity:
    texts = ("Where is my order?", "name: 3 + 4 = 7, Zwölf", "long " * 30)
    prompts = tuple(tuple(renderer.prompt_ids([{"role": "user", "content": t}])) for t in texts)
    asked = parity.Questions(prompts, renderer.stop_ids, 8)
    model = load_model(base, dtype=torch.float32)
    load_adapter(model, adapter)
    first = parity.read(parity.InRunner(Runner(model)), asked)
    return parity.compare(first, parity.read(subject, asked, first.rows))


# --- the model file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_the_gguf_library_reads_every_parameter(name: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, name)
    path, renderer = exported(base, adapter, tmp_path / "m.gguf")
    found = compared(base, adapter, renderer, readers.load_gguf(path, load_model(base, dtype=torch.float32)))
    assert found.mean_kl < 1e-4 and found.same_answers == 1.0


@llama
@pytest.mark.parametrize("name", BASES)
def test_llama_cpp_computes_the_adapted_model(name: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, name)
    path, renderer = exported(base, adapter, tmp_path / "m.gguf")
    found = compared(base, adapter, renderer, llama_cpp.LlamaCpp(path, 256))
    assert found.mean_kl < 1e-4 and found.same_answers == 1.0


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_computes_the_adapted_model(name: str, tmp_path: Path) -> None:
    if not readers.installed("accelerate"):
        pytest.skip("accelerate is not installed")
    base, adapter = made(tmp_path, name)
    path, renderer = exported(base, adapter, tmp_path / "m.gguf")
    config = load_model(base, dtype=torch.float32).config
    found = compared(base, adapter, renderer, readers.in_transformers_gguf(path, config))
    assert found.mean_kl < 1e-4 and found.same_answers == 1.0


@llama
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("settings_", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}])
def test_llama_cpp_puts_the_adapter_on_the_base(name: str, settings_: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", name)
    adapter = peft_adapter(base, tmp_path / "adapter", **settings_)
    model, renderer = exported(base, adapter, tmp_path / "m.gguf", adapted=False)
    from tunegate.adapter.files import checked_state
    from tunegate.export.flat import flatten
    from tunegate.model.loading import empty_model

    empty = empty_model(base)
    gguf_file.write_adapter(flatten(*checked_state(empty, adapter)), empty.config, tmp_path / "a.gguf", {})
    found = compared(base, adapter, renderer, llama_cpp.LlamaCpp(model, 256, tmp_path / "a.gguf"))
    assert found.mean_kl < 1e-4 and found.same_answers == 1.0
    plain = compared(base, adapter, renderer, llama_cpp.LlamaCpp(model, 256))
    assert plain.mean_kl > 100 * found.mean_kl


def test_numbers_are_the_gguf_librarys(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import quantize

    base, adapter = made(tmp_path, "qwen2")
    merged = load_model(base, dtype=torch.float32)
    load_adapter(merged, adapter)
    for outtype in ("f16", "bf16", "q8_0"):
        path, _ = exported(base, adapter, tmp_path / f"{outtype}.gguf", outtype, adapted=False)
        tensors = {t.name: t for t in GGUFReader(path).tensors}
        original = load_model(base, dtype=torch.float32).get_parameter("model.layers.1.mlp.down_proj.weight")
        expected = quantize(original.numpy(), GGMLQuantizationType[outtype.upper()])
        assert np.array_equal(tensors["blk.1.ffn_down.weight"].data, expected)
        assert tensors["blk.1.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import load_file, save_file

    base, adapter = made(tmp_path, "qwen2")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    path, _ = exported(base, adapter, tmp_path / "m.gguf")
    stored = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float64)) for t in GGUFReader(path).tensors}
    (update,) = plan_merge(base, [adapter], tmp_path / "out", ONE).updates["model.layers.1.mlp.down_proj"]
    assert update is not None
    added = update.scale * update.b.double() @ update.a.double()
    truth = tensors["model.layers.1.mlp.down_proj.weight"].double() + added
    error = (stored["blk.1.ffn_down.weight"] - truth).abs() / truth.abs().clamp_min(1e-3)
    assert 2**-12 < error.max() < 1.01 * 2**-11  # f16 has 11 bits; bf16 on the way would make 2 ** -9 of it
    embedding = stored["token_embd.weight"]
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"].double())


def test_a_weight_too_large_for_f16_is_refused(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama")
    path = base / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 4] = 1e6
    for stored in (torch.float32, torch.bfloat16):
        save_file({n: t.to(stored) for n, t in tensors.items()}, path, metadata={"format": "pt"})
        with pytest.raises(TunegateError, match=r"not finite in float16|too large for f16"):
            exported(base, adapter, tmp_path / "m.gguf")
    exported(base, adapter, tmp_path / "n.gguf", "bf16")


# --- settings -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_interleaving_is_undone_by_the_reader_of_gguf_bases(heads: int, pairs: int, width: int) -> None:
    rows = torch.arange(heads * 2 * pairs * width, dtype=torch.float32).view(-1, width)
    there = interleave(rows, heads)
    assert torch.equal(separate(there, heads), rows)
    assert np.array_equal(unpermute(there.numpy(), heads), rows.numpy())


def test_llama_3s_frequencies_are_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_config("llama", head_dim=64, **BASES["llama3"])
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    divisors = rope_freqs(config)
    assert divisors is not None
    plain = 1.0 / (10000.0 ** (torch.arange(0, 64, 2) / 64))
    torch.testing.assert_close(plain / divisors, theirs)


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("phi3", {}, "not exported"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        family_of(tiny_config(family, **overrides))


def test_every_family_is_tried_here() -> None:
    assert {f.arch for f in FAMILIES.values()} == {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"}


# --- vocabularies -------------------------------------------------------------------------------------------------


def pieces_tokenizer() -> Any:
    """SentencePiece's BPE as ``tokenizer.json`` has it: bytes to fall back on, spaces as ▁, one in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    corpus = [
        "the cat sat on the mat",
        "a cat and a hat that sat",
        "where is the order I made",
        "hats and mats and cats",
    ]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    document = json.loads(trained.to_str())
    special = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    learned = sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
    vocab = {token: i for i, token in enumerate([*special, *learned])}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in document["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", *SPECIAL)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[2], unk_token="<unk>", pad_token=SPECIAL[0]
    )
    made.chat_template = CHATML
    return made


def pieces_base(folder: Path) -> Path:
    tokenizer = pieces_tokenizer()
    base = tiny_base(folder, "llama", vocab_size=len(tokenizer), eos_token_id=3, bos_token_id=1, pad_token_id=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    return base


def test_kinds_scores_and_unused_tokens() -> None:
    words = vocabulary(Renderer(pieces_tokenizer()), 500, "here")
    assert words.model == "llama" and words.space_prefix is True and len(words.tokens) == len(words.kinds) == 500
    assert words.kinds[4] == BYTE and words.kinds[3] == CONTROL and words.kinds[499] == UNUSED
    assert words.tokens[499] == "[PAD499]"
    formed = [s for t, s in zip(words.tokens, words.scores, strict=True) if len(t) > 1 and not t.startswith(("<", "["))]
    assert formed == sorted(formed, reverse=True) and len(set(formed)) == len(formed)
    assert words.ids["eos"] == 3 and "eot" not in words.ids


def test_the_end_of_a_turn_stops_where_it_is_not_eos() -> None:
    template = CHATML.replace("<|im_end|>", "<|im_start|>")  # a turn that ends with another control token
    words = vocabulary(Renderer(tiny_tokenizer(template)), 400, "here")
    assert words.ids["eot"] == 1 and words.ids["eos"] == 2
    assert words.pre == "gpt-2" and words.template == template and not words.add_bos
    assert vocabulary(Renderer(tiny_tokenizer("{{ bos_token }}" + CHATML)), 400, "here").add_bos


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(InputError, match="no name known here"):
        vocabulary(Renderer(tokenizer), 400, "here")
    with pytest.raises(InputError, match="more tokens than the embedding has rows"):
        vocabulary(Renderer(tiny_tokenizer()), 399, "here")


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_published_rules_are_known(name: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    from tunegate.export.gguf_vocab import _PRE_TOKENIZERS

    if name == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as expression
    else:  # transformers keeps Llama 3's in its converter of tiktoken files
        import inspect

        from transformers.convert_slow_tokenizer import TikTokenConverter

        expression = inspect.signature(TikTokenConverter).parameters["pattern"].default
    rule = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert rule is not None
    assert _PRE_TOKENIZERS[(expression, "bytes")] == name


@pytest.fixture(scope="module")
def in_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[llama_cpp.LlamaCpp, Any]]:
    found = {}
    for name in ("bytes", "pieces"):
        folder = tmp_path_factory.mktemp(name)
        base = tiny_base(folder / "base") if name == "bytes" else pieces_base(folder / "base")
        path, renderer = exported(base, peft_adapter(base, folder / "adapter"), folder / "m.gguf")
        found[name] = (llama_cpp.LlamaCpp(path, 64), renderer.tokenizer)
    return found


@llama
@pytest.mark.parametrize("name", ["bytes", "pieces"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("the cats, on mat? 12 I'm Zö\n<|>世🙂", max_size=24))
def test_llama_cpp_splits_text_into_the_same_tokens(name: str, text: str, in_llama_cpp: dict[str, Any]) -> None:
    subject, tokenizer = in_llama_cpp[name]
    whole = f"<|im_start|>user\n{text}<|im_end|>\n"
    assert subject.tokens(whole) == tokenizer(whole, add_special_tokens=False)["input_ids"]
