"""Batched generation: the same scheduler as in serving, for prompts that are all known beforehand.

What all prompts share at their beginning (a system prompt, few-shot examples) is computed once for the whole call and
kept once; every row stops by itself, and waiting prompts take the places of rows that stopped. Keys and values, and
recorded passes, belong to one call: between two calls training may go on, or an adapter come or go. Sampling draws from
one generator per prompt, seeded by (seed, index), so a row's text does not depend on its neighbours. A constraint takes
tokens that would break the answer's form out of the logits first (see ``constrain``). :func:`score_continuations` gives
the likelihood of fixed answers instead.

On the padded path (see ``runner``) transformers' own ``generate`` does the work. No beams, no speculative decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunegate.data.pack import SHORTEST_PREFIX, common_prefix, split_batches
from tunegate.data.types import Rendered
from tunegate.engine.constrain import Constraint, RowState
from tunegate.engine.runner import Runner, evaluating
from tunegate.engine.sampling import Chooser, Picking, barred
from tunegate.engine.scheduler import PAGE_TOKENS, Row, Scheduler
from tunegate.errors import TunegateError

PREFILL_TOKENS = 4096  # own tokens of the prompts of one pass; bounds what running rows keep, too


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
        if not prompts:
            return []
        made = _generate_paged if runner.path == "packed" else _generate_padded
        return made(runner, prompts, sampling, progress, constraint)


def _generate_paged(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    progress: Callable[[int], None],
    constraint: Constraint | None,
) -> list[Generation]:
    """On a scheduler of this call's own, because the model may be another one at the next."""
    prefix = _prefix(runner, prompts, sampling)
    rows = [_row(runner, index, prompt, prefix, sampling, constraint) for index, prompt in enumerate(prompts)]
    scheduler = Scheduler(
        runner,
        _pages(rows, sampling),
        most_rows=sampling.rows,
        step_tokens=PREFILL_TOKENS,
        prefix=prompts[0][:prefix],
    )
    for row in rows:
        scheduler.add(row)
    done: dict[Row, Generation] = {}
    while scheduler.busy:
        for event in scheduler.step():
            if isinstance(event.chosen, TunegateError):
                raise event.chosen
            if event.finish is not None:
                done[event.row] = Generation(tuple(event.row.answer), event.finish == "stop")
                progress(1)
    return [done[row] for row in rows]


def _prefix(runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """Tokens that all prompts share; they are rotated as a short row's, so no row may grow long."""
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if len(prompts) == 1 or runner.is_long(longest + sampling.max_new_tokens):
        return 0
    shared = min(common_prefix(prompts), shortest - 1)
    return shared if shared >= SHORTEST_PREFIX else 0


def _row(
    runner: Runner, index: int, prompt: Sequence[int], prefix: int, sampling: Sampling, constraint: Constraint | None
) -> Row:
    picking = Picking(sampling.temperature, sampling.top_p, seed=sampling.seed * 1_000_003 + index)
    chooser = Chooser(picking, prompt, None if constraint is None else constraint.start())
    room = _room(runner, len(prompt), sampling)
    return Row(list(prompt[prefix:]), room, chooser, frozenset(sampling.stop_ids))


def _pages(rows: Sequence[Row], sampling: Sampling) -> int:
    """What the longest ``sampling.rows`` rows need, within the bound; what the longest row needs in any case."""
    needs = sorted((-(-(row.prompt + row.room - 1) // PAGE_TOKENS) for row in rows), reverse=True)
    bound = (PREFILL_TOKENS + sampling.rows * sampling.max_new_tokens) // PAGE_TOKENS
    return max(needs[0], min(sum(needs[: sampling.rows]), bound))


def _masked(logits: Tensor, states: Sequence[RowState | None]) -> Tensor:
    """(N, V) logits, -inf where row n's state does not allow the token; a row without a state is free."""
    on_cpu = logits.cpu()
    rows = [row if state is None else barred(row, state) for row, state in zip(on_cpu, states, strict=True)]
    return torch.stack(rows).to(logits.device)


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
