"""The registry on both databases: adding, states, aliases, flags, lineage, differences, upkeep."""

from __future__ import annotations

import datetime
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from registry_fixtures import Place
from registry_folders import adapter_folder, change_card, decision, fingerprint, peft_folder, run_folder
from tunegate.adapter.card import FILES, MANIFEST, check_complete
from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_file, read_json
from tunegate.registry import database, pulling, tables
from tunegate.registry import store as stores
from tunegate.registry.adding import Added, add
from tunegate.registry.bases import add_base, check_base, list_bases, supersede
from tunegate.registry.differing import diff
from tunegate.registry.entries import Entity, Version, find_entity, history, list_versions, resolve
from tunegate.registry.intake import read_folder
from tunegate.registry.lineage import lineage, way
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import PROVENANCE, adapter_folders, materialize, pull
from tunegate.registry.states import promote, retire, set_alias
from tunegate.registry.upkeep import collect, trust_clock, verify


def added(registry: Registry, folder: Path, **named: str) -> Added:
    return add(registry, read_folder(folder, **named))  # type: ignore[arg-type]


def find(registry: Registry, reference: str) -> Version:
    with registry.database.reading() as connection:
        return resolve(connection, reference)


def versions(registry: Registry) -> list[Version]:
    with registry.database.reading() as connection:
        return list_versions(connection)


def new_base(seed: int, name: str = "tiny") -> Entity:
    made = fingerprint(seed)
    return Entity(made.total, "base", name, {"name": name, "fingerprint": vars(made)})


# --- adding and references ---------------------------------------------------------------------------------------


def test_the_same_adapter_is_the_same_version_and_another_gets_the_next_number(
    registry: Registry, tmp_path: Path
) -> None:
    one, two = adapter_folder(tmp_path / "one", 1), adapter_folder(tmp_path / "two", 2)
    first, again, second = added(registry, one), added(registry, one), added(registry, two)
    assert (first.new, again.new, second.new) == (True, False, True)
    assert first.version == again.version and first.uploaded > 0 and again.uploaded == 0
    assert [v.ref for v in versions(registry)] == ["support:1", "support:2"]
    assert (first.version.state, first.version.verdict) == ("candidate", "ship")


