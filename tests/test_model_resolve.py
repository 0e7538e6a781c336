"""resolve_base: what a name means, what a folder must hold, and what the hub's refusals become.

The hub tests run the real hub library, against a small HTTP server that speaks the hub's protocol and against a cache
folder in the library's own layout.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import struct
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_base
from tunegate.errors import InputError, TunegateError
from tunegate.files import nearest_folder
from tunegate.model.resolve import check_folder, resolve_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def texts(folder: Path, **options) -> list[str]:
    return [str(problem) for problem in check_folder(folder, **options)]


# ---- names and folders


def test_a_folder_resolves_to_its_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("./model", "model", str(folder)):
        base = resolve_base(name)
        assert (base.path, base.source, base.revision) == (folder.resolve(), "folder", None)


def test_an_existing_folder_goes_before_a_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert resolve_base(name).source == "folder"


def test_dot_slash_never_means_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("the hub was asked"))
    for name in ("./org", "../org/name", "~/no-such-folder-here/x", str(tmp_path / "none")):
        with pytest.raises(InputError, match="no such base"):
            resolve_base(name)


def test_unknown_names_suggest_packaged_names_and_folders(folder, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'smollm2-135m-instruct'"):
        resolve_base("SmolLM2-135M")
    with pytest.raises(InputError) as caught:
        resolve_base(str(folder.parent / "modle"))
    assert f"did you mean {str(folder)!r}?" in str(caught.value)
    assert caught.value.exit_code == 2


def test_folders_are_suggested_and_files_are_not(tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapter.log").write_text("")
    assert nearest_folder(tmp_path / "adapter") == f"did you mean {str(tmp_path / 'adapters')!r}?"
    assert nearest_folder(tmp_path / "no" / "such" / "place") == nearest_folder(Path("\0")) == ""
    assert nearest_folder(tmp_path / "x") == ""  # that they share a long path makes two names no more alike


def test_a_revision_needs_a_hub_id(folder):
    with pytest.raises(InputError, match="remove the revision"):
        resolve_base(str(folder), "main")


def test_a_file_is_not_a_base(folder):
    with pytest.raises(InputError, match="the base is a file"):
        resolve_base(str(folder / "model.safetensors"))


def test_all_problems_of_a_folder_come_together(folder):
    (folder / "config.json").write_text("{")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError) as caught:
        resolve_base(str(folder))
    found = [p.what for p in caught.value.problems]
    assert found == ["not valid JSON", "no tokenizer", "no safetensors weights"]
    assert "pytorch_model.bin" in str(caught.value) and "safe_serialization=True" in str(caught.value)


def test_an_adapter_folder_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter, not a base" in texts(tmp_path)[0]


def test_config_without_model_type_or_with_deep_json(folder):
    (folder / "config.json").write_text("{}")
    assert "no model_type" in texts(folder)[0]
    (folder / "config.json").write_text("[" * 20_000 + "]" * 20_000)
    assert "JSON" in texts(folder)[0]
    (folder / "config.json").write_bytes("{}".encode("utf-16"))
    assert "JSON" in texts(folder)[0] or "model_type" in texts(folder)[0]


def test_remote_code_is_refused_unless_asked_for_or_not_needed(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_model", "auto_map": {"AutoModelForCausalLM": "modeling_my.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code: true" in texts(folder)[0] and "modeling_my.MyModel" in texts(folder)[0]
    said: list[str] = []
    assert texts(folder, trust_remote_code=True, report=said.append) == [] and "as asked" in said[0]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    said.clear()
    assert texts(folder, report=said.append) == [] and "is not run" in said[0]


# ---- weights


def test_truncated_weights_are_refused_at_every_length(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 7, 8, header - 1, header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "not a sound safetensors file" in texts(folder)[0], length
    path.write_bytes(whole + b"\0")
    assert f"the file has {len(whole) + 1:,} bytes" in texts(folder)[0]


def sharded(folder: Path) -> list[Path]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_every_missing_shard_is_reported(folder):
    shards = sharded(folder)
    assert len(shards) >= 3 and check_folder(folder) == []
    shards[0].unlink()
    shards[1].write_bytes(b"\xff" * 20)
    found = texts(folder)
    assert len(found) == 2 and shards[0].name in found[0] and "claims" in found[1]


def test_an_index_must_name_files_of_its_folder_and_tensors_they_hold(folder):
    shards = sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"evil": "../x.safetensors", "other": "C:\\x.safetensors", "n": 3}
    index["weight_map"]["ghost"] = shards[0].name
    path.write_text(json.dumps(index))
    found = texts(folder)
    assert sum("not a shard's name" in f for f in found) == 3
    assert any("'ghost'" in f for f in found)


def test_a_tensor_in_two_shards_is_refused(folder):
    shards = sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(shards[0], folder / "copy.safetensors")
    index["weight_map"]["ghost"] = "copy.safetensors"
    path.write_text(json.dumps(index))
    assert any("is also in" in f for f in texts(folder))


def test_a_base_in_another_quantization_is_refused_by_its_config_or_its_tensors(folder):
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    (problem,) = texts(folder)
    assert "quantized already, as GPTQ" in problem and "16-bit checkpoint" in problem
    path.write_text(json.dumps(plain))
    assert texts(folder) == []
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scaled = tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    (problem,) = texts(folder)
    assert "as FP8" in problem and name in problem


def test_the_packaged_name_offline_without_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    monkeypatch.delenv("TUNEGATE_PACKAGED_WHEEL", raising=False)
    with pytest.raises(InputError, match="TUNEGATE_PACKAGED_WHEEL"):
        resolve_base("smollm2-135m-instruct", offline=True)


# ---- the hub, offline, in the library's own cache layout


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, folder: Path, name: str) -> Path:
    repo = cache / ("models--" + name.replace("/", "--"))
    snapshot = repo / "snapshots" / COMMIT
    for part in (repo / "refs", repo / "blobs", snapshot):
        part.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_offline_finds_the_cached_snapshot_and_its_commit(cache, folder):
    snapshot = put_in_cache(cache, folder, "org/tiny")
    for revision in (None, "main", COMMIT):
        base = resolve_base("org/tiny", revision, offline=True)
        assert (base.path, base.revision, base.source) == (snapshot, COMMIT, "hub")


def test_offline_by_the_librarys_own_switch(cache, folder, monkeypatch):
    put_in_cache(cache, folder, "org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_base("org/tiny").revision == COMMIT
    with pytest.raises(InputError, match="downloads are off"):
        resolve_base("org/other")


def test_offline_and_not_in_the_cache(cache, folder):
    put_in_cache(cache, folder, "org/tiny")
    for name, revision in (("org/none", None), ("org/tiny", "v2"), ("org/tiny", "f" * 40)):
        with pytest.raises(InputError, match="downloads are off") as caught:
            resolve_base(name, revision, offline=True)
        assert str(cache) in str(caught.value) and caught.value.exit_code == 2


def test_a_cached_base_is_checked_like_any_folder(cache, folder):
    (folder / "model.safetensors").write_bytes(b"short")
    put_in_cache(cache, folder, "org/tiny")
    with pytest.raises(InputError, match="not a sound safetensors file"):
        resolve_base("org/tiny", offline=True)


# ---- the hub, online


class Hub(http.server.BaseHTTPRequestHandler):
    """The three routes of the hub that a download uses. ``repos`` maps an id to its files; errors are by name."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]
    asked: list[str]
    tokens: list[str | None]

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        self.asked.append(f"{self.command} {path}")
        self.tokens.append(self.headers.get("authorization"))
        repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if repo == "org/gated":
            return self.refuse(403, "GatedRepo")
        if repo == "org/broken":
            return self.refuse(500, "")
        if repo not in self.repos:
            return self.refuse(401, "RepoNotFound")
        content = self.repos[repo]
        if rest[1:2] and rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if rest[:1] == ["resolve"]:
            name = "/".join(rest[2:])
            if name not in content:
                return self.refuse(404, "EntryNotFound")
            etag = '"' + hashlib.sha256(content[name]).hexdigest() + '"'
            return self.answer(200, content[name], X_Repo_Commit=COMMIT, ETag=etag)
        if rest[:1] == ["tree"]:
            value: object = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in content.items()
            ]
        else:
            value = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in content]}
        return self.answer(200, json.dumps(value).encode(), Content_Type="application/json")


