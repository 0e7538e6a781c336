"""Command line: parse, call, print.

Results go to standard output, progress and messages to standard error; ``--json`` prints one JSON object instead of
tables. Exit codes: 0 done (and shipped, for ``run`` and ``gate``), 1 failed or held by the gate, 2 wrong use or bad
input, 130 interrupted. A traceback appears only with ``--debug``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict

from tunegate.cli.arguments import parse
from tunegate.cli.console import Console
from tunegate.cli.parser import make_parser
from tunegate.errors import Problem, TunegateError

# What these write appears when it is whole, and they start anew. A merge with finished shards says that it kept them.
ALL_OR_NOTHING = {"check", "deploy", "doctor", "export", "init", "merge", "plan", "quantize", "show"}

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["serve", "advise"]:  # another name of it; a base in a folder `advise` is ./advise
        words[0] = "deploy"
    arguments = parse(make_parser(), words)
    # Read by OpenMP when torch is loaded. Its default is to spin at barriers, which with one busy neighbour on the
    # machine makes training many times slower; a bounded spin costs nothing measurable on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    _quiet_libraries()
    console = Console(json_only=arguments.json)
    previous = signal.signal(signal.SIGINT, console.on_interrupt)
    try:
        from tunegate.cli import commands

        code: int = getattr(commands, arguments.command)(arguments, console)
        return code
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug:
            traceback.print_exc()
        problems, code = _explain(error, arguments.command)
        if arguments.json:
            print(json.dumps({"error": [asdict(p) for p in problems], "exit_code": code}))
        else:
            console.error(str(TunegateError(problems)))
        return code
    finally:
        signal.signal(signal.SIGINT, previous)


def _explain(error: BaseException, command: str) -> tuple[list[Problem], int]:
    """Problems to show and the exit code, for whatever ``command`` raised."""
    if isinstance(error, TunegateError):
        return error.problems, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        kept = "what was finished is kept, the same command goes on from there"
        usual = "nothing was written" if command in ALL_OR_NOTHING else kept
        return [Problem(f"interrupted; {str(error) or usual}")], 130
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        fix = "lower train.tokens_per_batch, or set train.gradient_checkpointing: true"
        if command in ("export", "merge"):
            fix = "the parity report loads the whole model: use a machine with more memory, or close other programs"
        return [Problem("out of memory", fix=fix)], 1
    if isinstance(error, OSError) and error.strerror:
        return [Problem(f"the system refuses: {error.strerror}", where=str(error.filename or ""))], 1
    first = (str(error).splitlines() or [""])[0]
    fix = "this is a defect of tunegate; --debug shows where it happened"
    return [Problem(f"unexpected {type(error).__name__}: {first}", fix=fix)], 1


def _quiet_libraries() -> None:
    """Other libraries' warnings and bars have no place between ours; errors still come through. They read the
    environment when they are loaded, which not every command has to do."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if logging := sys.modules.get("transformers.utils.logging"):  # whoever called us has loaded it
        logging.set_verbosity_error()
        logging.disable_progress_bar()
