"""What a model answers to a list of prompts, and how likely it finds fixed answers.

Prompts go through the one renderer and the one generator; answers are generated in groups of equal length limit.
Likelihoods are summed over the answer's tokens, its end-of-turn token included, in flat batches that hold many items
at once. Nothing here judges an answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunegate.data.pack import split_batches
from tunegate.data.render import Renderer
from tunegate.data.types import Example, Message, Rendered
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.runner import Runner, evaluating
from tunegate.errors import InputError, Problem, TunegateError, collecting

Progress = Callable[[int], None]


def silent(n: int) -> None:
    del n


@dataclass(frozen=True)
class Model:
    """A base, with or without an adapter in place, and the renderer of its prompts.

    ``tokens`` bounds the computed tokens of one likelihood batch, ``rows`` the prompts generated side by side.
    """

    runner: Runner
    renderer: Renderer
    tokens: int = 4096
    rows: int = 64


@dataclass(frozen=True)
class Reply:
    """An answer as text, whether it ended by itself, and how many tokens it took."""

    text: str
    stopped: bool
    tokens: int


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of an answer: nats, summed over ``tokens`` tokens, the end of the turn included."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def with_system(messages: Sequence[Message], system: str | None, *, in_user: bool = False) -> tuple[Message, ...]:
    """``messages`` with another system message; ``in_user``: at the head of the first user message instead."""
    if system is None:
        return tuple(messages)
    rest = [m for m in messages if m.get("role") != "system"]
    if in_user:
        return ({**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:])
    return ({"role": "system", "content": system}, *rest)


def takes_system(renderer: Renderer) -> bool:
    """Whether the template has a system role."""
    try:
        renderer.prompt_ids([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    except InputError:
        return False
    return True


def reply(
    model: Model,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: Sequence[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Reply]:
    """One answer for each of ``prompts``, at most as many tokens long as ``max_new_tokens`` says for it."""
    ids = _prompt_ids(model.renderer, prompts)
    found: dict[int, Reply] = {}
    for limit in sorted(set(max_new_tokens)):
        places = [i for i, n in enumerate(max_new_tokens) if n == limit]
        sampling = Sampling(limit, model.renderer.stop_ids, temperature, top_p, seed, model.rows)
        answers = generate(model.runner, [ids[i] for i in places], sampling, progress)
        for place, answer in zip(places, answers, strict=True):
            text = model.renderer.decode(answer.ids).strip()
            found[place] = Reply(text, answer.stopped, len(answer.ids))
    return [found[i] for i in range(len(prompts))]


def _prompt_ids(renderer: Renderer, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    problems: list[Problem] = []
    ids: list[list[int]] = []
    for number, messages in enumerate(prompts, 1):
        found: list[Problem] = []
        with collecting(found):
            ids.append(renderer.prompt_ids(messages))
        problems += [p if p.where else dataclasses.replace(p, where=f"prompt {number}") for p in found]
    if problems:
        raise InputError(problems)
    return ids


def likelihoods(
    model: Model, pairs: Sequence[tuple[Sequence[Message], str]], progress: Progress = silent
) -> list[Likelihood]:
    """Log-likelihood of each (messages, answer) pair's answer as the assistant's turn."""
    examples = [
        Example("pair", n, messages=(*messages, {"role": "assistant", "content": answer}))
        for n, (messages, answer) in enumerate(pairs, 1)
    ]
    rows = rendered(model.renderer, examples)
    return row_likelihoods(model, [dataclasses.replace(r, target=_last_turn(r.target)) for r in rows], progress)


def rendered(renderer: Renderer, examples: Sequence[Example]) -> list[Rendered]:
    """Every example as a row; :class:`InputError` with all that cannot be rendered."""
    rows = renderer.render_many(examples)
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise InputError(problems)
    return [row for row in rows if isinstance(row, Rendered)]


def row_likelihoods(model: Model, rows: Sequence[Rendered], progress: Progress = silent) -> list[Likelihood]:
    """Log-likelihood of each row's targets, in the order of ``rows``, whatever their ids."""
    found: dict[int, Likelihood] = {}
    numbered = [Rendered(str(n), row.ids, row.target) for n, row in enumerate(rows)]
    numbered.sort(key=len)  # rows of one batch are of like length: the padded path pays for the longest
    batches = split_batches(numbered, model.tokens, share_prefix=model.runner.shares_prefix) if numbered else []
    with evaluating(model.runner.model):
        for batch in batches:
            values = model.runner.log_probs(batch).double().numpy()
            owner = batch.target_rows.numpy()
            totals = np.bincount(owner, weights=values, minlength=len(batch.row_ids))
            counts = np.bincount(owner, minlength=len(batch.row_ids))
            for row_id, total, count in zip(batch.row_ids, totals, counts, strict=True):
                if math.isnan(total):
                    raise TunegateError("the likelihood is NaN: the model diverged", where=rows[int(row_id)].row_id)
                found[int(row_id)] = Likelihood(float(total), int(count))
            progress(len(batch.row_ids))
    return [found[n] for n in range(len(rows))]


def _last_turn(target: tuple[bool, ...]) -> tuple[bool, ...]:
    """The mask of the last run of targets: earlier assistant turns of a chat are given, not asked."""
    end = len(target)
    while end and not target[end - 1]:
        end -= 1
    start = end
    while start and target[start - 1]:
        start -= 1
    return tuple(start <= i < end for i in range(len(target)))
