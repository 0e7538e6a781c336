"""Names and what they mean: loaded once, swapped whole, forgotten when nobody uses them; a registry followed."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import tracemalloc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry_fixtures import Place
from registry_folders import fingerprint
from served import FakeEngine, make_adapter, make_peft, served_base, until
from tunegate.adapter.files import adapter_hash
from tunegate.errors import InputError, TunegateError
from tunegate.files import home
from tunegate.registry.adding import add
from tunegate.registry.bases import supersede
from tunegate.registry.entries import STATES, Entity, aliased, list_versions, resolve
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import Registry
from tunegate.registry.states import promote, retire, set_alias
from tunegate.serve.admission import House
from tunegate.serve.base import ServedBase
from tunegate.serve.catalogue import (
    AdapterNotFound,
    Catalogue,
    DuplicateName,
    ModelRefused,
    Served,
    UnknownModel,
    check_name,
)
from tunegate.serve.following import Follower
from tunegate.serve.jobs import EngineGone, Job

Test = Callable[..., Coroutine[Any, Any, None]]


def run(test: Test) -> Any:
    """An async test, with what pytest gives its arguments."""
    import functools

    @functools.wraps(test)
    def wrapped(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 300))

    return wrapped


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ServedBase:
    return served_base(tiny_llama)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: ServedBase) -> list[Path]:
    """Three adapters; read them, do not write to them."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(root / f"a{n}", base, seed=n) for n in range(3)]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def catalogue(engine: FakeEngine, base: ServedBase) -> Catalogue:
    return Catalogue(engine, House(base))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    shutil.rmtree(home() / "pulled", ignore_errors=True)
    return Place(str(tmp_path / "registry"), None).open()


def entered(registry: Registry, folder: Path, name: str = "support", production: bool = True) -> str:
    """The reference of the version that ``folder`` becomes."""
    ref = add(registry, read_folder(folder, name=name)).version.ref
    if production:
        promote(registry, ref, why="good", to="production")
    return ref


# --- names -------------------------------------------------------------------------------------------------------


@run
async def test_a_name_means_its_adapter_and_the_base_is_there_too(
    catalogue: Catalogue, engine: FakeEngine, base: ServedBase, adapters: list[Path]
) -> None:
    await catalogue.register("support", str(adapters[0]))
    assert engine.loads == []  # nobody has asked yet
    served = await catalogue.resolve("support")
    key = adapter_hash(adapters[0])
    assert served == Served(
        "support", key, base.renderer(), key, "ship", str(adapters[0]), base.name, served.created
    )  # fmt: skip
    assert engine.holds == {key: (adapters[0], False)}
    alone = await catalogue.resolve(base.name)
    assert (alone.key, alone.standing, alone.parent) == (None, "base", None)
    assert alone.fingerprint == base.at_hand.fingerprint.total
    assert [s.name for s in catalogue.names()] == [base.name, "support"]
    with pytest.raises(UnknownModel, match="did you mean 'support'"):
        await catalogue.resolve("suport")


@run
async def test_names_are_unique_and_can_be_given_up(
    catalogue: Catalogue, engine: FakeEngine, base: ServedBase, adapters: list[Path]
) -> None:
    await catalogue.register("one", str(adapters[0]))
    for name in ("one", base.name):
        with pytest.raises(DuplicateName):
            await catalogue.register(name, str(adapters[1]))
    await catalogue.resolve("one")
    await catalogue.unload("one")
    await until(lambda: not engine.holds)
    with pytest.raises(UnknownModel):
        await catalogue.unload("one")
    with pytest.raises(InputError, match="base is not unloaded"):
        await catalogue.unload(base.name)


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/etc", "", "a b", "a/", "a//b", ".a", "é", "a" * 201, "a\n", "a\0"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match="not a name for a model"):
        check_name(name)


@given(st.text(max_size=30) | st.from_regex(r"[\w./@:-]{1,30}", fullmatch=True))
def test_a_name_never_leads_anywhere(name: str) -> None:
    try:
        check_name(name)
    except InputError:
        return
    assert name.isascii() and name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts


# --- where load requests may look ----------------------------------------------------------------------------------


