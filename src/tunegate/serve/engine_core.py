"""The engine itself: a base, adapters in a fixed number of bytes, and a scheduler, driven by jobs.

A job whose form is not compiled, or whose adapter is not in memory, waits for it (``engine_forms``,
``engine_adapters``). Loads are asked of :attr:`EngineCore.adapters` and do not wait for passes. Adapters that are to
run on merged weights are proven by rows that go through the scheduler like all others (``lane``). What fails at one job
is said to that job.

It speaks no protocol (``engine_worker`` does), and is for one thread but for its adapters.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunegate.adapter.segmented import Served
from tunegate.engine.constrain import RowState
from tunegate.engine.effect import Effect
from tunegate.engine.page_store import token_bytes
from tunegate.engine.prompt_scores import PromptScores
from tunegate.engine.runner import Runner
from tunegate.engine.sampling import Chooser, Chosen
from tunegate.engine.scheduler import PAGE_TOKENS, STEP_TOKENS, Event, Row, Scheduler
from tunegate.errors import InputError, TunegateError
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
from tunegate.serve.engine_adapters import Adapter, Adapters
from tunegate.serve.engine_forms import Forms
from tunegate.serve.jobs import EngineFacts, EngineFull, EngineOptions, Job, TokenLogprob, Tokens
from tunegate.serve.telling import tell


@dataclass
class _Running:
    """A job and its row. ``scores`` of its prompt. ``told``: whether anything was sent."""

    row: Row
    job: Job
    adapter: Adapter | None
    scores: PromptScores | None
    told: bool = False


class EngineCore:
    """``send(id, tokens or error)`` is called with what each job gets; ``wake``, from any thread, when :meth:`step` has
    become due."""

    def __init__(
        self,
        options: EngineOptions,
        send: Callable[[int, Tokens | TunegateError], None],
        wake: Callable[[], None] = lambda: None,
    ):
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
        model.eval()
        vocabulary = int(model.config.get_text_config().vocab_size)
        effect = Effect(self.runner, self.served)
        self.adapters = Adapters(self.served, effect, options.adapter_bytes, vocabulary, wake)
        self.forms = Forms(self.tokenizer, wake)
        self._states: dict[int, RowState] = {}  # of jobs that have not begun
        self._jobs: dict[int, _Running] = {}
        self._rows: dict[Row, int] = {}
        self._proofs: dict[Row, Adapter] = {}
        positions = longest_row(load_object(resolved.path / "config.json"))
        self.facts = EngineFacts(
            context=min(options.context or positions or 2**31, self.scheduler.room(1, 2**31)),
            vocabulary=vocabulary,
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
        return self.scheduler.busy or self.adapters.waits or self.forms.waits

    def submit(self, number: int, job: Job, folder: Path | None = None) -> None:
        """Take a job; what is wrong with it goes to ``send`` as an error. ``folder``: where its adapter is."""
        with self._told(number):
            self._check(job)
            if job.form is not None:
                constraint = self.forms.of(number, job, folder)
                if constraint is None:
                    return
                self._states[number] = constraint.start()
            adapter = None
            if job.adapter is not None:
                adapter = self.adapters.use(job.adapter, folder, number, job)
                if adapter is None:
                    return
            self._start(number, job, adapter)

    @contextlib.contextmanager
    def _told(self, number: int) -> Iterator[None]:
        """What fails here is said to this job alone; the others go on."""
        try:
            yield
        except TunegateError as error:
            self._refuse(number, error)
        except Exception as error:
            tell("a job failed", error)
            self._refuse(number, TunegateError("the engine failed at this answer; its log says more"))

    def _refuse(self, number: int, error: TunegateError) -> None:
        self._states.pop(number, None)
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
        under_way = len(self._jobs) + self.forms.waiting + self.adapters.waiting
        if under_way >= self.options.most_rows + self.options.most_waiting:
            raise EngineFull("too many answers are waiting", got=f"{under_way}", fix="send it again later")

    def _start(self, number: int, job: Job, adapter: Adapter | None) -> None:
        """``adapter`` is in use, and is not if this fails."""
        try:
            row, scores = self._row(job, adapter, self._states.pop(number, None))
        except Exception:
            if adapter is not None:
                self.adapters.release(adapter)
            raise
        self.scheduler.add(row)
        self._jobs[number], self._rows[row] = _Running(row, job, adapter, scores), number

    def _row(self, job: Job, adapter: Adapter | None, state: RowState | None) -> tuple[Row, PromptScores | None]:
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
        return row, scores

    def cancel(self, number: int) -> None:
        if number in self._jobs:
            self.scheduler.cancel(self._jobs[number].row)
            self._end(number)
        self._states.pop(number, None)
        self.forms.cancel(number)
        self.adapters.cancel(number)

    def _end(self, number: int) -> None:
        running = self._jobs.pop(number)
        del self._rows[running.row]
        if running.adapter is not None:
            self.adapters.release(running.adapter)

    def step(self) -> None:
        """Begin what waited for forms and adapters, then one pass."""
        for parked in self.forms.come():
            if parked.error is None:
                self.submit(parked.number, parked.job, parked.folder)
            else:
                self._refuse(parked.number, parked.error)
        come, to_prove = self.adapters.come()
        for one in come:
            if isinstance(one.adapter, TunegateError):
                self._refuse(one.number, one.adapter)
                continue
            with self._told(one.number):
                self._start(one.number, one.job, one.adapter)
        for adapter in to_prove:
            assert adapter.proof is not None
            for row in adapter.proof.rows:
                self._proofs[row] = adapter
                self.scheduler.add(row, first=True)
        try:
            events = self.scheduler.step()
        except TunegateError as error:
            self._fail_all(error)
            return
        for event in events:
            self._tell(event)

    def _fail_all(self, error: TunegateError) -> None:
        self.scheduler.clear()
        for adapter in set(self._proofs.values()):
            self._end_proof(adapter, error)
        for number in list(self._jobs):
            self.send(number, error)
            self._end(number)

    def _tell(self, event: Event) -> None:
        if event.row in self._proofs:
            adapter = self._proofs.pop(event.row)
            failed = event.chosen if isinstance(event.chosen, TunegateError) else None
            if failed is not None or adapter not in self._proofs.values():
                self._end_proof(adapter, failed)
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

    def _end_proof(self, adapter: Adapter, error: TunegateError | None) -> None:
        for row in [row for row, own in self._proofs.items() if own is adapter]:
            self.scheduler.cancel(row)
            del self._proofs[row]
        self.adapters.proven(adapter, error)

    def stats(self) -> dict[str, Any]:
        scheduler, held = self.scheduler, self.adapters.stats()
        return {
            **held,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + held["waiting"] + self.forms.waiting,
            "pages": scheduler.pool.pages,
            "pages_used": scheduler.pool.used,
            **vars(scheduler.counters),
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


def _tensors(model: Any) -> list[torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen.setdefault(tensor.data_ptr(), tensor)
    return list(seen.values())