def test_what_two_adapters_share_is_stored_once(registry: Registry, tmp_path: Path) -> None:
    one = adapter_folder(tmp_path / "one", 1)
    first = added(registry, one)
    two = change_card(adapter_folder(tmp_path / "two", 1), created="2026-05-05T00:00:00+00:00")
    second = added(registry, two)
    assert second.new
    kept = sum(
        (two / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")
    )
    assert second.uploaded == first.uploaded - kept  # sizes of card and manifest are equal


def test_every_form_of_a_reference(registry: Registry, tmp_path: Path) -> None:
    for seed in (1, 2):
        added(registry, adapter_folder(tmp_path / f"{seed}", seed))
    first, second = versions(registry)
    promote(registry, "support:1", why="good", to="production")
    set_alias(registry, "support@canary", "support:2")
    for reference, expected in {
        "support:1": first, "support@production": first, "support@latest": second, "support@canary": second,
        second.adapter: second, second.adapter[:12]: second, second.adapter[3:11]: second,
    }.items():  # fmt: skip
        assert find(registry, reference).adapter == expected.adapter, reference
    assert find(registry, "support:1").aliases == ("production",)
    for wrong in ("support", "support:3", "support@stable", "suport:1", "b3:", "b3:0000000", "", "%", "support@%"):
        with pytest.raises(InputError):
            find(registry, wrong)
    with pytest.raises(InputError, match="did you mean 'support'"):
        find(registry, "suport:1")


def test_a_pulled_folder_is_the_added_one(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PART", 100)  # so that files have several parts
    folder = run_folder(tmp_path / "runs", 1)
    version = added(registry, folder).version
    out = tmp_path / "out"
    pull(registry, "support:1", out, evidence=True)
    for name in (*FILES, MANIFEST):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    check_complete(out)
    answers = "test/adapter.items.jsonl"
    assert (out / "evidence" / answers).read_bytes() == (folder.parent / answers).read_bytes()
    told = read_json(out / PROVENANCE)
    assert (told["ref"], told["state"], told["adapter"]) == ("support:1", "candidate", version.adapter)
    assert added(registry, out).new is False
    with pytest.raises(InputError, match="exists"):
        pull(registry, "support:1", out)
    assert not (tmp_path / "plain").exists() and pull(registry, "support:1", tmp_path / "plain")
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {*FILES, MANIFEST, PROVENANCE}
    started = threading.Barrier(4)  # all of them find that nothing is there

    def both_see_nothing(*arguments: object) -> object:
        started.wait(30)
        return plan(*arguments)  # type: ignore[arg-type]

    plan = pulling._plan
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(pulling, "_plan", both_see_nothing)
        folders = set(pool.map(lambda _: materialize(registry, "support:1"), range(4)))
    assert len(folders) == 1
    cached = materialize(registry, "support@latest")
    (cached / "card.json").write_text("{}")
    assert hash_file(materialize(registry, "support@latest") / "card.json") == hash_file(folder / "card.json")


# --- states ------------------------------------------------------------------------------------------------------


def test_who_when_and_why_of_every_step(registry: Registry, tmp_path: Path) -> None:
    added(registry, adapter_folder(tmp_path / "one", 1))
    assert promote(registry, "support:1", why="looks good").state == "approved"
    assert promote(registry, "support:1", why="go live").state == "production"
    retired = retire(registry, "support@production", why="old")
    assert (retired.state, retired.aliases) == ("retired", ())
    with registry.database.reading() as connection:
        events = history(connection, retired.adapter)
    assert [(e.what, e.who, e.why) for e in events] == [
        ("added as candidate", "tester", ""),
        ("approved", "tester", "looks good"),
        ("production", "tester", "go live"),
        ("retired from production, no longer @production", "tester", "old"),
    ]
    times = [datetime.datetime.fromisoformat(e.at) for e in events]
    assert times == sorted(times)
    for action in (lambda: promote(registry, "support:1", why="x"), lambda: retire(registry, "support:1", why="x")):
        with pytest.raises(InputError, match="retired"):
            action()


@pytest.mark.parametrize("verdict", ["hold", "inconclusive"])
def test_what_the_gate_did_not_ship_needs_a_reason_that_stays(registry: Registry, tmp_path: Path, verdict: str) -> None:
    added(registry, adapter_folder(tmp_path / "one", 1, verdict=verdict))
    for reason in (None, "", "  "):
        with pytest.raises(InputError, match=f"the gate says {verdict}"):
            promote(registry, "support:1", why="x", override=reason)
    assert find(registry, "support:1").state == "candidate"
    promote(registry, "support:1", why="x", override="the customer waits")
    version = promote(registry, "support:1", why="x")
    assert version.standing == f"production, {verdict}, OVERRIDE: the customer waits"
    assert pull(registry, "support@production", tmp_path / "out").override == "the customer waits"
    assert "OVERRIDE: the customer waits" in read_json(tmp_path / "out" / PROVENANCE)["standing"]
    with registry.database.reading() as connection:
        assert any("OVERRIDE: the customer waits" in e.what for e in history(connection, version.adapter))


def test_what_ships_takes_no_override_and_every_step_a_reason(registry: Registry, tmp_path: Path) -> None:
    added(registry, adapter_folder(tmp_path / "one", 1))
    with pytest.raises(InputError, match="nothing to override"):
        promote(registry, "support:1", why="x", override="y")
    with pytest.raises(InputError, match="say why"):
        promote(registry, "support:1", why=" ")
    promote(registry, "support:1", why="x")
    with pytest.raises(InputError, match="approved already"):
        promote(registry, "support:1", why="x", to="approved")
    with pytest.raises(InputError, match="nothing to override"):
        promote(registry, "support:1", why="x", override="y")
    assert find(registry, "support:1").state == "approved"


def test_one_version_is_in_production_and_the_way_back_is_open(registry: Registry, tmp_path: Path) -> None:
    for seed in (1, 2):
        added(registry, adapter_folder(tmp_path / f"{seed}", seed))
        promote(registry, f"support:{seed}", why="x", to="production")
    assert [v.state for v in versions(registry)] == ["approved", "production"]
    promote(registry, "support:1", why="roll back")
    assert [v.state for v in versions(registry)] == ["production", "approved"]
    with pytest.raises(TunegateError), registry.database.writing() as connection:  # the index, not only the code
        connection.execute(tables.versions.update().values(state="production"))
    assert [v.state for v in versions(registry)] == ["production", "approved"]


def test_an_adapter_without_a_card_is_unverified_and_stays_so(registry: Registry, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", 3)
    (folder / "training_args.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="no name"):
        added(registry, folder)
    found = added(registry, folder, name="imported")
    assert (found.version.state, found.version.verdict, found.left_out) == ("unverified", None, ["training_args.bin"])
    for override in (None, "trust me"):
        with pytest.raises(InputError, match="unverified"):
            promote(registry, "imported:1", why="x", override=override)
    assert pull(registry, "imported:1", tmp_path / "out").state == "unverified"
    assert retire(registry, "imported:1", why="x").state == "retired"


def test_aliases_move_and_are_refused(registry: Registry, tmp_path: Path) -> None:
    for seed in (1, 2):
        added(registry, adapter_folder(tmp_path / f"{seed}", seed))
    set_alias(registry, "support@canary", "support:1")
    assert set_alias(registry, "support@canary", "support:2").aliases == ("canary",)
    assert find(registry, "support:1").aliases == ()
    for alias in (
        "support@production",
        "support@latest",
        "support@approved",
        "support@retired",
        "other@canary",
        "support",
        "support@a/b",
    ):
        with pytest.raises(InputError):
            set_alias(registry, alias, "support:1")
    with pytest.raises(InputError):
        set_alias(registry, "support@x", "support:9")
    retire(registry, "support:2", why="x")
    with pytest.raises(InputError):
        find(registry, "support@canary")


# --- bases -------------------------------------------------------------------------------------------------------


def test_a_superseded_base_flags_its_adapters_at_once(registry: Registry, tmp_path: Path) -> None:
    for seed in (1, 2):
        added(registry, adapter_folder(tmp_path / f"{seed}", seed))
    promote(registry, "support:1", why="x", to="production")
    added(registry, adapter_folder(tmp_path / "other", 3, base=7, base_name="other", name="else"))
    old = fingerprint(0).total
    flagged = supersede(registry, "tiny", new_base(1), why="tokenizer mended")
    assert [v.ref for v in flagged] == ["support:1", "support:2"]
    assert [bool(v.flags) for v in versions(registry)] == [False, True, True]
    version = find(registry, "support@production")
    assert "tokenizer mended" in version.flags[0] and "INCOMPATIBLE" in version.standing
    for what in (
        lambda: pull(registry, "support@production", tmp_path / "out"),
        lambda: materialize(registry, "support:1"),
        lambda: promote(registry, "support:2", why="x"),
        lambda: check_base(registry, old),
    ):
        with pytest.raises(InputError, match="superseded by tiny"):
            what()
    assert not (tmp_path / "out").exists()
    check_base(registry, fingerprint(1).total)
    check_base(registry, fingerprint(99).total)
    # an adapter of the old base is known by fingerprint, and flagged from the start; one of the new base is not
    assert added(registry, adapter_folder(tmp_path / "late", 4)).version.flags
    assert not added(registry, adapter_folder(tmp_path / "new", 5, base=1)).version.flags
    with registry.database.reading() as connection:
        entries = {b.base.id: b for b in list_bases(connection)}
    assert entries[old].names == () and entries[old].superseded_by == fingerprint(1).total
    assert entries[fingerprint(1).total].names == ("tiny",)


def test_flags_are_transitive(registry: Registry, tmp_path: Path) -> None:
    """A base merged from an adapter of the old base, an adapter on that, and a chain of superseded bases."""
    first = added(registry, adapter_folder(tmp_path / "1", 1)).version
    merged = new_base(5, "merged")
    with registry.database.writing() as connection:
        from tunegate.registry.entries import Edge, insert

        insert(connection, [merged], [Edge(merged.id, first.adapter, "merged from")], database.stamp(connection))
    second = added(registry, adapter_folder(tmp_path / "2", 2, base=5, base_name="merged", name="deep")).version
    assert not second.flags
    supersede(registry, "tiny", new_base(1), why="one")
    assert find(registry, "deep:1").flags and find(registry, "support:1").flags
    third = added(registry, adapter_folder(tmp_path / "3", 3, base=1)).version
    assert not third.flags
    supersede(registry, "tiny", new_base(2), why="two")
    assert "two" in find(registry, third.adapter).flags[0] and len(find(registry, "support:1").flags) == 1


def test_a_base_made_from_the_one_that_it_supersedes_is_not_flagged(registry: Registry, tmp_path: Path) -> None:
    from tunegate.registry.entries import Edge, insert

    added(registry, adapter_folder(tmp_path / "1", 1))
    better = new_base(6)
    with registry.database.writing() as connection:
        insert(connection, [better], [Edge(better.id, fingerprint(0).total, "made from")], database.stamp(connection))
    supersede(registry, "tiny", better, why="x")
    assert not added(registry, adapter_folder(tmp_path / "2", 2, base=6)).version.flags
    assert find(registry, "support:1").flags


def test_what_cannot_supersede(registry: Registry, tmp_path: Path) -> None:
    added(registry, adapter_folder(tmp_path / "1", 1))
    add_base(registry, new_base(3, "third"))
    for old, new, why, says in (
        ("tiny", new_base(0), "x", "itself"), ("tiny", new_base(1), " ", "say why"),
        ("none", new_base(1), "x", "no such"), ("tiny", new_base(9, "third"), "x", "third base"),
        ("support:1", new_base(1), "x", "not a base"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            supersede(registry, old, new, why=why)
    supersede(registry, "tiny", new_base(1), why="x")
    with pytest.raises(InputError, match="superseded before"):
        supersede(registry, fingerprint(0).total, new_base(2), why="x")
    with pytest.raises(InputError, match="itself superseded"):
        supersede(registry, "tiny", new_base(0), why="x")
    assert [b.superseded_by is not None for b in bases(registry)].count(True) == 1


def bases(registry: Registry) -> list[object]:
    with registry.database.reading() as connection:
        return list(list_bases(connection))


def test_an_unverified_adapter_is_flagged_by_the_name_that_it_claims(registry: Registry, tmp_path: Path) -> None:
    add_base(registry, new_base(0))
    assert not added(registry, peft_folder(tmp_path / "peft", 3), name="imported").version.flags
    supersede(registry, "tiny", new_base(1), why="x")
    assert find(registry, "imported:1").flags


@pytest.mark.parametrize("how", ["base add", "another name", "a card", "superseding", "supersedes"])
def test_an_unverified_adapter_that_came_before_its_base(registry: Registry, tmp_path: Path, how: str) -> None:
    """Once the name that it claims is given to a base, whichever way, it belongs to that one."""
    claimed = 'ti"ny_%'
    added(registry, peft_folder(tmp_path / "peft", 3, base=claimed), name="imported")
    added(registry, peft_folder(tmp_path / "other", 4, base="other"), name="other")
    if how == "another name":
        add_base(registry, new_base(0, "first"))
    if how == "a card":
        added(registry, adapter_folder(tmp_path / "carded", 1, base_name=claimed))
    elif how == "supersedes":
        add_base(registry, new_base(5, "old"))
        supersede(registry, "old", new_base(0, claimed), why="x")
    elif how != "superseding":
        add_base(registry, new_base(0, claimed))
    else:
        add_base(registry, new_base(0, claimed))
        with registry.database.writing() as connection:  # as it was left before claims were linked
            connection.execute(tables.edges.delete().where(tables.edges.c.role == "claims"))
        assert not add_base(registry, new_base(0, claimed))
    assert not find(registry, "imported:1").flags
    supersede(registry, claimed, new_base(1, "new"), why="mended")
    assert "mended" in find(registry, "imported:1").flags[0] and not find(registry, "other:1").flags
    with pytest.raises(InputError, match="superseded"):
        pull(registry, "imported:1", tmp_path / "out")


def test_folders_are_refused_where_a_registry_is_in_use(
    registry: Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter_folder(tmp_path / "1", 1)
    added(registry, folder)
    told: list[str] = []
    assert adapter_folders([str(folder)], None, "merged", told.append) == [str(folder)]
    (found,) = adapter_folders(["support@latest"], place.where, "merged", told.append)
    assert hash_file(Path(found) / "card.json") == hash_file(folder / "card.json") and "support:1" in told[0]
    supersede(registry, "tiny", new_base(1), why="x")
    for text in (str(folder), "support@latest"):
        with pytest.raises(InputError, match="superseded"):
            adapter_folders([text], place.where, "merged", told.append)
    assert adapter_folders([str(folder)], None, "merged", told.append) == [str(folder)]
    monkeypatch.setenv("TUNEGATE_REGISTRY", place.where)
    with pytest.raises(InputError, match="superseded"):
        adapter_folders([str(folder)], None, "merged", told.append)


# --- lineage and differences -------------------------------------------------------------------------------------


def test_lineage_from_any_to_any(registry: Registry, tmp_path: Path) -> None:
    for seed, rows in ((1, "rows"), (2, "rows"), (3, "others")):
        added(registry, adapter_folder(tmp_path / f"{seed}", seed, data=rows))
    with registry.database.reading() as connection:
        found = lineage(connection, resolve(connection, "support:1").adapter)
        kinds = {e.kind for e in found.entities.values()}
        assert kinds == {"base", "dataset", "run", "eval", "decision", "adapter"}
        ids = [row.id for row in connection.execute(sa.select(tables.entities.c.id))]
        for start in ids[:2]:  # everything hangs together, through the base if through nothing else
            for end in ids:
                chain = way(connection, start, end)
                assert chain is not None and (chain == []) == (start == end)
        one, two = (resolve(connection, f"support:{n}").adapter for n in (1, 2))
        chain = way(connection, one, two)
        assert chain is not None and [e.role for e in chain] == ["trained on", "trained on"]
        data = find_entity(connection, fingerprint(0).total)
        assert {e.child for e in lineage(connection, data.id).below} >= {one, two}
        assert lineage(connection, data.id).above == []


def test_lineage_stops_where_nothing_connects(registry: Registry) -> None:
    add_base(registry, new_base(1, "a"))
    add_base(registry, new_base(2, "b"))
    with registry.database.reading() as connection:
        assert way(connection, fingerprint(1).total, fingerprint(2).total) is None


def test_differences_down_to_the_item(registry: Registry, tmp_path: Path) -> None:
    added(registry, run_folder(tmp_path, 1, ("pink", "blue", "red"), score=0.6))
    two = run_folder(tmp_path, 2, ("grey", "red", "green"), score=0.7)
    change_card(two, config={"train": {"rank": 4, "lr": 0.01, "seed": 0}, "base": {"name": "tiny"}})
    added(registry, two)
    found = diff(registry, "support:1", "support:2")
    assert found.settings == {"train.rank": (2, 4)} and found.data == {}
    assert found.scores == {"adapter accuracy": (0.6, 0.7), "base accuracy": (0.6, 0.7)}
    assert found.items is not None and (found.compared, found.metric) == (3, "accuracy")
    assert [(i["row_id"], i["predictions"]) for i in found.items] == [  # what the metric tells apart comes first
        ("rows.jsonl:1", ["blue", "red"]), ("rows.jsonl:2", ["red", "green"]), ("rows.jsonl:0", ["pink", "grey"]),
    ]  # fmt: skip
    assert diff(registry, "support:1", "support:1").items == []
    added(registry, run_folder(tmp_path / "other", 3, data="others"))
    assert diff(registry, "support:1", "support:3").items is None
    assert set(diff(registry, "support:1", "support:3").data) == {"files.rows.jsonl", "test"}
    line = "one\u2028line\x85of text\x0c"  # JSON Lines end at a line feed and at nothing else
    added(registry, run_folder(tmp_path / "odd", 5, (line, "blue", "red")))
    odd = next(v.ref for v in versions(registry) if v.number == 4)
    assert (found := diff(registry, "support:1", odd)).items is not None and found.items[0]["predictions"][1] == line
    added(registry, adapter_folder(tmp_path / "bare", 4))
    assert "support:5" in diff(registry, "support:1", "support:5").why_not


def test_of_an_adapter_without_a_card_its_own_config_is_compared(registry: Registry, tmp_path: Path) -> None:
    added(registry, run_folder(tmp_path, 1))
    added(registry, peft_folder(tmp_path / "peft", 3, base="else", rank=4), name="bare")
    for one, two in (("support:1", "bare:1"), ("bare:1", "support:1")):
        found = diff(registry, one, two)
        swap = slice(None, None, 1 if one == "support:1" else -1)
        assert found.settings == {"base_model_name_or_path": ("tiny", "else")[swap], "r": (2, 4)[swap]}
        assert (found.data, found.scores, found.metric, found.cardless) == ({}, {}, None, ("bare:1",))
        assert found.items is None and "bare:1" in found.why_not


# --- upkeep ------------------------------------------------------------------------------------------------------


def test_verify_finds_every_flipped_byte(registry: Registry, tmp_path: Path) -> None:
    added(registry, run_folder(tmp_path, 1))
    found = verify(registry)
    assert found.problems == [] and found.adapters == 1 and found.files == 7 and found.bytes > 1000
    assert registry.store.local is not None
    objects = [p for p in registry.store.local.rglob("*") if p.is_file()]
    assert len(objects) == 7
    for path in objects:
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        (problem,) = verify(registry).problems
        assert "changed" in problem.what and "support:1" in problem.where
        path.unlink()
        (problem,) = verify(registry).problems
        assert "lost" in problem.what
        path.write_bytes(data)
    assert verify(registry).problems == []


def test_verify_finds_what_the_database_says_against_the_card(registry: Registry, tmp_path: Path) -> None:
    """A verdict turned to ship, a record's copy of the card, a decision, a lost edge to the base."""
    added(registry, adapter_folder(tmp_path / "one", 1, verdict="hold"))
    added(registry, peft_folder(tmp_path / "peft", 3), name="imported")
    assert verify(registry).problems == []
    record, mine = tables.entities.c.kind, tables.versions.c.name == "support"
    for table, where, column, old, new, says in (
        (tables.versions, mine, "verdict", "hold", "ship", "the verdict is not the card's"),
        (tables.entities, record == "adapter", "body", '"value":0.8', '"value":0.9', "its card"),
        (tables.entities, record == "decision", "body", "hold", "ship", "decision has changed"),
        (tables.edges, tables.edges.c.role == "trained on", "role", "trained", "tested", "the base is not the card's"),
        (tables.versions, mine, "state", "candidate", "approved", "nobody gave a reason for an override"),
    ):
        with registry.database.writing() as connection:
            one = table.c[column]
            connection.execute(table.update().where(where).values({column: sa.func.replace(one, old, new)}))
        (problem,) = verify(registry).problems
        assert says in problem.what
        with registry.database.writing() as connection:
            where = one == "tested on" if column == "role" else where
            connection.execute(table.update().where(where).values({column: sa.func.replace(one, new, old)}))
        assert verify(registry).problems == []


def test_gc_removes_what_a_killed_writer_left_a_day_ago(registry: Registry, tmp_path: Path) -> None:
    added(registry, adapter_folder(tmp_path / "one", 1))
    assert registry.store.local is not None
    folder = next(p for p in registry.store.local.iterdir() if p.is_dir())
    old, young = folder / ".tmp-old", folder / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    collect(registry)
    assert young.exists() and not old.exists()


def test_adding_again_mends_a_damaged_store(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "one", 1)
    added(registry, folder)
    assert registry.store.local is not None
    one, two, *_ = sorted(p for p in registry.store.local.rglob("*") if p.is_file())
    one.write_bytes(b"damage")
    two.unlink()
    assert len(verify(registry).problems) == 2
    again = added(registry, folder)
    assert not again.new and again.uploaded > 0 and verify(registry).problems == []


def test_verify_finds_a_changed_record(registry: Registry, tmp_path: Path) -> None:
    added(registry, adapter_folder(tmp_path / "one", 1))
    with registry.database.writing() as connection:
        rows = connection.execute(sa.select(tables.entities).where(tables.entities.c.kind == "eval")).all()
        body = rows[0].body.replace('"value":0.8', '"value":0.9')
        assert body != rows[0].body
        connection.execute(tables.entities.update().where(tables.entities.c.id == rows[0].id).values(body=body))
    (problem,) = verify(registry).problems
    assert "eval has changed" in problem.what
    with registry.database.writing() as connection:
        one = tables.entities.c.id == rows[1].id
        connection.execute(tables.entities.update().where(one).values(body="[not JSON"))
    assert len(verify(registry).problems) == 2


def test_gc_takes_what_nobody_needs_and_nothing_else(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "one", 1)
    added(registry, folder)
    from tunegate.files import hash_bytes

    for data in (b"left over", b"pinned"):
        registry.store.put(hash_bytes(data), data)
    with registry.database.writing() as connection:
        now = database.stamp(connection)
        connection.execute(tables.pins.insert().values(hash=hash_bytes(b"pinned"), upload="u", at=now))
    found = collect(registry)
    assert (found.objects, found.bytes, found.pinned) == (1, 9, 1)
    assert registry.store.get(hash_bytes(b"pinned")) == b"pinned"
    with registry.database.writing() as connection:
        connection.execute(tables.pins.update().values(at="2020-01-01T00:00:00.000000+00:00"))
    assert collect(registry).objects == 1 and collect(registry).objects == 0
    assert verify(registry).problems == []
    with registry.database.reading() as connection:
        assert connection.execute(sa.select(tables.pins)).all() == []


# --- clocks ------------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards(registry: Registry, tmp_path: Path) -> None:
    added(registry, adapter_folder(tmp_path / "one", 1))

    def last_event(offset: float) -> str:
        time = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=offset)
        text = time.isoformat(timespec="microseconds")
        with registry.database.writing() as connection:
            connection.execute(tables.events.update().values(at=text))
        return text

    ahead = last_event(30)  # another machine's clock, within the tolerance: order is kept
    promote(registry, "support:1", why="x")
    with registry.database.reading() as connection:
        assert history(connection, find(registry, "support:1").adapter)[-1].at == ahead
    last_event(3600)
    for action in (
        lambda: promote(registry, "support:1", why="x"),
        lambda: added(registry, adapter_folder(tmp_path / "two", 2)),
        lambda: supersede(registry, "tiny", new_base(1), why="x"),
    ):
        with pytest.raises(TunegateError, match="clock"):
            action()
    assert [v.state for v in versions(registry)] == ["approved"]
    with registry.database.reading() as connection:
        assert connection.execute(sa.select(tables.pins)).all() == []


def test_a_clock_that_was_a_year_ahead(registry: Registry, tmp_path: Path) -> None:
    """Everything is refused until somebody says that the clock is right; then all goes on, and nothing is rewritten."""
    folder = adapter_folder(tmp_path / "one", 1)
    added(registry, folder)
    with pytest.raises(InputError, match="no entry is dated after"):
        trust_clock(registry, why="x")
    late = (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=365)).isoformat(
        timespec="microseconds"
    )
    with registry.database.writing() as connection:  # as a machine whose clock is a year ahead leaves it
        for table in (tables.events, tables.entities):
            connection.execute(table.update().values(at=late))
        connection.execute(tables.pins.insert().values(hash=fingerprint(0).total, upload="killed", at=late))
    with pytest.raises(TunegateError, match="tunegate registry clock"):
        promote(registry, "support:1", why="x")
    with pytest.raises(InputError, match="say why"):
        trust_clock(registry, why=" ")
    assert trust_clock(registry, why="the battery was empty") == late
    promote(registry, "support:1", why="good", to="production")
    added(registry, adapter_folder(tmp_path / "two", 2))
    supersede(registry, "tiny", new_base(1), why="mended")
    with registry.database.reading() as connection:
        events = history(connection, find(registry, "support:1").adapter)
        (pin,) = connection.execute(sa.select(tables.pins.c.at)).scalars()
    assert [e.what for e in events] == [
        "added as candidate", f"dated {late} by a clock that was ahead", "approved", "production",
    ]  # fmt: skip
    assert events[0].at == late and events[1].why == "the battery was empty"
    assert events[1].at <= events[2].at < late and pin == events[1].at
    assert find(registry, "support:2").flags


def test_a_decision_that_does_not_follow_from_its_rules(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "one", 1, verdict="hold")
    from dataclasses import replace

    change_card(folder, decision=replace(decision("hold"), verdict="ship"))
    with pytest.raises(InputError, match="does not follow"):
        added(registry, folder)
    assert versions(registry) == []