@pytest.fixture
def hub(cache, folder, monkeypatch):
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"x", "consolidated.safetensors": b"x"}
    bin_only = {k: v for k, v in content.items() if k != "model.safetensors"} | {"pytorch_model.bin": b"pickle"}
    remote = {"config.json": b'{"model_type": "my_model", "auto_map": {"AutoModel": "x.X"}}', "x.py": b"boom"}

    repos = {
        "org/tiny": {**content, **extra, "modeling.py": b"boom"},
        "org/bin": bin_only,
        "org/adapter": {"adapter_config.json": b"{}"},
        "org/remote": {**content, **remote},
        "org/awq": {
            **content,
            "config.json": b'{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
        },
    }
    handler = type("Handler", (Hub,), {"repos": repos, "asked": [], "tokens": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_download_takes_safe_files_only_and_pins_the_commit(hub, folder):
    base = resolve_base("org/tiny", "main")
    assert (base.revision, base.source, base.path.name) == (COMMIT, "hub", COMMIT)
    assert sorted(p.name for p in base.path.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert (base.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    asked = " ".join(hub.asked)
    assert not any(part in asked for part in (".bin", "onnx", "consolidated", ".py"))
    assert set(hub.tokens) == {"Bearer hf_secret"}
    hub.repos.clear()
    assert resolve_base("org/tiny", offline=True) == base


def test_a_pickle_only_repository_is_refused_without_fetching_the_pickle(hub):
    with pytest.raises(InputError, match="no safetensors weights"):
        resolve_base("org/bin")
    assert not any(".bin" in path for path in hub.asked)


def test_another_quantization_is_refused_before_the_weights_are_fetched(hub):
    with pytest.raises(InputError, match="quantized already, as AWQ"):
        resolve_base("org/awq")
    assert not any("safetensors" in path for path in hub.asked)


def test_remote_code_is_refused_before_the_weights_are_fetched(hub):
    with pytest.raises(InputError, match="auto_map"):
        resolve_base("org/remote")
    assert not any("safetensors" in path or path.endswith(".py") for path in hub.asked)


@pytest.mark.parametrize(
    ("name", "revision", "parts"),
    [
        ("org/none", None, ["no such hub repository", "hf auth login", "HF_TOKEN"]),
        ("org/smollm2-135m-instuct", None, ["did you mean 'smollm2-135m-instruct'"]),
        ("org/gated", None, ["gated", "https://huggingface.co/org/gated", "hf auth login"]),
        ("org/tiny", "v9", ["no such revision", "'v9'"]),
        ("org/adapter", None, ["no config.json", "adapter"]),
        ("org/na--me", None, ["not a hub id"]),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, name, revision, parts):
    with pytest.raises(InputError) as caught:
        resolve_base(name, revision)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.exit_code == 2


def test_a_hub_that_fails_is_told_from_a_missing_base(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its attempts
    with pytest.raises(TunegateError, match="500") as caught:
        resolve_base("org/broken")
    assert "no such" not in str(caught.value)


def test_a_dead_hub_is_told_from_a_missing_base(cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TunegateError, match="cannot be reached"):
        resolve_base("org/tiny")


def test_a_misspelt_folder_that_looks_like_a_hub_id_names_the_folder(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "support").mkdir(parents=True)
    with pytest.raises(InputError, match="downloads are off") as caught:
        resolve_base("models/suport", offline=True)
    assert "did you mean 'models/support'?" in str(caught.value)


def test_another_family_is_sound(tmp_path):
    assert check_folder(tiny_base(tmp_path / "gpt2", "gpt2")) == []
