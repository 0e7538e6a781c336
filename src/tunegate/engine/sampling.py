"""The next token of rows that each choose in their own way.

Rows that take the likeliest token as the model gives it never see all logits. For the others, in this order: penalties
and biases, the answer's form, temperature, ``min_p``, ``top_k``, ``top_p``, and one draw from the row's own generator,
so that a row's text does not depend on its neighbours. Log-probabilities are the model's own, before all of that.

A draw inverts the cumulative distribution: one random number a token, whatever the vocabulary.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunegate.engine.constrain import RowState
from tunegate.errors import TunegateError
from tunegate.kernels import Head, all_logits, argmax_logits

_FIRST = 512  # likeliest tokens that top_p looks at before it sorts them all


@dataclass(frozen=True)
class Picking:
    """How each next token is chosen.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 take all tokens; ``min_p`` drops those below that share of
    the likeliest one's probability. Penalties are OpenAI's (``presence``, ``frequency``: subtracted from the logits of
    tokens of the answer) and transformers' ``repetition`` (divides; prompt included, 1 for none). ``logit_bias`` adds.
    ``seed`` None draws one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken as the model gives it."""
        return self.temperature == 0.0 and not self.changes

    @property
    def changes(self) -> bool:
        """Whether logits are changed before anything is chosen."""
        return bool(self.presence or self.frequency or self.repetition != 1.0 or self.logit_bias)


@dataclass(frozen=True)
class Chosen:
    """A token; where asked for, its log-probability in nats and the likeliest tokens with theirs, likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Chooser:
    """One row's way of choosing, with what it has chosen so far. ``logprobs``: of the chosen token and of that many
    likeliest ones; None for none. ``look`` is shown the model's own logits, (V,) fp32, each time."""

    picking: Picking
    prompt: Sequence[int] = ()
    state: RowState | None = None
    logprobs: int | None = None
    look: Callable[[Tensor], None] | None = None
    counts: Counter[int] = field(default_factory=Counter)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        seed = int.from_bytes(os.urandom(7), "little") if self.picking.seed is None else self.picking.seed
        self.generator = torch.Generator().manual_seed(seed % 2**63)

    @property
    def plain(self) -> bool:
        return self.picking.plain and self.state is None and self.logprobs is None and self.look is None

    def took(self, token: int, *, stops: bool) -> None:
        """``token`` is the row's next one."""
        if stops:
            return
        if self.picking.changes:
            self.counts[token] += 1
        if self.state is not None:
            self.state.advance(token)


def choose(head: Head, hidden: Tensor, choosers: Sequence[Chooser]) -> list[Chosen | TunegateError]:
    """Each row's next token from its last hidden state, (N, H), or why it can have none."""
    chosen: list[Chosen | TunegateError | None] = [None] * len(choosers)
    plain = [n for n, chooser in enumerate(choosers) if chooser.plain]
    others = [n for n, chooser in enumerate(choosers) if not chooser.plain]
    if plain:
        for n, token in zip(plain, argmax_logits(_rows(hidden, plain), head).tolist(), strict=True):
            chosen[n] = Chosen(token)
    if others:
        for n, logits in zip(others, all_logits(_rows(hidden, others), head).cpu(), strict=True):
            try:
                chosen[n] = _choose_one(logits, choosers[n])
            except TunegateError as error:  # its form cannot be followed: the others go on
                chosen[n] = error
    return [c for c in chosen if c is not None]


def _rows(hidden: Tensor, rows: list[int]) -> Tensor:
    return hidden if len(rows) == len(hidden) else hidden[torch.tensor(rows, device=hidden.device)]


def _choose_one(logits: Tensor, chooser: Chooser) -> Chosen:
    """``logits`` (V,) fp32 on the CPU."""
    own = logits
    if chooser.look is not None:
        chooser.look(own)
    if chooser.picking.changes:
        logits = _changed(logits.clone(), chooser)
    if chooser.state is not None:
        logits = barred(logits, chooser.state)
    token = int(logits.argmax()) if chooser.picking.temperature == 0.0 else _draw(logits, chooser)
    if chooser.logprobs is None:
        return Chosen(token)
    logprobs = own.log_softmax(-1)
    top = logprobs.topk(min(chooser.logprobs, len(logprobs)))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Chosen(token, float(logprobs[token]), tuple(likeliest))


def _changed(logits: Tensor, chooser: Chooser) -> Tensor:
    picking = chooser.picking
    if picking.repetition != 1.0:
        seen = torch.tensor(sorted({*chooser.prompt, *chooser.counts}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / picking.repetition, values * picking.repetition)
    if chooser.counts and (picking.presence or picking.frequency):
        tokens = torch.tensor(list(chooser.counts))
        counts = torch.tensor(list(chooser.counts.values()), dtype=logits.dtype)
        logits[tokens] -= picking.presence + picking.frequency * counts
    for token, bias in picking.logit_bias:
        logits[token] += bias
    return logits


def barred(logits: Tensor, state: RowState) -> Tensor:
    """-inf where the answer's form does not allow the token."""
    allowed = torch.from_numpy(state.allowed())[: len(logits)]
    if not bool(allowed.any()):
        raise TunegateError("no token of the base can continue the answer in its form")
    result = torch.full_like(logits, -torch.inf)
    result[: len(allowed)][allowed] = logits[: len(allowed)][allowed]
    return result


def _draw(logits: Tensor, chooser: Chooser) -> int:
    picking = chooser.picking
    logits = logits.double() / picking.temperature
    uniform = float(torch.rand((), dtype=torch.float64, generator=chooser.generator))
    if picking.top_k == 0 and picking.top_p == 1.0:
        probabilities = (logits - logits.max()).exp_()
        if picking.min_p > 0.0:
            probabilities[probabilities < picking.min_p] = 0.0
        return _inverted(probabilities, uniform)
    total = logits.logsumexp(-1)
    count = picking.top_k or _FIRST
    while True:
        values, tokens = logits.topk(min(count, len(logits)))
        probabilities = (values - (values.logsumexp(-1) if picking.top_k else total)).exp_()
        if picking.min_p > 0.0:
            probabilities[probabilities < picking.min_p * probabilities[0]] = 0.0
        before = probabilities.cumsum(-1) - probabilities
        complete = picking.top_k > 0 or len(values) == len(logits) or (picking.min_p > 0.0 and probabilities[-1] == 0.0)
        if complete or float(before[-1]) >= picking.top_p:
            break
        count = len(logits)
    probabilities[before >= picking.top_p] = 0.0  # the likeliest stays, whatever its share
    return int(tokens[_inverted(probabilities, uniform)])


def _inverted(weights: Tensor, uniform: float) -> int:
    """The index at which the cumulative weights pass ``uniform`` (0 to 1) of their sum."""
    sums = weights.cumsum(-1)
    index = int(torch.searchsorted(sums, uniform * float(sums[-1]), right=True))
    if index >= len(weights) or weights[index] == 0.0:  # rounding at the very end
        index = int(weights.nonzero()[-1])
    return index
