"""The fingerprint: the same content under any layout, another hash for any change, and a cache that never lies."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tunegate import files
from tunegate.errors import InputError
from tunegate.model import fingerprint
from tunegate.model.fingerprint import (
    digest_tensors,
    fingerprint_base,
    hash_config,
    hash_template,
    hash_tokenizer,
    hash_weights,
)
from tunegate.model.weights import MAX_HEADER_BYTES, read_header


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- weights


def test_the_hash_follows_its_definition(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7], dtype=np.int64)
    save_file({"b": b, "a": a}, tmp_path / "model.safetensors")
    rows = [
        ["a", "F32", [2, 3], blake3(a.tobytes()).hexdigest()],
        ["b", "I64", [1], blake3(b.tobytes()).hexdigest()],
    ]
    text = json.dumps(rows, separators=(",", ":"))
    assert hash_weights(tmp_path) == "b3:" + blake3(text.encode()).hexdigest()


def write_by_hand(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file with its tensors in the given order, metadata and a padded header."""
    header, data = {"__metadata__": {"x": "y"}}, b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "int64": "I64"}[str(array.dtype)]
        start = len(data)
        data += array.tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode() + b" " * 9
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_layout_and_sharding_do_not_count(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((3, 5)).astype(np.float32) for name in "cabde"}
    one, reordered, shards = tmp_path / "one", tmp_path / "reordered", tmp_path / "shards"
    for folder in (one, reordered, shards):
        folder.mkdir()
    save_file(tensors, one / "model.safetensors")
    write_by_hand(reordered / "model.safetensors", tensors)
    weight_map = {}
    for i, names in enumerate(("ec", "a", "db")):
        shard = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in names}, shards / shard)
        weight_map |= dict.fromkeys(names, shard)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert hash_weights(one) == hash_weights(reordered) == hash_weights(shards)


def test_names_dtypes_shapes_and_bytes_count(tmp_path):
    x = np.arange(6, dtype=np.float32)
    variants = [
        {"a": x},
        {"b": x},
        {"a": x.reshape(2, 3)},
        {"a": x.view(np.int32)},
        {"a": x + 1},
        {"a": x, "b": x},
        {"a": x[:5], "b": x[5:]},
        {"a": x, "empty": x[:0]},
    ]
    seen = set()
    for tensors in variants:
        save_file(tensors, tmp_path / "model.safetensors")
        seen.add(hash_weights(tmp_path, use_cache=False))
    assert len(seen) == len(variants)


def test_threads_do_not_change_a_digest(tmp_path):
    big = np.random.default_rng(1).standard_normal((3, 1 << 18)).astype(np.float32)  # 3 MiB: hashed by all cores
    save_file({"big": big, "small": big[0, :5]}, tmp_path / "m.safetensors")
    digests = digest_tensors(tmp_path / "m.safetensors", read_header(tmp_path / "m.safetensors"))
    assert digests["big"] == blake3(big.tobytes()).hexdigest()
    assert digests["small"] == blake3(big[0, :5].tobytes()).hexdigest()


# ---- cache


def age(path: Path, seconds: int = 100) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def cache_files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home" / "fingerprints").glob("*"))


def test_a_settled_file_is_hashed_once(folder, tmp_path, monkeypatch):
    age(folder / "model.safetensors")
    first = fingerprint_base(folder)
    assert len(cache_files(tmp_path)) == 1
    monkeypatch.setattr(fingerprint, "digest_tensors", lambda *a: pytest.fail("hashed again"))
    assert fingerprint_base(folder) == first


def test_a_file_just_written_is_not_cached(folder, tmp_path):
    (folder / "model.safetensors").touch()
    fingerprint_base(folder)
    assert cache_files(tmp_path) == []