@run
async def test_load_requests_stay_below_the_roots(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, adapters: list[Path]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(adapters[0], root / "inside")
    (root / "leads-out").symlink_to(adapters[1])
    catalogue = Catalogue(engine, House(base), roots=[root])
    assert (await catalogue.load("a", "inside")).key == adapter_hash(adapters[0])
    await catalogue.load("b", str(root / "inside"))
    assert list(engine.holds) == [adapter_hash(adapters[0])]
    for source in (str(adapters[1]), "../" + adapters[1].name, "leads-out", "nothing", "", "\0", "x" * 5000, "~"):
        with pytest.raises((AdapterNotFound, InputError)) as error:
            await catalogue.load("c", source)
        assert "c" not in [s.name for s in catalogue.names()]
        assert adapter_hash(adapters[1]) not in str(error.value)
    with pytest.raises(AdapterNotFound, match="none is in use"):
        await catalogue.load("c", "support@production")
    with pytest.raises(AdapterNotFound):
        await Catalogue(engine, House(base)).load("c", str(adapters[0]))  # no roots at all


@run
async def test_a_refused_adapter_gets_no_name(tmp_path: Path, catalogue: Catalogue, base: ServedBase) -> None:
    with pytest.raises(InputError, match="no card"):
        await catalogue.register("plain", str(make_peft(tmp_path / "plain", base)))
    with pytest.raises(AdapterNotFound, match="did you mean"):
        await catalogue.register("plain", str(tmp_path / "plane"))
    assert len(catalogue.names()) == 1
    ungated = Catalogue(FakeEngine(), House(base, allow_ungated=True))
    assert (await ungated.register("plain", str(tmp_path / "plain"))).standing == "unverified"


# --- many at once --------------------------------------------------------------------------------------------------


@run
async def test_many_who_ask_at_once_load_it_once(
    catalogue: Catalogue, engine: FakeEngine, adapters: list[Path]
) -> None:
    await catalogue.register("support", str(adapters[0]))
    engine.gate = asyncio.Event()
    asking = [asyncio.ensure_future(catalogue.resolve("support")) for _ in range(50)]
    await until(lambda: bool(engine.loads))
    asking[0].cancel()  # the one who began it leaves
    await asyncio.sleep(0)
    engine.gate.set()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError) and len(set(map(id, found[1:]))) == 1
    await catalogue.resolve("support")
    assert engine.loads == [adapter_hash(adapters[0])]


@run
async def test_an_engine_that_fails_tells_all_who_wait_and_is_asked_again(
    catalogue: Catalogue, engine: FakeEngine, adapters: list[Path]
) -> None:
    await catalogue.register("support", str(adapters[0]))
    engine.broken = EngineGone("gone")
    found = await asyncio.gather(*(catalogue.resolve("support") for _ in range(3)), return_exceptions=True)
    assert [type(f) for f in found] == [EngineGone] * 3
    engine.broken = None
    await catalogue.resolve("support")
    assert list(engine.holds) == [adapter_hash(adapters[0])]


@run
async def test_a_replaced_adapter_serves_those_who_hold_it(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, adapters: list[Path]
) -> None:
    catalogue = Catalogue(engine, House(base), roots=[adapters[0].parent])
    first, second = map(adapter_hash, adapters[:2])
    await catalogue.load("support", "a0")
    held = await catalogue.resolve("support")
    await catalogue.load("support", "a1", replace=True)
    assert (await catalogue.resolve("support")).key == second
    assert set(engine.holds) == {first, second}  # somebody may still send a job with the first
    assert held.key == first
    del held
    await until(lambda: set(engine.holds) == {second})


@run
async def test_a_failed_replacement_changes_nothing(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, adapters: list[Path]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(adapters[0], root / "good")
    make_adapter(root / "held", base, seed=5, verdict="hold")
    shutil.copytree(adapters[1], root / "other")
    catalogue = Catalogue(engine, House(base), roots=[root])
    await catalogue.load("support", "good")
    with pytest.raises(InputError, match="gate says hold"):
        await catalogue.load("support", "held", replace=True)
    engine.broken = InputError("its logits do not move")
    with pytest.raises(InputError, match="do not move"):
        await catalogue.load("support", "other", replace=True)
    engine.broken = None
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])
    assert list(engine.holds) == [adapter_hash(adapters[0])]


