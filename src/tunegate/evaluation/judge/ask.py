"""Questions to a judge: each asked until it has a valid reply, paid once, and never asked again.

Replies are lines of a JSONL file under a key of everything that they depend on: model and its settings, rubric,
prompt, answers, sample. The file is the cache, the log and the bill. A line is written whole or not at all; what a
killed run left unfinished at the end is cut off, and the same call goes on from there.

What fails is tried again with growing waits (exponential, with jitter; the server's Retry-After if it is longer), a
reply that is not what the schema asks for with the fault named. The budget is a hard stop: a request is sent only if
its worst case, a token for each byte sent and the most tokens that may come back, still fits into what is left. A
reply that was lost, or came without a count of its tokens, is booked at its worst case; only what was under way when
the process was killed is booked nowhere.

It knows no rubric and makes no scores.
"""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections import Counter
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
_FRAME = 512  # tokens that a service may add to a question: roles, and the schema in its own words
_TRIED = 50  # places of a reply at which a verdict may begin


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
    """Asks ``provider`` and keeps replies in ``path``. ``sleep`` and ``clock`` are there for tests; the default sleep
    ends early where asking is stopped."""

    provider: Provider
    model: Model
    limits: Limits
    path: Path
    sleep: Callable[[float], object] | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.replies: dict[str, dict[str, Any]] = {}
        self.costs: dict[str, float] = {}
        self.spent, self.reserved, self.under_way = 0.0, 0.0, 0
        self.next_slot = self.clock()
        self.stopped = threading.Event()
        self.sleep = self.sleep or self.stopped.wait
        for line in _read_lines(self.path):
            self._count(line["key"], float(line.get("cost", 0.0)))
            if "verdict" in line:
                self.replies[line["key"]] = line["verdict"]

    def key(self, question: Question) -> str:
        """What the reply depends on, as one hash."""
        return hash_json([self.model.identity, question.messages, question.schema, question.salt])

    def cost_of(self, questions: Sequence[Question]) -> float:
        """What the replies to ``questions`` cost in $, failed attempts and earlier runs included."""
        return sum(self.costs.get(key, 0.0) for key in dict.fromkeys(map(self.key, questions)))

    def ask_all(self, questions: Sequence[Question], progress: Callable[[int], None] = lambda n: None) -> list[Any]:
        """The verdicts in order; equal questions are asked once. Those that no attempt answered are told together
        after the others are done; what cannot succeed (a refused key, the budget) ends it at once, with every reply so
        far in the file."""
        keys = [self.key(question) for question in questions]
        unique, copies = dict(zip(keys, questions, strict=True)), Counter(keys)
        failed: list[str] = []
        self.stopped.clear()
        with ThreadPoolExecutor(max_workers=self.limits.parallel) as pool:
            waiting = {pool.submit(self.ask, question): key for key, question in unique.items()}
            try:
                for done in as_completed(waiting):
                    try:
                        done.result()
                    except Busy as error:
                        failed.append(f"{_named(unique[waiting[done]])}: {error}")
                    progress(copies[waiting[done]])
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if failed:
            raise TunegateError(
                f"{len(failed)} of {len(unique)} questions have no valid reply after "
                f"{self.limits.attempts} attempts each",
                where=str(self.path),
                got="; ".join(sorted(failed)[:3]),
                fix="the same command asks only these again",
            )
        return [self.replies[key] for key in keys]

    def ask(self, question: Question) -> dict[str, Any]:
        """The verdict on one question, from the file or from the model. :class:`Busy` after the last attempt."""
        key = self.key(question)
        with self.changed:
            if key in self.replies:
                return self.replies[key]
        messages, last = list(question.messages), Busy("not asked")
        for attempt in range(1, self.limits.attempts + 1):
            line = {"key": key, "model": self.model.name, **question.about}
            self._pace()
            worst = self._reserve(messages)
            try:
                reply = self.provider.complete(messages, question.schema)
            except Busy as error:
                last = error
                self._book(worst, self._paid(error.used, worst), {**line, "failed": error.problems[0].what})
                if attempt < self.limits.attempts:
                    self._wait(attempt, key, error.wait)
                continue
            except BaseException:
                self.stopped.set()  # here: a free thread would send the next question before ask_all hears of it
                self._book(worst, 0.0, None)
                raise
            used = (reply.input_tokens, reply.output_tokens)
            paid = self._paid(used if reply.counted else None, worst)
            verdict, fault = read_verdict(reply.text, question.schema)
            line |= {"in": used[0], "out": used[1]}
            if verdict is not None:
                self._book(worst, paid, {**line, "verdict": verdict})
                return verdict
            last = Busy(f"the reply does not fit: {fault}")
            self._book(worst, paid, {**line, "failed": last.problems[0].what})
            messages = [
                *question.messages,
                {"role": "assistant", "content": reply.text.strip() or "(nothing)"},
                {"role": "user", "content": f"That does not fit: {fault}. Reply with the JSON object only."},
            ]
        raise last

    def _paid(self, used: tuple[int, int] | None, worst: float) -> float:
        return self.limits.cost(*used) if used is not None else worst

    def _worst(self, messages: Messages) -> float:
        sent = sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in messages)
        return self.limits.cost(sent + _FRAME, self.model.max_tokens)

    def _reserve(self, messages: Messages) -> float:
        """Set the worst case of a request aside, once there is room for it beside those under way, which may cost
        less than theirs. :class:`OverBudget` if there will be none."""
        worst, budget = self._worst(messages), self.limits.budget
        with self.changed:
            while budget is not None and self.spent + self.reserved + worst > budget and not self.stopped.is_set():
                if self.spent + worst > budget:
                    self.stopped.set()
                    raise OverBudget(
                        "the judge's budget is used up",
                        where="judge.budget",
                        expected=f"at most ${budget:g}",
                        got=f"${self.spent:.4f} spent, the next request may cost up to ${worst:.4f}",
                        fix="raise it; the replies so far are kept and not asked again",
                    )
                self.changed.wait()
            if self.stopped.is_set():
                raise Busy("stopped")
            self.reserved += worst
            self.under_way += 1
        return worst

    def _count(self, key: str, cost: float) -> None:
        self.spent += cost
        self.costs[key] = self.costs.get(key, 0.0) + cost

    def _book(self, reserved: float, paid: float, line: dict[str, Any] | None) -> None:
        """Replace a reservation by what it came to, and write the line."""
        with self.changed:
            self.under_way -= 1
            self.reserved = self.reserved - reserved if self.under_way else 0.0  # no rounding is left over
            self.changed.notify_all()
            if line is not None:
                _append(self.path, {**line, "cost": paid})
                self._count(line["key"], paid)
                if "verdict" in line:
                    self.replies[line["key"]] = line["verdict"]

    def _pace(self) -> None:
        """Wait for this request's turn: evenly spaced, and not before a pause that a server asked for is over."""
        with self.changed:
            now = self.clock()
            start = max(now, self.next_slot)
            rate = self.limits.requests_per_minute
            self.next_slot = start + (60.0 / rate if rate else 0.0)
        if start > now:
            self._sleep(start - now)

    def _sleep(self, seconds: float) -> None:
        assert self.sleep is not None
        self.sleep(seconds)
        if self.stopped.is_set():
            raise Busy("stopped")

    def _wait(self, attempt: int, key: str, asked: float | None) -> None:
        """Wait before the next attempt. A time that the server asked for holds every request back."""
        if asked is not None and asked > LONGEST_WAIT:
            raise Busy(f"the server asks to wait {asked:.0f} s")
        jitter = random.Random(f"{key}/{attempt}").uniform(0.5, 1.0)
        pause = min(self.limits.first_wait * 2.0 ** (attempt - 1), LONGEST_WAIT) * jitter
        if asked is not None:
            with self.changed:
                self.next_slot = max(self.next_slot, self.clock() + asked)
        self._sleep(pause)


def _named(question: Question) -> str:
    return ", ".join(f"{k} {v}" for k, v in question.about.items()) or "a question"


def read_verdict(text: str, schema: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """``(verdict, "")``, or ``(None, what is wrong with it)``. Words around the object and a code fence are allowed; of
    several objects the last that fits is the verdict, since reasoning comes before it."""
    import jsonschema

    validator, decoder = jsonschema.Draft202012Validator(schema), json.JSONDecoder()
    verdict, fault, start = None, "it holds no JSON object", text.find("{")
    for _ in range(_TRIED):
        if start < 0:
            break
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            fault = "it is not whole JSON"
            start = text.find("{", start + 1)
            continue
        wrong = next(iter(validator.iter_errors(found)), None)
        if wrong is None:
            verdict = found
        else:
            fault = f"{wrong.json_path}: {wrong.message[:200]}"
        start = text.find("{", end)
    return (verdict, "") if verdict is not None else (None, fault)


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line and see it on disk, whole or not at all."""
    data = (json.dumps(line, ensure_ascii=True) + "\n").encode("ascii")
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, data) < len(data):  # the disk was full after a part of it
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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