def test_a_changed_file_is_hashed_again(folder):
    path = folder / "model.safetensors"
    age(path)
    first = hash_weights(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    age(path)
    assert hash_weights(folder) != first


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(folder, tmp_path):
    path = folder / "model.safetensors"
    age(path)
    first, stat = hash_weights(folder), path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other = tmp_path / "other"
    other.write_bytes(data)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)  # another inode
    assert hash_weights(folder) != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "digests": {}}),
        lambda text: json.dumps({**json.loads(text), "schema": 99}),
        lambda text: json.dumps({**json.loads(text), "digests": dict.fromkeys(json.loads(text)["digests"], "ff")}),
        lambda text: json.dumps({**json.loads(text), "digests": dict.fromkeys(json.loads(text)["digests"], 3)}),
    ],
)
def test_a_damaged_cache_entry_is_ignored(folder, tmp_path, damage):
    age(folder / "model.safetensors")
    first = hash_weights(folder)
    (entry,) = cache_files(tmp_path)
    entry.write_text(damage(entry.read_text()))
    assert hash_weights(folder) == first
    assert json.loads(entry.read_text())["digests"]


def test_a_home_that_cannot_be_written_costs_only_time(folder, tmp_path, monkeypatch):
    age(folder / "model.safetensors")
    expected = hash_weights(folder, use_cache=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "file" / "below"))
    assert hash_weights(folder) == expected


# ---- config, tokenizer, template


def test_only_volatile_config_keys_are_left_out(folder):
    path = folder / "config.json"
    first = hash_config(folder)
    edit(path, transformers_version="9.9", _name_or_path="/x", torch_dtype="float16", dtype="x", use_cache=False)
    assert hash_config(folder) == first
    edit(path, rms_norm_eps=1e-3)
    assert hash_config(folder) != first


def test_volatile_keys_are_left_out_at_any_depth_and_infinity_is_hashed(tmp_path):
    (tmp_path / "config.json").write_text('{"a": [{"dtype": "x", "b": Infinity}]}')
    first = hash_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a":[{"b":Infinity}]}')
    assert hash_config(tmp_path) == first
    (tmp_path / "config.json").write_text('{"a":[{"b":1}]}')
    assert hash_config(tmp_path) != first


