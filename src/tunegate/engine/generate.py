"""Batched generation with a KV cache.

Prompts are sorted by length and generated in groups. What all prompts share at their beginning (a system prompt,
few-shot examples) is computed once for the whole call and kept once; every row stops by itself, and rows that
stopped leave the group. Sampling draws from one generator per prompt, seeded by (seed, index), so a row's text does
not depend on its neighbours. A constraint takes tokens that would break the answer's form out of the logits first
(see ``constrain``). :func:`score_continuations` gives the likelihood of fixed answers instead.

On the padded path (see ``runner``) transformers' own ``generate`` does the work. No beams, no speculative decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tunegate.data.pack import SHORTEST_PREFIX, common_prefix, split_batches
from tunegate.data.types import Rendered
from tunegate.engine.constrain import Constraint, RowState
from tunegate.engine.runner import DecodePass, PackedPass, Runner, evaluating
from tunegate.errors import TunegateError
from tunegate.kernels import DecodeStore, Layout, Plan

PREFILL_TOKENS = 4096  # own tokens of one group's prompts
COMPACT_AT = 0.75  # drop finished rows once no more than this share is still running


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
    results: dict[int, Generation] = {}
    with evaluating(runner.model):
        if runner.path != "packed":
            return _generate_padded(runner, prompts, sampling, progress, constraint)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        prefix = _prefix_cache(runner, prompts)
        for group in _groups(prompts, order, prefix.tokens, sampling.rows):
            rows = _Group(runner, prompts, group, prefix, sampling, constraint)
            rows.finish(results, progress)
    return [results[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Prefix:
    tokens: int
    past: dict[int, tuple[Tensor, Tensor]]


def _prefix_cache(runner: Runner, prompts: Sequence[Sequence[int]]) -> _Prefix:
    tokens = min(common_prefix(prompts), min(len(p) for p in prompts) - 1) if len(prompts) > 1 else 0
    if tokens < SHORTEST_PREFIX:
        return _Prefix(0, {})
    layout = Layout((tokens,))
    kept = PackedPass(Plan(layout, runner.device), keep=True)
    runner.run(torch.tensor(prompts[0][:tokens]), torch.arange(tokens), kept)
    assert kept.kept is not None
    return _Prefix(tokens, kept.kept)


def _groups(prompts: Sequence[Sequence[int]], order: list[int], prefix: int, rows: int) -> list[list[int]]:
    groups: list[list[int]] = []
    used = 0
    for index in order:
        own = len(prompts[index]) - prefix
        if not groups or len(groups[-1]) >= rows or used + own > PREFILL_TOKENS:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += own
    return groups


class _Group:
    """Prompts generated side by side."""

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Sequence[int]],
        group: list[int],
        prefix: _Prefix,
        sampling: Sampling,
        constraint: Constraint | None = None,
    ):
        self.runner, self.sampling, self.prefix = runner, sampling, prefix
        self.index = list(group)
        self.new: list[list[int]] = [[] for _ in group]
        self.room = [_room(runner, len(prompts[i]), sampling) for i in group]
        own = [list(prompts[i][prefix.tokens :]) for i in group]
        self.lengths = torch.tensor([len(p) for p in own], device=runner.device)
        self.stores, last = self._prefill(own)
        self.generators = {i: torch.Generator().manual_seed((sampling.seed * 1_000_003 + i) % 2**63) for i in group}
        self.states = {i: constraint.start() for i in group} if constraint is not None else {}
        self.next = self._next(last)

    def _prefill(self, own: list[list[int]]) -> tuple[dict[int, DecodeStore], Tensor]:
        """The rows' own keys and values in stores with room for the answers, and each row's last hidden state."""
        runner, prefix = self.runner, self.prefix
        lengths = tuple(len(p) for p in own)
        if prefix.tokens:
            plan = Plan(Layout((prefix.tokens, *lengths), prefix.tokens), runner.device, cached_prefix=True)
        else:
            plan = Plan(Layout(lengths), runner.device)
        attention_pass = PackedPass(plan, keep=True, past=prefix.past or None)
        ids = torch.tensor([t for p in own for t in p])
        positions = torch.tensor([prefix.tokens + i for p in own for i in range(len(p))])
        hidden = runner.run(ids, positions, attention_pass)
        ends = torch.tensor(list(accumulate(lengths)), device=runner.device)
        capacity = max(n + room - 1 for n, room in zip(lengths, self.room, strict=True))
        row = torch.repeat_interleave(torch.arange(len(own), device=runner.device), self.lengths)
        place = positions.to(runner.device) - prefix.tokens
        stores = {}
        assert attention_pass.kept is not None
        for layer, (key, value) in attention_pass.kept.items():
            _, heads, dim = key.shape
            store_key = key.new_zeros(len(own), heads, capacity, dim)
            store_value = value.new_zeros(len(own), heads, capacity, value.shape[-1])
            store_key[row, :, place] = key
            store_value[row, :, place] = value
            past_key, past_value = prefix.past.get(layer, (key[:0], value[:0]))
            stores[layer] = DecodeStore(past_key, past_value, store_key, store_value)
        return stores, hidden[ends - 1]

    def _next(self, hidden: Tensor) -> list[int]:
        """Each row's next token from its last hidden state."""
        logits = self.runner.head.logits(hidden)
        if self.states:
            logits = _masked(logits, [self.states.get(i) for i in self.index])
        return self._pick(logits)

    def _pick(self, logits: Tensor) -> list[int]:
        if self.sampling.temperature == 0.0:
            return logits.argmax(-1).tolist()
        probabilities = (logits.cpu() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1.0:
            ordered, places = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(outside, 0.0))
        return [
            int(torch.multinomial(probabilities[slot], 1, generator=self.generators[i]))
            for slot, i in enumerate(self.index)
        ]

    def finish(self, results: dict[int, Generation], progress: Callable[[int], None]) -> None:
        """Generate until every row has stopped or is full."""
        running = list(range(len(self.index)))  # slots of the group that still grow
        while True:
            still = []
            for slot in running:
                token, new = self.next[slot], self.new[slot]
                stopped = token in self.sampling.stop_ids
                if not stopped:
                    new.append(token)
                if stopped or len(new) >= self.room[slot]:
                    results[self.index[slot]] = Generation(tuple(new), stopped)
                    progress(1)
                    self.states.pop(self.index[slot], None)
                else:
                    still.append(slot)
                    if self.states:
                        self.states[self.index[slot]].advance(token)
            if not still:
                return
            running = self._compact(still) if len(still) <= COMPACT_AT * len(self.index) else still
            self._step()

    def _compact(self, slots: list[int]) -> list[int]:
        keep = torch.tensor(slots, device=self.runner.device)
        self.stores = {layer: store.keep(keep) for layer, store in self.stores.items()}
        self.lengths = self.lengths[keep]
        self.index = [self.index[s] for s in slots]
        self.new = [self.new[s] for s in slots]
        self.room = [self.room[s] for s in slots]
        self.next = [self.next[s] for s in slots]
        return list(range(len(slots)))

    def _step(self) -> None:
        capacity = next(iter(self.stores.values())).key.shape[2]
        self.lengths = (self.lengths + 1).clamp_max(capacity)  # a finished row waiting to be dropped stays in place
        positions = self.prefix.tokens + self.lengths - 1
        hidden = self.runner.run(torch.tensor(self.next), positions, DecodePass(self.stores, self.lengths))
        self.next = self._next(hidden)


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
