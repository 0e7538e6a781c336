"""Every benchmark in its quick form, one after the other: what ``make bench`` runs.

Results go to docs/benchmarks/ as JSON, Markdown and SVG, and the headline numbers to docs/benchmarks/summary.md. The
last line is one JSON object with all of them. Arguments are passed on to each script (``--data FILE``, ``--output``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import common

SCRIPTS = ("train.py", "generate.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the full set instead of the quick one")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args, passed = parser.parse_known_args()
    found, failed = {}, []
    for script in SCRIPTS:
        quick = [] if args.full else ["--quick"]
        command = [sys.executable, str(common.HERE / script), *quick, "--output", str(args.output), *passed]
        print(f"== {script} {' '.join(quick)}", flush=True)
        last = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        if process.returncode:
            failed.append(script)
        else:
            found[script.removesuffix(".py")] = json.loads(last)
    lines = [[name, key, value] for name, part in found.items() for key, value in part.items()]
    numbers = common.table(["benchmark", "number", "value"], lines)
    text = f"# Summary\n\n{common.describe(common.machine())}\n\n{numbers}"
    common.write("summary", found, text, args.output)
    print(json.dumps(found))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