@run
async def test_weights_that_two_names_share_stay_for_the_other(
    catalogue: Catalogue, engine: FakeEngine, adapters: list[Path]
) -> None:
    key = adapter_hash(adapters[0])
    for name in ("one", "two"):
        await catalogue.register(name, str(adapters[0]))
        await catalogue.resolve(name)
    await catalogue.unload("one")
    await asyncio.sleep(0.02)
    assert list(engine.holds) == [key]
    await catalogue.unload("two")
    await until(lambda: not engine.holds)


@run
async def test_weights_that_are_wanted_again_at_once_stay(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, adapters: list[Path]
) -> None:
    """There and back: the first version's forgetting must not hit its second life."""
    catalogue = Catalogue(engine, House(base), roots=[adapters[0].parent])
    await catalogue.load("support", "a0")
    for source in ("a1", "a0", "a1", "a0"):
        await catalogue.load("support", source, replace=True)
    await until(lambda: set(engine.holds) == {adapter_hash(adapters[0])})
    await asyncio.sleep(0.02)
    served = await catalogue.resolve("support")
    assert served.key in engine.holds


@run
async def test_requests_go_on_while_names_move(engine: FakeEngine, base: ServedBase, adapters: list[Path]) -> None:
    """Every job finds its adapter in the engine, whatever is swapped meanwhile."""
    catalogue = Catalogue(engine, House(base), roots=[adapters[0].parent])
    await catalogue.load("support", "a0")
    stop, seen = False, set()

    async def client() -> None:
        while not stop:
            served = await catalogue.resolve("support")
            await asyncio.sleep(0.001)  # it renders its prompt
            async for _ in engine.generate(Job((1,), 1, adapter=served.key)):
                seen.add(served.key)

    clients = [asyncio.ensure_future(client()) for _ in range(8)]
    for n in range(12):
        await catalogue.load("support", f"a{n % 3}", replace=True)
        await asyncio.sleep(0.005)
    stop = True
    await asyncio.gather(*clients)
    assert seen == {adapter_hash(folder) for folder in adapters}
    await until(lambda: set(engine.holds) == {adapter_hash(adapters[2])})


# --- files that change ---------------------------------------------------------------------------------------------


@run
async def test_files_that_change_under_a_name_are_noticed(
    tmp_path: Path, catalogue: Catalogue, engine: FakeEngine, adapters: list[Path]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    await catalogue.register("support", str(folder))
    await catalogue.resolve("support")
    for file in adapters[0].iterdir():  # the same bytes written again are the same adapter
        (folder / file.name).write_bytes(file.read_bytes())
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such adapter folder"):
        await catalogue.resolve("support")
    shutil.copytree(adapters[1], folder)
    with pytest.raises(ModelRefused, match="changed since they were loaded"):
        await catalogue.resolve("support")
    shutil.rmtree(folder)
    shutil.copytree(adapters[0], folder)
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])
    assert set(engine.holds) == {adapter_hash(adapters[0])}


# --- thousands of names --------------------------------------------------------------------------------------------


@run
async def test_a_thousand_names_cost_little(
    tmp_path: Path, catalogue: Catalogue, engine: FakeEngine, base: ServedBase
) -> None:
    folder, other = make_adapter(tmp_path / "0", base), make_adapter(tmp_path / "1", base, seed=1)
    for n in range(960):
        await catalogue.register(f"adapter-{n}", str(folder))
    gc.collect()
    tracemalloc.start()  # which makes everything slow: the last ones are measured
    before = tracemalloc.get_traced_memory()[0]
    for n in range(960, 1000):
        await catalogue.register(f"adapter-{n}", str(folder))
    gc.collect()
    used = (tracemalloc.get_traced_memory()[0] - before) / 40
    tracemalloc.stop()
    assert used < 4096, f"{used:.0f} bytes a name"
    assert engine.loads == [] and len(catalogue.names()) == 1001
    await catalogue.register("other", str(other))
    catalogue.pin("adapter-3")
    for name in ("adapter-3", "adapter-4", "other"):
        await catalogue.resolve(name)
    # pinned stays pinned when another name of the same weights is asked for
    assert engine.holds == {adapter_hash(folder): (folder, True), adapter_hash(other): (other, False)}


# --- the registry --------------------------------------------------------------------------------------------------


def following(engine: FakeEngine, base: ServedBase, registry: Registry, **how: Any) -> tuple[Catalogue, Follower]:
    catalogue = Catalogue(engine, House(base, registry))
    return catalogue, Follower(catalogue, registry, every=0.01, **how)


