"""Adapters on merged weights: the adapter's own answers, whatever else runs, proven before the first one."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry_fixtures import Place
from served import FakeEngine, make_adapter, served_base, until
from test_engine_scheduler import (
    GREEDY,
    NEW,
    SPECS,
    adapter_folder,
    adapter_folders,
    alone,
    answers,
    compiled,
    loaded,
    prompts,
    row,
)
from test_serve_engine import job, whole, with_engine
from tiny import tiny_base
from tunegate.adapter.files import adapter_hash, load_adapter, save_adapter
from tunegate.adapter.inject import inject
from tunegate.adapter.segmented import Merged, Served
from tunegate.adapter.spec import AdapterSpec
from tunegate.cli import main
from tunegate.engine.runner import Runner
from tunegate.engine.sampling import Chooser
from tunegate.engine.scheduler import Row, Scheduler
from tunegate.errors import InputError, TunegateError
from tunegate.export.deltas import Mix, Update
from tunegate.export.merge import write_merged
from tunegate.export.parity import Limits
from tunegate.export.plan import plan_merge
from tunegate.kernels.nf4 import QuantizedLinear
from tunegate.kernels.stored import StoredLinear
from tunegate.model.loading import empty_model, load_model
from tunegate.registry.adding import add
from tunegate.registry.intake import read_folder
from tunegate.registry.states import promote
from tunegate.serve.admission import House
from tunegate.serve.catalogue import Catalogue
from tunegate.serve.engine_core import EngineCore
from tunegate.serve.engine_process import EngineProcess
from tunegate.serve.following import Follower
from tunegate.serve.jobs import MERGED, EngineOptions, Job, Loaded, Tokens
from tunegate.serve.lane import Proof, Read, merged_layer, prompts_of, read


def read_merged(served: Served, folder: Path) -> Read:
    return read(served, served.identify(folder), folder, adapter_hash(folder) + MERGED, 400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return adapter_folders(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def keys(folders: list[Path]) -> list[str]:
    return [adapter_hash(folder) for folder in folders]


def served(base: Path) -> tuple[Runner, Served]:
    model, runner = loaded(base)
    return runner, Served(model, empty_model(base))


def as_adapter(base: Path, folder: Path, asked: list[list[int]]) -> list[tuple[int, ...]]:
    """What the adapter answers, unmerged and by itself."""
    model, runner = loaded(base)
    load_adapter(model, folder)
    return alone(runner, asked)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_layers_are_what_a_merge_writes(tmp_path: Path, folders: list[Path], dtype: torch.dtype) -> None:
    model = load_model(tiny_base(tmp_path / "plain"), dtype=dtype)
    stored = tmp_path / "base"
    model.save_pretrained(stored)
    model = load_model(stored, dtype=torch.float32, narrow=True)
    lane = Served(model, empty_model(stored))
    for number, folder in enumerate(folders[:3]):
        merged = read_merged(lane, folder).merged
        assert merged is not None
        plan = plan_merge(stored, [folder], tmp_path / f"out{number}", Mix("linear", (1.0,)))
        written = load_file(write_merged(plan).folder / "model.safetensors")
        for path, layer in lane.layers.items():
            own = merged.layers.get(layer.column, layer.base)
            assert own.weight.dtype == dtype and torch.equal(own.weight, written[f"{path}.weight"])  # type: ignore[operator]
        assert merged.nbytes == sum(layer.weight.nbytes for layer in merged.layers.values())  # type: ignore[operator, misc]


def test_a_4_bit_base_gets_16_bit_copies(base: Path) -> None:
    layer = load_model(base, dtype=torch.float32).model.layers[0].self_attn.q_proj
    quantized = QuantizedLinear.from_linear(layer)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, layer.in_features, generator=g), torch.randn(layer.out_features, 3, generator=g)
    own, changed = merged_layer(quantized, Update(a, b, 0.1), "q_proj")
    assert changed and isinstance(own, StoredLinear) and own.weight.dtype == torch.bfloat16
    assert torch.equal(own.weight, (quantized.dequantize() + 0.1 * (b @ a)).to(torch.bfloat16))


def test_what_rounding_swallows_is_refused(tmp_path: Path) -> None:
    stored = tmp_path / "base"
    load_model(tiny_base(tmp_path / "plain"), dtype=torch.bfloat16).save_pretrained(stored)
    model = load_model(stored, dtype=torch.float32)
    injection = inject(model, AdapterSpec(rank=2, alpha=2.0, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.fill_(1e-9)
    save_adapter(tmp_path / "small", injection, base_name="tiny")
    lane = Served(load_model(stored, dtype=torch.float32, narrow=True), empty_model(stored))
    with pytest.raises(InputError, match="come out of merging as they are in the base"):
        read_merged(lane, tmp_path / "small")


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_merged_rows_answer_as_the_adapter_beside_all_others(tmp_path: Path, family: str) -> None:
    base = tiny_base(tmp_path / "base", family)
    specs = [s for s in SPECS if family != "gpt2" or not any("_proj" in str(v) for v in s.values())]
    folders = [adapter_folder(base, tmp_path / f"a{n}", n, **spec) for n, spec in enumerate(specs)]
    asked = prompts(4)
    runner, lanes = served(base)
    wanted: dict[Any, list[tuple[int, ...]]] = {None: alone(loaded(base)[1], asked)}
    ways: list[tuple[Any, int | None, Merged | None]] = [(None, None, None)]
    for n, folder in enumerate(folders):
        read = read_merged(lanes, folder)
        wanted[n] = as_adapter(base, folder, asked)
        ways += [(n, lanes.table.add(read.factors), None), (n, None, read.merged)]
    scheduler = Scheduler(runner, 400, served=lanes, page_tokens=4, step_tokens=40)
    for _ in range(2):  # computed, and then recorded and cached
        pairs = [(way, n) for n in range(len(asked)) for way in ways]
        rows = [row(asked[n], slot, salt=f"{w}{slot}".encode(), merged=merged) for (w, slot, merged), n in pairs]
        assert answers(scheduler, rows) == [wanted[w][n] for (w, _, _), n in pairs]
    assert scheduler.counters.cached_tokens > 0


@compiled
def test_a_merged_rows_tokens_are_the_same_bytes_alone_and_in_company(base: Path, folders: list[Path]) -> None:
    runner, lanes = served(base)
    read = read_merged(lanes, folders[1])
    slot = lanes.table.add(read.factors)
    asked = prompts(9, seed=5)

    def run(rows: list[Row]) -> list[list[Any]]:
        scheduler = Scheduler(runner, 400, served=lanes, page_tokens=4)
        found: dict[Row, list[Any]] = {r: [] for r in rows}
        for r in rows:
            scheduler.add(r)
        while scheduler.busy:
            for event in scheduler.step():
                found[event.row].append(event.chosen)
        return list(found.values())

    def of(prompt: list[int], slot: int | None, merged: Merged | None) -> Row:
        salt = f"{slot}{merged is None}".encode()
        return Row(list(prompt), NEW, Chooser(GREEDY, prompt, logprobs=2), frozenset(), slot, salt, merged)

    crowd = [of(p, *way) for p in asked for way in ((None, None), (slot, None), (None, read.merged))]
    together = run(crowd)
    for n in (0, 4, 8):
        assert run([of(asked[n], None, read.merged)])[0] == together[3 * n + 2]  # log-probabilities too


def test_passes_of_different_weights_take_turns(base: Path, folders: list[Path]) -> None:
    runner, lanes = served(base)
    merged = read_merged(lanes, folders[0]).merged
    scheduler = Scheduler(runner, 400, served=lanes, page_tokens=4, step_tokens=20)
    prompt = prompts(3)[2]
    crowd = [row(prompt, new=30, merged=merged, salt=b"m") for _ in range(6)]
    for r in crowd:
        scheduler.add(r)
    scheduler.step()
    other = row(prompt, new=8)
    scheduler.add(other)
    taken = []
    while other in scheduler.running or other in scheduler.waiting:
        if len(crowd) < 40:  # more of the busy kind arrive all the time
            crowd.append(row(prompt, new=3, merged=merged, salt=b"m"))
            scheduler.add(crowd[-1])
        events = scheduler.step()
        assert len({event.row.kind for event in events}) <= 1
        taken.append(any(event.row is other for event in events))
    assert sum(taken) == 8 and len(taken) <= 2 * 8 + 1
    while scheduler.busy:
        scheduler.step()
    assert scheduler.pool.used == 0


@compiled
def test_weights_that_nobody_uses_are_gone_with_their_recordings(base: Path, folders: list[Path]) -> None:
    runner, lanes = served(base)
    scheduler = Scheduler(runner, 100, served=lanes, page_tokens=4)
    asked = prompts(2)
    for folder in (*folders[:3], *folders[:2]):  # addresses come again
        merged = read_merged(lanes, folder).merged
        rows = [row(p, salt=str(folder).encode(), merged=merged) for p in asked]
        assert answers(scheduler, rows) == as_adapter(base, folder, asked)
        assert scheduler._recorded is not None and len(scheduler._recorded._merged) == 1
        gone = weakref.ref(merged)
        del merged, rows
        gc.collect()
        assert gone() is None and not len(scheduler._recorded._merged)


# --- proof ------------------------------------------------------------------------------------------------------------


def prove(base: Path, folder: Path, limits: Limits, spoil: Callable[[Merged], None] = lambda _: None) -> None:
    runner, lanes = served(base)
    read = read_merged(lanes, folder)
    assert read.merged is not None
    spoil(read.merged)
    proof = Proof(read, lanes.table.add(read.factors), folder)
    answers(Scheduler(runner, 100, served=lanes, page_tokens=4), proof.rows)
    proof.require(limits)


def test_a_proof_holds_and_sees_a_wrong_weight(base: Path, folders: list[Path]) -> None:
    for folder in folders:
        prove(base, folder, Limits(1e-5, 0.99))

    def undo(merged: Merged) -> None:
        layer = merged.layers[min(merged.layers)]
        layer.weight.data.copy_(layer.weight.flip(0))  # type: ignore[union-attr, operator]

    with pytest.raises(InputError, match="not what it is on its base") as caught:
        prove(base, folders[0], Limits(), undo)
    assert "--merged" in str(caught.value) and "mean KL at most 0.01" in str(caught.value)


def test_what_a_proof_reads(tmp_path: Path, base: Path) -> None:
    folder = make_adapter(tmp_path / "carded", served_base(base))
    own = prompts_of(folder, 1 << 20)
    assert len(own) == 2 and all(1 < len(ids) <= 24 for ids in own)  # the card's golden prompts
    spread = prompts_of(tmp_path, 400)
    assert len({ids for row_ids in spread for ids in row_ids}) > 40 and max(map(max, spread)) < 400


# --- the engine -------------------------------------------------------------------------------------------------------


class Engine:
    """An :class:`EngineCore` here, its answers by number."""

    def __init__(self, base: Path, **options: Any):
        self.told: dict[int, list[Any]] = {}
        self.core = EngineCore(
            EngineOptions(str(base), threads=1, cache_bytes=1 << 22, **options),
            lambda number, found: self.told.setdefault(number, []).append(found),
        )

    def run(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not self.core.adapters.reading and not self.core.busy:  # in this order: what was read makes it busy
                return
            if self.core.busy:
                self.core.step()
            else:
                time.sleep(0.001)  # the reader has the work
        raise AssertionError("it does not end")

    def load(self, key: str, folder: Path) -> Loaded:
        told: list[Any] = []
        self.core.adapters.load(key, folder, False, told.append)
        self.run()
        if isinstance(told[0], TunegateError):
            raise told[0]
        return told[0]

    def ids(self, number: int) -> tuple[int, ...]:
        return tuple(i for part in self.told[number] if isinstance(part, Tokens) for i in part.ids)

    def submit(self, number: int, prompt: list[int], adapter: str | None = None, folder: Path | None = None) -> None:
        self.core.submit(number, Job(tuple(prompt), NEW, adapter=adapter, picking=GREEDY), folder)


def test_one_content_merged_and_unmerged_side_by_side(base: Path, folders: list[Path], keys: list[str]) -> None:
    engine, asked = Engine(base), prompts(3)
    wanted = as_adapter(base, folders[1], asked)
    plain, merged = engine.load(keys[1], folders[1]), engine.load(keys[1] + MERGED, folders[1])
    linear = load_model(base, dtype=torch.float32).model.layers
    assert merged.bytes == sum(p.nbytes for name, p in linear.named_parameters() if "_proj" in name)
    stats = engine.core.stats()
    assert (stats["adapter_bytes"], stats["merged_bytes"]) == (plain.bytes, merged.bytes)
    assert (stats["adapters"], stats["merged"]) == (2, 1)
    for n, prompt in enumerate(asked):
        engine.submit(n, prompt, keys[1])
        engine.submit(10 + n, prompt, keys[1] + MERGED)
    engine.run()
    assert [engine.ids(n) for n in range(3)] == [engine.ids(10 + n) for n in range(3)] == wanted
    assert sum(slot is not None for slot in engine.core.served.table.slots) == 1  # the proof's are gone


def test_merged_weights_stay_when_others_are_pushed_out(base: Path, folders: list[Path], keys: list[str]) -> None:
    engine = Engine(base, adapter_bytes=36_000)
    engine.load(keys[0] + MERGED, folders[0])
    for n, folder in enumerate(folders):
        engine.load(keys[n], folder)
    stats = engine.core.stats()
    assert stats["adapter_bytes"] <= 36_000 and stats["merged"] == 1


def test_replaced_while_answers_run(base: Path, folders: list[Path], keys: list[str]) -> None:
    engine, prompt = Engine(base), prompts(3)[2]
    old, new = keys[0] + MERGED, keys[1] + MERGED
    engine.load(old, folders[0])
    engine.submit(0, prompt, old)
    for _ in range(3):
        engine.core.step()
    engine.load(new, folders[1])  # the old one's answers go on meanwhile
    engine.submit(1, prompt, old)
    engine.submit(2, prompt, new)
    engine.core.step()
    engine.core.adapters.unload(old)
    assert engine.core.stats()["merged_bytes"] > 0
    engine.run()
    assert engine.ids(0) == engine.ids(1) == as_adapter(base, folders[0], [prompt])[0]
    assert engine.ids(2) == as_adapter(base, folders[1], [prompt])[0]
    engine.core.adapters.unload(new)
    stats = engine.core.stats()
    assert (stats["merged_bytes"], stats["adapters"], stats["pages_used"]) == (0, 0, 0)


def test_a_job_that_comes_before_its_adapter_waits_for_the_proof(
    base: Path, folders: list[Path], keys: list[str]
) -> None:
    engine, prompt = Engine(base), prompts(2)[1]
    engine.submit(0, prompt, keys[0] + MERGED, folders[0])  # as after a restart
    engine.run()
    assert engine.ids(0) == as_adapter(base, folders[0], [prompt])[0]
    assert engine.core.stats()["merged"] == 1


def test_one_that_fails_its_proof_leaves_nothing(
    base: Path, folders: list[Path], keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunegate.serve.engine_adapters.Limits", lambda: Limits(-1.0, 1.0))
    engine = Engine(base)
    with pytest.raises(InputError, match="not what it is on its base"):
        engine.load(keys[0] + MERGED, folders[0])
    stats = engine.core.stats()
    assert (stats["adapters"], stats["merged_bytes"], stats["pages_used"], stats["waiting"]) == (0, 0, 0, 0)
    assert all(slot is None for slot in engine.core.served.table.slots)


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_in_the_lane_keeps_to_it_wherever_its_alias_moves(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a real engine: the new version is merged and proven while the old one answers, or nothing changes."""
    at_hand = served_base(base)
    folders = [make_adapter(tmp_path / f"a{n}", at_hand, seed=n) for n in range(3)]
    registry = Place(str(tmp_path / "registry"), None).open()
    asked, hashes = prompts(2)[1], [adapter_hash(folder) for folder in folders]
    wanted = [as_adapter(base, folder, [asked])[0] for folder in folders]

    def enter(folder: Path) -> None:
        promote(registry, add(registry, read_folder(folder, name="a")).version.ref, why="good", to="production")

    async def body(engine: EngineProcess) -> None:
        def ask(key: str | None) -> Any:
            return whole(engine, job(asked, key, max_new_tokens=NEW))

        catalogue = Catalogue(engine, House(at_hand, registry), roots=(tmp_path,), merged=("a",))
        follower = Follower(catalogue, registry, every=60)
        await catalogue.register("a", "a@production")
        await catalogue.register("b", str(folders[0]))
        catalogue.pin("a")
        one, other = await catalogue.resolve("a"), await catalogue.resolve("b")
        assert (one.key, one.fingerprint, other.key) == (hashes[0] + MERGED, hashes[0], hashes[0])
        assert [await whole(engine, job(asked, key, max_new_tokens=NEW)) for key in (one.key, other.key)] == [
            wanted[0]
        ] * 2
        assert engine.pid is not None
        running = engine.generate(job(asked, one.key, max_new_tokens=NEW))
        ids = [*(await anext(running)).ids]
        enter(folders[1])
        await follower.look()
        new = await catalogue.resolve("a")
        assert (new.key, new.root) == (hashes[1] + MERGED, "a:2") and (await engine.stats())["merged"] == 2
        assert await ask(new.key) == wanted[1]
        ids += [i for part in [p async for p in running] for i in part.ids]
        assert tuple(ids) == wanted[0]
        os.kill(engine.pid, signal.SIGKILL)  # the next engine merges and proves it again
        await until(lambda: not engine.alive)
        await until(lambda: engine.alive)
        assert await ask(new.key) == wanted[1]
        replaced = await catalogue.load("a", str(folders[2].name), replace=True)
        assert replaced.key == hashes[2] + MERGED and await ask(replaced.key) == wanted[2]

    enter(folders[0])
    with caplog.at_level("INFO", "tunegate.serve"):
        with_engine(base, body)
    assert "merged weights" in caplog.text


