"""The forms that answers of an engine are held to, compiled beside the passes.

A form is compiled once, by a thread of its own, and the newest ones are kept; the library lets go of Python's lock
meanwhile, so passes go on. A job whose form is not compiled waits here; ``wake`` is called when the loop may begin it,
which it learns by :meth:`Forms.come`. The tokenizer is spelled out for the library by that thread too, at the start.

It bounds no form's time: whoever sends jobs has asked before (``form_checks``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.engine.constrain import AnswerForm, Constraint, build_constraint, form_problem, spelling
from tunegate.errors import TunegateError
from tunegate.serve.jobs import Job
from tunegate.serve.telling import tell

_MOST = 256  # compiled ones kept
Key = tuple[Any, tuple[int, ...]]


@dataclass(frozen=True)
class Parked:
    """A job that waited for its form; ``error``: why it has none."""

    number: int
    job: Job
    folder: Path | None
    error: TunegateError | None = None


class Forms:
    """:meth:`of` and :meth:`come` are for the engine's loop."""

    def __init__(self, tokenizer: Any, wake: Callable[[], None]):
        self._tokenizer, self._wake = tokenizer, wake
        self._spelled: Any = None
        self._known: OrderedDict[Key, Constraint] = OrderedDict()
        self._parked: dict[Key, list[Parked]] = {}
        self._done: list[tuple[Key, Constraint | TunegateError]] = []
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "forms")
        if not form_problem(AnswerForm("json_schema", "")):
            self._compiler.submit(self._spell)

    def of(self, number: int, job: Job, folder: Path | None) -> Constraint | None:
        """The constraint of ``job``'s form; None: the job comes when it is compiled."""
        key = (job.form, job.stop_ids)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if key not in self._parked:
            self._parked[key] = []  # until it is compiled, whoever is left to wait
            self._compiler.submit(self._compile, key)
        self._parked[key].append(Parked(number, job, folder))
        return None

    def cancel(self, number: int) -> None:
        """Forget a job that waits."""
        for key, waiting in self._parked.items():
            self._parked[key] = [one for one in waiting if one.number != number]

    @property
    def waiting(self) -> int:
        return sum(map(len, self._parked.values()))

    @property
    def waits(self) -> bool:
        """Whether :meth:`come` has something to tell."""
        return bool(self._done)

    def come(self) -> list[Parked]:
        """The jobs whose wait is over."""
        with self._lock:
            done, self._done = self._done, []
        found: list[Parked] = []
        for key, made in done:
            waiting = self._parked.pop(key)
            if isinstance(made, TunegateError):
                found += [Parked(one.number, one.job, one.folder, made) for one in waiting]
                continue
            self._known[key] = made
            found += waiting
        while len(self._known) > max(_MOST, len(done)):  # those that just came are to be used now
            self._known.popitem(last=False)
        return found

    # --- the thread ----------------------------------------------------------------------------------------------

    def _spell(self) -> None:
        try:
            self._spelled = spelling(self._tokenizer)
        except Exception as error:  # each form says so again
            tell("the tokenizer cannot hold answers to a form", error)

    def _compile(self, key: Key) -> None:
        made: Constraint | TunegateError
        try:
            kind, value, compact = key[0]
            made = build_constraint(AnswerForm(kind, value, compact), self._tokenizer, key[1], self._spelled)
        except TunegateError as error:
            made = error
        except Exception as error:  # a form that nobody foresaw: its jobs' fault alone
            tell("a form failed", error)
            made = TunegateError("the answer's form cannot be enforced", got=type(error).__name__)
        with self._lock:
            self._done.append((key, made))
        self._wake()
