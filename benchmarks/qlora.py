"""QLoRA side by side in one run: tunegate's NF4 and PEFT on bitsandbytes' NF4, the same rows and tokens a step.

    python benchmarks/qlora.py --quick       # at most ten minutes
    python benchmarks/qlora.py

Both quantize the same layers with double quantization, keep their activations or recompute them, and train rank 16 on
all linear layers; the codes are the same (docs/quantization.md). Speed is real tokens a second and memory the highest
resident set, each repetition in a process of its own, interleaved. The loss curves are of identical batches from one
start, computed in fp32; PEFT trains twice, the second time with the rows of each batch in reverse: that difference is
the noise two runs of the same thing have. The last line is one JSON object; see benchmarks/README.md for its keys.
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
from common import Skipped
from contestants import Score
from curves import largest
from train import QUICK_SECONDS, play


def loss_curves(spec: dict[str, Any], *, quick: bool) -> dict[str, Any] | None:
    train = {**spec["train"], "tokens_per_step": 256}  # several rows a step, whose order matters
    settings = {"kind": "curves", "quantization": "nf4", "warmup": 0, "steps": 8 if quick else 50, "train": train}
    try:
        losses = common.run_worker({**spec, **settings})["losses"]
    except Skipped as error:
        print(f"loss curves: skipped, {error}", flush=True)
        return None
    found = {
        "gap": largest(losses["tunegate"], losses["peft"]),
        "noise": largest(losses["peft again"], losses["peft"]),
        "losses": losses,
    }
    print(f"loss curves: gap {found['gap']:.2e}, noise {found['noise']:.2e}", flush=True)
    return found


def headline_of(scores: list[Score], curves: dict[str, Any] | None) -> dict[str, Any]:
    """The last line. Speed is compared with PEFT's fastest, memory with its least, under the same kind of saving."""
    by_name = {s.contestant.name: s for s in scores if s.runs}
    found: dict[str, Any] = {}
    for suffix, key in (("", ""), (" recomputing", "_recomputing")):
        ours = by_name.get(f"tunegate{suffix}")
        theirs = [s for name in ("PEFT", "PEFT + tcmalloc") if (s := by_name.get(name + suffix))]
        fastest = max((s.tokens_per_second["median"] for s in theirs), default=None)
        least = min((s.rss_gb["median"] for s in theirs), default=None)
        found[f"speed_vs_peft{key}"] = common.ratio(ours.tokens_per_second["median"] if ours else None, fastest)
        found[f"rss_vs_peft{key}"] = common.ratio(ours.rss_gb["median"] if ours else None, least)
    found["loss_gap_nf4"] = curves["gap"] if curves else None
    found["loss_noise_nf4"] = curves["noise"] if curves else None
    return found


def markdown(found: dict[str, Any], scores: list[Score]) -> str:
    lines = []
    for score in scores:
        name = score.contestant.name
        if score.runs:
            numbers = (score.tokens_per_second, 0), (score.rss_gb, 2), (score.rss_beyond_torch_gb, 2)
            lines.append([name, *(common.spread(value, digits) for value, digits in numbers)])
        else:
            lines.append([name, f"skipped: {score.reason or 'no time left'}", "", ""])
    curves = found["curves"]
    text = [
        "# QLoRA", common.describe(found["machine"]),
        "NF4 with double quantization, rank 16 on all linear layers, about "
        f"{found['settings']['tokens_per_step']:,} row tokens a step, rows of {found['rows']['length_median']} tokens "
        "in the median. Median [range] over interleaved repetitions.",
        common.table(["", "real tokens/s", "peak RSS, GB", "beyond `import torch`, GB"], lines),
    ]  # fmt: skip
    if curves:
        text.append(
            f"Loss curves on identical batches, {len(curves['losses']['peft'])} steps, computed in fp32: largest "
            f"difference tunegate to PEFT {curves['gap']:.2e}, PEFT to itself with the rows of each batch in reverse "
            f"{curves['noise']:.2e}."
        )
        names = list(curves["losses"])
        steps = [
            [n + 1, *(f"{curves['losses'][name][n]:.6f}" for name in names)]
            for n in range(len(curves["losses"]["peft"]))
        ]
        text.append(common.table(["step", *names], steps))
    return "\n\n".join([*text, f"```json\n{json.dumps(found['headline'])}\n```"])


def main() -> None:
    from tunegate.model.resolve import resolve_base

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer contestants and steps, at most ten minutes")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="packaged name or folder")
    parser.add_argument("--profile", default="intent", choices=sorted(rows.PROFILES))
    parser.add_argument("--tokens-per-step", type=int, help="default 1024 quick, 2048 otherwise")
    parser.add_argument("--rounds", type=int, help="repetitions; default 2 quick, as far as time allows, 3 otherwise")
    parser.add_argument("--steps", type=int, help="timed steps a repetition; default 5 and 1 (PEFT) quick, 10 and 4")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    end = time.monotonic() + (QUICK_SECONDS if args.quick else float("inf"))
    machine = common.machine()
    print(common.describe(machine), flush=True)
    base = resolve_base(args.base).path
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        made = rows.rendered(base, data=None, profile=args.profile, n=1500, seed=0)
        train = {"tokens_per_step": args.tokens_per_step or (1024 if args.quick else 2048)}
        spec = {"base": str(base), "rows": rows.save(made, Path(folder) / "rows.json"), "warmup": 1, "train": train}
        curves = loss_curves(spec, quick=args.quick)
        scores = [Score(c, reason=c.why_not()) for c in contestants.qlora() if c.quick or not args.quick]
        steps = (args.steps or (5 if args.quick else 10), args.steps or (1 if args.quick else 4))
        play(scores, spec, steps, args.rounds or (2 if args.quick else 3), end)
    found = {"machine": machine, "rows": rows.describe(made), "settings": train, "curves": curves}
    found |= {"contestants": [score.to_json() for score in scores], "headline": headline_of(scores, curves)}
    name = "qlora-quick" if args.quick else "qlora"
    text = markdown(found, scores)
    common.write(name, found, text, args.output)
    print(text)
    print(json.dumps(found["headline"]))


if __name__ == "__main__":
    main()
