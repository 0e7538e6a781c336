"""What comes from outside and is refused: a clear error, and nothing written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from registry_folders import adapter_folder, card, change_card, fingerprint, peft_folder, tensors, write_card
from tunegate import records
from tunegate.adapter.card import FILES
from tunegate.adapter.files import adapter_hash
from tunegate.config import load_config
from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_file
from tunegate.records import AdapterCard
from tunegate.registry.adding import add
from tunegate.registry.database import parse_url
from tunegate.registry.entries import is_reference, list_versions
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import Registry, open_registry
from tunegate.registry.pulling import pull
from tunegate.registry.store import Store

PREFIX = "base_model.model.model.layers.0.mlp"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return open_registry(str(tmp_path / "registry"), create=True, who="tester")


def contents(folder: Path) -> dict[str, bytes]:
    """Every stored byte; of the database, what can be read from it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def objects(registry: Registry) -> int:
    with registry.database.reading() as connection:
        assert list_versions(connection) == []
    return len(list(registry.store.hashes()))


def with_tensors(folder: Path, change: Any) -> Path:
    """A whole adapter whose card and manifest agree with changed tensors."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)
    return folder


def rename(new: str) -> Any:
    def change(found: dict[str, Any]) -> None:
        found[new] = found.pop(sorted(found)[0])

    return change


def put(name: str, value: Any) -> Any:
    return lambda found: found.__setitem__(name, value)


def nan(found: dict[str, Any]) -> None:
    found[sorted(found)[0]][0, 0] = np.nan


def zero(found: dict[str, Any]) -> None:
    for value in found.values():
        value[:] = 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename("../../etc/passwd"), "is a path out of the folder"),
        (rename(f"{PREFIX}/../x.lora_A.weight"), "is a path out of the folder"),
        (rename(f"{PREFIX}..up_proj.lora_A.weight"), "not a tensor of an adapter"),
        (rename(f"{PREFIX}.up_proj.lora_A.weight\n"), "not a tensor of an adapter"),
        (rename("model.embed_tokens.weight"), "not a tensor of an adapter"),
        (lambda found: found.pop(sorted(found)[0]), r"got: A missing, B \(8, 2\)"),
        (put(f"{PREFIX}.up_proj.lora_magnitude_vector", np.ones(8, np.float32)), "do not fit together"),
        (put(f"{PREFIX}.up_proj.lora_A.weight", np.ones((3, 8), np.float32)), "do not fit together"),
        (put(f"{PREFIX}.up_proj.lora_A.weight", np.ones((2, 8), np.int32)), "wrong type"),
        (nan, "not finite"),
        (zero, "every lora_B is zero"),
    ],
)
@pytest.mark.parametrize("carded", [False, True])
def test_tensors(registry: Registry, tmp_path: Path, change: Any, says: str, carded: bool) -> None:
    folder = adapter_folder(tmp_path / "a", 1) if carded else peft_folder(tmp_path / "a", 1)
    with_tensors(folder, change)
    with pytest.raises(InputError, match=says) as error:
        add(registry, read_folder(folder, name="x"))
    assert objects(registry) == 0
    assert "fetch it again" not in str(error.value)  # the file is whole; what is in it is wrong


def test_a_link_to_itself(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    (folder / "README.md").symlink_to("README.md")
    with pytest.raises(InputError, match="leads nowhere"):
        read_folder(folder, name="x")


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_a_link_out_of_the_folder(registry: Registry, tmp_path: Path, kind: str) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    secret = tmp_path / "secret"
    if kind == "folder":
        secret.mkdir()
    elif kind == "file":
        secret.write_text("secret")
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of the folder"):
        add(registry, read_folder(folder, name="x"))
    assert objects(registry) == 0


def test_a_link_inside_the_folder_and_a_linked_folder_are_taken(registry: Registry, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    (folder / "real.md").write_text("text")
    (folder / "README.md").symlink_to("real.md")
    (tmp_path / "link").symlink_to(folder)
    found = add(registry, read_folder(tmp_path / "link", name="x"))
    pull(registry, found.version.ref, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "text" and not (tmp_path / "out" / "README.md").is_symlink()


def test_what_is_no_regular_file(registry: Registry, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    os.mkfifo(folder / "README.md")
    with pytest.raises(InputError, match="not a regular file"):
        read_folder(folder, name="x")


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "none", "no such adapter folder"), (tmp_path, "not an adapter folder")):
        with pytest.raises(InputError, match=says):
            read_folder(folder, name="x")
    pickled = peft_folder(tmp_path / "a", 1)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        read_folder(pickled, name="x")
    truncated = peft_folder(tmp_path / "b", 1) / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-5])
    with pytest.raises(InputError, match="not a sound safetensors file"):
        read_folder(truncated.parent, name="x")


def changed_file(folder: Path) -> Path:
    (folder / "README.md").write_text("other")
    return folder


def lying_card(folder: Path) -> Path:
    other = tensors(9)
    save_file(other, folder / "adapter_model.safetensors")
    return write_card(folder, records.load(folder / "card.json", AdapterCard))


def cut_card(folder: Path) -> Path:
    (folder / "card.json").write_text("{")
    return folder


def odd_base(folder: Path) -> Path:
    said = records.load(folder / "card.json", AdapterCard)
    return change_card(folder, base={**said.base, "fingerprint": {"total": "sha256:abc"}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed_file, "changed since it was published"),
        (lying_card, "the card is of another adapter"),
        (odd_base, "told by content hashes"),
        (lambda f: (f / "manifest.json").unlink() or f, "not a complete adapter"),
        (cut_card, "changed since it was published"),
        (lambda f: change_card(f, name="../x"), "not a name"),
        (lambda f: change_card(f, data={"files": ["x"], "test": fingerprint(0).total}), "told by content hashes"),
    ],
)
def test_cards(registry: Registry, tmp_path: Path, change: Any, says: str) -> None:
    folder = change(adapter_folder(tmp_path / "a", 1))
    with pytest.raises(InputError, match=says):
        add(registry, read_folder(folder))
    assert objects(registry) == 0


def test_text_that_is_not_unicode(registry: Registry, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1, base="\ud800")
    with pytest.raises(InputError, match="not Unicode"):
        add(registry, read_folder(folder, name="x"))
    card = json.loads((adapter_folder(tmp_path / "b", 1) / "card.json").read_text())
    (tmp_path / "b" / "card.json").write_text(json.dumps({**card, "config": {"x": "\ud800"}}))
    hashes = {name: hash_file(tmp_path / "b" / name) for name in FILES}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(InputError):
        add(registry, read_folder(tmp_path / "b"))
    assert objects(registry) == 0


def test_two_bases_with_one_name(registry: Registry, tmp_path: Path) -> None:
    add(registry, read_folder(adapter_folder(tmp_path / "a", 1)))
    before = contents(tmp_path / "registry" / "blobs")
    other = adapter_folder(tmp_path / "b", 2, base=1)
    with pytest.raises(InputError, match="another base has this name") as error:
        add(registry, read_folder(other))
    assert fingerprint(0).total in str(error.value) and fingerprint(1).total in str(error.value)
    assert contents(tmp_path / "registry" / "blobs") == before
    assert add(registry, read_folder(other, base="tiny-2")).new  # said to be another base


def test_one_hash_for_two_things(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", 1)
    said = records.load(folder / "card.json", AdapterCard)
    change_card(folder, data={**said.data, "files": {"rows.jsonl": fingerprint(0).total}})
    with pytest.raises(InputError, match="one hash for two things"):
        add(registry, read_folder(folder))
    assert objects(registry) == 0


def test_an_adapter_has_one_name(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", 1)
    add(registry, read_folder(folder))
    with pytest.raises(InputError, match="another name"):
        add(registry, read_folder(folder, name="other"))


def test_a_store_whose_records_name_a_path_outside(registry: Registry, tmp_path: Path) -> None:
    from tunegate.registry import tables

    add(registry, read_folder(adapter_folder(tmp_path / "a", 1)))
    column, last = tables.files.c.path, "README.md"
    for path in ("../escaped", "/tmp/escaped", "a/../../escaped", "a//b"):
        with registry.database.writing() as connection:
            connection.execute(tables.files.update().where(column == last).values(path=path))
        last = path
        with pytest.raises(TunegateError, match="outside of the adapter"):
            pull(registry, "support:1", tmp_path / "deep" / "out")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "deep").exists()


def test_places_that_hold_no_registry(tmp_path: Path) -> None:
    for where in (str(tmp_path / "none"), f"sqlite:///{tmp_path}/none.db"):
        with pytest.raises(InputError, match="no registry yet"):
            open_registry(where)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "registry.db").write_bytes(b"not a database, but long enough to look like something" * 20)
    with pytest.raises(TunegateError, match="database refuses"):
        open_registry(str(tmp_path))


def test_another_store_than_the_registrys(tmp_path: Path) -> None:
    first = open_registry(str(tmp_path / "r"), create=True, store=str(tmp_path / "s"))
    assert first.store.url == str(tmp_path / "s")
    assert open_registry(str(tmp_path / "r")).store.url == str(tmp_path / "s")
    with pytest.raises(InputError, match="elsewhere"):
        open_registry(str(tmp_path / "r"), create=True, store=str(tmp_path / "t"))


def test_a_registry_folder_can_be_moved(tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "r"), create=True)
    add(registry, read_folder(adapter_folder(tmp_path / "a", 1)))
    (tmp_path / "r").rename(tmp_path / "moved")
    assert pull(open_registry(str(tmp_path / "moved")), "support:1", tmp_path / "out").number == 1


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:secret@h/d", "mysql://u:sec/ret-secret@h/d", "nonsense://u:secret@h", "sqlite://", "sqlite:///:memory:",
        "postgresql://u@127.0.0.1:1/d?password=secret", "postgresql://u:secret@127.0.0.1:1/d?sslpassword=secret",
    ],
)  # fmt: skip
def test_urls(url: str) -> None:
    with pytest.raises(TunegateError) as error:
        open_registry(url, create=True, store="memory://x")
    assert "secret" not in str(error.value)


def test_a_store_with_a_password_is_not_remembered(tmp_path: Path) -> None:
    for place in ("sftp://u:secret@host/x", "s3://bucket/x?secret_key=secret"):
        with pytest.raises(InputError, match="keep the password") as error:
            open_registry(str(tmp_path / "r"), create=True, store=place)
        assert "=secret" not in str(error.value) and ":secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_store_that_is_there_is_not_another_one(tmp_path: Path) -> None:
    open_registry(str(tmp_path / "r"), create=True)
    assert open_registry(str(tmp_path / "r"), create=True, store=str(tmp_path / "r" / "blobs") + "/").store


def test_a_password_does_not_reach_a_card(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    text = "base: b\ndata: d\ntask: accuracy\nregistry: "
    for place in (
        "postgresql+psycopg://user:secret@host/database",
        "postgresql://:secret@host",
        "x://u:se:cret@h",
        "postgresql://host/d?password=secret",
    ):
        task.write_text(text + place)
        with pytest.raises(InputError, match="without a password") as error:
            load_config(task)
        assert "cret" not in str(error.value)
    for place in ("postgresql+psycopg://user@host:5432/database", "default", "/srv/registry", "folder@home"):
        task.write_text(text + place)
        assert load_config(task).task.registry == place
    assert parse_url("postgresql://user@host/database").drivername == "postgresql+psycopg"


@given(st.text(max_size=40))
def test_any_text_as_a_reference(text: str) -> None:
    if is_reference(text):
        assert all(c.isascii() and (c.isalnum() or c in "._-@:") for c in text)


@given(st.text(max_size=80))
def test_the_store_takes_content_hashes_only(text: str) -> None:
    store = Store("memory://confined")
    with pytest.raises(InputError):
        store.get(text if not text.startswith("b3:") else text[1:])


def test_a_card_with_an_unknown_field(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", 1)
    said = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**said, "surplus": 1}))
    with pytest.raises(InputError):
        read_folder(folder)
    assert replace(card(adapter_hash(folder)), name="y").name == "y"
