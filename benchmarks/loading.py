"""Loading an adapter from local disk, alone and beside streams: how long it takes, and what the streams notice.

    python benchmarks/loading.py                # a server in its own processes, asked over HTTP
    python benchmarks/loading.py --timeline     # the front in this process: where the time of a load goes

Adapters are random, rank 16 on every linear layer. Each load is of other files, which lie in the page cache. Beside it
1 or 8 streams of the base run, on prompts of their own; their longest pause is set beside that of as many streams with
nothing to disturb them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import common
import load
import rows
import servers

STREAMS = (0, 1, 8)
STREAMED = 160  # tokens of each stream: they outlast the loads
LOADS = 8  # beside each number of streams


class Streams:
    """So many streams of the base at once, on prompts that were not sent before."""

    def __init__(self, port: int, chats: Sequence[list[dict[str, str]]]):
        self.port, self.chats, self.next = port, chats, 0

    def _body(self) -> dict[str, Any]:
        messages = self.chats[self.next % len(self.chats)]
        self.next += 1
        return {
            "model": "base", "messages": messages, "max_tokens": STREAMED, "temperature": 0.0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    async def beside(self, count: int, work: Callable[[], Awaitable[None]]) -> float:
        """Milliseconds of the longest pause of ``count`` streams during ``work``, which begins once all have begun."""
        streams = [asyncio.create_task(load.ask(self.port, self._body())) for _ in range(count)]
        await asyncio.sleep(1.5 if count else 0.0)  # their prompts are through
        begin = time.perf_counter()
        await work()
        end = time.perf_counter()
        answers = await asyncio.gather(*streams)
        assert all(answer.began + answer.seconds > end for answer in answers), "the streams were too short"
        return 1000 * max([answer.gap_within(begin, end) or 0.0 for answer in answers], default=0.0)


async def measure(port: int, folders: dict[str, Path], chats: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
    """Milliseconds: of a load, of the longest pause beside loads, and of the longest pause without."""
    streams, waiting, found = Streams(port, chats), iter(folders.items()), {}
    for count in STREAMS:
        await streams.beside(count, _nothing)  # what is seen often is recorded by then
    for count in STREAMS:
        times: list[float] = []

        async def loads(times: list[float] = times) -> None:
            for _ in range(LOADS):
                name, folder = next(waiting)
                body = {"lora_name": name, "lora_path": str(folder)}
                answer = await load.ask(port, body, "/v1/load_lora_adapter")
                if answer.status != 200:
                    raise SystemExit(f"load: {answer.status} {answer.text}")
                times.append(1000 * answer.seconds)
                await asyncio.sleep(0.1)

        calm = await streams.beside(count, _nothing)
        paused = await streams.beside(count, loads)
        found[str(count)] = {"load_ms": common.summary(times), "pause_ms": paused, "calm_ms": calm}
    return found


async def _nothing() -> None:
    await asyncio.sleep(1.0)


# --- the timeline ---------------------------------------------------------------------------------------------------


class Stamped:
    """An engine whose hand-overs are stamped: what it was asked when, and when it answered."""

    def __init__(self, engine: Any):
        self.engine, self.stamps = engine, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def _stamped(self, name: str, work: Awaitable[Any]) -> Any:
        self.stamps[f"{name} asked"] = time.perf_counter()
        found = await work
        self.stamps[f"{name} answered"] = time.perf_counter()
        return found

    async def identify(self, folder: Path) -> str:
        return str(await self._stamped("identify", self.engine.identify(folder)))

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Any:
        found = await self._stamped("load", self.engine.load(key, folder, pinned=pinned))
        self.stamps["stages"] = found.stages
        return found


@contextlib.asynccontextmanager
async def front(base: Path, roots: Path) -> AsyncIterator[tuple[int, Stamped]]:
    """The server with its front in this process, and its stamped engine."""
    from tunegate.model.resolve import resolve_base
    from tunegate.serve import start
    from tunegate.serve.admission import House
    from tunegate.serve.app import create_app
    from tunegate.serve.base import open_base
    from tunegate.serve.catalogue import Catalogue
    from tunegate.serve.connections import Bounds
    from tunegate.serve.engine_process import EngineProcess
    from tunegate.serve.jobs import EngineOptions

    engine = Stamped(EngineProcess(EngineOptions(str(base), adapter_bytes=2 << 30)))
    opened = open_base(resolve_base(str(base)), name="base")
    catalogue = Catalogue(engine, House(opened, allow_ungated=True), roots=[roots])
    await engine.start()
    bound, asked, up = start.bind(load.HOST, 0), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(start.listen(create_app(engine, catalogue), bound, Bounds(grace=5.0), asked, up.set))
    try:
        await up.wait()
        yield bound.getsockname()[1], engine
    finally:
        asked.set()
        await serving
        await engine.stop()


async def timeline(base: Path, folders: dict[str, Path], chats: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
    """Milliseconds of each step of a load, medians, by streams beside it."""
    found = {}
    async with front(base, next(iter(folders.values())).parent) as (port, engine):
        streams, waiting = Streams(port, chats), iter(folders.items())
        for count in STREAMS:
            await streams.beside(count, _nothing)
            steps: dict[str, list[float]] = {}

            async def loads(steps: dict[str, list[float]] = steps) -> None:
                for _ in range(LOADS):
                    name, folder = next(waiting)
                    answer = await load.ask(
                        port, {"lora_name": name, "lora_path": str(folder)}, "/v1/load_lora_adapter"
                    )
                    for step, seconds in _steps(answer, engine.stamps).items():
                        steps.setdefault(step, []).append(1000 * seconds)
                    await asyncio.sleep(0.1)

            await streams.beside(count, loads)
            found[str(count)] = {step: common.summary(values) for step, values in steps.items()}
    return found


def _steps(answer: load.Answer, stamps: dict[str, Any]) -> dict[str, float]:
    """Seconds of each step: what the front did, in turn, and what the engine says of its own part."""
    marks = ["identify asked", "identify answered", "load asked", "load answered"]
    times = [answer.began, *(stamps[mark] for mark in marks), answer.began + answer.seconds]
    names = ["request, until the engine is asked", "engine: identify", "admission", "engine: load", "response"]
    steps = dict(zip(names, [b - a for a, b in itertools.pairwise(times)], strict=True))
    return {**steps, **{f"engine's {name}": s for name, s in stamps["stages"].items()}, "all": answer.seconds}


def markdown(machine: dict[str, Any], found: dict[str, Any], timed: bool) -> str:
    streams = list(found)
    if timed:
        cells = [[step, *(common.spread(found[n][step], 1) for n in streams)] for step in found[streams[0]]]
    else:
        cells = [
            ["a load, ms", *(common.spread(found[n]["load_ms"], 1) for n in streams)],
            ["longest pause beside loads, ms", *(f"{found[n]['pause_ms']:.0f}" for n in streams)],
            ["longest pause without, ms", *(f"{found[n]['calm_ms']:.0f}" for n in streams)],
        ]
    head = ["", *(f"beside {n} streams" if n != "0" else "alone" for n in streams)]
    what = f"{LOADS} loads each, rank 16 on every linear layer, from the page cache; median [range]."
    return "\n\n".join(["# Loading an adapter", common.describe(machine), what, common.table(head, cells)])


async def served(base: Path, folders: dict[str, Path], chats: Sequence[list[dict[str, str]]], log: Path) -> Any:
    port, items = servers.free_port(), list(folders.items())
    server = servers.ours(base, dict(items[:1]), port)
    async with servers.running(server, port, log):
        return await measure(port, dict(items[1:]), chats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--timeline", action="store_true", help="the steps of a load, the front in this process")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    from tunegate.model.resolve import resolve_base
    from tunegate.serve.probing import random_adapters

    base, machine = resolve_base(args.base).path, common.machine()
    made = rows.made_messages(rows.PROFILES["intent"], 200, rows.renderer(base).tokenizer, seed=3)
    chats = [chat[:-1] for chat in made]
    with tempfile.TemporaryDirectory(prefix="tunegate-loading-") as folder:
        folders = random_adapters(base, Path(folder) / "adapters", LOADS * len(STREAMS) + 1, servers.RANK)
        if args.timeline:
            found = asyncio.run(timeline(base, folders, chats))
        else:
            found = asyncio.run(served(base, folders, chats, Path(folder) / "log"))
    text = markdown(machine, found, args.timeline)
    name = "loading-timeline" if args.timeline else "loading"
    common.write(name, {"machine": machine, "loads": LOADS, "streams": found}, text, args.output)
    print(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
