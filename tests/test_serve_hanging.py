"""Disks, stores and forms that never answer: whoever waits is told in time, others go on, and nothing is half done."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry_fixtures import Place
from served import FakeEngine, make_adapter, served_base, until
from serving import serving
from tiny import tiny_tokenizer
from tunegate.adapter.files import adapter_hash
from tunegate.errors import InputError, TunegateError
from tunegate.registry.adding import add
from tunegate.registry.intake import read_folder
from tunegate.registry.states import promote
from tunegate.serve import catalogue as module
from tunegate.serve.admission import House
from tunegate.serve.base import ServedBase
from tunegate.serve.catalogue import Catalogue
from tunegate.serve.following import Follower
from tunegate.serve.form_checks import LONGEST, FormChecks
from tunegate.serve.jobs import Job
from tunegate.serve.threads import KeptThread, in_thread, in_time

openai = pytest.importorskip("openai")
exchange = pytest.importorskip("tunegate.serve.exchange", exc_type=ImportError)

HELLO: list[Any] = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ServedBase:
    return served_base(tiny_llama)


class Disk:
    """Calls of ``real`` about a folder whose name is in ``dead`` do not come back before :meth:`wake`."""

    def __init__(self, real: Callable[..., Any]):
        self.real, self.dead, self.hung = real, set[str](), 0
        self._awake = threading.Event()

    def __call__(self, folder: Path, *rest: Any, **named: Any) -> Any:
        if folder.name in self.dead and not self._awake.is_set():
            self.hung += 1
            self._awake.wait()
        return self.real(folder, *rest, **named)

    def wake(self) -> None:
        self._awake.set()


@pytest.fixture(params=["stamp_of", "admit"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk(getattr(module, request.param))
    monkeypatch.setattr(module, request.param, found)
    yield found
    found.wake()


def folders(tmp_path: Path, base: ServedBase) -> list[Path]:
    return [make_adapter(tmp_path / name, base, seed=n) for n, name in enumerate(("dead", "well", "other"))]


def test_a_disk_that_is_gone_holds_up_nobody_else(base: ServedBase, tmp_path: Path, disk: Disk) -> None:
    dead, well, other = folders(tmp_path, base)

    async def work() -> None:
        engine = FakeEngine()
        catalogue = Catalogue(engine, House(base), roots=[tmp_path])
        await catalogue.register("dead", str(dead))
        await catalogue.register("well", str(well))
        disk.dead = {"dead"}
        dead.joinpath("adapter_config.json").touch()  # so that it is looked at, and then read again
        waiting = [asyncio.ensure_future(catalogue.resolve("dead")) for _ in range(40)]
        for late in waiting[:20]:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(late, 0.01)
        assert (await catalogue.resolve("well")).key == adapter_hash(well)
        await catalogue.load("new", "other")  # which reads from the same root
        assert disk.hung == 1  # however many wait
        if disk.real.__name__ == "admit":
            for _ in range(3):  # asked again and again, it hangs once
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(catalogue.load("more", "dead"), 0.05)
            assert disk.hung == 2
        assert {s.name for s in catalogue.names()} == {base.name, "dead", "well", "new"}
        assert set(engine.holds) == {adapter_hash(well), adapter_hash(other)}
        disk.wake()
        assert {served.key for served in await asyncio.gather(*waiting[20:])} == {adapter_hash(dead)}
        assert (await catalogue.load("more", "dead")).key == (await catalogue.resolve("dead")).key
        assert len(engine.loads) == 3

    asyncio.run(work())


def test_an_engine_that_does_not_come_back_from_a_load(base: ServedBase, tmp_path: Path) -> None:
    """Nothing gets the name, one that was there stays what it was, and the engine forgets what it finds in the end."""
    dead, well, _ = folders(tmp_path, base)

    async def work() -> None:
        engine = FakeEngine()
        catalogue = Catalogue(engine, House(base), roots=[tmp_path])
        before = await catalogue.load("well", "well")
        engine.gate = asyncio.Event()
        for name, replace in (("new", False), ("well", True)):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(catalogue.load(name, "dead", replace=replace), 1.0)
        assert [s.name for s in catalogue.names()] == [base.name, "well"] and await catalogue.resolve("well") == before
        engine.gate.set()
        await until(lambda: engine.loads.count(adapter_hash(dead)) == 1 and set(engine.holds) == {adapter_hash(well)})
        engine.gate = None
        assert (await catalogue.load("new", "dead")).key in engine.holds

    asyncio.run(work())


def test_the_end_does_not_wait_for_a_thread() -> None:
    never = threading.Event()

    async def work() -> str:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(in_thread(never.wait), 0.01)
        with pytest.raises(ValueError, match="wrong"):
            await in_thread(lambda: int("wrong"))
        return await in_thread(lambda: "right")

    began = time.monotonic()
    assert asyncio.run(work()) == "right" and time.monotonic() - began < 60
    never.set()


def test_a_kept_thread_is_used_again_and_one_that_hangs_keeps_nobody() -> None:
    never = threading.Event()

    async def work() -> None:
        kept = KeptThread()
        first = await kept(threading.current_thread)
        assert await kept(threading.current_thread) is first
        with pytest.raises(ValueError, match="wrong"):
            await kept(lambda: int("wrong"))
        hung = asyncio.ensure_future(kept(lambda: never.wait() and threading.current_thread()))
        await asyncio.sleep(0)
        others = await asyncio.gather(*(kept(threading.current_thread) for _ in range(3)))
        assert first not in others
        never.set()
        assert await hung is first and await kept(threading.current_thread) is first
        left = asyncio.ensure_future(kept(threading.current_thread))
        await asyncio.sleep(0)
        left.cancel()  # whoever leaves
        for _ in range(1000):
            if await kept(threading.current_thread) is first:
                break
        else:
            raise AssertionError("the kept thread is not used any more")
        del kept, left
        gc.collect()  # an error and the frames that it went through know each other
        first.join(20)
        assert not first.is_alive()

    asyncio.run(work())


def test_a_version_that_does_not_come_keeps_no_other_from_being_followed(
    base: ServedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Place(str(tmp_path / "registry"), None).open()
    made = folders(tmp_path, base)

    def enter(folder: Path, name: str) -> None:
        promote(registry, add(registry, read_folder(folder, name=name)).version.ref, why="good", to="production")

    enter(made[0], "a")
    enter(made[1], "b")
    awake = threading.Event()
    real = module.materialize

    def materialize(registry: Any, adapter: str) -> Path:
        if adapter == stuck:
            awake.wait()
        return real(registry, adapter)

    async def work() -> None:
        nonlocal stuck
        catalogue = Catalogue(FakeEngine(), House(base, registry))
        follower = Follower(catalogue, registry, everything=True, patience=0.5)
        await follower.look()
        enter(made[2], "a")
        stuck = next(v.adapter for v in follower._read()[1].by_id.values() if v.ref == "a:2")  # type: ignore[union-attr]
        enter(make_adapter(tmp_path / "newer", base, seed=9), "b")
        for _ in range(2):
            with pytest.raises(TunegateError, match="could not be followed") as told:
                await follower.look()
            assert [p.where for p in told.value.problems] == ["a"]
        assert {s.name: s.root for s in catalogue.names()[1:]} == {"a": "a:1", "b": "b:2"}
        awake.set()
        follower._patience = 60
        await follower.look()
        assert {s.name: s.root for s in catalogue.names()[1:]} == {"a": "a:2", "b": "b:2"}

    stuck = ""
    monkeypatch.setattr(module, "materialize", materialize)
    try:
        asyncio.run(work())
    finally:
        awake.set()


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_whoever_waits_for_an_adapter_gets_504(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    limits = exchange.Limits(answer_seconds=0.4)
    with serving(tiny_tokenizer(), lambda job: "well", front={"limits": limits}) as server:
        real, ended = server.catalogue.resolve, list[str]()

        async def hang(*_: Any, **__: Any) -> Any:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append("ended")

        async def resolve(name: str) -> Any:
            return await (hang() if name == "support" else real(name))

        monkeypatch.setattr(server.catalogue, "resolve", resolve)
        monkeypatch.setattr(server.catalogue, "load", hang)
        client = server.client()
        asks: list[Callable[[], Any]] = [
            lambda: client.chat.completions.create(model="support", messages=HELLO),
            lambda: client.chat.completions.create(model="support", messages=HELLO, stream=True),
            lambda: client.completions.create(model="support", prompt="x"),
            lambda: client.post("/../tokenize", body={"model": "support", "prompt": "x"}, cast_to=object),
            lambda: client.post("/../detokenize", body={"model": "support", "tokens": [1]}, cast_to=object),
            lambda: client.post("/load_lora_adapter", body={"lora_name": "n", "lora_path": "p"}, cast_to=object),
        ]
        for number, ask in enumerate(asks, 1):
            with pytest.raises(openai.InternalServerError) as told:
                ask()
            assert told.value.status_code == 504 and told.value.body["code"] == "answer_timeout"
            assert len(ended) == number
            assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content == "well"
        with pytest.raises(openai.APITimeoutError):  # a client that leaves is noticed before that
            client.with_options(timeout=0.1).chat.completions.create(model="support", messages=HELLO)
        for _ in range(30):
            if len(ended) > len(asks):
                break
            time.sleep(0.01)
        else:
            raise AssertionError("the server waits for nobody")


# --- forms -----------------------------------------------------------------------------------------------------------

ENDLESS = json.dumps({"allOf": [{"type": "string", "pattern": f".*{n}.{{100}}"} for n in range(40)]})


def held_to(kind: str, value: Any) -> Job:
    return Job((1,), 1, form=(kind, value, False))


def test_a_form_that_takes_for_ever_is_given_up() -> None:
    pytest.importorskip("llguidance")

    async def work() -> None:
        check = FormChecks(seconds=1)
        await check(Job((1,), 1))
        endless = [asyncio.ensure_future(check(held_to("json_schema", ENDLESS))) for _ in range(5)]
        await check(held_to("json_schema", '{"type": "integer"}'))  # beside them
        for one in endless:
            with pytest.raises(InputError, match="more than 1 s"):
                await one
        began = time.monotonic()
        with pytest.raises(InputError, match="more than 1 s"):
            await check(held_to("json_schema", ENDLESS))
        assert time.monotonic() - began < 0.9  # known by now
        for wrong, says in (
            (held_to("regex", "((("), "unclosed group"),
            (held_to("json_schema", '{"type": 7}'), "cannot be enforced"),
            (held_to("regex", "a" * (LONGEST + 1)), "too large"),
            (held_to("choices", ("a" * 1000,) * 70), "too large"),
        ):
            with pytest.raises(InputError, match=says):
                await check(wrong)

    asyncio.run(work())


def test_others_are_answered_while_a_form_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(tiny_tokenizer(), lambda job: "well") as server:
        told: list[Any] = []

        def ask() -> None:
            form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(ENDLESS)}}
            try:
                patient = server.client().with_options(timeout=100)  # seconds of the processor may be many by the clock
                patient.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
            except openai.BadRequestError as error:
                told.append(error.body)

        thread = threading.Thread(target=ask)
        thread.start()
        answered = 0
        while thread.is_alive():
            made = server.client().chat.completions.create(model="tiny", messages=HELLO)
            answered += made.choices[0].message.content == "well"
        assert answered > 3 and "to compile" in told[0]["message"] and len(server.engine.jobs) == answered


def test_a_cancellation_is_not_lost_to_work_that_is_just_done() -> None:
    """asyncio.wait_for answers with the work's result there, before Python 3.12."""

    async def cancelled() -> bool:
        inner: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def work() -> int:
            return await inner

        waiting = asyncio.ensure_future(in_time(work(), 5))
        for _ in range(2):  # it waits
            await asyncio.sleep(0)
        inner.set_result(1)
        await asyncio.sleep(0)  # the work is done, and the waiting does not know yet
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return waiting.cancelled()

    assert asyncio.run(cancelled())


def test_what_takes_too_long_is_ended() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def late() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await in_time(work(), 0.01)
        await asyncio.sleep(0)

    asyncio.run(late())
    assert ended == [True]
