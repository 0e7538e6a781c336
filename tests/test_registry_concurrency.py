"""Sixteen processes at once, and processes killed in the middle, on both databases: nothing lost, nothing half."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from registry_fixtures import Place
from registry_folders import adapter_folder
from tunegate.registry import adding, tables
from tunegate.registry import store as stores
from tunegate.registry.entries import PRODUCTION, history, list_versions, resolve
from tunegate.registry.intake import Intake, read_folder
from tunegate.registry.opening import Registry
from tunegate.registry.states import promote, set_alias
from tunegate.registry.upkeep import collect, verify

PROCESSES = 16
FORK = multiprocessing.get_context("fork")  # everything is imported already; every process opens its own connections


def in_process(work: Callable[[], None], errors: Path) -> Any:
    """``work`` in a forked process; what it raises is written to ``errors``."""

    def guarded() -> None:
        try:
            work()
        except BaseException:
            errors.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=guarded)
    process.start()
    return process


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


def test_sixteen_processes(place: Place, tmp_path: Path) -> None:
    """Each adds an adapter of its own and one that all add, promotes its own to production, and reads all the while.
    They also start together where there is no registry yet."""
    shared = read_folder(adapter_folder(tmp_path / "shared", 99))
    own = [read_folder(adapter_folder(tmp_path / f"a{n}", n)) for n in range(PROCESSES)]
    start = FORK.Barrier(PROCESSES)

    def work(n: int) -> None:
        start.wait(60)
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
        process.join(120)
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


# --- kill -9 -----------------------------------------------------------------------------------------------------


def killed_in(place: Place, intake: Intake, at: Callable[[Registry], None], errors: Path) -> int:
    """Add ``intake`` in a process that ``at`` prepares to be killed; returns its exit code."""

    def work() -> None:
        registry = place.open()
        at(registry)
        adding.add(registry, intake)

    process = in_process(work, errors)
    process.join(60)
    assert not errors.exists(), errors.read_text()
    return int(process.exitcode or 0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_puts(n: int) -> Callable[[Registry], None]:
    """Killed when ``n`` parts are stored."""

    def prepare(registry: Registry) -> None:
        put, count = stores.Store.put, [0]

        def counted(self: stores.Store, digest: str, data: bytes) -> bool:
            if count[0] == n:
                kill()
            count[0] += 1
            return put(self, digest, data)

        stores.Store.put = counted  # type: ignore[method-assign]  # in the forked process alone

    return prepare


def before_commit(n: int) -> Callable[[Registry], None]:
    """Killed when the ``n``-th commit is about to be sent."""

    def prepare(registry: Registry) -> None:
        count = [0]

        def counted(connection: Any) -> None:
            write = connection.get_execution_options().get("write")
            count[0] += bool(write)
            if write and count[0] == n:
                kill()

        sa.event.listen(registry.database.engine, "commit", counted)

    return prepare


def test_killed_at_any_point_of_adding(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PART", 400)
    first = read_folder(adapter_folder(tmp_path / "first", 1))
    registry = place.open()
    adding.add(registry, first)
    intake = read_folder(adapter_folder(tmp_path / "second", 2))
    whole = sum(path.stat().st_size for path, _ in intake.files.values())
    points = [before_commit(1), *(after_puts(n) for n in (0, 1, 3, 7)), before_commit(2)]
    for number, point in enumerate(points):
        assert killed_in(place, intake, point, tmp_path / "error") == -signal.SIGKILL, number
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
        before_commit(1)(mine)
        promote(mine, "support:2", why="x", to="production")

    process = in_process(work, tmp_path / "error")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
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
