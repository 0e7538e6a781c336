"""Training side by side: tunegate, TRL, and a PEFT loop, on the same rows, in one run.

    python benchmarks/train.py --quick                 # about ten minutes
    python benchmarks/train.py                         # every contestant
    python benchmarks/train.py --lengths --ranks ...   # sweeps, see --help

Repetitions are interleaved: each round measures everyone once, in a fresh process each, starting with another one.
Speeds are REAL tokens (row tokens, padding not counted) a second, the median over the rounds with the whole range.
The last line is one JSON object; everything is written to docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import contestants
import rows
import sweeps
from common import Skipped
from contestants import Contestant, Score

QUICK_SECONDS = 570


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer contestants and steps, at most ten minutes")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="packaged name or folder")
    parser.add_argument("--data", type=Path, help="JSONL of messages; default: rows made to --profile")
    parser.add_argument("--profile", default="intent", choices=sorted(rows.PROFILES))
    parser.add_argument("--tokens-per-step", type=int, help="default 1024 quick, 2048 otherwise")
    parser.add_argument("--rounds", type=int, help="repetitions; default 2 quick, 3 otherwise")
    parser.add_argument("--steps", type=int, help="timed steps a repetition; default by speed")
    parser.add_argument("--thread-count", type=int, help="threads for everyone; default: torch's choice")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="contestants whose name begins so")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    for name, what in sweeps.SWEEPS.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    parser.add_argument("--no-main", action="store_true", help="only the sweeps that are named")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from tunegate.model.resolve import resolve_base

    machine = common.machine()
    print(common.describe(machine), flush=True)
    base = resolve_base(args.base).path
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        path = Path(folder) / "rows.json"
        made = rows.rendered(base, data=args.data, profile=args.profile, n=1500, seed=0)
        spec = {
            "base": str(base), "rows": rows.save(made, path), "warmup": 1, "threads": args.thread_count,
            "train": {"tokens_per_step": args.tokens_per_step or (1024 if args.quick else 2048)},
        }  # fmt: skip
        found = {"machine": machine, "rows": rows.describe(made), "settings": spec["train"]}
        print(f"rows: {found['rows']}", flush=True)
        headline: dict[str, Any] = {}
        if not args.no_main:
            headline = run_main(args, spec, found)
        for name in sweeps.SWEEPS:
            if getattr(args, name):
                sweeps.run(name, spec, Path(folder), args.output, machine, args.only, args.steps)
    print(json.dumps(headline))


def run_main(args: argparse.Namespace, spec: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    limit = QUICK_SECONDS if args.quick else float("inf")
    steps = (args.steps or (5 if args.quick else 10), args.steps or (1 if args.quick else 4))
    extras = {"loss_gap": loss_gap(spec, quick=args.quick), "roofline": roofline(spec, found["rows"], None)}
    scores = [Score(c, reason=c.why_not()) for c in chosen(args)]
    play(scores, spec, steps, args.rounds or (2 if args.quick else 3), began + limit)
    extras["roofline"] = roofline(spec, found["rows"], extras["roofline"])
    headline = headline_of(scores, extras)
    found |= {"contestants": [score.to_json() for score in scores], **extras, "headline": headline}
    found["seconds"] = round(time.monotonic() - began)
    name = "train-quick" if args.quick else "train"
    common.write(name, found, markdown(found, scores), args.output)
    bars = {s.contestant.name: s.tokens_per_second for s in scores if s.runs}
    common.plot_bars(name, "Training speed, SmolLM2-135M, LoRA rank 16", bars, "real tokens a second", args.output)
    return headline


def chosen(args: argparse.Namespace) -> list[Contestant]:
    everyone = [c for c in contestants.catalogue() if c.quick or not args.quick or args.only]
    if args.only:
        return [c for c in everyone if any(c.name.startswith(name) for name in args.only)]
    return everyone


def play(scores: list[Score], spec: dict[str, Any], steps: tuple[int, int], rounds: int, end: float) -> None:
    """Rounds, as many as end before ``end`` (monotonic seconds) if each takes as long as those before it."""
    began = time.monotonic()
    for number in range(rounds):
        used, left = time.monotonic() - began, end - time.monotonic()
        if number and left < used / number:
            print(f"stopping after {number} rounds: {left:.0f} s are left", flush=True)
            break
        play_round(scores, spec, steps, number)


def play_round(scores: list[Score], spec: dict[str, Any], steps: tuple[int, int], number: int) -> None:
    """Everyone once, starting ``number`` places further on."""
    start = number % max(1, len(scores))
    for score in scores[start:] + scores[:start]:
        if score.reason:
            if not number:
                print(f"{score.contestant.name}: skipped, {score.reason}", flush=True)
            continue
        try:
            score.runs.append(contestants.measure(score.contestant, spec, steps))
        except Skipped as error:
            score.reason = str(error)
            print(f"{score.contestant.name}: skipped, {error}", flush=True)
            continue
        run = score.runs[-1]
        speed = sum(run["tokens"]) / sum(run["seconds"])
        print(f"{score.contestant.name}: {speed:,.0f} tokens/s, {run['rss'] / 2**30:.2f} GB", flush=True)


def roofline(spec: dict[str, Any], described: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The bare products of a step: the fastest of this time and of ``before``, as neighbours only ever slow them."""
    tokens = spec["train"]["tokens_per_step"]
    targets = round(tokens * described["targets"] / described["tokens"])
    try:
        found = common.run_worker({**spec, "kind": "roofline", "tokens": tokens, "targets": targets, "repeats": 3})
    except Skipped as error:
        print(f"roofline: skipped, {error}", flush=True)
        return before
    seconds = found["seconds_by"]
    for name, value in (before or {}).get("seconds_by", {}).items():
        if name != "reasons" and value and seconds.get(name):
            seconds[name] = min(seconds[name], value)
    print(f"roofline: {seconds}", flush=True)
    best = min(v for k, v in seconds.items() if k != "reasons" and v)
    return {**found, "tokens": tokens, "targets": targets, "tokens_per_second": tokens / best}


