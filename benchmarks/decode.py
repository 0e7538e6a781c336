"""Decoding alone: generated tokens a second of rows side by side, with and without adapters of their own.

    python benchmarks/decode.py --quick

The engine's scheduler on one base, no server and no prompts in the measured time: every row has its prompt behind it
and adds ``--steps`` tokens. Rows take turns among 0, 1, 4, 16 or 64 LoRA adapters (rank 16 on all linear layers, random
and not zero); ``merged`` ones run on merged weights. Repetitions are interleaved. The last line is one JSON object:
tokens a second by rows and adapters, what adapters cost against the base alone, and milliseconds a token that an
adapter adds at ranks 16 and 64, and merged.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import common
import torch

CASES: dict[str, dict[str, int]] = {
    **{
        f"{rows} rows, {adapters} adapters": {"rows": rows, "adapters": adapters}
        for rows, adapters in ((1, 0), (1, 1), (4, 4), (16, 0), (16, 1), (16, 4), (16, 16), (64, 0), (64, 64))
    },
    "1 row, rank 64": {"rows": 1, "adapters": 1, "rank": 64},
    "1 row, merged": {"rows": 1, "merged": 1},
    "16 rows, 1 adapter of rank 64": {"rows": 16, "adapters": 1, "rank": 64},
    "16 rows, merged": {"rows": 16, "merged": 16},
    "16 rows, 12 merged and 4 of 4 adapters": {"rows": 16, "adapters": 4, "merged": 12},
    "16 rows, 12 of 1 adapter and 4 of 4 others": {"rows": 16, "adapters": 5, "first": 12},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and repetitions")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="packaged name or folder")
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"], choices=["none", "nf4", "int8"])
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, help="default 12 quick, 32 otherwise")
    parser.add_argument("--rounds", type=int, help="default 3 quick, 5 otherwise")
    parser.add_argument("--thread-count", type=int)
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    return parser.parse_args()


class Bench:
    """A base with random adapters in its table."""

    def __init__(self, base: str, quantization: str, prompt_tokens: int):
        from tunegate.adapter.segmented import Served
        from tunegate.engine.runner import Runner
        from tunegate.engine.scheduler import Scheduler
        from tunegate.kernels.formats import Recipe
        from tunegate.model.loading import choose_dtype, empty_model, load_model
        from tunegate.model.resolve import resolve_base

        folder = resolve_base(base).path
        recipe = None if quantization == "none" else {**Recipe.of(quantization).to_json(), "keep": [], "stored": False}
        model = load_model(folder, dtype=choose_dtype("auto")[0], recipe=recipe, narrow=True)
        runner = Runner(model)
        self.served = Served(model, empty_model(folder))
        self.scheduler = Scheduler(runner, 4000, served=self.served)
        self.vocabulary = int(model.config.vocab_size)
        self.prompt_tokens = prompt_tokens
        self.slots: dict[int, list[int]] = {}
        self._merged: Any = None

    def adapters(self, rank: int, count: int) -> list[int]:
        from tunegate.kernels.segments import Factors

        known = self.slots.setdefault(rank, [])
        while len(known) < count:
            g = torch.Generator().manual_seed(len(known))
            factors = {
                layer.column: Factors(
                    torch.randn(rank, layer.in_features, generator=g) * 0.01,
                    torch.randn(rank, layer.out_features, generator=g) * 0.01,
                    1.0,
                )
                for layer in self.served.layers.values()
            }
            known.append(self.served.table.add(factors))
        return known[:count]

    def merged(self) -> Any:
        """The first adapter in weights of its own; its rank makes no difference any more."""
        from tunegate.adapter.segmented import Merged
        from tunegate.export.deltas import Update
        from tunegate.serve.lane import merged_layer

        if self._merged is None:
            factors = self.served.table.slots[self.adapters(16, 1)[0]]
            assert factors is not None
            layers = {}
            for path, layer in self.served.layers.items():
                f = factors[layer.column]
                layers[layer.column] = merged_layer(layer.base, Update(f.a, f.b.t(), f.scale), path)[0]
            self._merged = Merged(layers)
        return self._merged

    def run(
        self, steps: int, rows: int, adapters: int = 0, rank: int = 16, merged: int = 0, first: int = 0
    ) -> float:  # fmt: skip
        """Generated tokens a second, after the prompts and two steps. The first ``merged`` rows are on merged weights,
        or the ``first`` ones all have the first adapter."""
        from tunegate.engine.sampling import Chooser, Picking
        from tunegate.engine.scheduler import Row

        slots = self.adapters(rank, adapters)
        for n in range(rows):
            g = torch.Generator().manual_seed(n)  # known after the first time: prompts are not what is measured
            prompt = torch.randint(5, self.vocabulary, (self.prompt_tokens,), generator=g).tolist()
            slot = slots[0 if n < first else n % adapters] if adapters and n >= merged else None
            weights = self.merged() if n < merged else None
            chooser, salt = Chooser(Picking(temperature=0.0), prompt), f"{slot} {n < merged}".encode()
            self.scheduler.add(Row(prompt, 500, chooser, frozenset(), slot, salt, weights))
        while self.scheduler.waiting or any(len(row.answer) < 2 for row in self.scheduler.running):
            self.scheduler.step()
        ahead = sum(len(row.answer) for row in self.scheduler.running)
        started = time.perf_counter()
        for _ in range(steps * (2 if 0 < merged < rows else 1)):  # passes take turns where there are two kinds
            self.scheduler.step()
        seconds = time.perf_counter() - started
        made = sum(len(row.answer) for row in self.scheduler.running) - ahead
        for row in list(self.scheduler.running):
            self.scheduler.cancel(row)
        return made / seconds


def main() -> None:
    args = arguments()
    if args.thread_count:
        torch.set_num_threads(args.thread_count)
    machine = common.machine()
    print(common.describe(machine), flush=True)
    rounds, steps = args.rounds or (3 if args.quick else 5), args.steps or (12 if args.quick else 32)
    found: dict[str, Any] = {"machine": machine, "prompt_tokens": args.prompt_tokens, "steps": steps, "bases": {}}
    for quantization in args.quantization:
        found["bases"][quantization] = measure(Bench(args.base, quantization, args.prompt_tokens), rounds, steps)
        print(quantization, json.dumps(found["bases"][quantization]["headline"]), flush=True)
    headline = {
        f"{name}_{what}": value
        for name, base in found["bases"].items()
        for what, value in base["headline"].items()
    }  # fmt: skip
    found["headline"] = headline
    common.write("decode-quick" if args.quick else "decode", found, markdown(found), args.output)
    print(json.dumps(headline))


def measure(bench: Bench, rounds: int, steps: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first one records passes and fills caches
        for name, case in CASES.items():
            speed = bench.run(steps, **case)
            if number:
                speeds.setdefault(name, []).append(speed)
    medians = {name: common.summary(values) for name, values in speeds.items()}

    def of(name: str) -> float:
        return float(medians[name]["median"])

    alone = of("1 rows, 0 adapters")
    headline = {
        "batch16": round(of("16 rows, 0 adapters"), 1),
        "batch16_4_adapters": round(of("16 rows, 4 adapters"), 1),
        "cost_of_4_adapters": round(of("16 rows, 0 adapters") / of("16 rows, 4 adapters") - 1, 3),
        "cost_of_64_adapters": round(of("64 rows, 0 adapters") / of("64 rows, 64 adapters") - 1, 3),
        "cost_of_1_adapter": round(of("16 rows, 0 adapters") / of("16 rows, 1 adapters") - 1, 3),
        "cost_of_1_adapter_of_rank_64": round(of("16 rows, 0 adapters") / of("16 rows, 1 adapter of rank 64") - 1, 3),
        "cost_merged": round(of("16 rows, 0 adapters") / of("16 rows, merged") - 1, 3),
        "mixed_merged_against_unmerged": round(
            of("16 rows, 12 merged and 4 of 4 adapters") / of("16 rows, 12 of 1 adapter and 4 of 4 others"), 3
        ),
        "ms_a_token_alone": round(1000 / alone, 2),
        "ms_added_at_rank_16": round(1000 / of("1 rows, 1 adapters") - 1000 / alone, 2),
        "ms_added_at_rank_64": round(1000 / of("1 row, rank 64") - 1000 / alone, 2),
        "ms_added_merged": round(1000 / of("1 row, merged") - 1000 / alone, 2),
    }
    return {"speeds": medians, "headline": headline}


def markdown(found: dict[str, Any]) -> str:
    names = list(next(iter(found["bases"].values()))["speeds"])
    lines = [[name, *(common.spread(base["speeds"][name], 1) for base in found["bases"].values())] for name in names]
    about = f"{found['steps']} tokens a row after {found['prompt_tokens']} of prompt, greedy. Median [range]."
    return "\n\n".join(
        [
            "# Decoding", common.describe(found["machine"]), about,
            common.table(["generated tokens/s", *(f"base {name}" for name in found["bases"])], lines),
            f"```json\n{json.dumps(found['headline'])}\n```",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
