"""Whether the adapter is as good as PEFT's: the same task, data, masks and steps by tunegate and by TRL, several seeds.

    python benchmarks/accuracy.py                                        # examples/support, three seeds
    python benchmarks/accuracy.py --task my.yaml --seeds 0 1 2 --set train.epochs=2

Each pair of backend and seed is a whole ``tunegate run``; both answer the same test items through the same decoder, so
only the trainer differs. The last line is one JSON object with the scores of each backend, their means, and the paired
differences. No speed is measured, so a busy machine does no harm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "support" / "task.yaml"


def run(task: Path, backend: str, seed: int, overrides: list[str], folder: str) -> dict[str, Any]:
    """The JSON of one run."""
    chosen = [f"train.backend={backend}", f"train.seed={seed}", f"output={folder}", *overrides]
    command = [sys.executable, "-W", "ignore", "-m", "tunegate.cli", "run", str(task), "--json"]
    for one in chosen:
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 1 or not done.stdout.strip():
        raise RuntimeError(f"{backend}, seed {seed}: {done.stdout[-400:]} {done.stderr[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds of 24 steps")
    parser.add_argument("--task", type=Path, default=EXAMPLE)
    parser.add_argument("--backends", nargs="+", default=["native", "trl"])
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 quick, 0 1 2 otherwise")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    args.seeds = args.seeds or ([0, 1] if args.quick else [0, 1, 2])
    if args.quick:
        args.overrides = ["train.max_steps=24", "task.prompts=[]", *args.overrides]
    machine = common.machine()
    print(common.describe(machine), flush=True)
    scores: dict[str, list[float]] = {name: [] for name in args.backends}
    runs = []
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        for seed in args.seeds:
            for backend in args.backends:
                found = run(args.task, backend, seed, args.overrides, folder)
                score = next(e for e in found["evaluations"] if e["subject"] == "adapter")
                value = score["scores"][score["primary"]]
                scores[backend].append(value["value"])
                runs.append({"backend": backend, "seed": seed, "score": value, "training": found["training"]})
                print(f"seed {seed}, {backend}: {value['value']:.4f} ({value['low']:.3f}-{value['high']:.3f}, "
                      f"{value['n']} items), {found['training']['steps']} steps", flush=True)  # fmt: skip
    first, *others = args.backends
    result: dict[str, Any] = {
        "mean": {name: round(mean(values), 4) for name, values in scores.items()},
        "sd": {name: round(stdev(values), 4) if len(values) > 1 else None for name, values in scores.items()},
        "scores": scores,
        "differences": {
            name: [round(a - b, 4) for a, b in zip(scores[first], scores[name], strict=True)] for name in others
        },
    }
    lines = [[seed, *(f"{scores[name][i]:.4f}" for name in scores)] for i, seed in enumerate(args.seeds)]
    lines.append(["mean", *(f"{result['mean'][name]:.4f}" for name in scores)])
    text = (
        f"# Test score by trainer\n\n{common.describe(machine)}\n\n{args.task.name} {' '.join(args.overrides)}\n\n"
        + common.table(["seed", *scores], lines)
    )
    name = "accuracy-quick" if args.quick else "accuracy"
    common.write(name, {"machine": machine, **result, "runs": runs}, text, args.output)
    print(text)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
