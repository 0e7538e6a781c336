"""A server under mixed load for a while: does it grow, leak pages, or answer otherwise than when it is quiet?

    python benchmarks/soak.py --minutes 30

First every question is asked alone, greedy; those are the right answers. Then clients ask for base and adapters at
random, streamed and not, short and long, some sampled, some breaking off in the middle, some wrong. Every greedy answer
is compared with the right one; memory of all the server's processes and the engine's own counts are read all along.
At the end, with nothing under way, no page may be in use but those of the prefix cache. ``--output`` names the folder
for ``soak.md`` and ``soak.json``. The last line is one JSON object; the exit code is 0 if memory grew by at most 2 %
over the last three quarters, no page leaked, every answer was right, and nothing failed that should not have.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import load
import rows
import servers
from servers import Server

GROWTH = 0.02
SETTLED = 0.25  # of the time, before memory counts: caches fill first
CLIENTS, QUESTIONS, ADAPTERS = 12, 40, 6


@dataclass
class Soak:
    """What was seen. ``memory``: (seconds, bytes)."""

    right: dict[tuple[str, int], str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[int] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def fail(self, kind: str, answer: load.Answer, **more: Any) -> None:
        """An answer that is not what it should be."""
        self.wrong.append({"kind": kind, "status": answer.status, "got": answer.text, **more})

    def growth(self) -> float:
        """Memory of the last part over that just after everything had filled, minus one: medians of tenths."""
        counted = [size for _, size in self.memory[int(len(self.memory) * SETTLED) :]]
        tenth = max(1, len(counted) // 10)
        first, last = (
            common.summary([float(s) for s in part])["median"] for part in (counted[:tenth], counted[-tenth:])
        )
        return float(last / first - 1)


def body(model: str, question: list[dict[str, str]], new: int, **more: Any) -> dict[str, Any]:
    made = {"model": model, "messages": question, "max_tokens": new, "temperature": 0.0, **more}
    return made | ({"stream_options": {"include_usage": True}} if more.get("stream") else {})


async def client(port: int, soak: Soak, models: list[str], questions: list[Any], until: float, seed: int) -> None:
    """One of the crowd, until the time is over."""
    dice = random.Random(seed)
    while time.monotonic() < until:
        model, number = dice.choice(models), dice.randrange(len(questions))
        kind = dice.choices(("greedy", "streamed", "sampled", "left", "wrong"), (5, 4, 2, 1, 1))[0]
        soak.counts[kind] += 1
        if kind in ("greedy", "streamed"):
            answer = await load.ask(port, body(model, questions[number], _length(number), stream=kind == "streamed"))
            wanted = soak.right[model, number]
            if answer.status != 200 or answer.text != wanted:
                soak.fail(kind, answer, model=model, question=number, expected=wanted)
        elif kind == "sampled":
            more = {"temperature": 1.0, "seed": dice.randrange(1000), "n": 2, "top_p": 0.9}
            answer = await load.ask(port, {**body(model, questions[number], 24), **more})
            if answer.status != 200:
                soak.fail(kind, answer, model=model)
        elif kind == "left":
            asking = asyncio.create_task(load.ask(port, body(model, questions[number], 256, stream=True)))
            await asyncio.sleep(dice.random() * 0.5)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            continue
        else:
            answer = await load.ask(port, body("no-such-model", questions[number], 4))
            if not 400 <= answer.status < 500:
                soak.fail(kind, answer)
        if answer.status != 200:
            soak.errors[answer.status] += 1


def _length(number: int) -> int:
    return (4, 16, 16, 48)[number % 4]


async def watch(group: int, soak: Soak, began: float) -> None:
    while True:
        soak.memory.append((time.monotonic() - began, servers.group_rss(group)))
        await asyncio.sleep(1.0)


async def pages_in_use(port: int) -> dict[str, float]:
    """Gauges of /metrics that speak of pages or of what is under way."""
    text = (await load.get(port, "/metrics")).decode("utf-8", errors="replace")
    found = re.findall(r"^(\w*(?:pages|running|waiting)\w*)(?:\{[^\n]*\})? ([0-9.e+-]+)", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def run(args: argparse.Namespace, server: Server, port: int, questions: list[Any], log: Path) -> dict[str, Any]:
    soak = Soak()
    models = list(server.models.values())
    async with servers.running(server, port, log) as process:
        for model in models:
            for number, question in enumerate(questions):
                answer = await load.ask(port, body(model, question, _length(number)))
                if answer.status != 200:
                    raise common.Skipped(f"a quiet request failed: {answer.status} {answer.text}")
                soak.right[model, number] = answer.text
        quiet = await pages_in_use(port)
        print(f"quiet: {len(soak.right)} answers, {len(set(soak.right.values()))} different; {quiet}", flush=True)
        began = time.monotonic()
        watching = asyncio.create_task(watch(process.pid, soak, began))
        until = began + 60 * args.minutes
        await asyncio.gather(*(client(port, soak, models, questions, until, n) for n in range(args.clients)))
        watching.cancel()
        await asyncio.sleep(3)
        after = await pages_in_use(port)
        again = await load.ask(port, body(models[0], questions[0], _length(0)))
    busy = {name: value for name, value in after.items() if ("running" in name or "waiting" in name) and value}
    leaked = {name: value for name, value in after.items() if name.endswith("pages_used") and value}
    return {
        "minutes": args.minutes, "clients": args.clients, "requests": dict(soak.counts),
        "errors_by_status": {str(status): n for status, n in sorted(soak.errors.items())},
        "wrong": len(soak.wrong), "examples": soak.wrong[:5],
        "memory_growth": round(soak.growth(), 4), "rss_gb": round(soak.memory[-1][1] / 1e9, 3),
        "pages_leaked": leaked, "still_under_way": busy, "answers_after": again.text == soak.right[models[0], 0],
    }  # fmt: skip


def markdown(machine: dict[str, Any], found: dict[str, Any]) -> str:
    counted = ", ".join(f"{n} {kind}" for kind, n in sorted(found["requests"].items()))
    errors = ", ".join(f"{n} x {status}" for status, n in found["errors_by_status"].items()) or "none"
    lines = [
        ["minutes", f"{found['minutes']:g}"],
        ["clients", found["clients"]],
        ["requests", f"{sum(found['requests'].values())}: {counted}"],
        ["answers that differ from a quiet server's, or failed", found["wrong"]],
        ["errors by status (a wrong model's name is asked for on purpose)", errors],
        ["growth of memory over the last three quarters", f"{found['memory_growth']:+.2%}"],
        ["memory at the end, GB", found["rss_gb"]],
        ["pages leaked", sum(found["pages_leaked"].values()) or 0],
    ]
    about = "A mixture of greedy, streamed, sampled, abandoned and wrong requests for the base and its adapters."
    return "\n\n".join(["# Soak", common.describe(machine), about, common.table(["", ""], lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--data", type=Path, help="JSONL of messages; default: made prompts")
    parser.add_argument("--output", type=Path, default=common.RESULTS, help="folder for soak.md and soak.json")
    parser.add_argument("--serve-options", default="", help="further options of `tunegate serve`, as one string")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    from tunegate.model.resolve import resolve_base
    from tunegate.serve.probing import random_adapters

    base, machine = resolve_base(args.base).path, common.machine()
    if args.data:
        lines = args.data.read_text(encoding="utf-8").splitlines()[: args.questions]
        questions = [json.loads(line)["messages"][:-1] for line in lines]
    else:
        made = rows.made_messages(rows.PROFILES["intent"], args.questions, rows.renderer(base).tokenizer, seed=2)
        questions = [chat[:-1] for chat in made]
    with tempfile.TemporaryDirectory(prefix="tunegate-soak-") as folder:
        adapters = random_adapters(base, Path(folder) / "adapters", ADAPTERS, servers.RANK)
        port = servers.free_port()
        server = servers.ours(base, adapters, port, more=tuple(args.serve_options.split()))
        found = asyncio.run(run(args, server, port, questions, Path(folder) / "log"))
    common.write("soak", {"machine": machine, **found}, markdown(machine, found), args.output)
    print(json.dumps(found))
    good = not found["wrong"] and not found["pages_leaked"] and not found["still_under_way"] and found["answers_after"]
    sys.exit(0 if good and found["memory_growth"] <= GROWTH else 1)


if __name__ == "__main__":
    main()
