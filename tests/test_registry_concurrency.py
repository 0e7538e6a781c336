"""Sixteen processes at once, and processes killed in the middle, on both databases: nothing lost, nothing half."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from registry_fixtures import Place
from registry_folders import FORK, adapter_folder, in_process, kill, kill_at, killed
from tunegate.registry import adding, database, tables
from tunegate.registry import store as stores
from tunegate.registry.entries import PRODUCTION, history, list_versions, resolve
from tunegate.registry.intake import Intake, read_folder
from tunegate.registry.opening import Registry
from tunegate.registry.states import promote, set_alias
from tunegate.registry.upkeep import collect, verify

PROCESSES = 16
PATIENCE = 300  # seconds, of a machine that has other things to do


def look(registry: Registry) -> None:
    """What every reader must see at every moment."""
    with registry.database.reading() as connection:
        found = list_versions(connection)
        rows = connection.execute(
            sa.select(tables.files.c.adapter, sa.func.count()).group_by(tables.files.c.adapter)
        ).all()
    assert len([v for v in found if v.state == PRODUCTION]) <= 1
    assert [v.number for v in found] == list(range(1, len(found) + 1))  # numbers without a gap
    assert dict(rows) == {v.adapter: 5 for v in found}  # every version with all of its five files


def test_sixteen_processes(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds an adapter of its own and one that all add, promotes its own to production, and reads all the while.
    They also start together where there is no registry yet."""
    import alembic.command  # noqa: F401  once, and not in every process

    monkeypatch.setattr(database, "WAIT_SECONDS", PATIENCE)
    shared = read_folder(adapter_folder(tmp_path / "shared", 99))
    own = [read_folder(adapter_folder(tmp_path / f"a{n}", n)) for n in range(PROCESSES)]
    start = FORK.Barrier(PROCESSES)

    def work(n: int) -> None:
        start.wait(PATIENCE)
        registry = place.open(who=f"worker-{n}")
        version = adding.add(registry, own[n]).version
        adding.add(registry, shared)
        look(registry)
        promote(registry, version.ref, why=f"by {n}")
        look(registry)
        promote(registry, version.adapter, why=f"by {n}")
        for _ in range(5):  # from now on there is always one
            with registry.database.reading() as connection:
                assert resolve(connection, "support@production").state == PRODUCTION
        set_alias(registry, "support@newest", version.ref)
        look(registry)

    files = [tmp_path / f"error-{n}" for n in range(PROCESSES)]
    processes = [in_process(lambda n=n: work(n), files[n]) for n in range(PROCESSES)]
    for process in processes:
        process.join(PATIENCE)
    assert [f.read_text() for f in files if f.exists()] == []
    assert [p.exitcode for p in processes] == [0] * PROCESSES

    registry = place.open()
    look(registry)
    with registry.database.reading() as connection:
        found = {v.adapter: v for v in list_versions(connection)}
        assert found.keys() == {shared.id, *(i.id for i in own)}
        for n, intake in enumerate(own):
            whats = [(e.what, e.who) for e in history(connection, intake.id)]
            mine = [what for what, who in whats if who == f"worker-{n}"]
            assert mine[:3] == ["added as candidate", "approved", "production"]
            assert found[intake.id].state == (PRODUCTION if "production" in found[intake.id].aliases else "approved")
        assert [e.what for e in history(connection, shared.id)] == ["added as candidate"]
        (newest,) = connection.execute(sa.select(tables.aliases)).all()
        assert newest.adapter in found
        assert connection.execute(sa.select(tables.pins)).all() == []
    assert verify(registry).problems == []
    assert collect(registry).objects == 0


def test_a_forked_process_makes_its_own_connection(place: Place, tmp_path: Path) -> None:
    """And the parent's is the same one before and after; one that the server ended is made anew."""
    registry = place.open()
    if place.store is None:
        pytest.skip("SQLite is opened for each transaction")

    def session() -> int:
        with registry.database.reading() as connection:
            return int(connection.execute(sa.select(sa.func.pg_backend_pid())).scalar_one())

    def work() -> None:
        for _ in range(3):
            (tmp_path / f"child-{session()}").touch()

    mine = session()
    processes = [in_process(work, tmp_path / f"error-{n}") for n in range(4)]
    for process in processes:  # all of them talk at once with the parent
        assert session() == mine
        process.join(PATIENCE)
    assert [p.read_text() for p in tmp_path.glob("error-*")] == [] and session() == mine
    theirs = {p.name for p in tmp_path.glob("child-*")}
    assert len(theirs) == 4 and f"child-{mine}" not in theirs
    with place.open().database.writing() as connection:
        connection.execute(sa.select(sa.func.pg_terminate_backend(mine, 10_000)))
    assert session() != mine