@run
async def test_a_promotion_swaps_without_dropping_a_request(
    engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path]
) -> None:
    first, second = map(adapter_hash, adapters[:2])
    entered(registry, adapters[0])
    catalogue, follower = following(engine, base, registry)
    assert (await catalogue.register("support", "support@production")).root == "support:1"
    stop, seen = False, list[str | None]()

    async def client() -> None:
        while not stop:
            served = await catalogue.resolve("support")
            await asyncio.sleep(0.001)
            async for _ in engine.generate(Job((1,), 1, adapter=served.key)):
                seen.append(served.key)

    clients = [asyncio.ensure_future(client()) for _ in range(4)]
    watching = asyncio.ensure_future(follower.run())
    await until(lambda: len(seen) > 10)
    await asyncio.to_thread(entered, registry, adapters[1])
    await until(lambda: second in seen)
    stop = True
    await asyncio.gather(*clients)
    watching.cancel()
    at = seen.index(second)
    assert set(seen[:at]) == {first} and seen[-1] == second
    assert catalogue.names()[1].root == "support:2"
    await until(lambda: set(engine.holds) == {second})


@run
async def test_clients_that_replace_one_adapter_at_once(
    base: ServedBase, engine: FakeEngine, adapters: list[Path]
) -> None:  # fmt: skip
    """Each gets what it asked for; in the end the name means one of them, and the engine holds nothing else."""
    catalogue = Catalogue(engine, House(base), roots=[adapters[0].parent])
    wanted = [adapters[n % 3] for n in range(12)]

    async def replaced(folder: Path) -> str | None:
        await asyncio.sleep(0.001 * (int(folder.name[1])))
        return (await catalogue.load("one", folder.name, replace=True)).key

    found = await asyncio.gather(*map(replaced, wanted), catalogue.load("two", adapters[0].name))
    assert found[:-1] == [adapter_hash(folder) for folder in wanted]
    del found
    one, two = await catalogue.resolve("one"), await catalogue.resolve("two")
    await until(lambda: set(engine.holds) == {one.key, two.key})
    assert [s.name for s in catalogue.names()] == [base.name, "one", "two"]


@run
async def test_a_registry_alone_serves_what_is_in_production_on_this_base(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path]
) -> None:
    from registry_folders import adapter_folder

    entered(registry, adapters[0], "one")
    entered(registry, adapters[1], "two", production=False)
    entered(registry, adapter_folder(tmp_path / "foreign", seed=3, base_name="foreign"), "foreign")
    catalogue, follower = following(engine, base, registry, everything=True)
    await follower.look()
    listed = {s.name: s for s in catalogue.names()}
    assert set(listed) == {base.name, "one"} and listed["one"].key == adapter_hash(adapters[0])
    assert listed["one"].standing == "ship" and listed["one"].root == "one:1"
    assert not (home() / "pulled").exists() and engine.loads == []  # nothing is fetched before it is asked for
    assert (await catalogue.resolve("one")).key in engine.holds
    promote(registry, "two:1", why="good", to="production")
    await follower.look()
    assert (await catalogue.resolve("two")).key == adapter_hash(adapters[1])
    await catalogue.unload("two")
    entered(registry, adapters[2], "three")
    await follower.look()
    assert [s.name for s in catalogue.names()] == [base.name, "one", "three"]  # what was unloaded stays away
    shutil.rmtree(home() / "pulled")  # a cache: it can be deleted at any time
    assert (await catalogue.resolve("one")).key == adapter_hash(adapters[0])


