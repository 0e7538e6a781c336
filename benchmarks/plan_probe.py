"""How well a few probed steps foretell a run: peak memory and training time, predicted and measured.

    python benchmarks/plan_probe.py                 # every configuration, each in processes of its own
    python benchmarks/plan_probe.py --only dora     # those whose name begins so

For each configuration one process probes the task (``tunegate plan TASK --probe``) and a second one runs it whole
(``tunegate run TASK``); its ``plan.json`` holds the peak memory and the seconds of its steps. The caches of bases are
the user's own; calibration starts empty. Times mean something on a quiet machine only: the load before and after is
written beside them. On a busy one, ``--cpu-seconds`` compares the processes' CPU seconds on one thread instead, which
neighbours disturb less. Results go to docs/benchmarks/plan-probe.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

TICKETS = Path(__file__).resolve().parent.parent / "examples" / "support" / "tickets.jsonl"

TASK = {
    "base": {"name": "smollm2-135m-instruct"},
    "data": {"train": str(TICKETS), "group_by": "customer", "valid_fraction": 0.05,
             "test_fraction": 0.05, "system": "Classify the customer's message. Answer with the intent name only."},
    "task": {"metric": "accuracy", "max_new_tokens": 8, "prompts": []},
}  # fmt: skip

# name: train settings; those of the base under "base"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora r8, 256 tokens": {"rank": 8, "tokens_per_step": 256},
    "qlora r16, 512 tokens": {"rank": 16, "tokens_per_step": 512, "base": {"quantization": "nf4"}},
    "lora r16 on int8, 512 tokens": {"rank": 16, "tokens_per_step": 512, "base": {"quantization": "int8"}},
    "lora r16, 512 tokens, no shared prefix": {"rank": 16, "tokens_per_step": 512, "share_prefix": False},
    "lora r16, 1024 tokens, recomputed": {"rank": 16, "tokens_per_step": 1024, "gradient_checkpointing": True},
    "lora r64, 1024 tokens in batches of 256": {"rank": 64, "tokens_per_step": 1024, "tokens_per_batch": 256},
    "dora r16, 512 tokens": {"rank": 16, "method": "dora", "tokens_per_step": 512},
    "lora r16, 512 tokens": {"rank": 16, "tokens_per_step": 512},
}


# The clock of every measured step is time.perf_counter; in these processes it counts CPU seconds.
CPU_CLOCK = (
    "import sys, time; time.perf_counter = time.process_time; import tunegate.cli; sys.exit(tunegate.cli.main())"
)


def command(home: Path, cpu_seconds: bool, *arguments: str) -> dict[str, Any]:
    """The JSON that ``tunegate ARGUMENTS`` prints, in a process of its own."""
    environment = {**os.environ, "TUNEGATE_HOME": str(home), "TOKENIZERS_PARALLELISM": "false"}
    if cpu_seconds:
        environment["OMP_NUM_THREADS"] = "1"
    program = ["-c", CPU_CLOCK] if cpu_seconds else ["-m", "tunegate.cli"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *program, *arguments, "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode > 1 or not done.stdout.startswith('{"') or '"exit_code"' in done.stdout:
        raise RuntimeError(f"tunegate {' '.join(arguments)}: {done.stdout[-400:]} {done.stderr[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(settings: dict[str, Any], folder: Path, cpu_seconds: bool) -> dict[str, Any]:
    home = folder / "home"
    home.mkdir()
    own = Path(os.environ.get("TUNEGATE_HOME") or "~/.cache/tunegate").expanduser()
    if (own / "bases").is_dir():
        (home / "bases").symlink_to(own / "bases")
    task = folder / "task.yaml"
    train = {"epochs": 9.0, "max_steps": 12, "eval_every": 10**6, "eval_items": 8, **settings}
    base = {**TASK["base"], **train.pop("base", {})}
    task.write_text(json.dumps({**TASK, "base": base, "train": train}), encoding="utf-8")
    load = os.getloadavg()[0]
    planned = command(home, cpu_seconds, "plan", str(task), "--probe")
    formula, probed = planned["this_machine"]["estimated"], planned["probe"]
    run = command(home, cpu_seconds, "run", str(task))
    measured = json.loads((Path(run["run"]) / "plan.json").read_text(encoding="utf-8"))["measured"]
    return {
        "settings": settings, "load": [round(load, 2), round(os.getloadavg()[0], 2)], "steps": measured["steps"],
        "bytes": {"formula": formula["bytes"], "probe": probed["bytes"], "measured": measured["bytes"]},
        "seconds": {"formula": formula["seconds"], "probe": probed["seconds"], "measured": measured["seconds"]},
        "tokens_per_second": run["training"]["tokens_per_second"],
    }  # fmt: skip


def error(found: dict[str, float], which: str) -> float:
    return found[which] / found["measured"] - 1


def markdown(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{one['bytes']['measured'] / 2**30:.2f}", f"{error(one['bytes'], 'formula'):+.1%}",
         f"{error(one['bytes'], 'probe'):+.1%}", f"{one['seconds']['measured']:.1f}",
         f"{error(one['seconds'], 'formula'):+.0%}", f"{error(one['seconds'], 'probe'):+.0%}",
         f"{one['load'][0]:.1f}, {one['load'][1]:.1f}"]
        for name, one in result["configurations"].items()
    ]  # fmt: skip
    header = ["configuration", "peak GiB", "formula", "probe", "train s", "formula", "probe", "load before, after"]
    return "\n\n".join(
        [
            "# plan: predicted and measured",
            common.describe(result["machine"]),
            f"Times: {result['clock']}.",
            common.table(header, rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="configurations whose name begins so")
    parser.add_argument("--cpu-seconds", action="store_true", help="compare CPU seconds on one thread, not wall time")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    clock = "CPU seconds on one thread" if args.cpu_seconds else "wall time"
    result: dict[str, Any] = {"machine": common.machine(), "clock": clock, "configurations": {}}
    for name, settings in CONFIGURATIONS.items():
        if args.only and not any(name.startswith(start) for start in args.only):
            continue
        with tempfile.TemporaryDirectory(prefix="tunegate-plan-") as folder:
            found = measure(settings, Path(folder), args.cpu_seconds)
        result["configurations"][name] = found
        print(name, json.dumps(found), flush=True)
    common.write("plan-probe", result, markdown(result), args.output)
    print(markdown(result))


if __name__ == "__main__":
    main()
