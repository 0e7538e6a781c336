"""Whether tunegate's loss curve is PEFT's: the same batches from the same start in fp32, step by step.

    python benchmarks/curves.py                # 200 steps of 128 row tokens; --quick: 50

PEFT trains twice, the second time with the rows of each batch in reverse: sums in another order are the noise that two
runs of the same thing have (A/A). The last line is one JSON object; ``gap`` is the largest difference of tunegate to
PEFT, ``noise`` that of PEFT to itself, nats per target token. No speed is measured, so a busy machine does no harm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import common
import rows


def largest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> None:
    from tunegate.model.resolve import resolve_base

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct", help="packaged name or folder")
    parser.add_argument("--profile", default="intent", choices=sorted(rows.PROFILES))
    parser.add_argument("--quick", action="store_true", help="50 steps")
    parser.add_argument("--steps", type=int, help="default 50 quick, 200 otherwise")
    parser.add_argument("--tokens-per-step", type=int, default=128)
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    args.steps = args.steps or (50 if args.quick else 200)
    machine = common.machine()
    print(common.describe(machine), flush=True)
    base = resolve_base(args.base).path
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        made = rows.rendered(base, data=None, profile=args.profile, n=1500, seed=0)
        spec = {
            "base": str(base), "rows": rows.save(made, Path(folder) / "rows.json"), "warmup": 0, "kind": "curves",
            "steps": args.steps, "train": {"tokens_per_step": args.tokens_per_step},
        }  # fmt: skip
        losses = common.run_worker(spec, timeout=6 * 3600)["losses"]
    found = {
        "steps": args.steps,
        "gap": largest(losses["tunegate"], losses["peft"]),
        "noise": largest(losses["peft again"], losses["peft"]),
        "first": losses["peft"][0],
        "last_20": {name: sum(losses[name][-20:]) / 20 for name in losses},
    }
    at = [s for s in (1, 10, 25, 50, 100, 150, args.steps) if s <= args.steps]
    lines = [[s, *(f"{losses[name][s - 1]:.6f}" for name in losses)] for s in at]
    text = (
        f"# Loss curves in fp32: tunegate and PEFT\n\n{common.describe(machine)}\n\n{args.steps} steps of "
        f"{args.tokens_per_step} row tokens. Largest difference tunegate to PEFT {found['gap']:.2e}, PEFT to itself "
        f"with the rows of each batch in reverse {found['noise']:.2e}.\n\n" + common.table(["step", *losses], lines)
    )
    name = "curves-quick" if args.quick else "curves"
    common.write(name, {"machine": machine, **found, "losses": losses}, text, args.output)
    print(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
