"""The engine in its own process: the same answers as in this one, adapters within their bytes, and a sudden end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from test_engine_scheduler import adapter_folder, adapter_folders, alone, loaded, prompts
from tiny import tiny_base
from tunegate.adapter.files import CONFIG, TENSORS, adapter_hash, load_adapter
from tunegate.engine.constrain import build_constraint
from tunegate.engine.sampling import Picking
from tunegate.errors import InputError, TunegateError
from tunegate.serve.engine_core import EngineCore
from tunegate.serve.engine_process import EngineProcess
from tunegate.serve.jobs import EngineFull, EngineGone, EngineOptions, Job, TokenLogprob, Tokens, to_json
from tunegate.serve.wire import error_json, error_of

GREEDY = Picking(temperature=0.0)
NEW = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return adapter_folders(base, tmp_path_factory.mktemp("adapters"))


def with_engine(base: Path, body: Callable[[EngineProcess], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        engine = EngineProcess(EngineOptions(str(base), threads=1, cache_bytes=1 << 22, **options))
        await engine.start()
        try:
            return await asyncio.wait_for(body(engine), 100)
        finally:
            await engine.stop()

    return asyncio.run(run())


def job(prompt: list[int], adapter: str | None = None, **more: Any) -> Job:
    return Job(tuple(prompt), more.pop("max_new_tokens", NEW), adapter=adapter, picking=GREEDY, **more)


async def whole(engine: EngineProcess, one: Job) -> tuple[int, ...]:
    return tuple([i async for part in engine.generate(one) for i in part.ids])


def test_many_adapters_at_once_answer_as_each_alone(base: Path, adapters: list[Path]) -> None:
    asked = prompts(4)
    wanted = {None: alone(loaded(base)[1], asked, NEW)}
    for folder in adapters:
        model, runner = loaded(base)
        load_adapter(model, folder)
        wanted[adapter_hash(folder)] = alone(runner, asked, NEW)

    async def body(engine: EngineProcess) -> None:
        for folder in adapters:
            found = await engine.load(adapter_hash(folder), folder)
            assert found.moved > 0 and found.bytes > 0
        pairs = [(key, n) for n in range(len(asked)) for key in wanted]
        answers = await asyncio.gather(*(whole(engine, job(asked[n], key)) for key, n in pairs))
        assert answers == [wanted[key][n] for key, n in pairs]
        stats = await engine.stats()
        assert stats["pages_used"] == stats["running"] == stats["waiting"] == 0 and stats["adapters"] == len(adapters)

    with_engine(base, body)


def test_adapters_stay_within_their_bytes_and_come_back_when_asked_for(base: Path, adapters: list[Path]) -> None:
    async def body(engine: EngineProcess) -> None:
        keys = [adapter_hash(folder) for folder in adapters]
        sizes = [(await engine.load(key, folder)).bytes for key, folder in zip(keys, adapters, strict=True)]
        stats = await engine.stats()
        assert stats["adapter_bytes"] <= engine.options.adapter_bytes < sum(sizes)
        prompt = prompts(2)[1]
        first = [await whole(engine, job(prompt, key)) for key in keys]
        again = [await whole(engine, job(prompt, key)) for key in reversed(keys)]
        assert again == first[::-1] and len(set(first)) > 1
        assert (await engine.stats())["adapter_bytes"] <= engine.options.adapter_bytes
        with pytest.raises(EngineFull, match="no room for the adapter"):
            await engine.load(keys[0], adapters[0], pinned=True)
            await engine.load(keys[1], adapters[1], pinned=True)
            await engine.load(keys[2], adapters[2], pinned=True)

    with_engine(base, body, adapter_bytes=36_000)


def test_an_unloaded_adapter_finishes_what_it_began(base: Path, adapters: list[Path]) -> None:
    async def body(engine: EngineProcess) -> None:
        key = adapter_hash(adapters[0])
        await engine.load(key, adapters[0])
        prompt = prompts(2)[1]
        stream = engine.generate(job(prompt, key, max_new_tokens=60))
        ids = list((await anext(stream)).ids)
        await engine.unload(key)
        with pytest.raises(InputError, match="no adapter with this hash"):
            await whole(engine, job(prompt, key))
        ids += [i async for part in stream for i in part.ids]
        assert len(ids) == 60
        assert (await engine.stats())["adapters"] == 0

    with_engine(base, body)


def test_an_adapter_that_changes_nothing_or_does_not_fit_is_refused(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    other = tiny_base(tmp_path / "other", hidden_size=64)
    wrong = adapter_folder(other, tmp_path / "wrong", 0)

    async def body(engine: EngineProcess) -> None:
        with pytest.raises(InputError, match="wrong shape"):
            await engine.load("wrong", wrong)
        with pytest.raises(InputError, match="no such file"):
            await engine.load("gone", tmp_path / "nowhere")
        prompt = prompts(1)[0]
        key = adapter_hash(adapters[0])
        await engine.load(key, adapters[0])  # it goes on
        assert await whole(engine, job(prompt, key))

    with_engine(base, body)


def test_what_was_hashed_is_what_answers(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """An adapter is identified by what the engine read; files that are others by then, or later, are not loaded."""
    folder, bad = tmp_path / "moving", tmp_path / "bad"
    for place in (folder, bad):
        shutil.copytree(adapters[0], place)
    tensors = load_file(bad / TENSORS)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, bad / TENSORS)

    async def body(engine: EngineProcess) -> None:
        key = await engine.identify(folder)
        assert key == adapter_hash(folder) and (await engine.stats())["adapters"] == 0
        with pytest.raises(InputError, match="not finite"):
            await engine.identify(bad)
        with pytest.raises(InputError, match="no such file"):
            await engine.identify(tmp_path / "nowhere")
        prompt = prompts(2)[1]
        await engine.load(await engine.identify(folder), folder)
        answer = await whole(engine, job(prompt, key))
        await engine.unload(key)
        for file in (CONFIG, TENSORS):
            shutil.copy(adapters[1] / file, folder)
        with pytest.raises(InputError, match="not those that were admitted"):
            await engine.load(key, folder)
        await engine.load(key, adapters[0])
        assert await whole(engine, job(prompt, key)) == answer
        await engine.identify(adapters[0])  # kept for a load of this hash only
        other = adapter_hash(adapters[1])
        await engine.load(other, adapters[1])
        assert await whole(engine, job(prompt, other)) != answer

    with_engine(base, body)


def test_loads_beside_streams_change_no_answer(base: Path, adapters: list[Path]) -> None:
    """Adapters come, are replaced and go all the time while others, and the base, answer."""

    async def body(engine: EngineProcess) -> None:
        stays, *moving = [(await engine.identify(folder), folder) for folder in adapters]
        await engine.load(*stays)
        asked = [(prompt, key) for prompt in prompts(4) for key in (None, stays[0])]
        quiet = [await whole(engine, job(prompt, key, max_new_tokens=60)) for prompt, key in asked]
        over = asyncio.Event()

        async def churn() -> int:
            loads = 0
            while not over.is_set():
                for key, folder in moving:
                    assert await engine.identify(folder) == key
                    assert (await engine.load(key, folder)).moved > 0
                    await engine.unload(key)
                    loads += 1
            return loads

        churning = asyncio.create_task(churn())
        for _ in range(3):
            found = await asyncio.gather(*(whole(engine, job(p, key, max_new_tokens=60)) for p, key in asked))
            assert found == quiet
        over.set()
        assert await churning >= len(moving)
        assert (await engine.stats())["adapters"] == 1

    with_engine(base, body)


def test_a_load_waits_for_no_pass(base: Path, adapters: list[Path]) -> None:
    """The engine's loop stands still, and the adapter is there."""
    sent: dict[int, list[Any]] = {}
    woken = threading.Event()
    options = EngineOptions(str(base), threads=1, cache_bytes=1 << 22, most_rows=1, most_waiting=0)
    core = EngineCore(options, lambda number, found: sent.setdefault(number, []).append(found), woken.set)
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    core.adapters.identify(adapters[0], told.put)
    key = told.get(timeout=60)
    assert key == adapter_hash(adapters[0])
    core.submit(0, job(prompts(2)[1], key), adapters[0])  # waits for it from now on
    core.submit(1, job(prompts(2)[1]))  # there is room for one: who waits counts
    assert not core.scheduler.busy and isinstance(sent.pop(1)[0], EngineFull)
    core.adapters.load(key, adapters[0], False, told.put)
    assert told.get(timeout=60).key == key and woken.wait(60)
    assert core.stats()["adapters"] == 1 and core.stats()["steps"] == 0 and core.busy and not sent
    while core.busy:
        core.step()
    assert sent[0][-1].finish == "length"
    core.submit(1, job(prompts(2)[1], key))
    core.cancel(1)
    core.adapters.unload(key)
    assert core.stats()["adapter_bytes"] == 0


