"""Batched generation with a KV cache.

Prompts are sorted by length and generated side by side. What all prompts share at their beginning (a system prompt,
few-shot examples) is computed once for the whole call and kept once; every row stops by itself, and waiting prompts
take the places of rows that stopped. Greedy choices never hold all logits. Sampling draws from one generator per
prompt, seeded by (seed, index), so a row's text does not depend on its neighbours. A constraint takes tokens that would
break the answer's form out of the logits first (see ``constrain``). :func:`score_continuations` gives the likelihood of
fixed answers instead.

On the padded path (see ``runner``) transformers' own ``generate`` does the work. No beams, no speculative decoding.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunegate.data.pack import SHORTEST_PREFIX, common_prefix, split_batches
from tunegate.data.types import Rendered
from tunegate.engine.constrain import Constraint, RowState
from tunegate.engine.runner import DecodePass, PackedPass, Runner, evaluating
from tunegate.errors import TunegateError
from tunegate.kernels import DecodeStore, Layout, Plan, argmax_logits

PREFILL_TOKENS = 4096  # own tokens of the prompts of one pass; bounds what running rows keep, too
REFILL_AT = 0.75  # compute waiting prompts once no more than this share of the slots is taken


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_p`` keeps the smallest set of tokens with that probability mass."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    rows: int = 64


@dataclass(frozen=True)
class Generation:
    """Generated token ids without the stop token; ``stopped`` is False if the length limit ended the row."""

    ids: tuple[int, ...]
    stopped: bool


@torch.inference_mode()
def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    progress: Callable[[int], None] = lambda rows: None,
    constraint: Constraint | None = None,
) -> list[Generation]:
    """Continue every prompt (at least one token each). ``progress`` is told the number of rows just finished; every
    answer follows ``constraint``.

    A base with a table of positions ends a row, not ``stopped``, where the table ends.
    """
    if any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt has no tokens")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}")
    runner.check_fit((f"prompt {number}", len(prompt)) for number, prompt in enumerate(prompts))
    with evaluating(runner.model):
        if runner.path != "packed":
            return _generate_padded(runner, prompts, sampling, progress, constraint)
        rows = [_row(runner, index, prompt, sampling, constraint) for index, prompt in enumerate(prompts)]
        waiting = [row for row in rows if not runner.is_long(len(row.tokens))]
        _Slots(runner, _prefix_cache(runner, waiting), sampling, progress, runner.long_above).finish(waiting)
        later = [row for row in rows if row.done is None]  # long from the start, or grown so
        _Slots(runner, _Prefix(0, {}), sampling, progress).finish(later)  # a prefix by itself would not be long
    return [row.done for row in rows if row.done is not None]


@dataclass
class _Row:
    """A prompt and its answer so far."""

    index: int
    tokens: list[int]  # the prompt, and then the answer
    prompt: int  # tokens of the prompt
    room: int  # tokens that the answer may have
    generator: torch.Generator
    state: RowState | None
    done: Generation | None = None

    @property
    def left(self) -> int:
        return self.prompt + self.room - len(self.tokens)


def _row(runner: Runner, index: int, prompt: Sequence[int], sampling: Sampling, constraint: Constraint | None) -> _Row:
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + index) % 2**63)
    state = None if constraint is None else constraint.start()
    return _Row(index, list(prompt), len(prompt), _room(runner, len(prompt), sampling), generator, state)


@dataclass(frozen=True)
class _Prefix:
    tokens: int
    past: dict[int, tuple[Tensor, Tensor]]


def _prefix_cache(runner: Runner, rows: Sequence[_Row]) -> _Prefix:
    prompts = [row.tokens for row in rows]
    tokens = min(common_prefix(prompts), min(len(p) for p in prompts) - 1) if len(prompts) > 1 else 0
    if tokens < SHORTEST_PREFIX:
        return _Prefix(0, {})
    layout = Layout((tokens,))
    kept = PackedPass(Plan(layout, runner.device), keep=True)
    runner.run(torch.tensor(prompts[0][:tokens]), torch.arange(tokens), kept)
    assert kept.kept is not None
    return _Prefix(tokens, kept.kept)


class _Slots:
    """Rows generated side by side. The stores have a slot for each, the running ones first; a row that is done leaves
    its slot to the last one, and waiting prompts take the free slots once there are some."""

    def __init__(
        self,
        runner: Runner,
        prefix: _Prefix,
        sampling: Sampling,
        progress: Callable[[int], None],
        limit: int | None = None,
    ):
        self.runner, self.prefix, self.sampling, self.progress = runner, prefix, sampling, progress
        self.limit = limit  # tokens above which a row does not belong here
        self.running: list[_Row] = []
        self.lengths = torch.zeros(0, dtype=torch.long, device=runner.device)  # own tokens in each running row's slot
        self.stores: dict[int, DecodeStore] = {}
        self.slots = self.places = 0  # of the stores

    def finish(self, rows: Sequence[_Row]) -> None:
        """Generate until every row is done or above the limit."""
        waiting = deque(sorted(rows, key=lambda row: (len(row.tokens), row.index)))
        while waiting or self.running:
            taken = self._take(waiting) if len(self.running) <= REFILL_AT * self._most(self.places) else []
            self._accept(self._prefill(taken) if taken else self._step())

    def _need(self, row: _Row) -> int:
        """Places of the row's slot: its own tokens and those of its answer that are read."""
        need = len(row.tokens) - self.prefix.tokens + row.left - 1
        return need if self.limit is None else min(need, self.limit - self.prefix.tokens)

    def _most(self, places: int) -> int:
        """Rows that may run with slots of so many places."""
        budget = PREFILL_TOKENS + self.sampling.rows * self.sampling.max_new_tokens
        return max(1, min(self.sampling.rows, budget // max(1, places)))

    def _take(self, waiting: deque[_Row]) -> list[_Row]:
        """The next prompts to compute: as many as there are slots for and as fit one pass."""
        taken: list[_Row] = []
        used, places = 0, self.places
        while waiting:
            own, wider = len(waiting[0].tokens) - self.prefix.tokens, max(places, self._need(waiting[0]))
            rows = len(self.running) + len(taken)
            if (taken and used + own > PREFILL_TOKENS) or (rows and rows >= self._most(wider)):
                break
            taken.append(waiting.popleft())
            used, places = used + own, wider
        self._grow(len(self.running) + len(taken), places)
        return taken

    def _grow(self, slots: int, places: int) -> None:
        if slots <= self.slots and places <= self.places:
            return
        if places > self.places:
            # the next rows are longer still: not again for each; and only for as many as fit so long ones
            self.slots, self.places = slots, max(places, self.places * 5 // 4)
        else:
            self.slots = slots
        for layer, store in self.stores.items():
            self.stores[layer] = store.resized(len(self.running), self.slots, self.places)

    def _prefill(self, taken: list[_Row]) -> Tensor:
        """Take the rows into slots; returns their last hidden states."""
        runner, prefix, first = self.runner, self.prefix, len(self.running)
        own = [row.tokens[prefix.tokens :] for row in taken]
        lengths = tuple(len(tokens) for tokens in own)
        if prefix.tokens:
            plan = Plan(Layout((prefix.tokens, *lengths), prefix.tokens), runner.device, cached_prefix=True)
        else:
            plan = Plan(Layout(lengths), runner.device)
        attention_pass = PackedPass(plan, keep=True, past=prefix.past or None)
        place = torch.tensor([i for n in lengths for i in range(n)])
        ids = torch.tensor([t for tokens in own for t in tokens])
        hidden = runner.run(ids, place + prefix.tokens, attention_pass)
        new = torch.tensor(lengths, device=runner.device)
        slot = first + torch.repeat_interleave(torch.arange(len(own), device=runner.device), new)
        place = place.to(runner.device)
        assert attention_pass.kept is not None
        for layer, (key, value) in attention_pass.kept.items():
            if layer not in self.stores:
                past = prefix.past.get(layer, (key[:0], value[:0]))
                self.stores[layer] = DecodeStore.empty(*past, self.slots, self.places)
            store = self.stores[layer]
            store.key[slot, :, place] = key
            store.value[slot, :, place] = value
        self.running += taken
        self.lengths = torch.cat([self.lengths, new])
        return hidden[new.cumsum(0) - 1]

    def _step(self) -> Tensor:
        """The last token of every running row into the model; returns the hidden states."""
        count = len(self.running)
        self.lengths += 1
        positions = self.prefix.tokens + self.lengths - 1
        stores = {layer: store.first(count) for layer, store in self.stores.items()}
        ids = torch.tensor([row.tokens[-1] for row in self.running])
        return self.runner.run(ids, positions, DecodePass(stores, self.lengths))

    def _accept(self, hidden: Tensor) -> None:
        """Append the next token of the last rows, one for each hidden state, and let those go that need no more."""
        first = len(self.running) - len(hidden)
        gone = []
        for slot, token in enumerate(_next(self.runner, hidden, self.running[first:], self.sampling), first):
            row = self.running[slot]
            stopped = token in self.sampling.stop_ids
            if not stopped:
                row.tokens.append(token)
            if stopped or not row.left:
                row.done = Generation(tuple(row.tokens[row.prompt :]), stopped)
                self.progress(1)
            elif row.state is not None:
                row.state.advance(token)
            if row.done is not None or (self.limit is not None and len(row.tokens) > self.limit):
                gone.append(slot)
        if gone:
            self._release(gone)

    def _release(self, gone: list[int]) -> None:
        """The slots of ``gone`` to the last rows that stay."""
        count = len(self.running) - len(gone)
        left = set(gone)
        holes = [slot for slot in gone if slot < count]
        movers = [slot for slot in range(count, len(self.running)) if slot not in left]
        if holes:
            to, origin = (torch.tensor(slots, device=self.runner.device) for slots in (holes, movers))
            self.lengths[to] = self.lengths[origin]
            for store in self.stores.values():
                store.key[to] = store.key[origin]
                store.value[to] = store.value[origin]
            for hole, mover in zip(holes, movers, strict=True):
                self.running[hole] = self.running[mover]
        del self.running[count:]
        self.lengths = self.lengths[:count]


def _next(runner: Runner, hidden: Tensor, rows: Sequence[_Row], sampling: Sampling) -> list[int]:
    """Each row's next token from its last hidden state."""
    free = all(row.state is None for row in rows)
    if free and sampling.temperature == 0.0:
        return argmax_logits(hidden, runner.head).tolist()
    logits = runner.head.logits(hidden)
    if not free:
        logits = _masked(logits, [row.state for row in rows])
    return _pick(logits, [row.generator for row in rows], sampling)


def _pick(logits: Tensor, generators: Sequence[torch.Generator], sampling: Sampling) -> list[int]:
    """A token for each row of (N, V) logits."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.cpu() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1.0:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(outside, 0.0))
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def _masked(logits: Tensor, states: Sequence[RowState | None]) -> Tensor:
    """(N, V) logits, -inf where row n's state does not allow the token; a row without a state is free."""
    barred = torch.zeros(logits.shape, dtype=torch.bool)
    for row, state in zip(barred, states, strict=True):
        if state is not None:
            allowed = torch.from_numpy(state.allowed())[: len(row)]
            row[: len(allowed)] = ~allowed
            row[len(allowed) :] = True
            if bool(row.all()):
                raise TunegateError("no token of the base can continue the answer in its form")
    return logits.masked_fill(barred.to(logits.device), -torch.inf)


class _Masking:
    """:func:`_masked` as transformers' generate calls it: (N, tokens) ids so far and (N, V) logits."""

    def __init__(self, states: list[RowState | None], prompt: int, stop_ids: Sequence[int]):
        self.states, self.prompt, self.stop_ids = states, prompt, stop_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.prompt:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                state = self.states[row]
                if state is not None and token in self.stop_ids:
                    self.states[row] = None
                elif state is not None:
                    state.advance(token)
        return _masked(scores, self.states)


def _room(runner: Runner, tokens: int, sampling: Sampling) -> int:
    """New tokens that a prompt of ``tokens`` has room for; the last one is never read."""
    if runner.context is None:
        return sampling.max_new_tokens
    return min(sampling.max_new_tokens, runner.context - tokens + 1)


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """The base's own generation defaults (top_k, penalties) out of the way: transformers adds them to any request."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _generate_padded(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    progress: Callable[[int], None],
    constraint: Constraint | None,
) -> list[Generation]:
    """transformers' generate on groups of equal length, so that the model never sees padding."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    results: dict[int, Generation] = {}
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), sampling.rows):
            part = indices[start : start + sampling.rows]
            ids = torch.tensor([list(prompts[i]) for i in part], device=runner.device)
            torch.manual_seed(sampling.seed)
            sampled = sampling.temperature > 0
            chosen: dict[str, Any] = {}
            if sampled:
                chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if constraint is not None:
                chosen["logits_processor"] = [_Masking([constraint.start() for _ in part], length, sampling.stop_ids)]
            with _plain_generation(runner.model):
                output = runner.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=_room(runner, length, sampling),
                    do_sample=sampled,
                    eos_token_id=list(sampling.stop_ids) or None,
                    pad_token_id=sampling.stop_ids[0] if sampling.stop_ids else 0,
                    **chosen,
                )
            for index, row in zip(part, output[:, length:].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in sampling.stop_ids), None)
                results[index] = Generation(tuple(row[:end]), end is not None)
            progress(len(part))
    return [results[i] for i in range(len(prompts))]


@torch.inference_mode()
def score_continuations(
    runner: Runner, prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, tokens: int = 4096
) -> list[float]:
    """Log-likelihood of each continuation after ``prompt`` (at least one token), nats, summed over its tokens."""
    if len(prompt) == 0:
        raise ValueError("the prompt has no tokens")
    rows = [
        Rendered(str(n), (*prompt, *tail), (False,) * len(prompt) + (True,) * len(tail))
        for n, tail in enumerate(continuations)
    ]
    scores = [0.0] * len(rows)
    with evaluating(runner.model):
        for batch in split_batches(rows, tokens, share_prefix=runner.shares_prefix):
            found = runner.log_probs(batch)
            for number, row_id in enumerate(batch.row_ids):
                scores[int(row_id)] = float(found[batch.target_rows == number].sum())
    return scores
