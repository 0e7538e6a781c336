"""Questions to a judge: each asked until it has a valid reply, paid once, and never asked again.

Replies are lines of a JSONL file under a key of everything that they depend on: model and its settings, rubric,
prompt, answers, sample. The file is the cache, the log and the bill. A line is written whole or not at all; what a
killed run left unfinished at the end is cut off, and the same call goes on from there.

What fails is tried again with growing waits (exponential, with jitter; the server's Retry-After if it is longer), a
reply that is not what the schema asks for with the fault named. The budget is a hard stop: a request is sent only if
its worst case, a token for each byte sent and the most tokens that may come back, still fits into what is left. A
reply that was lost, or came without a count of its tokens, is booked at its worst case.

It knows no rubric and makes no scores.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.judge.http import Busy
from tunegate.evaluation.judge.providers import Model, Provider
from tunegate.evaluation.judge.rubric import Messages
from tunegate.files import explain_os_error, hash_json

LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not worth waiting for
_MILLION = 1e6


class OverBudget(TunegateError):
    """The next request might exceed the budget."""


@dataclass(frozen=True)
class Limits:
    """``attempts`` per question; waits start at ``first_wait`` seconds and double. ``budget`` in $ counts everything
    in the file, earlier runs too; it needs both prices, in $ per million tokens."""

    attempts: int = 5
    parallel: int = 4
    requests_per_minute: float | None = None
    first_wait: float = 1.0
    budget: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and (self.price_in is None or self.price_out is None):
            raise InputError(
                "a budget needs the model's prices",
                where="judge.budget",
                expected="judge.price_in and judge.price_out, $ per million tokens",
                fix="they stand on the provider's price page; 0 for a server of your own",
            )

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """In $; 0 without prices."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / _MILLION


