"""Bases that were made from other bases: what a merge and a quantization say of it, and the flags that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import adapt_plain
from registry_folders import adapter_folder, change_card, fingerprint
from task import call, write_task
from test_registry_cli import told, typed
from test_registry_versions import added, find, new_base
from tiny import tiny_base
from tunegate import records
from tunegate.adapter.files import save_adapter
from tunegate.errors import InputError
from tunegate.files import hash_json, read_json
from tunegate.model.fingerprint import hash_weights
from tunegate.model.loading import load_model
from tunegate.model.origin import DEEPEST, MERGE, MERGED, check_origin, origin_of
from tunegate.records import AdapterCard
from tunegate.registry.bases import add_base, list_bases, supersede
from tunegate.registry.entries import Entity
from tunegate.registry.lineage import lineage
from tunegate.registry.opening import Registry, open_registry


@pytest.fixture
def small(tmp_path: Path) -> Registry:
    return open_registry(str(tmp_path / "small"), create=True, who="tester")


def said_of(base: int, *adapters: str, name: str = "tiny", **more: Any) -> dict[str, Any]:
    parts = [{"id": a, "hash": a, "weight": 1.0} for a in adapters]
    return {"how": MERGED, "base": {"name": name, "fingerprint": fingerprint(base).total, **more}, "adapters": parts}


def on_merged(folder: Path, seed: int, base: int, origin: dict[str, Any], **named: Any) -> Path:
    """An adapter whose base says that it was merged."""
    made = adapter_folder(folder, seed, base=base, **named)
    card = records.load(made / "card.json", AdapterCard)
    return change_card(made, base={**card.base, "origin": origin})


def adapter_on(base: Path, folder: Path, seed: int = 0) -> Path:
    """Random factors on ``base``, without a card."""
    model = load_model(base, dtype=torch.float32)
    save_adapter(folder, adapt_plain(model, seed=seed), base_name=str(base))
    return folder


# --- the file ----------------------------------------------------------------------------------------------------


def test_a_merge_says_what_it_was_made_from_and_base_add_takes_it(tmp_path: Path, tiny_llama: Path) -> None:
    """Merged twice, added, and the first base superseded: an adapter on the last one is flagged."""
    first = adapter_on(tiny_llama, tmp_path / "first")
    told(tmp_path, "base", "add", tiny_llama, "--name", "one")
    added_first = told(tmp_path, "add", first, "--name", "first", "--base-name", "one")
    assert call("merge", first, "-o", tmp_path / "two", "--base", tiny_llama).code == 0
    said = read_json(tmp_path / "two" / MERGE)
    assert said["weights"] == hash_weights(tmp_path / "two", use_cache=False)
    assert said["adapters"][0]["id"] == added_first["adapter"] and said["method"] == "linear"
    second = adapter_on(tmp_path / "two", tmp_path / "second", seed=1)
    assert call("merge", second, "-o", tmp_path / "three", "--base", tmp_path / "two").code == 0
    assert read_json(tmp_path / "three" / MERGE)["base"]["origin"]["adapters"][0]["id"] == added_first["adapter"]

    three = told(tmp_path, "base", "add", tmp_path / "three", "--name", "three")
    way = told(tmp_path, "lineage", three["fingerprint"])["made_from"]
    assert {e["role"] for e in way} >= {MERGED} and added_first["adapter"] in {e["parent"] for e in way}
    task = write_task(tmp_path / "task", tmp_path / "three")
    task.write_text(task.read_text() + f"registry: {tmp_path / 'registry'}\n")
    assert call("run", task).code in (0, 1)  # whatever the gate says of it
    assert not told(tmp_path, "show", "task:1")["flags"]
    other = tiny_base(tmp_path / "other", "llama", seed=5)
    flagged = told(tmp_path, "base", "supersede", "one", other, "--why", "mended")["flagged"]
    assert {v["ref"] for v in flagged} == {"first:1", "task:1"}
    said_no = call("export", "task:1", "--to", "peft", "-o", tmp_path / "no", "--registry", tmp_path / "registry")
    assert said_no.code == 2 and "mended" in said_no.err and not (tmp_path / "no").exists()


def test_a_file_for_other_weights_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    adapter = adapter_on(tiny_llama, tmp_path / "adapter")
    assert call("merge", adapter, "-o", tmp_path / "merged", "--base", tiny_llama).code == 0
    other = tiny_base(tmp_path / "other", "llama", seed=3)
    shutil.copyfile(tmp_path / "merged" / MERGE, other / MERGE)
    said = typed(tmp_path, "base", "add", other)
    assert said.code == 2 and "written for other weights" in said.err


def test_a_quantized_base_says_what_it_was_made_from(tmp_path: Path, tiny_llama: Path) -> None:
    assert call("quantize", tiny_llama, tmp_path / "nf4").code == 0
    found = origin_of(tmp_path / "nf4", "b3:any")
    told(tmp_path, "base", "add", tiny_llama, "--name", "one")
    told(tmp_path, "base", "add", tmp_path / "nf4", "--name", "four-bit")
    assert found is not None and found["how"] == "quantized from"
    other = tiny_base(tmp_path / "other", "llama", seed=5)
    told(tmp_path, "base", "supersede", "one", other, "--why", "mended")
    by = {b["base"]["name"]: b for b in told(tmp_path, "base", "list")["bases"]}
    assert by["four-bit"]["flags"]


@given(
    st.recursive(
        st.none() | st.text(max_size=5) | st.integers(),
        lambda inner: (
            st.dictionaries(st.sampled_from(["how", "base", "adapters", "id", "name", "origin"]), inner)
            | st.lists(inner, max_size=2)
        ),
        max_leaves=10,
    )
)
def test_any_other_json_is_an_input_error(value: Any) -> None:
    with pytest.raises(InputError):
        check_origin(value, "here")


def test_origins_inside_one_another_end(tmp_path: Path) -> None:
    deep = said_of(0)
    for _ in range(DEEPEST + 2):
        deep = said_of(0, origin=deep)
    with pytest.raises(InputError):
        check_origin(deep, "here")


# --- in the registry ---------------------------------------------------------------------------------------------


def test_a_card_on_a_merged_base_is_enough(small: Registry, tmp_path: Path) -> None:
    """The merged base was never added by itself, and the adapter in it comes last."""
    first = adapter_folder(tmp_path / "1", 1)
    from tunegate.registry.intake import folder_id

    origin = said_of(0, folder_id(first))
    deep = added(small, on_merged(tmp_path / "2", 2, 5, origin, base_name="merged", name="deep")).version
    assert not deep.flags
    version = added(small, first).version
    with small.database.reading() as connection:
        above = lineage(connection, deep.adapter).above
    assert (fingerprint(5).total, version.adapter, MERGED) in {(e.child, e.parent, e.role) for e in above}
    supersede(small, "tiny", new_base(1), why="one")
    assert find(small, "deep:1").flags and find(small, "support:1").flags


def test_a_card_adds_nothing_to_a_base_that_is_known(small: Registry, tmp_path: Path) -> None:
    """Else a card could flag everybody's adapters, by calling their base a merge of a superseded one."""
    good = added(small, adapter_folder(tmp_path / "1", 1, base=3, base_name="good", name="good")).version
    add_base(small, new_base(0))
    supersede(small, "tiny", new_base(1), why="one")
    hostile = on_merged(tmp_path / "2", 2, 3, said_of(0), base_name="good", name="hostile")
    added(small, hostile)
    assert not find(small, good.ref).flags
    made = fingerprint(3)
    body = {"name": "good", "fingerprint": vars(made), "origin": said_of(0)}
    assert add_base(small, Entity(made.total, "base", "good", body)) is False  # its own folder may say so
    assert find(small, good.ref).flags


def test_a_base_is_not_named_like_a_version(small: Registry, tmp_path: Path) -> None:
    hash_like = fingerprint(7).total
    for name in ("support:1", "support@production", hash_like, hash_like[3:12]):
        with pytest.raises(InputError, match="like a version"):
            added(small, adapter_folder(tmp_path / hash_json(name)[3:9], 1, base_name=name))
        with pytest.raises(InputError, match="like a version"):
            add_base(small, new_base(1, name))
    add_base(small, new_base(1))
    with pytest.raises(InputError, match="like a version"):
        supersede(small, "tiny", new_base(2, "support:1"), why="x")
    with small.database.reading() as connection:
        assert [b.base.name for b in list_bases(connection)] == ["tiny"]


def test_a_card_with_a_wrong_origin(small: Registry, tmp_path: Path) -> None:
    for n, origin in enumerate((1, {}, {**said_of(0), "how": "x"}, said_of(0, "no hash"))):
        with pytest.raises(InputError, match="what the model was made from"):
            added(small, on_merged(tmp_path / str(n), n, 5, origin))  # type: ignore[arg-type]
    assert json.dumps(said_of(0))
