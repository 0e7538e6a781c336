"""Disks that do not answer while the engine reads from them, and folders that are others by then."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from served import make_adapter, served_base
from test_engine_scheduler import adapter_folders, alone, loaded, prompts
from test_serve_engine import NEW, job, whole, with_engine
from tiny import tiny_base
from tunegate.adapter import segmented
from tunegate.adapter.files import adapter_hash, load_adapter
from tunegate.errors import InputError, TunegateError
from tunegate.serve import engine_adapters
from tunegate.serve.admission import House, admit
from tunegate.serve.base import ServedBase
from tunegate.serve.catalogue import Catalogue, ModelRefused
from tunegate.serve.engine_core import EngineCore
from tunegate.serve.engine_process import EngineProcess
from tunegate.serve.jobs import MERGED, EngineOptions

PROMPT = prompts(2)[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return adapter_folders(base, tmp_path_factory.mktemp("adapters"))


# --- disks ------------------------------------------------------------------------------------------------------------


class Disk:
    """Reads of tensors in a folder of ``dead`` fill their memory, and come back after :meth:`wake`."""

    def __init__(self) -> None:
        self.dead, self.hung = set[Path](), queue.SimpleQueue[Path]()
        self._awake, self._real = threading.Event(), segmented.read_canonical

    def __call__(self, handle: Any, *rest: Any) -> Any:
        found, folder = self._real(handle, *rest), Path(handle.name).parent
        if folder in self.dead:
            self.hung.put(folder)
            self._awake.wait(100)
            found = self._real(handle, *rest)  # what a late read writes, it writes now
        return found

    def wake(self) -> None:
        self._awake.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk()
    monkeypatch.setattr(segmented, "read_canonical", found)
    monkeypatch.setattr(engine_adapters, "PATIENCE", 0.05)
    yield found
    found.wake()


class Engine:
    """An engine in this process."""

    def __init__(self, base: Path):
        self.told: dict[str, queue.SimpleQueue[Any]] = {}
        self._sent: list[Any] = []
        options = EngineOptions(str(base), threads=1, cache_bytes=1 << 22)
        self.core = EngineCore(options, lambda number, found: self._sent.append(found))

    def load(self, name: str, key: str, folder: Path) -> None:
        self.told[name] = queue.SimpleQueue()
        self.core.adapters.load(key, folder, False, self.told[name].put)

    def identify(self, name: str, folder: Path) -> None:
        self.told[name] = queue.SimpleQueue()
        self.core.adapters.identify(folder, self.told[name].put)

    def says(self, name: str) -> Any:
        return self.told[name].get(timeout=60)

    def answer(self, key: str) -> tuple[int, ...]:
        self._sent.clear()
        self.core.submit(0, job(PROMPT, key))
        while self.core.busy:
            self.core.step()
        return tuple(i for part in self._sent for i in part.ids)


def own(base: Path, folder: Path) -> tuple[int, ...]:
    """What an adapter answers by itself."""
    model, runner = loaded(base)
    load_adapter(model, folder)
    return alone(runner, [PROMPT], NEW)[0]


def test_a_disk_that_is_gone_holds_up_no_other_load_and_may_come_back(
    base: Path, adapters: list[Path], disk: Disk
) -> None:
    engine, (first, dead, gone, well, *_) = Engine(base), adapters
    keys = {folder: adapter_hash(folder) for folder in adapters}
    engine.load("first", keys[first], first)  # so that there is memory to be used again
    assert engine.says("first").key == keys[first]
    disk.dead = {dead, gone}
    engine.load("dead", keys[dead], dead)
    engine.load("gone", keys[gone], gone)
    engine.identify("hash of dead", dead)
    engine.identify("hash of well", well)
    assert engine.says("hash of well") == keys[well]
    engine.load("well", keys[well], well)
    assert engine.says("well").key == keys[well]
    assert [disk.hung.get(timeout=60) for _ in range(3)] == [dead, gone, dead]
    assert engine.answer(keys[well]) == own(base, well) and engine.answer(keys[first]) == own(base, first)
    engine.core.adapters.unload(keys[gone])
    assert isinstance(engine.says("gone"), TunegateError)
    assert all(engine.told[name].empty() for name in ("dead", "hash of dead"))
    disk.wake()
    assert engine.says("dead").key == engine.says("hash of dead") == keys[dead]
    engine.load("again", keys[well], well)
    assert engine.says("again").key == keys[well]
    for folder in (first, dead, well):
        assert engine.answer(keys[folder]) == own(base, folder)
    assert engine.core.adapters.stats()["adapters"] == 3 and engine.told["gone"].empty()


def test_so_many_reads_are_left_behind_and_no_more(
    base: Path, adapters: list[Path], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_adapters, "MOST_LATE", 1)
    engine, (one, two, well, *_) = Engine(base), adapters
    disk.dead = {one, two}
    for name, folder in (("one", one), ("two", two), ("well", well)):
        engine.load(name, adapter_hash(folder), folder)
    assert [disk.hung.get(timeout=60) for _ in range(2)] == [one, two]
    with pytest.raises(queue.Empty):
        engine.told["well"].get(timeout=0.5)
    disk.wake()
    assert [engine.says(name).key for name in ("one", "two", "well")] == [adapter_hash(f) for f in (one, two, well)]
    assert engine.answer(adapter_hash(two)) == own(base, two)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front(base: Path) -> ServedBase:
    return served_base(base)


@pytest.fixture
def pair(front: ServedBase, tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters, both of which are admitted."""
    return make_adapter(tmp_path / "one", front, seed=1), make_adapter(tmp_path / "two", front, seed=2)