def test_names_that_are_not_served_have_no_lane(
    capsys: pytest.CaptureFixture[str], base: Path, folders: list[Path]
) -> None:
    named = [str(base), "--adapter", f"support={folders[0]}", "--allow-ungated", "--port", "0"]
    assert main(["serve", *named, "--merged", "suport"]) == 2
    told = capsys.readouterr()
    assert "no such model" in told.err and "support" in told.err
    assert main(["serve", *named, "--merged", "support", "--engine", "vllm"]) == 2
    assert "no adapter on weights of its own" in capsys.readouterr().err


@compiled
def test_enrolled_names_have_their_lane_too(tmp_path: Path, base: Path) -> None:
    at_hand = served_base(base)
    registry = Place(str(tmp_path / "registry"), None).open()
    folder = make_adapter(tmp_path / "adapter", at_hand)
    promote(registry, add(registry, read_folder(folder, name="a")).version.ref, why="good", to="production")

    async def body() -> None:
        engine = FakeEngine()
        catalogue = Catalogue(engine, House(at_hand, registry), merged=("a",))  # type: ignore[arg-type]
        await Follower(catalogue, registry, everything=True).look()
        served = await catalogue.resolve("a")
        assert (served.key, served.fingerprint) == (adapter_hash(folder) + MERGED, adapter_hash(folder))
        assert list(engine.holds) == [served.key]

    asyncio.run(body())
