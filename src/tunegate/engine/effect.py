"""Whether an adapter changes what the base says, found out beside running passes with as little of a pass as shows it.

A few tokens of the base alone are computed once, and what went into each of its layers is kept. An adapter is measured
on the same tokens from the last layer on that it touches, at some thousand logits after the last token: nothing there
differs from the base but for the adapter. Where that shows no change, or where factors are so large that products could
leave the numbers' range, all layers are computed, as they are wherever layers are not fused.

For one thread, which need not be the one that makes the engine's passes; it waits for none of them. It says that an
adapter does something, not that it does something good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.adapter.segmented import Merged, SegmentedLinear, Served
from tunegate.engine.fused import Partial, PassState
from tunegate.engine.runner import PackedPass, Runner
from tunegate.engine.workspace import Lease
from tunegate.kernels import Head, Layout, Plan
from tunegate.kernels.segments import Factors, FactorTable, Segment, Segments
from tunegate.kernels.stored import StoredLinear

_TOKENS = 4  # attention needs several: of one token it is the same whatever queries and keys are
_LOGITS = 1024  # of the vocabulary, or a few more
_LARGEST = 1e3  # no trained factor is near


class Effect:
    """Of adapters of ``served``, whose model ``runner`` runs."""

    def __init__(self, runner: Runner, served: Served):
        self.runner, self.served = runner, served
        vocabulary = int(runner.model.config.get_text_config().vocab_size)
        self._ids = torch.arange(1, 1 + _TOKENS) * vocabulary // (2 + _TOKENS)
        self._table = FactorTable(served.table.columns, served.table.dtype, slots=1)
        self._partial = Partial()
        self._state = PassState(Lease([]))
        self._head = _some(runner.head, max(1, vocabulary // _LOGITS))
        fused = runner.fused
        order = fused.order() if fused is not None and len(fused.layers()) == fused.count else {}
        self._layer_of = {  # by column
            part.column: number
            for layer, number in order.items()
            for part in layer.modules()
            if isinstance(part, SegmentedLinear)
        }
        self._plain = self._logits(0)

    def of(self, factors: Mapping[int, Factors], largest: float, merged: Merged | None = None) -> float:
        """The largest change of a logit by an adapter, on its factors, whose largest magnitude is ``largest``, or on
        ``merged`` weights. 0: it changes none; not finite: it gives NaN or infinity."""
        columns = factors if merged is None else merged.layers
        last = max((self._layer_of.get(column, 0) for column in columns), default=0)
        for first in dict.fromkeys((last if largest <= _LARGEST else 0, 0)):
            computed = {c: f for c, f in factors.items() if self._layer_of.get(c, 0) >= first}
            slot = None if merged is not None else self._table.add(computed)
            try:
                moved = float((self._logits(first, slot, merged) - self._plain).abs().max())
            finally:
                if slot is not None:
                    self._table.remove(slot)
            if moved != 0.0:
                return moved if math.isfinite(moved) else math.nan
        return 0.0

    @torch.inference_mode()
    def _logits(self, first: int, slot: int | None = None, merged: Merged | None = None) -> Tensor:
        """Some logits after the last token, with the layers from ``first`` on computed."""
        segments = None if slot is None else Segments(self._table, [Segment(0, _TOKENS, slot)])
        one = PackedPass(Plan(Layout((_TOKENS,)), self.runner.device))
        one.fused, one.partial = self._state, self._partial
        self._partial.first = first
        with self.served.using(segments, _TOKENS, merged):
            hidden = self.runner.run(self._ids, torch.arange(_TOKENS), one)
        return self._head.logits(hidden[-1:]).cpu()


def _some(head: Head, every: int) -> Head:
    """``head`` for one of ``every`` so many tokens, where its layer is an ordinary one."""
    module: Any = head.module
    if type(module) not in (nn.Linear, StoredLinear):
        return head
    weight, bias = (None if p is None else p.detach()[::every].clone() for p in (module.weight, module.bias))
    assert weight is not None
    some = StoredLinear(*(None if p is None else nn.Parameter(p, requires_grad=False) for p in (weight, bias)))  # type: ignore[arg-type]
    return Head(some, head.scale, head.softcap)