@run
async def test_a_production_version_that_cannot_be_served_does_not_keep_its_name_from_the_next(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    recipe = {"format": "nf4", "block": 64, "double": True, "keep": [], "stored": False}
    entered(registry, make_adapter(tmp_path / "nf4", base, seed=8, recipe=recipe))
    catalogue, follower = following(engine, base, registry, everything=True)
    await follower.look()
    entered(registry, adapters[2], "another", production=False)
    await follower.look()
    assert [s.name for s in catalogue.names()] == [base.name]
    assert caplog.text.count("support:1 is not served") == 1 and "another quantization" in caplog.text
    entered(registry, adapters[0])
    await follower.look()
    assert (await catalogue.resolve("support")).root == "support:2"


@run
async def test_a_version_that_is_not_admitted_leaves_the_last_good_one(
    tmp_path: Path, engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    entered(registry, adapters[0], production=False)
    held = make_adapter(tmp_path / "held", base, seed=7, verdict="hold")
    entered(registry, held, production=False)
    set_alias(registry, "support@canary", "support:1")
    catalogue, follower = following(engine, base, registry)
    await catalogue.register("support", "support@canary")
    set_alias(registry, "support@canary", "support:2")
    for _ in range(2):
        await follower.look()
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(said) == 1 and "support stays on support:1" in said[0] and "the gate says hold" in said[0]
    promote(registry, "support:2", why="needed", override="the customer waits")
    await follower.look()
    served = await catalogue.resolve("support")
    assert (served.key, served.standing) == (adapter_hash(held), "hold (override: the customer waits)")


@run
async def test_what_is_retired_or_flagged_is_refused_from_then_on(
    engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    entered(registry, adapters[0], "one")
    entered(registry, adapters[1], "two")
    catalogue, follower = following(engine, base, registry, everything=True)
    await catalogue.register("folder", str(adapters[1]))
    await catalogue.register("unknown", str(adapters[2]))
    await follower.look()
    await catalogue.resolve("one")
    retire(registry, "one:1", why="it was wrong")
    await follower.look()
    with pytest.raises(ModelRefused, match="retired"):
        await catalogue.resolve("one")
    assert "one is refused from now on: the version is retired" in caplog.text
    assert catalogue.names()[2].standing.startswith("refused: the version is retired")
    await catalogue.resolve("two")
    new = fingerprint(9)
    supersede(registry, base.at_hand.fingerprint.total, Entity(new.total, "base", "newer", {}), why="a leak")
    await follower.look()
    for name in ("two", "folder", "unknown"):
        with pytest.raises(ModelRefused, match="superseded by newer"):
            await catalogue.resolve(name)
    assert (await catalogue.resolve(base.name)).key is None


@run
async def test_a_registry_that_fails_is_survived(
    engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    entered(registry, adapters[0])
    catalogue, follower = following(engine, base, registry)
    await catalogue.register("support", "support@production")
    real, broken = follower._read, True

    def read() -> Any:
        if broken:
            raise TunegateError("the database is away")
        return real()

    monkeypatch.setattr(follower, "_read", read)
    watching = asyncio.ensure_future(follower.run())
    await until(lambda: "the database is away" in caplog.text)
    await asyncio.sleep(0.05)
    assert caplog.text.count("the database is away") == 1  # told once, not every time
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])
    entered(registry, adapters[1])
    broken = False
    await until(lambda: catalogue.names()[1].root == "support:2")
    watching.cancel()


@run
async def test_a_version_that_cannot_be_fetched_is_tried_again(
    engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunegate.serve import catalogue as module

    entered(registry, adapters[0])
    catalogue, follower = following(engine, base, registry)
    await catalogue.register("support", "support@production")
    entered(registry, adapters[1])
    real = module.materialize

    def away(*arguments: Any) -> Path:
        raise TunegateError("the store is away")

    monkeypatch.setattr(module, "materialize", away)
    for _ in range(2):
        with pytest.raises(TunegateError, match="store is away"):
            await follower.look()
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])
    monkeypatch.setattr(module, "materialize", real)
    await follower.look()
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[1])


@run
async def test_a_fixed_version_does_not_move(
    engine: FakeEngine, base: ServedBase, registry: Registry, adapters: list[Path]
) -> None:
    entered(registry, adapters[0])
    catalogue, follower = following(engine, base, registry)
    await catalogue.load("support", "support:1")
    entered(registry, adapters[1])
    await follower.look()
    assert (await catalogue.resolve("support")).key == adapter_hash(adapters[0])


def test_an_alias_means_the_same_as_in_the_registry(registry: Registry, adapters: list[Path]) -> None:
    for folder in adapters:
        entered(registry, folder, production=False)
    promote(registry, "support:2", why="good", to="production")
    set_alias(registry, "support@canary", "support:1")
    retire(registry, "support:3", why="old")
    with registry.database.reading() as connection:
        found = list_versions(connection)
        assert {v.state for v in found} <= set(STATES)
        for alias in ("production", "latest", "canary"):
            assert aliased(found, alias) == resolve(connection, f"support@{alias}")
    assert aliased(found, "nothing") is None and aliased([], "latest") is None
