"""How far an adapter moves the base on text that has nothing to do with its task.

KL(base || adapter) per token: at every position of neutral paragraphs, the expectation under the base's next-token
distribution of log p_base - log p_adapter, over the whole vocabulary, in nats. Zero means that the adapter left
ordinary text alone. Unlike accuracy it moves with the first steps of a drift, and it needs no right answers.

Hidden states of both are computed once; logits exist for a block of positions at a time, so memory is bounded by
:data:`BLOCK` entries and not by the text. It does not say whether a drift does harm.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from tunegate.adapter.inject import Injection, disabled
from tunegate.data.pack import Batch, split_batches
from tunegate.data.types import Example, Rendered
from tunegate.engine.runner import evaluating
from tunegate.errors import TunegateError
from tunegate.evaluation.answering import Model, Progress, rendered, silent

BLOCK = 1 << 23  # logits of one block: 32 MB in fp32, for each of the two


@dataclass(frozen=True)
class TextDivergence:
    """One text: mean KL per token in nats, mean log-likelihood per token of both, number of tokens."""

    text: str
    kl: float
    base_log_likelihood: float
    adapter_log_likelihood: float
    tokens: int


def neutral_texts() -> list[Example]:
    """The built-in neutral paragraphs as plain text."""
    file = resources.files("tunegate.evaluation") / "data" / "neutral.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Example("neutral", n, text=row["text"], meta={"topic": row["topic"]}) for n, row in enumerate(rows, 1)]


@torch.inference_mode()
def divergence(
    model: Model, injection: Injection | None, texts: Sequence[Example], progress: Progress = silent
) -> list[TextDivergence]:
    """KL(base || adapter) on each of ``texts``. ``injection`` is the adapter in place; None compares base with base."""
    rows = [Rendered(str(n), r.ids, r.target) for n, r in enumerate(rendered(model.renderer, texts))]
    found: dict[int, TextDivergence] = {}
    batches = split_batches(rows, model.tokens, share_prefix=model.runner.shares_prefix) if rows else []
    with evaluating(model.runner.model):
        for batch in batches:
            kl, base, adapter = (values.double().cpu().numpy() for values in _compare(model, injection, batch))
            owner = batch.target_rows.numpy()
            for number, row_id in enumerate(batch.row_ids):
                mine = owner == number
                name = texts[int(row_id)].row_id
                if not np.isfinite(kl[mine]).all():
                    raise TunegateError("the divergence is not finite: the adapter diverged", where=name)
                moved, before, after = (float(values[mine].mean()) for values in (kl, base, adapter))
                found[int(row_id)] = TextDivergence(name, moved, before, after, int(mine.sum()))
            progress(len(batch.row_ids))
    return [found[n] for n in range(len(texts))]


def _compare(model: Model, injection: Injection | None, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) fp32 each: KL at every target's position, and its log-probability under base and adapter."""
    runner = model.runner
    places, labels = batch.predictors.to(runner.device), batch.labels.to(runner.device)

    def as_base() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if injection is None else disabled(injection)

    with as_base():
        before = runner.hidden(batch)[places]
        rows = max(8, BLOCK // runner.head.logits(before[:1]).shape[-1])
    after = runner.hidden(batch)[places]
    kl, base, adapter = [], [], []
    for start in range(0, len(places), rows):
        part = slice(start, start + rows)
        with as_base():
            p = runner.head.logits(before[part]).float().log_softmax(-1)
        q = runner.head.logits(after[part]).float().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0.0))  # rounding can leave -1e-8 where the two are equal
        base.append(p.gather(1, labels[part, None])[:, 0])
        adapter.append(q.gather(1, labels[part, None])[:, 0])
    return torch.cat(kl), torch.cat(base), torch.cat(adapter)
