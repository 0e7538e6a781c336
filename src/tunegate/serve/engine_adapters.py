"""The adapters of an engine: by key, in a fixed number of bytes, loaded beside the passes.

A thread of its own checks, hashes and lays out what an adapter's files hold, and measures that it changes what the base
says (``engine.effect``). What it does takes cores from a pass, and waits for none: an adapter is in its slot, and
whoever asked is told, whatever the engine's loop does meanwhile. After :meth:`Adapters.identify` everything is done
ahead for the :meth:`Adapters.load` that mostly follows. One for merged weights is also proven by rows of the loop's
(``lane``).

The files are read by a second thread. One whose disk does not answer is left behind: others are read by another, and
what comes late after all goes on from there.

Least recently used ones are pushed out first; one that rows use, or that is pinned, stays. A job whose adapter is not
in memory waits here; ``wake`` is called when the loop may begin it, which it learns by :meth:`Adapters.come`.

All of it is for any thread. It makes no passes, and knows no rows but those of proofs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from tunegate.adapter.segmented import Fetched, Identified, Merged, Served
from tunegate.engine.effect import Effect
from tunegate.errors import InputError, TunegateError
from tunegate.export.parity import Limits
from tunegate.serve import lane
from tunegate.serve.jobs import MERGED, EngineFull, Job, Loaded
from tunegate.serve.lane import Proof, Read

Tell = Callable[[Loaded | TunegateError], None]
PATIENCE = 3.0  # seconds for an adapter's files; then others are read beside it
MOST_LATE = 8  # reads that hang; the next one holds up the others


class _Late(Exception):
    """The files of an adapter are still being read."""


@dataclass(eq=False)
class Adapter:
    """``slot`` and ``merged`` None: known, but not in memory. ``proof`` while it is under way."""

    key: str
    folder: Path
    pinned: bool
    slot: int | None = None
    merged: Merged | None = None
    bytes: int = 0
    rank: int = 0
    moved: float = 0.0
    users: int = 0  # jobs that run or are about to
    reading: bool = False
    proof: Proof | None = None
    begun: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    asked: list[Tell] = field(default_factory=list)
    waiting: list[tuple[int, Job]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return self.slot is not None or self.merged is not None

    @property
    def ready(self) -> bool:
        return self.held and self.proof is None


@dataclass(frozen=True)
class Come:
    """A job that waited, and its adapter or why it has none."""

    number: int
    job: Job
    adapter: Adapter | TunegateError


class Adapters:
    """``budget``: bytes for factors. ``vocabulary``: of the base."""

    def __init__(self, served: Served, effect: Effect, budget: int, vocabulary: int, wake: Callable[[], None]):
        self.served, self.budget = served, budget
        self._effect, self._vocabulary, self._wake = effect, vocabulary, wake
        self._known: OrderedDict[str, Adapter] = OrderedDict()  # the least recently used first
        self._leaving: list[Adapter] = []
        self._come: list[Come] = []
        self._to_prove: list[Adapter] = []
        self._lock = threading.RLock()
        self._reader, self._disk = _thread("adapters"), _thread("disk")
        self._late = 0  # like the next, the reader's alone
        self._ahead: tuple[Identified, float] | None = None

    # --- what is asked from outside ------------------------------------------------------------------------------

    def load(self, key: str, folder: Path, pinned: bool, tell: Tell) -> None:
        """Read an adapter and keep it; ``tell`` is called, from any thread, when it can answer, or with why not."""
        with self._lock:
            adapter = self._known.setdefault(key, Adapter(key, folder, pinned))
            adapter.folder, adapter.pinned = folder, pinned
            if not adapter.ready:
                adapter.asked.append(tell)
                self._read(adapter)
                return
            loaded = Loaded(key, adapter.bytes, adapter.rank, 0.0, adapter.moved)
        tell(loaded)

    def identify(self, folder: Path, tell: Callable[[str | TunegateError], None]) -> None:
        """The content hash of the adapter in ``folder``, which may be loaded next."""

        def hashed(key: Future[str]) -> None:
            error = key.exception()
            tell(key.result() if error is None else _told(error, folder))

        def work(files: Future[Fetched] | None = None) -> None:
            self._ahead = None
            try:
                found = self.served.laid_out(self._fetched(folder, work) if files is None else files.result())
            except _Late:
                return
            except Exception as error:
                tell(_told(error, folder))
                return
            found.hashing.add_done_callback(hashed)
            self._ahead = found, self._effect_of(found, None)  # while it is hashed

        self._reader.submit(work)

    def unload(self, key: str) -> None:
        """Forget an adapter; rows that run with it finish first."""
        with self._lock:
            adapter = self._known.pop(key, None)
            if adapter is None:
                return
            self._refuse(adapter, InputError("the adapter was unloaded", got=key))
            if adapter.held:
                self._leaving.append(adapter)
                self._let_go()

    # --- what the loop asks --------------------------------------------------------------------------------------

    def use(self, key: str, folder: Path | None, number: int, job: Job) -> Adapter | None:
        """The adapter for a job, until :meth:`release`; None: the job comes when it is there. ``folder``: where to find
        one that is not known."""
        with self._lock:
            adapter = self._known.get(key)
            if adapter is None:
                if folder is None:
                    raise InputError("the engine knows no adapter with this hash", got=key)
                adapter = self._known[key] = Adapter(key, folder, pinned=False)
            self._known.move_to_end(key)
            if not adapter.ready:
                adapter.waiting.append((number, job))
                self._read(adapter)
                return None
            adapter.users += 1
            return adapter

    def release(self, adapter: Adapter) -> None:
        """A job with it is over."""
        with self._lock:
            adapter.users -= 1
            self._let_go()

    def cancel(self, number: int) -> None:
        """Forget a job that waits."""
        with self._lock:
            for adapter in self._known.values():
                adapter.waiting = [(n, job) for n, job in adapter.waiting if n != number]
            for one in [one for one in self._come if one.number == number]:
                self._come.remove(one)
                if isinstance(one.adapter, Adapter):
                    self.release(one.adapter)

    @property
    def waits(self) -> bool:
        """Whether :meth:`come` has something to tell."""
        return bool(self._come or self._to_prove)

    @property
    def waiting(self) -> int:
        """Jobs that wait for adapters, or whose wait is just over."""
        with self._lock:
            return sum(len(a.waiting) for a in self._known.values()) + len(self._come)

    @property
    def reading(self) -> bool:
        """Whether adapters are being read."""
        with self._lock:
            return any(adapter.reading for adapter in self._known.values())

    def come(self) -> tuple[list[Come], list[Adapter]]:
        """Jobs whose wait is over, their adapters in use from now on, and adapters whose proof is to be made."""
        with self._lock:
            found = self._come, self._to_prove
            self._come, self._to_prove = [], []
            return found

    def proven(self, adapter: Adapter, error: TunegateError | None) -> None:
        """The proof's rows are done; ``error``: they did not get so far."""
        with self._lock:
            assert adapter.proof is not None
            try:
                if error is not None:
                    raise error
                adapter.proof.require(Limits())
            except TunegateError as why:
                self._push_out(adapter)
                self._refuse(adapter, why)
                return
            self._drop_factors(adapter)
            self._ready(adapter)

    # --- reading -------------------------------------------------------------------------------------------------

    def _read(self, adapter: Adapter) -> None:
        if not adapter.reading and adapter.proof is None:
            adapter.begun, adapter.reading = time.monotonic(), True
            self._reader.submit(self._work, adapter)

    def _fetched(self, folder: Path, work: Callable[[Future[Fetched]], None]) -> Fetched:
        """What the files in ``folder`` hold. :class:`_Late`: ``work`` will be done when that is known."""
        files = self._disk.submit(self.served.fetching(folder))
        if self._late < MOST_LATE:
            wait([files], PATIENCE)
            if not files.done():
                self._late += 1
                self._disk.shutdown(wait=False)
                self._disk = _thread("disk")
                files.add_done_callback(lambda files: self._come_late(work, files))
                raise _Late
        return files.result()

    def _come_late(self, work: Callable[[Future[Fetched]], None], files: Future[Fetched]) -> None:
        def go_on() -> None:
            self._late -= 1
            work(files)

        self._reader.submit(go_on)

    def _work(self, adapter: Adapter, files: Future[Fetched] | None = None) -> None:
        """In the reader's thread: all that costs time, without the lock."""
        try:
            read = self._measured(adapter, files)
        except _Late:
            return
        except Exception as error:  # a file that changed under us, a full memory: this adapter's fault alone
            with self._lock:
                self._refuse(adapter, _told(error, adapter.folder))
            return
        with self._lock:
            adapter.reading = False
            if self._known.get(adapter.key) is not adapter:  # unloaded meanwhile
                return
            try:
                self._place(adapter, read)
            except Exception as error:
                self._refuse(adapter, _told(error, adapter.folder))
                return
            if adapter.proof is None:
                self._ready(adapter)
            else:
                self._to_prove.append(adapter)
                self._wake()
        self.served.spares.refill()

    def _measured(self, adapter: Adapter, files: Future[Fetched] | None) -> Read:
        """The adapter, which changes what the base says. ``files``: where they came late."""
        (found, moved), self._ahead = self._ahead or (None, None), None
        if files is not None:
            found, moved = self.served.laid_out(files.result()), None
        elif found is None or found.key != adapter.key.removesuffix(MERGED):
            found, moved = self.served.laid_out(self._fetched(adapter.folder, partial(self._work, adapter))), None
        read = lane.read(self.served, found, adapter.folder, adapter.key, self._vocabulary)
        if moved is None or read.merged is not None:
            moved = self._effect_of(found, read.merged)
        if not math.isfinite(moved):
            raise InputError("the adapter gives NaN or infinite logits", where=str(adapter.folder))
        if moved == 0.0:
            raise InputError("the adapter changes no logit of a probe", where=str(adapter.folder))
        adapter.moved, adapter.stages = moved, found.seconds
        return read

    def _effect_of(self, found: Identified, merged: Merged | None) -> float:
        begun = time.perf_counter()
        moved = self._effect.of(found.factors, found.largest, merged)
        found.seconds["probe"] = time.perf_counter() - begun
        return moved

    # --- with the lock -------------------------------------------------------------------------------------------

    def _place(self, adapter: Adapter, read: Read) -> None:
        """What was read into the table, if there is room."""
        adapter.bytes, adapter.rank = read.nbytes, max(f.rank for f in read.factors.values())
        if read.merged is None:
            self._make_room(adapter)
        adapter.slot, adapter.merged = self.served.table.add(read.factors), read.merged
        if read.merged is not None:
            adapter.proof = Proof(read, adapter.slot, adapter.folder)

    def _ready(self, adapter: Adapter) -> None:
        seconds = time.monotonic() - adapter.begun
        loaded = Loaded(adapter.key, adapter.bytes, adapter.rank, seconds, adapter.moved, adapter.stages)
        asked, adapter.asked = adapter.asked, []
        for tell in asked:
            tell(loaded)
        waiting, adapter.waiting = adapter.waiting, []
        adapter.users += len(waiting)
        self._over(waiting, adapter)
        self._let_go()

    def _refuse(self, adapter: Adapter, error: TunegateError) -> None:
        """Forget an adapter, and tell everybody who waits for it."""
        adapter.reading = False
        if self._known.get(adapter.key) is adapter:
            del self._known[adapter.key]
        asked, adapter.asked = adapter.asked, []
        for tell in asked:
            tell(error)
        waiting, adapter.waiting = adapter.waiting, []
        self._over(waiting, error)

    def _over(self, waiting: list[tuple[int, Job]], adapter: Adapter | TunegateError) -> None:
        self._come += [Come(number, job, adapter) for number, job in waiting]
        if waiting:
            self._wake()

    def _let_go(self) -> None:
        """Unloaded adapters whose last row is done."""
        for adapter in [a for a in self._leaving if not a.users and a.proof is None]:
            self._leaving.remove(adapter)
            self._push_out(adapter)

    def _push_out(self, adapter: Adapter) -> None:
        self._drop_factors(adapter)
        adapter.merged = None

    def _drop_factors(self, adapter: Adapter) -> None:
        if adapter.slot is not None:
            self.served.table.remove(adapter.slot)
        adapter.slot = adapter.proof = None

    def _make_room(self, adapter: Adapter) -> None:
        """Push out adapters that nobody uses until this one fits."""
        for other in list(self._known.values()):
            if self._bytes + adapter.bytes <= self.budget:
                return
            if other.ready and other.merged is None and not other.users and not other.pinned:
                self._push_out(other)
        if self._bytes + adapter.bytes > self.budget:
            raise EngineFull(
                "no room for the adapter: all others are pinned or in use", where="--adapter-cache",
                expected=f"{adapter.bytes:,} bytes beside {self._bytes:,}", got=f"{self.budget:,}",
            )  # fmt: skip

    @property
    def _bytes(self) -> int:
        """Of factors."""
        return sum(a.bytes for a in self._held() if a.merged is None)

    def _held(self) -> list[Adapter]:
        return [a for a in (*self._known.values(), *self._leaving) if a.held]

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {
                "waiting": self.waiting,
                "adapters": sum(a.held for a in self._known.values()),
                "adapter_bytes": self._bytes,
                "merged": sum(a.merged is not None for a in self._known.values()),
                "merged_bytes": sum(a.bytes for a in self._held() if a.merged is not None),
            }


def _thread(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(1,))


def _told(error: BaseException, folder: Path) -> TunegateError:
    if isinstance(error, TunegateError):
        return error
    return InputError("the adapter cannot be read", where=str(folder), got=f"{type(error).__name__}: {error}")
