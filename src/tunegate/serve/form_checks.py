"""Whether an answer's form can be compiled in time, found out by a process that may be killed.

llguidance bounds what most forms cost, not what all do: a schema of a kilobyte can keep it busy for hours, and nothing
stops a thread that computes. So a form that was not seen before is compiled once in a process of its own, with few
seconds of processor time and little memory, and goes to an engine only after that. A few run at a time, the newest
verdicts are kept.

It compiles nothing for the engine (``engine_forms`` does), and says nothing of the time that a token takes under a
form, which the library does bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import OrderedDict
from pathlib import Path

from tunegate.engine.constrain import AnswerForm, cannot_be_enforced, grammar_text
from tunegate.errors import InputError
from tunegate.serve.jobs import Job
from tunegate.serve.once import Once

LONGEST = 65_536  # characters of a form: with n answers it goes to the engine n times
SECONDS, PATIENCE = 3, 30.0  # of processor time, and by the clock
MEMORY = 1 << 30  # bytes of address space
_MOST, _AT_ONCE = 1024, 2
_COMPILER = str(Path(__file__).with_name("form_compiler.py"))


class FormChecks:
    """``await check(job)``: :class:`InputError` if the job's form is too large, cannot be followed, or takes too long.
    All calls on one event loop. ``seconds`` of processor time."""

    def __init__(self, seconds: int = SECONDS):
        self._seconds = seconds
        self._verdicts: OrderedDict[AnswerForm, str] = OrderedDict()  # empty: it can be followed
        self._once = Once()
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, job: Job) -> None:
        if job.form is None:
            return
        kind, value, compact = job.form
        form = AnswerForm(kind, value, compact)  # type: ignore[arg-type]
        size = len(value) if isinstance(value, str) else sum(map(len, value))
        if size > LONGEST:
            most = f"at most {LONGEST:,} characters"
            raise InputError("the answer's form is too large", where=kind, expected=most, got=f"{size:,}")
        if kind == "choices":  # a tree of their tokens
            return
        if form not in self._verdicts:
            self._verdicts[form] = await self._once(form, lambda: self._compile(grammar_text(form)))
            while len(self._verdicts) > _MOST:
                self._verdicts.popitem(last=False)
        if said := self._verdicts[form]:
            raise cannot_be_enforced(kind, said)

    async def _compile(self, grammar: str) -> str:
        """What the library says against ``grammar``; empty: nothing."""
        async with self._free:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", _COMPILER, str(self._seconds), str(MEMORY), stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                said, _ = await asyncio.wait_for(process.communicate(grammar.encode()), PATIENCE)
            except asyncio.TimeoutError:
                said = b""
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        if process.returncode == 0:
            return said.decode("utf-8", "replace")
        if process.returncode and process.returncode > 0:  # it was not killed
            return f"its compiler failed with exit status {process.returncode}"
        return f"it takes more than {self._seconds} s, or more than {MEMORY >> 20} MiB, to compile"
