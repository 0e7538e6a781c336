"""The engine itself: a base, adapters in a fixed number of bytes, and a scheduler, driven by jobs.

Adapters are kept by key, least recently used pushed out first; one that running rows use, or that is pinned, stays. A
job whose adapter was pushed out waits until it is read again. Reading and checking happen in a thread of their own,
while passes go on; what takes a place in a pass is only its probe, a row of one token like all others, whose logits are
held against the base's. An adapter that moves none is refused. One that is to run on merged weights (``lane``) is
also proven on them, and then keeps these alone; they stay, beside what the others have.

It speaks no protocol (``engine_worker`` does), and is for one thread but for :meth:`EngineCore.read`.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunegate.adapter.segmented import Merged, Served
from tunegate.engine.constrain import AnswerForm, Constraint, build_constraint
from tunegate.engine.page_store import token_bytes
from tunegate.engine.prompt_scores import PromptScores
from tunegate.engine.runner import Runner, evaluating
from tunegate.engine.sampling import Chooser, Chosen, Picking
from tunegate.engine.scheduler import PAGE_TOKENS, STEP_TOKENS, Event, Row, Scheduler
from tunegate.errors import InputError, TunegateError
from tunegate.export.parity import Limits
from tunegate.kernels import native
from tunegate.model.loading import (
    DTYPES,
    choose_device,
    choose_dtype,
    empty_model,
    load_model,
    load_tokenizer,
    longest_row,
)
from tunegate.model.resolve import resolve_base
from tunegate.model.weights import load_object
from tunegate.serve import lane
from tunegate.serve.jobs import EngineFacts, EngineFull, EngineOptions, Job, Loaded, TokenLogprob, Tokens
from tunegate.serve.lane import Proof, Read

_PROBE = 1  # the token that adapters are probed with
_MOST_FORMS = 256  # compiled ones kept


@dataclass
class _Adapter:
    """``slot`` and ``merged`` None: known, but not in memory. ``probes``: rows that prove it and are not done."""

    key: str
    folder: Path
    pinned: bool
    slot: int | None = None
    merged: Merged | None = None
    bytes: int = 0
    rank: int = 0
    moved: float = 0.0
    users: int = 0  # rows that run or wait with it
    reading: Future[Read] | None = None
    probes: set[Row] = field(default_factory=set)
    proof: Proof | None = None
    begun: float = 0.0
    asked: list[Callable[[Loaded | TunegateError], None]] = field(default_factory=list)
    waiting: list[tuple[int, Job]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return self.slot is not None or self.merged is not None

    @property
    def ready(self) -> bool:
        return self.held and not self.probes


@dataclass
class _Running:
    """A job and its row. ``scores`` of its prompt. ``told``: whether anything was sent."""

    row: Row
    job: Job
    adapter: _Adapter | None
    scores: PromptScores | None
    told: bool = False


class EngineCore:
    """``send(id, tokens or error)`` is called with what each job gets."""

    def __init__(self, options: EngineOptions, send: Callable[[int, Tokens | TunegateError], None]):
        started = time.monotonic()
        self.options, self.send = options, send
        if options.threads:
            torch.set_num_threads(options.threads)
        resolved = resolve_base(options.base, offline=True, trust_remote_code=options.trust_remote_code)
        device = choose_device(options.device, "--device")
        dtype, _ = choose_dtype(options.compute_dtype, device=device)
        narrow = native.library() is not None and device.startswith("cpu")
        model: Any = load_model(
            resolved.path, dtype=dtype, recipe=options.recipe, narrow=narrow,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        model.to(torch.device(device))
        self.tokenizer = load_tokenizer(resolved.path, trust_remote_code=options.trust_remote_code)
        self.runner = Runner(model)
        skeleton = empty_model(resolved.path, trust_remote_code=options.trust_remote_code)
        factors = self.runner.dtype if options.adapter_dtype == "auto" else DTYPES[options.adapter_dtype]
        self.served = Served(model, skeleton, factors)
        page_bytes = PAGE_TOKENS * token_bytes(self.runner)
        pages = options.cache_bytes // page_bytes
        if pages < 4:
            raise InputError(
                "the cache is too small for a page of every layer", where="--kv-cache",
                expected=f"at least {4 * page_bytes:,} bytes", got=f"{options.cache_bytes:,}",
            )  # fmt: skip
        self.scheduler = Scheduler(
            self.runner, pages, served=self.served, most_rows=options.most_rows,
            step_tokens=options.step_tokens or STEP_TOKENS,
        )  # fmt: skip
        self.adapters: OrderedDict[str, _Adapter] = OrderedDict()  # the least recently used first
        self._jobs: dict[int, _Running] = {}
        self._rows: dict[Row, int] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._forms: OrderedDict[Any, Constraint] = OrderedDict()
        self._probes: dict[Row, _Adapter] = {}
        self._plain = self._probe_base()
        self._leaving: list[_Adapter] = []
        positions = longest_row(load_object(resolved.path / "config.json"))
        self.facts = EngineFacts(
            context=min(options.context or positions or 2**31, self.scheduler.room(1, 2**31)),
            vocabulary=int(model.config.get_text_config().vocab_size),
            dtype=str(self.runner.dtype).removeprefix("torch."),
            path=self.runner.path_reason,
            pages=pages,
            page_tokens=PAGE_TOKENS,
            base_bytes=sum(t.numel() * t.element_size() for t in _tensors(model)),
            load_seconds=time.monotonic() - started,
        )

    # --- jobs -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has something to do now."""
        return self.scheduler.busy or any(a.reading is not None and a.reading.done() for a in self.adapters.values())

    @property
    def reading(self) -> bool:
        """Whether adapters are being read."""
        return any(a.reading is not None for a in self.adapters.values())

    def submit(self, number: int, job: Job, folder: Path | None = None) -> None:
        """Take a job; what is wrong with it goes to ``send`` as an error. ``folder``: where its adapter is."""
        try:
            self._check(job)
            adapter = None
            if job.adapter is not None:
                adapter = self.adapters.get(job.adapter)
                if adapter is None:
                    if folder is None:
                        raise InputError("the engine knows no adapter with this hash", got=job.adapter)
                    adapter = self.adapters[job.adapter] = _Adapter(job.adapter, folder, pinned=False)
            if adapter is not None and not adapter.ready:
                adapter.waiting.append((number, job))
                self._read(adapter)
            else:
                self._start(number, job, adapter)
        except TunegateError as error:
            self.send(number, error)

    def _check(self, job: Job) -> None:
        vocabulary = self.facts.vocabulary
        bad = next((t for t in (*job.tokens, *(i for i, _ in job.picking.logit_bias)) if not 0 <= t < vocabulary), None)
        if bad is not None:
            raise InputError("a token id is outside of the vocabulary", expected=f"0 to {vocabulary - 1}", got=str(bad))
        if not job.tokens or job.max_new_tokens < 0:
            raise InputError("nothing to continue", got=f"{len(job.tokens)} tokens, {job.max_new_tokens} to make")
        most = self.facts.context - min(1, job.max_new_tokens)
        if len(job.tokens) > most:
            raise InputError(
                "the prompt is longer than what can be read", expected=f"at most {most} tokens",
                got=f"{len(job.tokens)}",
            )  # fmt: skip
        if len(self._jobs) >= self.options.most_rows + self.options.most_waiting:
            raise EngineFull("too many answers are waiting", got=f"{len(self._jobs)}", fix="send it again later")

    def _start(self, number: int, job: Job, adapter: _Adapter | None) -> None:
        state = None if job.form is None else self._form(job).start()
        room = max(1, min(job.max_new_tokens, self.facts.context - len(job.tokens)))
        scores = None if job.prompt_logprobs is None else PromptScores(job.tokens, job.prompt_logprobs)
        row = Row(
            list(job.tokens),
            self.scheduler.room(len(job.tokens), room),
            Chooser(job.picking, job.tokens, state, job.logprobs),
            frozenset(job.stop_ids),
            None if adapter is None else adapter.slot,
            b"" if adapter is None else adapter.key.encode()[-48:],
            None if adapter is None else adapter.merged,
            None if scores is None else scores.reader,
        )
        self.scheduler.add(row)
        self._jobs[number], self._rows[row] = _Running(row, job, adapter, scores), number
        if adapter is not None:
            adapter.users += 1
            self.adapters.move_to_end(adapter.key)

    def _form(self, job: Job) -> Constraint:
        key = (job.form, job.stop_ids)
        if key not in self._forms:
            assert job.form is not None
            kind, value, compact = job.form
            self._forms[key] = build_constraint(AnswerForm(kind, value, compact), self.tokenizer, job.stop_ids)  # type: ignore[arg-type]
            while len(self._forms) > _MOST_FORMS:
                self._forms.popitem(last=False)
        self._forms.move_to_end(key)
        return self._forms[key]

    def cancel(self, number: int) -> None:
        if number in self._jobs:
            self.scheduler.cancel(self._jobs[number].row)
            self._end(number)
        for adapter in self.adapters.values():
            adapter.waiting = [(n, job) for n, job in adapter.waiting if n != number]

    def _end(self, number: int) -> None:
        running = self._jobs.pop(number)
        del self._rows[running.row]
        if running.adapter is not None:
            running.adapter.users -= 1
            self._let_go()

    def step(self) -> None:
        """Take adapters that were read, then one pass."""
        for adapter in [a for a in self.adapters.values() if a.reading is not None and a.reading.done()]:
            self._take(adapter)
        try:
            with evaluating(self.runner.model):
                events = self.scheduler.step()
        except TunegateError as error:
            self._fail_all(error)
            return
        for event in events:
            self._tell(event)

    def _fail_all(self, error: TunegateError) -> None:
        self.scheduler.clear()
        while self._probes:
            row, adapter = self._probes.popitem()
            self._proven(adapter, Event(row, error, None))
        for number in list(self._jobs):
            self.send(number, error)
            self._end(number)

    def _tell(self, event: Event) -> None:
        if event.row in self._probes:
            self._proven(self._probes.pop(event.row), event)
            return
        number = self._rows[event.row]
        running = self._jobs[number]
        if isinstance(event.chosen, TunegateError):
            self.send(number, event.chosen)
            self._end(number)
            return
        self.send(number, _tokens(running, event.chosen, event.finish))
        running.told = True
        if event.finish is not None:
            self._end(number)

    # --- adapters -------------------------------------------------------------------------------------------------

    def load(self, key: str, folder: Path, pinned: bool, tell: Callable[[Loaded | TunegateError], None]) -> None:
        """Read an adapter and keep it; ``tell`` is called when it can answer, or with why it cannot."""
        adapter = self.adapters.get(key)
        if adapter is None:
            adapter = self.adapters[key] = _Adapter(key, folder, pinned)
        adapter.folder, adapter.pinned = folder, pinned
        if adapter.ready:
            tell(Loaded(key, adapter.bytes, adapter.rank, 0.0, adapter.moved))
            return
        adapter.asked.append(tell)
        self._read(adapter)

    def identify(self, folder: Path, tell: Callable[[str | TunegateError], None]) -> None:
        """The content hash of the adapter in ``folder``, which may be loaded next. ``tell`` is called from the thread
        that reads."""

        def work() -> None:
            try:
                tell(self.served.identify(folder))
            except Exception as error:
                tell(error if isinstance(error, TunegateError) else _unreadable(folder, error))

        self._reader.submit(work)

    def unload(self, key: str) -> None:
        """Forget an adapter; rows that run with it finish first."""
        adapter = self.adapters.pop(key, None)
        if adapter is None:
            return
        self._refuse(adapter, InputError("the adapter was unloaded", got=key))
        if adapter.held:
            self._leaving.append(adapter)
            self._let_go()

    def _let_go(self) -> None:
        """Unloaded adapters whose last row is done."""
        for adapter in [a for a in self._leaving if not a.users and not a.probes]:
            self._leaving.remove(adapter)
            self._push_out(adapter)

    def _push_out(self, adapter: _Adapter) -> None:
        self._drop_factors(adapter)
        adapter.merged = None

    def _drop_factors(self, adapter: _Adapter) -> None:
        if adapter.slot is not None:
            self.served.table.remove(adapter.slot)
        adapter.slot = adapter.proof = None

    def _read(self, adapter: _Adapter) -> None:
        if adapter.reading is None and not adapter.probes:
            adapter.begun = time.monotonic()
            adapter.reading = self._reader.submit(
                lane.read, self.served, adapter.folder, adapter.key, self.facts.vocabulary
            )

    def _take(self, adapter: _Adapter) -> None:
        """An adapter that was read into the table, if there is room, and its probes into the queue."""
        assert adapter.reading is not None
        reading, adapter.reading = adapter.reading, None
        try:
            read = reading.result()
            adapter.bytes, adapter.rank = read.nbytes, max(f.rank for f in read.factors.values())
            if read.merged is None:
                self._make_room(adapter)
            adapter.slot, adapter.merged = self.served.table.add(read.factors), read.merged
        except Exception as error:  # a file that changed under us, a full memory: this adapter's fault alone
            self._refuse(adapter, error if isinstance(error, TunegateError) else _unreadable(adapter.folder, error))
            return
        slot = adapter.slot if read.merged is None else None
        rows = [self._probe_row(slot, read.merged, lambda logits: self._look(adapter, logits))]
        if read.merged is not None:
            adapter.proof = Proof(read, adapter.slot, adapter.folder)
            rows += adapter.proof.rows
        adapter.probes.update(rows)
        for row in rows:
            self._probes[row] = adapter
            self.scheduler.add(row, first=True)

    def _look(self, adapter: _Adapter, logits: torch.Tensor) -> None:
        moved = float((logits - self._plain).abs().max())
        if not math.isfinite(moved):
            raise InputError("the adapter gives NaN or infinite logits", where=str(adapter.folder))
        if moved == 0.0:
            raise InputError("the adapter changes no logit of a probe", where=str(adapter.folder))
        adapter.moved = moved

    def _proven(self, adapter: _Adapter, event: Event) -> None:
        """The end of one of an adapter's probes; after the last one what waited for it begins."""
        adapter.probes.discard(event.row)
        try:
            if isinstance(event.chosen, TunegateError):
                raise event.chosen
            if adapter.probes:
                return
            if adapter.proof is not None:
                adapter.proof.require(Limits())
                self._drop_factors(adapter)
        except TunegateError as error:
            for row in adapter.probes:
                self.scheduler.cancel(row)
                del self._probes[row]
            adapter.probes.clear()
            self._push_out(adapter)
            self._refuse(adapter, error)
            return
        loaded = Loaded(adapter.key, adapter.bytes, adapter.rank, time.monotonic() - adapter.begun, adapter.moved)
        asked, adapter.asked = adapter.asked, []
        for tell in asked:
            tell(loaded)
        waiting, adapter.waiting = adapter.waiting, []
        for number, job in waiting:
            try:
                self._start(number, job, adapter)
            except TunegateError as error:
                self.send(number, error)
        self._let_go()

    def _probe_row(self, slot: int | None, merged: Merged | None, look: Callable[[torch.Tensor], None]) -> Row:
        chooser = Chooser(Picking(temperature=0.0), (_PROBE,), look=look)
        return Row([_PROBE], 1, chooser, frozenset(), slot, b"probe", merged)

    def _probe_base(self) -> torch.Tensor:
        """The base's logits after the probe's token."""
        found: list[torch.Tensor] = []
        self.scheduler.add(self._probe_row(None, None, lambda logits: found.append(logits.clone())))
        with evaluating(self.runner.model):
            self.scheduler.step()
        return found[0]

    def _refuse(self, adapter: _Adapter, error: TunegateError) -> None:
        """Forget an adapter, and tell everybody who waits for it."""
        self.adapters.pop(adapter.key, None)
        for tell in adapter.asked:
            tell(error)
        for number, _ in adapter.waiting:
            self.send(number, error)
        adapter.asked, adapter.waiting = [], []

    def _make_room(self, adapter: _Adapter) -> None:
        """Push out adapters that nobody uses until this one fits."""
        budget = self.options.adapter_bytes
        for other in list(self.adapters.values()):
            if self.bytes_held + adapter.bytes <= budget:
                return
            if other.ready and other.merged is None and not other.users and not other.pinned:
                self._push_out(other)
        if self.bytes_held + adapter.bytes > budget:
            raise EngineFull(
                "no room for the adapter: all others are pinned or in use", where="--adapter-cache",
                expected=f"{adapter.bytes:,} bytes beside {self.bytes_held:,}", got=f"{budget:,}",
            )  # fmt: skip

    @property
    def bytes_held(self) -> int:
        """Of factors."""
        return sum(a.bytes for a in self._held() if a.merged is None)

    def _held(self) -> list[_Adapter]:
        return [a for a in (*self.adapters.values(), *self._leaving) if a.held]

    def stats(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + sum(len(a.waiting) for a in self.adapters.values()),
            "pages": scheduler.pool.pages,
            "pages_used": scheduler.pool.used,
            **vars(scheduler.counters),
            "adapters": sum(a.held for a in self.adapters.values()),
            "adapter_bytes": self.bytes_held,
            "merged": sum(a.merged is not None for a in self.adapters.values()),
            "merged_bytes": sum(a.bytes for a in self._held() if a.merged is not None),
        }


def _tokens(running: _Running, chosen: Chosen, finish: Any) -> Tokens:
    """What the job is told of its row's next token."""
    row, job = running.row, running.job
    stopped, made = finish == "stop", job.max_new_tokens > 0
    logprobs, waited, prompt = None, None, None
    if chosen.logprob is not None and made and (not stopped or job.prompt_logprobs is not None):
        logprobs = (TokenLogprob(chosen.token, chosen.logprob, chosen.top),)
    if not running.told:
        waited = (row.begun or row.arrived) - row.arrived
        if running.scores is not None:
            prompt = tuple(TokenLogprob(c.token, c.logprob or 0.0, c.top) for c in running.scores.found)
    return Tokens(
        (chosen.token,) if made and not stopped else (), finish if made else "length", logprobs, row.cached, waited,
        chosen.token if made and stopped else None, prompt,
    )  # fmt: skip


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError("the adapter cannot be read", where=str(folder), got=f"{type(error).__name__}: {error}")


def _tensors(model: Any) -> list[torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen.setdefault(tensor.data_ptr(), tensor)
    return list(seen.values())
