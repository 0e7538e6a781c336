"""Generation as an evaluation does it: N short prompts with one system prompt, greedy, with a LoRA adapter.

    python benchmarks/generate.py --quick

tunegate against transformers' ``generate`` one prompt at a time and in left-padded batches. The last line is one
JSON object of ratios (above 1: tunegate is faster); ``same_answers`` is the share of answers equal to those of
one-by-one generation, token for token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import rows
from common import Skipped

WAYS = ("tunegate", "batched", "single")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer items and repetitions")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="packaged name or folder")
    parser.add_argument("--data", type=Path, help="JSONL of messages; default: made rows")
    parser.add_argument("--items", type=int, help="default 32 quick, 128 otherwise")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rows-at-once", type=int, default=64)
    parser.add_argument("--rounds", type=int, help="default 2 quick, 3 otherwise")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--thread-count", type=int)
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from tunegate.model.resolve import resolve_base

    machine = common.machine()
    print(common.describe(machine), flush=True)
    base = resolve_base(args.base).path
    render = rows.renderer(base)
    items = args.items or (32 if args.quick else 128)
    made = rows.rendered(base, data=args.data, profile="intent", n=items, seed=1)
    prompts = [row["ids"][: row["target"].index(1)] for row in made]
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        path = Path(folder) / "prompts.json"
        path.write_text(json.dumps(prompts), encoding="utf-8")
        spec = {
            "kind": "generate", "base": str(base), "prompts": str(path), "stop_ids": list(render.stop_ids), "rank": 16,
            "dtype": "bfloat16" if common.has_bf16() else "float32", "new_tokens": args.new_tokens,
            "rows_at_once": args.rows_at_once, "threads": args.thread_count,
        }  # fmt: skip
        runs = measure(spec, args.rounds or (2 if args.quick else 3), args.ways)
    result = summarise(runs, len(prompts))
    found = {"machine": machine, "items": len(prompts), "prompt_tokens": sum(map(len, prompts)), **result}
    name = "generate-quick" if args.quick else "generate"
    common.write(name, found, markdown(found), args.output)
    bars = {way: result["ways"][way]["items_per_second"] for way in WAYS if way in result["ways"]}
    common.plot_bars(name, "Generation, SmolLM2-135M with a LoRA adapter", bars, "items a second", args.output)
    print(json.dumps(result["headline"]))


def measure(spec: dict[str, Any], rounds: int, ways: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Interleaved repetitions, a fresh process each; a way that fails is left out with its reason printed."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in [w for w in ways if w in runs]:
            try:
                runs[way].append(common.run_worker({**spec, "way": way}))
            except Skipped as error:
                print(f"{way}: skipped, {error}", flush=True)
                del runs[way]
                continue
            print(f"round {number + 1}, {way}: {runs[way][-1]['seconds'][0]:.2f} s", flush=True)
    return runs


def summarise(runs: dict[str, list[dict[str, Any]]], items: int) -> dict[str, Any]:
    ways = {}
    for way, done in runs.items():
        ways[way] = {
            "items_per_second": common.summary([items / run["seconds"][0] for run in done]),
            "generated_per_second": common.summary([run["generated"] / run["seconds"][0] for run in done]),
            "rss_gb": common.summary([run["rss"] / 2**30 for run in done]),
        }

    def against(way: str) -> float | None:
        if way not in ways or "tunegate" not in ways:
            return None
        return common.ratio(ways["tunegate"]["items_per_second"]["median"], ways[way]["items_per_second"]["median"])

    reference = runs["single"][0]["answers"] if "single" in runs else None
    ours = runs["tunegate"][0]["answers"] if "tunegate" in runs else None
    same = sum(a == b for a, b in zip(ours, reference, strict=True)) / items if ours and reference else None
    headline = {"vs_batched": against("batched"), "vs_single": against("single"), "same_answers": same}
    return {"ways": ways, "headline": headline}


def markdown(found: dict[str, Any]) -> str:
    lines = [
        [way, common.spread(one["items_per_second"], 2), common.spread(one["generated_per_second"]),
         common.spread(one["rss_gb"], 2)]
        for way, one in found["ways"].items()
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Generation", common.describe(found["machine"]),
            f"{found['items']} prompts, {found['prompt_tokens']:,} prompt tokens, greedy. Median [range].",
            common.table(["", "items/s", "generated tokens/s", "peak RSS, GB"], lines),
            f"```json\n{json.dumps(found['headline'])}\n```",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
