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
from collections.abc import Sequence
from dataclasses import asdict

from tunegate.cli.console import Console
from tunegate.cli.parser import make_parser
from tunegate.errors import TunegateError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = make_parser().parse_args(argv)
    # Read by OpenMP when torch is loaded. Its default is to spin at barriers, which with one busy neighbour on the
    # machine makes training many times slower; a bounded spin costs nothing measurable on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    console = Console(json_only=arguments.json)
    previous = signal.signal(signal.SIGINT, console.on_interrupt)
    try:
        from tunegate.cli import commands

        _quiet_libraries()
        code: int = getattr(commands, arguments.command)(arguments, console)
        return code
    except TunegateError as error:
        if arguments.debug:
            raise
        return _fail(console, arguments.json, error)
    except KeyboardInterrupt:
        console.error("interrupted; what was finished is kept, the same command goes on from there")
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except MemoryError:
        console.error("out of memory: lower train.tokens_per_batch, or set train.gradient_checkpointing: true")
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        console.error(
            f"unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            "    this is a defect of tunegate; --debug shows where it happened"
        )
        return 1
    finally:
        signal.signal(signal.SIGINT, previous)


def _fail(console: Console, as_json: bool, error: TunegateError) -> int:
    if as_json:
        print(json.dumps({"error": [asdict(p) for p in error.problems], "exit_code": error.exit_code}))
    else:
        console.error(str(error))
    return error.exit_code


def _quiet_libraries() -> None:
    """Other libraries' warnings and bars have no place between ours; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