# --- kill -9 -----------------------------------------------------------------------------------------------------


def kill_at_commit(registry: Registry, number: int) -> None:
    """From here on this process is killed when the ``number``-th commit is about to be sent."""
    count = [0]

    def counted(connection: Any) -> None:
        write = connection.get_execution_options().get("write")
        count[0] += bool(write)
        if write and count[0] == number:
            kill()

    sa.event.listen(registry.database.engine, "commit", counted)


def test_killed_at_any_point_of_adding(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PART", 400)
    first = read_folder(adapter_folder(tmp_path / "first", 1))
    registry = place.open()
    adding.add(registry, first)
    intake = read_folder(adapter_folder(tmp_path / "second", 2))
    whole = sum(path.stat().st_size for path, _ in intake.files.values())

    def work(at: Callable[[Registry], None]) -> None:
        mine = place.open()
        at(mine)
        adding.add(mine, intake)

    puts = [lambda mine, n=n: kill_at(stores.Store, "put", n) for n in (1, 2, 4, 8)]
    for point in (lambda mine: kill_at_commit(mine, 1), *puts, lambda mine: kill_at_commit(mine, 2)):
        assert killed(lambda point=point: work(point), tmp_path / "error")
        with registry.database.reading() as connection:
            assert [v.adapter for v in list_versions(connection)] == [first.id]
        assert verify(registry).problems == []
        assert collect(registry).objects == 0  # what the killed one pinned is not taken from it
    added = adding.add(registry, intake)
    assert added.new and added.version.number == 2
    assert added.uploaded < whole / 2  # it went on where the killed ones were
    assert verify(registry).problems == []
    with registry.database.writing() as connection:
        connection.execute(tables.pins.update().values(at="2020-01-01T00:00:00.000000+00:00"))
    collect(registry)
    assert verify(registry).problems == []


def test_killed_while_promoting(place: Place, tmp_path: Path) -> None:
    registry = place.open()
    for seed in (1, 2):
        adding.add(registry, read_folder(adapter_folder(tmp_path / f"{seed}", seed)))
    promote(registry, "support:1", why="x", to="production")

    def work() -> None:
        mine = place.open()
        kill_at_commit(mine, 1)
        promote(mine, "support:2", why="x", to="production")

    assert killed(work, tmp_path / "error")
    with registry.database.reading() as connection:
        assert resolve(connection, "support@production").number == 1
        assert [v.state for v in list_versions(connection)] == ["production", "candidate"]
    assert (
        promote(registry, "support:2", why="x", to="production").state == PRODUCTION
    )  # the lock went with the process


def test_collecting_while_others_add(place: Place, tmp_path: Path) -> None:
    """`gc` runs all the while that adapters are added and never takes a part from under one."""
    intakes = [read_folder(adapter_folder(tmp_path / f"a{n}", n)) for n in range(8)]
    registry = place.open()
    done = FORK.Event()

    def add_all(part: list[Intake]) -> None:
        mine = place.open()
        for intake in part:
            adding.add(mine, intake)

    def collect_on() -> None:
        mine = place.open()
        while not done.is_set():
            collect(mine)
            time.sleep(0.01)

    collector = in_process(collect_on, tmp_path / "error-gc")
    adders = [in_process(lambda n=n: add_all(intakes[n::2]), tmp_path / f"error-{n}") for n in range(2)]
    for process in adders:
        process.join(120)
    done.set()
    collector.join(60)
    assert [p.read_text() for p in tmp_path.glob("error-*")] == []
    assert verify(registry).problems == [] and verify(registry).adapters == 8
    assert json.dumps([p.exitcode for p in [*adders, collector]]) == "[0, 0, 0]"