def test_the_tokenizer_hash_sees_vocabulary_and_special_tokens_only(folder):
    first = hash_tokenizer(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps({**document, "truncation": truncation}, indent=7))
    edit(folder / "tokenizer_config.json", chat_template="other", model_max_length=7)
    assert hash_tokenizer(folder) == first
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    second = hash_tokenizer(folder)
    document["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert len({first, second, hash_tokenizer(folder)}) == 3


def test_the_template_hash_is_that_of_its_text(tmp_path):
    assert hash_template(tmp_path) == "none"
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert hash_template(tmp_path) == "none"
    config.write_text(json.dumps({"chat_template": "{{ä}}"}))
    assert hash_template(tmp_path) == files.hash_bytes("{{ä}}".encode())
    named = [{"name": "default", "template": "{{ä}}"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert hash_template(tmp_path) == files.hash_bytes("{{ä}}".encode())
    config.write_text(json.dumps({"chat_template": [*named, {"name": "tool_use", "template": "x"}]}))
    both = hash_template(tmp_path)
    assert both != files.hash_bytes("{{ä}}".encode())
    (tmp_path / "chat_template.jinja").write_text("{{new}}")
    assert hash_template(tmp_path) not in (both, "none")
    config.write_text(json.dumps({"chat_template": "{{old}}"}))
    assert hash_template(tmp_path) == files.hash_bytes(b"{{new}}")
    config.write_text(json.dumps({"chat_template": [{"name": "x"}]}))
    with pytest.raises(InputError, match="chat_template"):
        hash_template(tmp_path)


def test_the_template_hashed_is_the_one_transformers_uses(folder):
    from tunegate.model.loading import load_tokenizer

    assert hash_template(folder) == files.hash_bytes(load_tokenizer(folder).chat_template.encode())


def test_the_total_covers_all_four(folder):
    seen = {fingerprint_base(folder).total}
    edit(folder / "config.json", rope_theta=5.0)
    seen.add(fingerprint_base(folder).total)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    seen.add(fingerprint_base(folder).total)
    (folder / "chat_template.jinja").write_text("x")
    seen.add(fingerprint_base(folder).total)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    seen.add(fingerprint_base(folder).total)
    assert len(seen) == 5 and all(h.startswith("b3:") and len(h) == 67 for h in seen)


def test_missing_parts_are_input_errors(tmp_path):
    for call in (fingerprint_base, hash_config, hash_tokenizer, hash_weights):
        with pytest.raises(InputError):
            call(tmp_path)


# ---- the header parser


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "fewer than the 8"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), "more than the limit"),
        (struct.pack("<Q", 2**64 - 1), "more than the limit"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes"),
        (raw(b"{"), "not valid JSON"),
        (raw(b"\xff\xfe"), "not valid JSON"),
        (raw(b"[" * 20_000), "not valid JSON"),
        (raw([]), "not a JSON object"),
        (raw({"a": 1}), "lacks dtype"),
        (raw({"a": entry([2], 0, 2, "X8")}, b"xx"), "unknown dtype"),
        (raw({"a": entry([-1], 0, 0)}), "shape is not"),
        (raw({"a": entry([True], 0, 1)}, b"x"), "shape is not"),
        (raw({"a": entry([1.0], 0, 1)}, b"x"), "shape is not"),
        (raw({"a": entry([1], 1, 0)}, b"x"), "not [start, end]"),
        (raw({"a": entry([2], 0, 1)}, b"x"), "needs 2.0 bytes"),
        (raw({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"xxx"), "overlaps"),
        (raw({"a": entry([2], 0, 2), "b": entry([2], 0, 2)}, b"xx"), "overlaps"),
        (raw({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, b"xxx"), "hole"),
        (raw({"a": entry([2], 0, 2)}, b"x"), "end at byte"),
        (raw({"a": entry([2], 0, 2)}, b"xxx"), "end at byte"),
        (
            raw(b'{"a": %s, "a": %s}' % (2 * (json.dumps(entry([1], 0, 1)).encode(),)), b"x"),
            "occurs twice",
        ),
    ],
)  # fmt: skip
def test_unsound_headers_are_refused(tmp_path, content, says):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert says in str(caught.value)


@given(st.binary(max_size=60), st.integers(0, 300), st.integers(0, 300))
def test_what_the_library_refuses_is_refused_here(tmp_path_factory, noise, at, cut):
    """Any damage to a file: the library's own reader never refuses a file that read_header accepted."""
    folder = tmp_path_factory.mktemp("noise")
    path = folder / "m.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 0), dtype=np.int8)}, path)
    whole = bytearray(path.read_bytes())
    whole[at : at + len(noise)] = noise
    path.write_bytes(whole[: max(0, len(whole) - cut)] if cut % 2 else whole)
    try:
        entries = read_header(path)
    except InputError:
        return
    try:
        with safe_open(path, "np") as reader:
            assert set(reader.keys()) == {e.name for e in entries}
    except SafetensorError as error:  # stricter only about metadata and padding, which hold no tensor
        assert "metadata" in str(error).lower() or "InvalidHeader" in str(error), error


NAMES = st.text(st.characters(exclude_characters="/\\\0", codec="utf-8"), min_size=1, max_size=8).filter("..".__ne__)


@given(st.lists(st.tuples(NAMES, st.lists(st.integers(0, 3), max_size=3)), max_size=5))
def test_every_sound_file_is_read_as_the_library_reads_it(tmp_path_factory, layout):
    path = tmp_path_factory.mktemp("sound") / "m.safetensors"
    tensors = {n: np.ones(shape, dtype=np.float16) for n, shape in layout if n != "__metadata__"}
    save_file(tensors, path)
    entries = read_header(path)
    assert {e.name: e.shape for e in entries} == {n: t.shape for n, t in tensors.items()}
    whole = path.read_bytes()
    assert all(whole[e.start : e.end] == tensors[e.name].tobytes() for e in entries)