def loss_gap(spec: dict[str, Any], *, quick: bool) -> dict[str, Any] | None:
    """Both loss curves on identical batches, and their largest difference."""
    train = {**spec["train"], "tokens_per_step": 128 if quick else 256}
    gap = {**spec, "kind": "loss_gap", "warmup": 0, "steps": 10 if quick else 50, "train": train}
    try:
        found = common.run_worker(gap)
    except Skipped as error:
        print(f"loss gap: skipped, {error}", flush=True)
        return None
    print(f"loss gap: {found['gap']:.2e}", flush=True)
    return found


def headline_of(scores: list[Score], extras: dict[str, Any]) -> dict[str, Any]:
    """The last line. PEFT's figure is its faster dtype; ``tuned`` is its best with anything that helps it."""
    by_name = {s.contestant.name: s for s in scores if s.runs}

    def best(*names: str, without: tuple[str, ...] = ()) -> float | None:
        found = [
            s.tokens_per_second["median"]
            for name, s in by_name.items()
            if name.startswith(names) and not any(word in name for word in without)
        ]
        return max(found, default=None)

    ours = by_name.get("tunegate")
    speed = ours.tokens_per_second["median"] if ours else None
    nf4, roof, trl = best("tunegate nf4"), extras["roofline"], by_name.get("TRL")
    return {
        "vs_trl": common.ratio(speed, trl.tokens_per_second["median"] if trl else None),
        "vs_trl_tuned": common.ratio(speed, best("TRL tuned", "TRL packing")),
        "vs_peft": common.ratio(speed, best("PEFT float", "PEFT bfloat", without=("tcmalloc",))),
        "vs_peft_tuned": common.ratio(speed, best("PEFT float", "PEFT bfloat")),
        "nf4_vs_peft_nf4": common.ratio(nf4, best("PEFT bitsandbytes")),
        "roofline_share": common.ratio(speed, roof["tokens_per_second"] if roof else None),
        "rss_vs_trl": common.ratio(
            ours.rss_gb["median"] if ours else None, trl.rss_gb["median"] if trl else None
        ),
        "loss_gap_fp32": extras["loss_gap"]["gap"] if extras["loss_gap"] else None,
        "tokens_per_second": round(speed, 1) if speed else None,
        "tokens_per_second_shared": best("tunegate, shared"),
    }  # fmt: skip


def markdown(found: dict[str, Any], scores: list[Score]) -> str:
    ours = next((s.tokens_per_second["median"] for s in scores if s.runs and s.contestant.name == "tunegate"), None)
    lines = []
    for score in scores:
        if not score.runs:
            lines.append([score.contestant.name, f"skipped: {score.reason}", "", "", ""])
            continue
        speed = score.tokens_per_second
        lines.append(
            [score.contestant.name, common.spread(speed), common.ratio(ours, speed["median"]),
             common.spread(score.rss_gb, 2), common.spread(score.rss_beyond_torch_gb, 2)]
        )  # fmt: skip
    header = ["", "real tokens/s", "tunegate / it", "peak RSS, GB", "beyond `import torch`, GB"]
    described = found["rows"]
    text = [
        "# Training", common.describe(found["machine"]),
        f"LoRA rank 16 on all linear layers, about {found['settings']['tokens_per_step']:,} row tokens a step, rows of "
        f"{described['length_median']} tokens in the median. Median [range] over interleaved repetitions.",
        common.table(header, lines),
    ]  # fmt: skip
    if found["roofline"]:
        roof = {k: round(v, 3) for k, v in found["roofline"]["seconds_by"].items() if k != "reasons" and v}
        text.append(f"Bare matrix products of one step, seconds: {roof}.")
    if found["loss_gap"]:
        gap = found["loss_gap"]
        text.append(
            f"fp32 loss curves on identical batches, {len(gap['peft'])} steps: largest difference {gap['gap']:.2e}."
        )
    text.append(f"```json\n{json.dumps(found['headline'])}\n```")
    return "\n\n".join(text)


if __name__ == "__main__":
    main()
