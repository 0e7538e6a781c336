"""Whether two models are the same: their next-token distributions and greedy answers on the same prompts.

The first model answers every prompt greedily. Both are then read on prompt and answer: per position the divergence
KL(first || second) in nats and whether the most likely token is the same, and per prompt whether the second one's own
greedy answer is the first one's. The models are held one after the other, not side by side.

What is compared is what was asked: a few prompts show that weights arrived, not that two models agree everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine.generate import Generation, Sampling, generate
from tunegate.engine.runner import Runner, evaluating
from tunegate.errors import TunegateError

POSITIONS = 32  # positions of a row whose distributions are kept, counted from its end
WAYS_OUT = "use the adapter unmerged, or a base in fp32; --onto trained takes the weights that it was trained on"
ROWS = 64  # rows whose distributions are kept: with 250,000 tokens, 2 GB


@dataclass(frozen=True)
class Limits:
    """Above ``mean_kl`` (nats a position) or below ``agreement`` (share of positions) two models are not the same."""

    mean_kl: float = 0.01
    agreement: float = 0.95


@dataclass(frozen=True)
class Reading:
    """One model on every prompt: log-probabilities (positions, vocabulary) fp32 of each of the first ``ROWS`` rows, and
    its greedy answers to all."""

    rows: tuple[tuple[int, ...], ...]
    log_probs: tuple[Tensor, ...]
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Parity:
    """KL in nats. ``moved`` is the mean KL between the plain base and the first model, where it was measured.
    ``parted``: where answers part, the most by which the first model preferred its token, in nats: how near a tie they
    all were; None if no answer parts where distributions were kept."""

    prompts: int
    positions: int
    mean_kl: float
    max_kl: float
    agreement: float
    same_answers: float
    moved: float | None = None
    parted: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Subject(Protocol):
    """A model that can be asked, in whatever library it runs."""

    def answers(self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], new_tokens: int) -> list[list[int]]:
        """Greedy continuations, at most ``new_tokens`` ids, without the stop id that ended one."""

    def log_probs(self, row: Sequence[int], last: int = POSITIONS) -> Tensor:
        """(positions, vocabulary) fp32, of the ``last`` positions of ``row`` or of all if it is shorter."""


class InRunner:
    """A model in the engine that trains and serves it."""

    def __init__(self, runner: Runner):
        self._runner = runner

    def answers(self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], new_tokens: int) -> list[list[int]]:
        found: list[Generation] = generate(self._runner, prompts, Sampling(new_tokens, tuple(stop_ids)))
        return [list(g.ids) for g in found]

    @torch.no_grad()
    def log_probs(self, row: Sequence[int], last: int = POSITIONS) -> Tensor:
        batch = make_batch([Rendered("parity", tuple(row), (False,) * (len(row) - 1) + (True,))], share_prefix=False)
        with evaluating(self._runner.model):
            hidden = self._runner.hidden(batch)[-last:]
            return torch.log_softmax(self._runner.head.logits(hidden), -1).cpu()


@dataclass(frozen=True)
class Questions:
    """What every subject is asked. ``stop_ids`` end an answer, as the end of a turn does in serving."""

    prompts: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...]
    new_tokens: int


def read(subject: Subject, asked: Questions, rows: Sequence[Sequence[int]] | None = None) -> Reading:
    """``subject``'s answers and its distributions on ``rows`` (default: the prompts with those answers)."""
    answers = tuple(tuple(a) for a in subject.answers(asked.prompts, asked.stop_ids, asked.new_tokens))
    wanted = [(*p, *a) for p, a in zip(asked.prompts, answers, strict=True)] if rows is None else map(tuple, rows)
    found = tuple(wanted)
    return Reading(found, tuple(subject.log_probs(row) for row in found[:ROWS]), answers)


def compare(first: Reading, second: Reading, base: Reading | None = None) -> Parity:
    """``second`` (and ``base``) must have read the rows of ``first``."""
    kls = torch.cat([_kl(a, b) for a, b in zip(first.log_probs, second.log_probs, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(first.log_probs, second.log_probs, strict=True)])
    equal = [a == b for a, b in zip(first.answers, second.answers, strict=True)]
    moved = None
    if base is not None:
        moved = float(torch.cat([_kl(a, b) for a, b in zip(first.log_probs, base.log_probs, strict=True)]).mean())
    gaps = [_gap(*one) for one in zip(first.log_probs, first.answers, second.answers, strict=False)]
    return Parity(
        prompts=len(first.rows), positions=len(kls), mean_kl=float(kls.mean()), max_kl=float(kls.max()),
        agreement=float(same.float().mean()), same_answers=sum(equal) / len(equal), moved=moved,
        parted=max((gap for gap in gaps if gap is not None), default=None),
    )  # fmt: skip


def _gap(log_probs: Tensor, first: Sequence[int], second: Sequence[int]) -> float | None:
    """How much likelier the first model's own next token was than the second's where their answers part, in nats.

    ``log_probs`` are the first model's, of a row that ends with its answer.
    """
    n = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    n = min(len(first), len(second)) if n is None else n
    behind = len(first) - n + 1
    if tuple(first) == tuple(second) or behind > len(log_probs):
        return None
    found = log_probs[-behind]
    other = found[second[n]] if n < len(second) else found.topk(2).values[1]  # it ended, with one of several ids
    return float(found.max() - other)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) per position of two tensors of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def require(parity: Parity, limits: Limits, what: str, where: str) -> None:
    """:class:`TunegateError` unless ``parity`` is within ``limits``."""
    within = parity.mean_kl <= limits.mean_kl and parity.agreement >= limits.agreement
    if not within:
        raise TunegateError(
            f"{what} is not the adapter on its base; nothing was kept",
            where=where,
            expected=f"mean KL at most {limits.mean_kl:g} nats, the same top token at {limits.agreement:.0%} or more",
            got=f"{parity.mean_kl:.4g} nats (largest {parity.max_kl:.4g}), {parity.agreement:.1%} of "
            f"{parity.positions} positions",
            fix=WAYS_OUT,
        )