def swap(one: Path, two: Path) -> None:
    """By renaming, as whoever deploys a new version does."""
    for was, becomes in ((one, "x"), (two, one.name), (one.parent / "x", two.name)):
        was.rename(one.parent / becomes)


def test_a_folder_that_is_another_when_the_engine_opens_it_is_refused(
    base: Path, front: ServedBase, pair: tuple[Path, Path]
) -> None:
    one, two = pair
    key, other = adapter_hash(one), adapter_hash(two)

    async def refused(engine: EngineProcess, merged: bool) -> None:
        catalogue = Catalogue(engine, House(front), merged=("support",) if merged else ())
        await catalogue.register("support", str(one))
        real, swaps = type(engine).load.__get__(engine), [one]

        async def load(*given: Any, **named: Any) -> Any:
            if swaps:  # after the look at the files, and before they are opened
                swap(swaps.pop(), two)
            return await real(*given, **named)

        engine.load = load  # type: ignore[method-assign]
        with pytest.raises(InputError, match="not those that were admitted") as told:
            await catalogue.resolve("support")
        (problem,) = told.value.problems
        assert (problem.where, problem.expected, problem.got) == (str(one), key, other)
        assert (await engine.stats())["adapters"] == 0
        with pytest.raises(ModelRefused, match="changed since they were loaded"):  # from the next look on
            await catalogue.resolve("support")
        swap(one, two)
        served = await catalogue.resolve("support")
        assert served.key == key + (MERGED if merged else "") and served.fingerprint == key
        assert await whole(engine, job(PROMPT, served.key)) == own(base, one) != own(base, two)
        await engine.unload(served.key)

    async def body(engine: EngineProcess) -> None:
        for merged in (False, True):
            await refused(engine, merged)

    with_engine(base, body)


def test_a_folder_that_is_another_after_it_was_hashed_changes_nothing(
    base: Path, front: ServedBase, pair: tuple[Path, Path]
) -> None:
    """The engine keeps what it hashed for the load that follows."""
    one, two = pair
    wanted = own(base, one)

    async def body(engine: EngineProcess) -> None:
        catalogue = Catalogue(engine, House(front), roots=[one.parent])
        real = engine.load

        async def load(*given: Any, **named: Any) -> Any:
            swap(one, two)
            return await real(*given, **named)

        engine.load = load  # type: ignore[method-assign]
        served = await catalogue.load("support", one.name)
        assert served.key == adapter_hash(two)  # which is where the first one is by now
        assert await whole(engine, job(PROMPT, served.key)) == wanted
        with pytest.raises(ModelRefused, match="changed since they were loaded"):
            await catalogue.resolve("support")

    with_engine(base, body)


@pytest.mark.parametrize("carded", [True, False])
def test_a_folder_that_changes_while_it_is_checked_is_not_admitted(
    front: ServedBase, pair: tuple[Path, Path], carded: bool
) -> None:
    one, two = pair
    if not carded:
        for folder in pair:
            shutil.copytree(folder, folder.parent / f"plain {folder.name}")
        one, two = (folder.parent / f"plain {folder.name}" for folder in pair)
        for folder in (one, two):
            (folder / "card.json").unlink()
    house = House(front, allow_ungated=True)
    assert admit(one, house).key == adapter_hash(one)

    def before(folder: Path) -> Callable[[], str]:
        swap(one, two)
        return lambda: adapter_hash(folder)

    def after(folder: Path) -> Callable[[], str]:
        def hashed() -> str:
            swap(one, two)
            return adapter_hash(folder)

        return hashed

    for identify in (before, after):
        with pytest.raises(InputError, match="changed while they were checked"):
            admit(one, house, identify=identify)