def test_a_flipped_bit_and_an_adapter_without_effect_are_refused(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    flipped, idle = tmp_path / "flipped", tmp_path / "idle"
    for place in (flipped, idle):
        shutil.copytree(adapters[0], place)
    data = bytearray((flipped / TENSORS).read_bytes())
    data[-3] ^= 1
    (flipped / TENSORS).write_bytes(data)
    tensors = load_file(idle / TENSORS)
    save_file({n: torch.zeros_like(t) if "lora_A" in n else t for n, t in tensors.items()}, idle / TENSORS)

    async def body(engine: EngineProcess) -> None:
        right = adapter_hash(adapters[0])
        with pytest.raises(InputError, match="not those that were admitted"):
            await engine.load(right, flipped)
        assert await engine.identify(flipped) == adapter_hash(flipped) != right
        key = await engine.identify(idle)
        for _ in range(2):  # measured ahead, and then anew
            with pytest.raises(InputError, match="changes no logit"):
                await engine.load(key, idle)
        assert (await engine.stats())["adapters"] == 0

    with_engine(base, body)


def test_what_is_wrong_with_a_job_is_said_to_its_sender_alone(base: Path) -> None:
    async def body(engine: EngineProcess) -> None:
        prompt = prompts(2)[1]
        good = asyncio.create_task(whole(engine, job(prompt, max_new_tokens=40)))
        for bad, says in (
            (job([400]), "outside of the vocabulary"),
            (job([-1]), "outside of the vocabulary"),
            (job([]), "nothing to continue"),
            (job(prompt, max_new_tokens=-1), "nothing to continue"),
            (job([5] * (engine.facts.context + 1)), "longer than what can be read"),
            (job(prompt, form=("regex", "(?=a)b", False), stop_ids=(2,)), "cannot be enforced"),
        ):
            with pytest.raises(InputError, match=says):
                await whole(engine, bad)
        assert len(await good) == 40

    with_engine(base, body)


WRONG_FORMS = [
    ("json_schema", '{"type": "integer", "maximum": 1' + "0" * 200 + "}"), ("json_schema", "false"),
    ("json_schema", '{"$ref": "#"}'), ("json_schema", '{"type": 7}'), ("json_schema", "no schema"), ("regex", "((("),
    ("choices", ("",)), ("choices", ()), ("nonsense", "x"),
]  # fmt: skip


def test_no_form_ends_the_engine(base: Path) -> None:
    pytest.importorskip("llguidance")

    async def body(engine: EngineProcess) -> None:
        prompt = prompts(2)[1]
        good = asyncio.create_task(whole(engine, job(prompt, max_new_tokens=40)))
        pid = engine.pid
        for kind, value in WRONG_FORMS:
            with pytest.raises(TunegateError, match=r"form|answer"):
                await whole(engine, job(prompt, form=(kind, value, False), stop_ids=(2,)))
        assert len(await good) == 40 and engine.pid == pid
        assert (await engine.stats())["pages_used"] == 0

    with_engine(base, body)


def test_passes_go_on_while_a_form_is_compiled(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is cancelled meanwhile never begins; one that fails as nobody foresaw is its job's fault alone."""
    compiled = threading.Event()

    def build(form: Any, *rest: Any) -> Any:
        assert compiled.wait(60)
        if form.value[0] == "fails":
            raise KeyError("hunter2")
        return build_constraint(form, *rest)

    sent: dict[int, list[Any]] = {}
    woken = threading.Event()
    monkeypatch.setattr("tunegate.serve.engine_forms.build_constraint", build)
    options = EngineOptions(str(base), threads=1, cache_bytes=1 << 22, most_rows=2, most_waiting=2)
    core = EngineCore(options, lambda number, found: sent.setdefault(number, []).append(found), woken.set)
    prompt = prompts(2)[1]
    words = job(prompt, form=("choices", ("red", "blue"), False), stop_ids=(2,))
    core.submit(0, words)
    core.submit(1, words)
    core.submit(2, job(prompt, form=("choices", ("fails",), False), stop_ids=(2,)))
    core.submit(3, job(prompt))
    assert core.stats()["waiting"] == 4 and core.forms.waiting == 3
    core.submit(4, job(prompt))  # they count
    assert isinstance(sent.pop(4)[0], EngineFull)
    core.cancel(1)
    while core.busy:
        core.step()
    assert sent[3][-1].finish == "length" and set(sent) == {3} and not woken.is_set()
    compiled.set()
    for _ in range(3000):
        if core.busy:
            core.step()
        elif {0, 2} <= set(sent) and sent[0][-1].finish:
            break
        woken.wait(0.01)
    ids = [i for part in sent[0] for i in part.ids]
    assert core.tokenizer.decode(ids) in ("red", "blue") and sent[0][-1].finish == "stop" and 1 not in sent
    assert isinstance(sent[2][0], TunegateError) and "hunter2" not in str(sent[2][0])
    assert core.stats()["pages_used"] == core.stats()["waiting"] == 0


def test_a_form_that_is_asked_for_again_while_it_is_compiled(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that went away and came back, before the form that it first asked for was there."""
    compiled, built, woken = threading.Event(), [], threading.Event()

    def build(form: Any, *rest: Any) -> Any:
        built.append(form)
        assert compiled.wait(60)
        return build_constraint(form, *rest)

    sent: dict[int, list[Any]] = {}
    monkeypatch.setattr("tunegate.serve.engine_forms.build_constraint", build)
    options = EngineOptions(str(base), threads=1, cache_bytes=1 << 22)
    core = EngineCore(options, lambda number, found: sent.setdefault(number, []).append(found), woken.set)
    words = job(prompts(2)[1], form=("choices", ("red", "blue"), False), stop_ids=(2,))
    core.submit(0, words)
    core.cancel(0)
    core.submit(1, words)
    compiled.set()
    core.forms._compiler.submit(lambda: None).result(60)  # whatever was to be compiled is
    while core.busy:
        core.step()
    assert len(built) == 1 and set(sent) == {1} and sent[1][-1].finish == "stop"


NUMBERS = st.sampled_from([0.0, 5e-324, 1e-300, 1e-30, 1e-7, 0.5, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    temperature=NUMBERS, top_p=NUMBERS.filter(bool), min_p=NUMBERS, top_k=st.sampled_from([0, 1, 399, 400, 2**31 - 1]),
    repetition=st.sampled_from([5e-324, 1e-300, 1e-3, 1.0, 10.0]), presence=st.sampled_from([-2.0, 0.0, 2.0]),
    seed=st.sampled_from([None, -1, 0, 2**63 - 1, -(2**63)]), bias=st.sampled_from([(), ((5, -100.0),), ((5, 100.0),)]),
    logprobs=st.sampled_from([None, 0, 20]),
)  # fmt: skip
def test_any_numbers_that_a_request_may_have_make_tokens(
    cores: EngineCore, logprobs: int | None, bias: Any, **picking: Any
) -> None:
    one = Job((5, 6, 7), 3, (2,), picking=Picking(**picking, logit_bias=bias), logprobs=logprobs)
    found: list[Any] = []
    cores.send = lambda _number, part: found.append(part)
    cores.submit(0, one)
    while cores.busy:
        cores.step()
    assert found[-1].finish in ("stop", "length") and all(0 <= i < 400 for part in found for i in part.ids)


@pytest.fixture(scope="module")
def cores(base: Path) -> EngineCore:
    return EngineCore(EngineOptions(str(base), threads=1, cache_bytes=1 << 22), lambda _number, _part: None)


FAILING = """
import sys, threading
import tunegate.serve.engine_worker as worker
class Core:
    def __init__(self, *_):
        thread = threading.Thread(target=lambda: {}["hunter2 of a thread"])
        thread.start()
        thread.join()
        raise KeyError("hunter2 of the engine")
worker.EngineCore = Core
sys.exit(worker.main())
"""


@pytest.mark.parametrize("debug", [False, True])
def test_the_engines_log_holds_no_message_of_an_error(base: Path, debug: bool) -> None:
    """Which may quote a prompt or a schema."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = [sys.executable, "-c", FAILING, str(theirs.fileno()), *(["debug"] if debug else [])]
        with subprocess.Popen(line, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as process:
            ours.sendall(json.dumps(to_json(EngineOptions(str(base)))).encode() + b"\n")
            _, log = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "the engine failed: KeyError at" in log and "a thread ended: KeyError at" in log
    assert log.count("Traceback") == (2 if debug else 0)
    assert ("hunter2 of the engine" in log) is ("hunter2 of a thread" in log) is debug


def test_the_context_is_the_bases_own_and_a_group_that_is_told_to_end_is_not_the_engines(base: Path) -> None:
    async def body(engine: EngineProcess) -> None:
        assert engine.facts.context == json.loads((base / "config.json").read_text())["max_position_embeddings"]
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGTERM)  # as systemd does; the front ends its engine when answers are done
        assert await whole(engine, job(prompts(2)[1]))

    with_engine(base, body)


def test_a_full_queue_says_so(base: Path) -> None:
    async def body(engine: EngineProcess) -> None:
        streams = [engine.generate(job(prompts(2)[1], max_new_tokens=400)) for _ in range(3)]
        for stream in streams[:2]:
            await anext(stream)
        third = asyncio.create_task(anext(streams[2]))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineFull, match="waiting"):
            await whole(engine, job([5]))
        for stream in streams[:2]:
            await stream.aclose()
        assert (await third).ids
        await streams[2].aclose()
        for _ in range(100):
            if not (await engine.stats())["running"]:
                break
        assert (await engine.stats())["pages_used"] == 0

    with_engine(base, body, most_rows=2, most_waiting=1)


def test_a_killed_engine_is_started_again(base: Path, adapters: list[Path]) -> None:
    async def body(engine: EngineProcess) -> None:
        prompt = prompts(2)[1]
        pinned, other = (adapter_hash(folder) for folder in adapters[:2])
        await engine.load(pinned, adapters[0], pinned=True)
        await engine.load(other, adapters[1])
        before = [await whole(engine, job(prompt, key)) for key in (None, pinned, other)]
        stream = engine.generate(job(prompt, max_new_tokens=400))
        await anext(stream)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineGone):
            async for _ in stream:
                pass
        for _ in range(600):
            if engine.alive:
                break
            with contextlib.suppress(EngineGone):
                await whole(engine, job(prompt))
            await asyncio.sleep(0.1)
        assert [await whole(engine, job(prompt, key)) for key in (None, pinned, other)] == before

    with_engine(base, body)


def test_what_an_ended_engine_held_is_forgotten_without_it(base: Path, adapters: list[Path]) -> None:
    """Names die when they like: while the engine is started again, and after its end."""

    async def body(engine: EngineProcess) -> EngineProcess:
        key = adapter_hash(adapters[0])
        await engine.load(key, adapters[0], pinned=True)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        while engine.alive:
            await asyncio.sleep(0.001)
        await engine.unload(key)
        while not engine.alive:
            await asyncio.sleep(0.01)
        assert (await engine.stats())["adapters"] == 0
        return engine

    ended = with_engine(base, body)
    asyncio.run(ended.unload("any"))


def test_a_base_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.json|not a"):
        (tmp_path / "config.json").write_text("{}")
        with_engine(tmp_path, lambda _engine: asyncio.sleep(0))


def test_messages_survive_the_wire() -> None:
    one = Job((1, 2), 3, (4,), "b3:x", Picking(logit_bias=((1, 0.5),), seed=7), ("choices", ("a", "b"), False), 2, 1)
    assert Job.from_json(json.loads(json.dumps(to_json(one)))) == one
    part = Tokens((5,), "stop", None, 3, 0.5, 2, (TokenLogprob(1, -0.5, ((1, -0.5), (2, -3.0))),))
    assert Tokens.from_json(json.loads(json.dumps(to_json(part)))) == part
    for error in (InputError("what", where="here", fix="so"), EngineFull("full"), TunegateError("plain")):
        found = error_of(error_json(error))
        assert type(found) is type(error) and found.problems == error.problems


def test_a_seed_gives_the_same_ids_again(base: Path) -> None:
    prompt = prompts(2)[1]

    async def body(engine: EngineProcess) -> list[int]:
        one = Job(tuple(prompt), 40, picking=Picking(temperature=0.8, top_k=5, seed=1), logprobs=5)
        parts = [part async for part in engine.generate(one)]
        for entry in (entry for part in parts for entry in part.logprobs or ()):
            assert entry.token in [t for t, _ in entry.top]  # of the five likeliest
        return [i for part in parts for i in part.ids]

    ids = with_engine(base, body)
    assert ids == with_engine(base, body) and len(ids) == 40
