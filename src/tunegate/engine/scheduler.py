"""Answers made side by side: who computes what in the next pass, on pages of keys and values.

Every :meth:`Scheduler.step` is one pass. Each running row adds its next token; what is left of ``step_tokens`` goes to
prompts, in pieces, the oldest first, so that a long prompt does not hold up the others. A prompt whose beginning lies
in known pages (see ``paging``) does not compute it again. Where pages run out, the newest row gives its own back and
is computed anew later: pages bound how much runs at a time, never what is answered.

Rows with different adapters share a pass; its tokens are ordered so that each adapter's lie together. Some rows cannot
share one: those on merged weights, and on a base with two sets of rotary frequencies (LongRoPE) long ones and short
ones. Their passes take turns. A row that grows long is computed anew.

A row whose prompt is read (``prompt_scores``) takes nothing from known pages. No beams, no speculative decoding; a
row's place in the queue is its arrival.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from tunegate.adapter.segmented import Merged, Served
from tunegate.engine.page_store import PageStore
from tunegate.engine.paged import PagedPass, Piece, alone, lonely
from tunegate.engine.paging import PagePool, page_keys
from tunegate.engine.prompt_scores import PromptReader
from tunegate.engine.recorded import RecordedSteps
from tunegate.engine.runner import Runner
from tunegate.engine.sampling import Chooser, Chosen, choose
from tunegate.errors import InputError, TunegateError
from tunegate.kernels.segments import Segment, Segments

PAGE_TOKENS = 16
STEP_TOKENS = 256
_EVEN = 8  # lanes that the kernels fill in any case
SHORT = 128  # beyond it, keys read once for many tokens outweigh the overhead of a call of their own


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far. ``slot``: its adapter's in ``Served.table``; ``merged``: weights that it runs on
    instead; neither: the base's own. ``salt`` names either for the pages. ``room``: tokens that the answer may have."""

    tokens: list[int]
    room: int
    chooser: Chooser
    stop_ids: frozenset[int]
    slot: int | None = None
    salt: bytes = b""
    merged: Merged | None = None
    reader: PromptReader | None = None
    prompt: int = field(init=False)
    arrived: float = field(init=False)
    begun: float | None = None  # when its prompt was first computed
    cached: int = 0  # tokens of the prompt that were not computed
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full pages
    computed: int = 0  # tokens whose keys lie in the pages
    long: bool = False
    turn: int = 0  # the last one of its kind

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self.arrived = time.monotonic()

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def kind(self) -> tuple[bool, Merged | None]:
        """Rows of one kind share a pass."""
        return self.long, self.merged

    @property
    def left(self) -> int:
        """Tokens whose keys are to be computed."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Event:
    """A row's next token; with ``finish`` (``stop``: it stops the answer, ``length``) its last one. An error ends the
    row without a token."""

    row: Row
    chosen: Chosen | TunegateError
    finish: str | None


@dataclass
class Counters:
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preempted: int = 0


class Scheduler:
    """Rows on one model. ``pages`` of ``page_tokens`` tokens each; ``served`` holds the adapters, None: there are
    none. Not for several threads.

    ``prefix``: tokens that come before those of every row. They are computed once, here, with the model as it is, and
    kept apart from the pages; a row's ``tokens`` do not count them, and it must not grow long.

    ``short``: so many tokens of a row attend each for itself. Which ones do depends on nothing else, so that a token's
    keys are the same bytes whatever shares its pass.
    """

    def __init__(
        self,
        runner: Runner,
        pages: int,
        *,
        served: Served | None = None,
        page_tokens: int = PAGE_TOKENS,
        most_rows: int = 64,
        step_tokens: int = STEP_TOKENS,
        prefix: Sequence[int] = (),
        short: int = SHORT,
    ):
        if runner.path != "packed":
            raise InputError(
                "this base cannot be served by tunegate's own engine",
                where=type(runner.model).__name__,
                expected="attention on flat batches",
                got=runner.path_reason,
            )
        self.runner, self.served = runner, served
        self.most_rows, self.step_tokens = most_rows, max(step_tokens, most_rows + 1)
        self.pool = PagePool(pages, page_tokens)
        self.store = PageStore(runner, pages, page_tokens, prefix)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.counters = Counters()
        self._recorded: RecordedSteps | None = None
        self._short = 0
        if runner.fused is not None:  # the kernels are there, for which alone it pays
            self._short = short
            most_pages = -(-self.room(1, 2**31) // page_tokens)
            self._recorded = RecordedSteps(self.store, most_rows, most_pages)
            self._numbers = torch.zeros(1 + 3 * most_rows, dtype=torch.long)
        self._turn = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def room(self, prompt: int, wanted: int) -> int:
        """Tokens that an answer to a prompt of so many may have; the last one is never read. May be below 1."""
        most = self.pool.pages * self.pool.size
        if self.runner.context is not None:
            most = min(most, self.runner.context - self.store.prefix_tokens)
        return min(wanted, most - prompt + 1)

    def add(self, row: Row, *, first: bool = False) -> None:
        """Queue a row, the last or the ``first``; ``row.room`` must be what :meth:`room` allows, at least 1."""
        if not row.tokens or row.room < 1 or row.room > self.room(row.prompt, row.room):
            raise ValueError(f"a row of {row.prompt} tokens with room for {row.room}")
        if (ahead := self.store.prefix_tokens) and self.runner.is_long(ahead + row.prompt + row.room):
            raise ValueError(f"a row of up to {row.prompt + row.room} tokens after a prefix of {ahead} grows long")
        row.long = self.runner.is_long(row.prompt)
        if first:
            self.waiting.appendleft(row)
        else:
            self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Leave a row out from now on."""
        if row in self.running:
            self.running.remove(row)
            self.pool.release(row.pages)
        elif row in self.waiting:
            self.waiting.remove(row)

    def clear(self) -> None:
        """Leave out all rows, and forget what pages hold: for after an error inside a step."""
        for row in [*self.running, *self.waiting]:
            self.cancel(row)
        self.pool.forget()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One pass; the new tokens of the rows that got one."""
        self._admit()
        steps, pieces = self._plan()
        if not steps and not pieces:
            return []
        self.counters.steps += 1
        hidden = self._run(steps, pieces)
        parts = [*((row, 1) for row in steps), *pieces]
        rows, ends = [], []
        for (row, count), end in zip(parts, accumulate(count for _, count in parts), strict=True):
            if row.reader is not None:
                row.reader.take(row.computed, hidden[end - count : end], self.runner.head)
            row.computed += count
            self._remember(row, row.computed - count)
            if not row.left:
                rows.append(row)
                ends.append(end - 1)
        if not rows:
            return []
        chosen = choose(self.runner.head, hidden[torch.tensor(ends)], [row.chooser for row in rows])
        return [self._took(row, c) for row, c in zip(rows, chosen, strict=True)]

    # --- what goes into a pass ------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Waiting rows into the running ones, while there are places, and pages and passes for their prompts."""
        tokens: Counter[tuple[bool, Merged | None]] = Counter()
        for row in self.running:
            tokens[row.kind] += row.left
        while self.waiting and len(self.running) < self.most_rows:
            row = self.waiting[0]
            if tokens[row.kind] >= self.step_tokens:
                break
            row.keys = page_keys(row.tokens, self.pool.size, self._salt(row))
            usable = row.keys[: (len(row.tokens) - 1) // self.pool.size]  # the last token is computed in any case
            if row.reader is not None:
                usable = []
            needed = -(-len(row.tokens) // self.pool.size)
            if self.running and needed > self.pool.available - len(self.running):  # each may need a page soon
                break
            self.waiting.popleft()
            row.pages = self.pool.find(usable)
            row.computed = len(row.pages) * self.pool.size
            if row.reader is None:
                self._copy_beginning(row)
            if row.begun is None:
                row.begun, row.cached = time.monotonic(), row.computed
                self.counters.cached_tokens += row.computed
                self.counters.prompt_tokens += row.prompt
            row.turn = self._turn
            self.running.append(row)
            tokens[row.kind] += row.left

    def _copy_beginning(self, row: Row) -> None:
        """What the row's next page has in common with one that is known, where its tokens attend each for itself:
        others would no longer share a call with rows that begin with the same pages."""
        size = self.pool.size
        tokens = row.tokens[row.computed : min(row.computed + size, len(row.tokens) - 1)]
        if self.store.prefix_tokens + len(row.tokens) > self._short:
            return
        found = self.pool.nearest(row.keys[len(row.pages) - 1] if row.pages else self._salt(row), tokens)
        if found is None:
            return
        known, count = found
        own = self.pool.take()
        if own is not None:
            self.store.copy(known, own, count)
            row.pages.append(own)
            row.computed += count
        self.pool.release([known])

    def _salt(self, row: Row) -> bytes:
        return row.salt + (b"long" if row.long else b"")

    def _plan(self) -> tuple[list[Row], list[tuple[Row, int]]]:
        """Rows that add one token, and pieces of prompts, each with pages for it and in the order of their adapters:
        of the kind whose turn is longest ago."""
        steps: list[Row] = []
        pieces: list[tuple[Row, int]] = []
        self._turn += 1
        kind = min(self.running, key=lambda row: row.turn).kind if self.running else None
        mine = [row for row in self.running if row.kind == kind]
        left = self.step_tokens - sum(1 for row in mine if row.left == 1)
        for row in mine:
            row.turn = self._turn
            if row not in self.running:  # it gave its pages back meanwhile
                continue
            count = row.left
            if count > 1:
                # the model rotates a pass by its last position, so a long row's tokens go at once
                count = count if row.long else min(count, left)
                left -= count
            if count < 1 or not self._get_pages(row, count):
                continue
            if row.left == 1:
                steps.append(row)
            else:
                pieces.append((row, count))
        steps.sort(key=_adapter)
        pieces.sort(key=lambda piece: (_adapter(piece[0]), piece[0].computed, piece[0].pages))
        return steps, pieces

    def _get_pages(self, row: Row, count: int) -> bool:
        """Pages for the next ``count`` tokens of a running row; False if it had to give back its own."""
        while len(row.pages) * self.pool.size < row.computed + count:
            page = self.pool.take()
            if page is not None:
                row.pages.append(page)
                continue
            victim = self.running[-1]
            if victim is row and len(self.running) == 1:
                raise TunegateError("a row needs more pages than there are", got=f"{self.pool.pages} pages")
            self._put_back(victim)
            if victim is row:
                return False
        return True

    def _put_back(self, row: Row) -> None:
        """A running row to the front of the queue; it is computed anew."""
        self.running.remove(row)
        self.pool.release(row.pages)
        row.pages, row.computed = [], 0
        self.waiting.appendleft(row)
        self.counters.preempted += 1

    # --- the pass -------------------------------------------------------------------------------------------------

    def _run(self, steps: Sequence[Row], pieces: Sequence[tuple[Row, int]]) -> Tensor:
        """The last hidden states of all tokens in the pass, and perhaps some more."""
        parts = [(row, 1) for row in steps] + list(pieces)
        merged = parts[0][0].merged
        runs = [Piece(row.pages, row.computed, count) for row, count in parts]
        cuts = [alone(piece, self._short - self.store.prefix_tokens) for piece in runs]
        tokens = sum(piece.count for piece in runs)
        ids = [t for row, count in parts for t in row.tokens[row.computed : row.computed + count]]
        recorded = self._recorded if sum(cuts) == tokens <= self.most_rows else None
        if recorded is not None and pieces:  # few sizes, so that most passes find a recording of theirs
            again = min(-tokens % _EVEN, self.most_rows - tokens)
            last = runs[-1]  # its last token comes again, and computes and writes the same bytes
            runs += [Piece(last.pages, last.past + last.count - 1, 1)] * again
            parts += [(parts[-1][0], 1)] * again
            ids += ids[-1:] * again
            cuts += [1] * again
        segments = None if merged is not None else self._segments(parts, recorded=recorded is not None)
        if recorded is not None:
            recorded.begin(*lonely(runs, cuts), segments, merged)
        paged = PagedPass(self.store, runs, cuts, self.runner.device, recorded)
        if self.served is None:
            return self.runner.run(torch.tensor(ids), paged.positions, paged)
        with self.served.using(segments, len(ids), merged):
            return self.runner.run(torch.tensor(ids), paged.positions, paged)

    def _segments(self, parts: Iterable[tuple[Row, int]], *, recorded: bool) -> Segments | None:
        """The pass's adapters, where a recording looks for them if it is ``recorded``."""
        if self.served is None:
            return None
        found, begin = [], 0
        for slot, group in groupby(parts, key=lambda part: part[0].slot):
            end = begin + sum(count for _, count in group)
            if slot is not None:
                found.append(Segment(begin, end, slot))
            begin = end
        if recorded and self._recorded is not None:
            return Segments(self.served.table, found, self._numbers)
        return Segments(self.served.table, found) if found else None

    def _remember(self, row: Row, before: int) -> None:
        """Tell the pool what the row's newly full pages hold."""
        full = row.computed // self.pool.size
        if full > len(row.keys):
            row.keys = page_keys(row.tokens[: row.computed], self.pool.size, self._salt(row), after=row.keys)
        size = self.pool.size
        for number in range(before // size, full):
            ahead = row.keys[number - 1] if number else self._salt(row)
            self.pool.remember(
                row.pages[number], row.keys[number], ahead, row.tokens[number * size : (number + 1) * size]
            )

    def _took(self, row: Row, chosen: Chosen | TunegateError) -> Event:
        if isinstance(chosen, TunegateError):
            self.cancel(row)
            return Event(row, chosen, None)
        token = chosen.token
        stops = token in row.stop_ids
        row.chooser.took(token, stops=stops)
        finish = "stop" if stops else None
        if not stops:
            row.tokens.append(token)
            self.counters.generated_tokens += 1
            finish = "length" if len(row.tokens) - row.prompt >= row.room else None
        if finish is not None:
            self.cancel(row)
        elif row.long != self.runner.is_long(len(row.tokens)):
            self._put_back(row)
            row.long = True
        return Event(row, chosen, finish)


def _adapter(row: Row) -> int:
    return -1 if row.slot is None else row.slot