@dataclass(frozen=True)
class Question:
    """``about`` is written beside the reply (row id, sample, ...) and is no part of the key, except through
    ``salt``: what tells two samples of one question apart."""

    messages: Messages
    schema: dict[str, Any]
    salt: Any
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Asker:
    """Asks ``provider`` and keeps replies in ``path``. ``sleep`` and ``clock`` are there for tests."""

    provider: Provider
    model: Model
    limits: Limits
    path: Path
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.replies: dict[str, dict[str, Any]] = {}
        self.spent, self.reserved, self.requests = 0.0, 0.0, 0
        self.next_slot = self.clock()
        self.stopped = threading.Event()
        for line in _read_lines(self.path):
            self.spent += float(line.get("cost", 0.0))
            if "verdict" in line:
                self.replies[line["key"]] = line["verdict"]

    def key(self, question: Question) -> str:
        """What the reply depends on, as one hash."""
        return hash_json([self.model.identity, question.messages, question.schema, question.salt])

    def ask_all(self, questions: Sequence[Question], progress: Callable[[int], None] = lambda n: None) -> list[Any]:
        """The verdicts in order. Questions that no attempt answered are told together after the others are done; what
        cannot succeed (a refused key, the budget) ends it at once, with every reply so far in the file."""
        found: dict[int, Any] = {}
        failed: list[str] = []
        self.stopped.clear()
        with ThreadPoolExecutor(max_workers=self.limits.parallel) as pool:
            waiting = {pool.submit(self.ask, question): i for i, question in enumerate(questions)}
            try:
                for done in as_completed(waiting):
                    try:
                        found[waiting[done]] = done.result()
                    except Busy as error:
                        failed.append(f"{_named(questions[waiting[done]])}: {error}")
                    progress(1)
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if failed:
            raise TunegateError(
                f"{len(failed)} of {len(questions)} questions have no valid reply after "
                f"{self.limits.attempts} attempts each",
                where=str(self.path),
                got="; ".join(sorted(failed)[:3]),
                fix="the same command asks only these again",
            )
        return [found[i] for i in range(len(questions))]

    def ask(self, question: Question) -> dict[str, Any]:
        """The verdict on one question, from the file or from the model. :class:`Busy` after the last attempt."""
        key = self.key(question)
        with self.lock:
            if key in self.replies:
                return self.replies[key]
        messages, last = list(question.messages), Busy("not asked")
        for attempt in range(1, self.limits.attempts + 1):
            if self.stopped.is_set():
                raise Busy("stopped")
            worst = self._reserve(messages)
            self._pace()
            try:
                reply = self.provider.complete(messages, question.schema)
            except Busy as error:
                last = error
                self._book(
                    worst, self._paid(error.used, messages), {"key": key, "failed": str(error), **question.about}
                )
                if attempt < self.limits.attempts:
                    self._wait(attempt, key, error.wait)
                continue
            except BaseException:
                self.stopped.set()  # here: a free thread would send the next question before ask_all hears of it
                self._book(worst, 0.0, None)
                raise
            used = (reply.input_tokens, reply.output_tokens)
            paid = self._paid(used if any(used) else None, messages)
            verdict, fault = read_verdict(reply.text, question.schema)
            line = {"key": key, "model": self.model.name, **question.about, "in": used[0], "out": used[1]}
            if verdict is not None:
                with self.lock:
                    self.replies[key] = verdict
                self._book(worst, paid, {**line, "verdict": verdict})
                return verdict
            last = Busy(f"the reply does not fit: {fault}")
            self._book(worst, paid, {**line, "failed": str(last)})
            messages = [
                *question.messages,
                {"role": "assistant", "content": reply.text or "(nothing)"},
                {"role": "user", "content": f"That does not fit: {fault}. Reply with the JSON object only."},
            ]
        raise last

    def _paid(self, used: tuple[int, int] | None, messages: Messages) -> float:
        return self.limits.cost(*used) if used is not None else self._worst(messages)

    def _worst(self, messages: Messages) -> float:
        sent = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 16 for m in messages)
        return self.limits.cost(sent, self.model.max_tokens)

    def _reserve(self, messages: Messages) -> float:
        """Set the worst case of a request aside. :class:`OverBudget` if it does not fit."""
        worst, budget = self._worst(messages), self.limits.budget
        with self.lock:
            if budget is not None and self.spent + self.reserved + worst > budget:
                self.stopped.set()
                raise OverBudget(
                    "the budget is used up",
                    where="judge.budget",
                    expected=f"at most ${budget:g}",
                    got=f"${self.spent:.4f} spent, ${self.reserved:.4f} under way, the next request up to ${worst:.4f}",
                    fix="raise it; the replies so far are kept and not asked again",
                )
            self.reserved += worst
            self.requests += 1
        return worst

    def _book(self, reserved: float, paid: float, line: dict[str, Any] | None) -> None:
        """Replace a reservation by what it came to, and write the line."""
        with self.lock:
            self.reserved -= reserved
            self.spent += paid
            if line is not None:
                _append(self.path, {**line, "cost": paid})

    def _pace(self) -> None:
        """Wait for this request's turn: evenly spaced, and not before a pause that a server asked for is over."""
        with self.lock:
            now = self.clock()
            start = max(now, self.next_slot)
            rate = self.limits.requests_per_minute
            self.next_slot = start + (60.0 / rate if rate else 0.0)
        if start > now:
            self.sleep(start - now)

    def _wait(self, attempt: int, key: str, asked: float | None) -> None:
        """Wait before the next attempt. A time that the server asked for holds every request back."""
        if asked is not None and asked > LONGEST_WAIT:
            raise Busy(f"the server asks to wait {asked:.0f} s")
        jitter = random.Random(f"{key}/{attempt}").uniform(0.5, 1.0)
        pause = min(self.limits.first_wait * 2.0 ** (attempt - 1), LONGEST_WAIT) * jitter
        if asked is not None:
            with self.lock:
                self.next_slot = max(self.next_slot, self.clock() + asked)
        self.sleep(max(pause, 0.0))


def _named(question: Question) -> str:
    return ", ".join(f"{k} {v}" for k, v in question.about.items()) or "a question"


def read_verdict(text: str, schema: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """``(verdict, "")``, or ``(None, what is wrong with it)``. Words around the object and a code fence are allowed."""
    import jsonschema

    start = text.find("{")
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start:]) if start >= 0 else (None, 0)
    except (ValueError, RecursionError):
        return None, "it is not whole JSON"
    if not isinstance(found, dict):
        return None, "it holds no JSON object"
    wrong = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(found)), None)
    if wrong is not None:
        return None, f"{wrong.json_path}: {wrong.message[:200]}"
    return found, ""


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line in one write and see it on disk."""
    data = (json.dumps(line, ensure_ascii=True) + "\n").encode("ascii")
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the file; what a killed run left after the last of them is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with explain_os_error(path):
            os.truncate(path, whole)
    found = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not isinstance(value.get("key"), str):
                raise ValueError("no reply")
        except ValueError:
            fix = "remove this line: its question is asked again"
            raise InputError("a line of the judge's replies is damaged", where=f"{path}:{number}", fix=fix) from None
        found.append(value)
    return found
