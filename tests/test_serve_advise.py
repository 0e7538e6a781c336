"""Which kind of deployment fits: the arithmetic against values by hand, the choice, figures from files and a probe."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.adapter.files import adapter_hash, checked_state
from tunegate.cli import main
from tunegate.errors import InputError, TunegateError
from tunegate.model.loading import empty_model
from tunegate.serve.advise import Measured, Wanted, advise, measured_from, rate_at, separate_rate, under_way
from tunegate.serve.jobs import EngineFacts, Job, Loaded, Tokens
from tunegate.serve.probing import AT_ONCE, NEW_TOKENS, probe, random_adapters

GB = 10**9
# one request alone 100 tokens/s, four 300, sixteen 600; with adapters 80, 240, 480
MEASURED = Measured(((1, 100.0), (4, 300.0), (16, 600.0)), ((1, 80.0), (4, 240.0), (16, 480.0)), 2 * GB, GB // 10)


def wanted(traffic: dict[str, float], **more: Any) -> Wanted:
    usual = Wanted(tuple(traffic.items()), 20.0, None, 1, 16 * GB)
    return replace(usual, **more)


def kinds(advice: Any) -> dict[str, Any]:
    return {option.kind: option for option in advice.options}


def test_rates_between_measured_points() -> None:
    assert [rate_at(MEASURED.base_rates, c) for c in (0.5, 1, 2.5, 4, 10, 16, 99)] == [
        100,
        100,
        200,
        300,
        450,
        600,
        600,
    ]


def test_servers_that_share_the_cores() -> None:
    """16 requests, half each: two batches of 8, 400 tokens/s each while it has the machine, so 400 together. Of 2, each
    has 1: 100. A quarter and three quarters of 16: 4 at 300 and 12 at 500: 1 / (1/4/300 + 3/4/500) = 428.57."""
    rates = MEASURED.base_rates
    assert separate_rate(rates, [0.5, 0.5], 16) == pytest.approx(400)
    assert separate_rate(rates, [0.5, 0.5], 2) == pytest.approx(100)
    assert separate_rate(rates, [0.25, 0.75], 16) == pytest.approx(1 / (0.25 / 300 + 0.75 / 500))
    assert separate_rate(rates, [1.0], 7) == pytest.approx(rate_at(rates, 7))


def test_multi_by_hand() -> None:
    """12 requests/s x 20 tokens = 240 tokens/s: that is made at 4 at a time, so an answer takes 4 / 12 s. Capacity
    480 / 20 = 24 requests/s, half of it asked. Memory 2 GB and two adapters of 0.1."""
    found = advise(wanted({"a": 8.0, "b": 4.0}), MEASURED)
    multi = kinds(found)["multi"]
    assert found.kind == "multi" and multi.fits
    assert multi.capacity == 24.0 and multi.load == 0.5 and multi.seconds == pytest.approx(4 / 12)
    assert multi.bytes == 2 * GB + 2 * GB // 10
    assert multi.shown[0] == "memory: 2.00 GB + 2 x 100.0 MB = 2.20 GB of 16.0 GB"
    assert multi.shown[1] == "capacity: 480 new tokens/s at 16 at a time / 20 = 24.00 requests/s; 12 asked, 50%"
    assert multi.shown[2] == "answer: 240 new tokens/s at 4.0 at a time, / 12 requests/s = 0.33 s"
    assert kinds(found)["separate"].bytes == 4 * GB
    assert kinds(found)["merged"].reasons == ("2 adapters, and a merged model holds one",)


def test_one_adapter_is_merged() -> None:
    """A little traffic: alone, 20 tokens at 100 a second."""
    found = advise(wanted({"a": 0.5}), MEASURED)
    merged = kinds(found)["merged"]
    assert found.kind == "merged" and merged.seconds == pytest.approx(0.2) and merged.capacity == 30.0
    assert "`multi` would cost 20%" in found.why
    assert merged.shown[2] == "answer: alone, 20 tokens / 100 a second = 0.20 s"


def test_different_bases_are_separate() -> None:
    found = advise(wanted({"a": 1.0, "b": 1.0}, bases=2), MEASURED)
    assert found.kind == "separate" and found.why == "2 bases, and adapters share a batch on one"
    small = advise(wanted({"a": 1.0, "b": 1.0}, bases=2, memory=4 * GB), MEASURED)
    assert small.kind is None and "memory: 4.00 GB, and 90% of 4.0 GB may be taken" in kinds(small)["separate"].reasons


def test_what_does_not_fit_says_why() -> None:
    """20 of 24 requests/s is 83 %: two machines. 400 tokens/s are made at 12 at a time: 0.6 s."""
    found = advise(wanted({"a": 10.0, "b": 10.0}, latency=0.5), MEASURED)
    assert found.kind is None
    assert kinds(found)["multi"].reasons == (
        "load: 83% of the capacity, at most 70%; 2 such machines", "latency: 0.60 s, at most 0.5 s",
    )  # fmt: skip
    beyond = kinds(advise(wanted({"a": 30.0, "b": 1.0}), MEASURED))["multi"]
    assert math.isinf(beyond.seconds) and "never reached" in beyond.shown[2]
    json.dumps(advise(wanted({"a": 30.0, "b": 1.0}), MEASURED).to_json(), allow_nan=False)


def test_a_hot_adapter_is_mentioned() -> None:
    assert "a has 95% of the traffic" in advise(wanted({"a": 1.9, "b": 0.1}), MEASURED).why
    assert "traffic" not in advise(wanted({"a": 1.0, "b": 1.0}), MEASURED).why


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    st.floats(10, 500), st.floats(1.0, 4.0), st.floats(1.0, 4.0),
)  # fmt: skip
def test_laws(traffic: list[float], alone: float, gain4: float, gain16: float) -> None:
    """A batch of all is never slower than batches of each; more traffic never makes an answer shorter; what is under
    way makes what is asked."""
    rates = ((1, alone), (4, alone * gain4), (16, alone * gain4 * gain16))
    total = sum(traffic)
    shares = [rate / total for rate in traffic]
    for at_once in (1.0, 3.0, 9.0, 16.0):
        assert separate_rate(rates, shares, at_once) <= rate_at(rates, at_once) * (1 + 1e-9)
    demand = total * 5
    found = under_way(lambda c: rate_at(rates, c), demand, 16.0)
    if math.isinf(found):
        assert rate_at(rates, 16) < demand
    elif found > 1.0:
        assert rate_at(rates, found) == pytest.approx(demand, rel=1e-6)
        more = under_way(lambda c: rate_at(rates, c), demand * 1.2, 16.0)
        assert more >= found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_rate": []}, ["unknown figure"]),
        ({"server_bytes": None}, ["not such a figure"]),
        ({"base_rates": [[1, -3]]}, ["not such a figure"]),
        ({"adapter_rates": [[True, 3]], "server_bytes": 1.5}, ["not such a figure", "not such a figure"]),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, Any], says: list[str]) -> None:
    good = {"base_rates": [[1, 2.0]], "adapter_rates": [[1, 2.0]], "server_bytes": 1, "adapter_bytes": 1}
    assert measured_from(good, "f").base_rates == ((1, 2.0),)
    data = {**good, **change}
    if data["server_bytes"] is None:
        data["server_bytes"] = "many"
    with pytest.raises(InputError) as error:
        measured_from(data, "f")
    assert [p.what for p in error.value.problems] == says


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(InputError) as error:
        advise(Wanted((("a", 1.0), ("a", 2.0)), 20, None, 3, GB), replace(MEASURED, base_rates=((2, 5.0),)))
    assert len(error.value.problems) == 3


def test_the_command_shows_the_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"base_rates": MEASURED.base_rates, "adapter_rates": MEASURED.adapter_rates,
                                "server_bytes": 2 * GB, "adapter_bytes": GB // 10}))  # fmt: skip
    line = ["deploy", "advise", "--adapter", "a=8", "--adapter", "b=4", "--new-tokens", "20", "--memory", "16GB",
            "--measured", str(path)]  # fmt: skip
    assert main(line) == 0
    assert "= 24.00 requests/s; 12 asked, 50%" in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "multi"
    assert main(["serve", *line[1:], "--json"]) == 0 and json.loads(capsys.readouterr().out) == said
    assert main([*line, "--latency", "0.01"]) == 1 and "latency: 0.33 s, at most 0.01 s" in capsys.readouterr().out
    assert main([*line, "--latency", "9", "--adapter", "c=900"]) == 1 and "inf" not in capsys.readouterr().out
    path.write_text("{")
    assert main(line) == 2


# --- the probe ----------------------------------------------------------------------------------------------------


class FakeEngine:
    """An EngineClient that answers at once and writes down what it was asked."""

    def __init__(self, context: int = 4096):
        self.facts = EngineFacts(context, 400, "float32", "fake", 10, 16, 1, 0.0)
        self.alive = False
        self.jobs: list[Job] = []
        self.busy = self.most = 0
        self.loaded: dict[str, Path] = {}

    async def start(self) -> EngineFacts:
        self.alive = True
        return self.facts

    async def stop(self) -> None:
        self.alive = False

    async def generate(self, job: Job) -> AsyncIterator[Tokens]:
        self.jobs.append(job)
        self.busy += 1
        self.most = max(self.most, self.busy)
        for number in range(job.max_new_tokens):
            await asyncio.sleep(0)
            yield Tokens((number,), "length" if number + 1 == job.max_new_tokens else None)
        self.busy -= 1

    async def identify(self, folder: Path) -> str:
        return adapter_hash(folder)

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Loaded:
        self.loaded[key] = folder
        return Loaded(key, 700, 16, 0.0, 1.0)

    async def unload(self, key: str) -> None:
        del self.loaded[key]

    async def stats(self) -> dict[str, Any]:
        return {"rss": 10_000, "adapter_bytes": 4 * 700}


def test_a_probe_asks_what_advise_needs(tiny_llama: Path) -> None:
    engine = FakeEngine()
    found = asyncio.run(probe(engine, tiny_llama, 24, rank=2))
    assert [n for n, _ in found.base_rates] == list(AT_ONCE) == [n for n, _ in found.adapter_rates]
    assert all(rate > 0 for _, rate in (*found.base_rates, *found.adapter_rates))
    assert found.adapter_bytes == 700 and found.server_bytes == 10_000 - 2_800 + 470_000_000
    assert engine.most == max(AT_ONCE) and not engine.alive and len(engine.loaded) == 4
    assert {job.adapter for job in engine.jobs} == {None, *engine.loaded}
    assert all(len(job.tokens) == 24 and job.max_new_tokens == NEW_TOKENS for job in engine.jobs)
    assert len({job.tokens for job in engine.jobs}) == len(engine.jobs)  # no prompt twice: no cache helps
    with pytest.raises(TunegateError, match="do not fit"):
        asyncio.run(probe(FakeEngine(context=40), tiny_llama, 24, rank=2))


def test_random_adapters_are_whole_and_differ(tiny_llama: Path, tmp_path: Path) -> None:
    made = random_adapters(tiny_llama, tmp_path, 2, 4)
    states = [checked_state(empty_model(tiny_llama), folder)[1] for folder in made.values()]
    assert list(made) == ["a0", "a1"] and states[0].keys() == states[1].keys()
    assert all(not states[0][name].equal(states[1][name]) for name in states[0])
