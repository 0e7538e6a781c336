"""Keys and values in pages, and a forward pass of rows that are at different places.

One pass computes the next token of some rows and pieces of the prompts of others, together: every product of the model
sees all tokens at once, only attention tells them apart. A row that adds one token attends over its pages as they lie
(``varlen.decode``). Pieces of prompts whose rows begin with the same pages share one call, in which these pages are the
prefix that all see.

Where the native kernels do not take the tensors, a row's pages are copied together and the twin runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tunegate.engine.fused import PassState
from tunegate.engine.page_store import PageStore
from tunegate.engine.recorded import RecordedSteps
from tunegate.kernels import DecodeStore, Layout, Plan, attention, decode_attention, varlen


@dataclass(frozen=True)
class Piece:
    """The next ``count`` tokens of a row whose first ``past`` own ones lie in ``pages``; the new ones will, too."""

    pages: Sequence[int]
    past: int
    count: int


@dataclass(frozen=True)
class _Group:
    """Pieces with the same past, ``past`` own tokens in ``pages``: tokens ``begin`` to ``end`` of the pass."""

    begin: int
    end: int
    past: int
    pages: Tensor
    plan: Plan


class PagedPass:
    """Attention of ``steps``, pieces of one token each, and then ``pieces``, in this order along the run. Pieces with
    the same past have to be neighbours to share a call. ``recorded``: the same pass as recordings, begun already."""

    def __init__(
        self,
        store: PageStore,
        steps: Sequence[Piece],
        pieces: Sequence[Piece],
        device: torch.device,
        recorded: RecordedSteps | None = None,
    ):
        self.store, self.device, self.recorded = store, device, recorded
        self.fused: PassState | None = None
        self.steps = len(steps)
        self._steps, self._pieces = steps, pieces
        if recorded is not None:
            self._places = recorded.places
        elif steps:
            most = max(len(piece.pages) for piece in steps)
            table = [[*piece.pages, *([piece.pages[0]] * (most - len(piece.pages)))] for piece in steps]
            self._places = varlen.Places(
                torch.tensor(table), torch.tensor([piece.past + 1 for piece in steps]), store.size
            )

    @cached_property
    def positions(self) -> Tensor:
        """Of every token of the run in its row."""
        all_pieces, ahead = [*self._steps, *self._pieces], self.store.prefix_tokens
        return torch.tensor([ahead + p.past + n for p in all_pieces for n in range(p.count)], dtype=torch.long)

    @cached_property
    def _new(self) -> tuple[Tensor, Tensor]:
        """Page and place of every token of the pieces."""
        size = self.store.size
        numbers = [(p.pages, p.past + n) for p in self._pieces for n in range(p.count)]
        page = torch.tensor([pages[n // size] for pages, n in numbers], device=self.device)
        return page, torch.tensor([n % size for _, n in numbers], device=self.device)

    @cached_property
    def _groups(self) -> list[_Group]:
        groups: list[list[Piece]] = []
        for piece in self._pieces:
            if groups and _shared(groups[-1][0], self.store.size) == _shared(piece, self.store.size):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        begins = accumulate((sum(p.count for p in group) for group in groups), initial=self.steps)
        return [self._group(begin, group) for begin, group in zip(begins, groups, strict=False)]

    def _group(self, begin: int, group: list[Piece]) -> _Group:
        past, counts = group[0].past, tuple(piece.count for piece in group)
        before = self.store.prefix_tokens + past
        layout = Layout((before, *counts), before) if before else Layout(counts)
        plan = Plan(layout, self.device, cached_prefix=before > 0)
        pages = torch.tensor(_shared(group[0], self.store.size)[1], dtype=torch.long, device=self.device)
        return _Group(begin, begin + sum(counts), past, pages, plan)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        options = varlen.Options(scale, window, softcap)
        if not self._pieces:
            return self._decode(layer, q, k, v, options)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        if self.steps:
            ahead = self.steps
            out[:ahead] = self._decode(layer, q[:ahead], k[:ahead], v[:ahead], options)
        keys, values = self.store.layers[layer]
        page, place = self._new
        keys[page, :, place], values[page, :, place] = k[self.steps :], v[self.steps :]
        for group in self._groups:
            own = slice(group.begin, group.end)
            before = self.store.gather(layer, group.pages, group.past)
            key, value = torch.cat([before[0], k[own]]), torch.cat([before[1], v[own]])
            out[own] = attention(q[own], key, value, group.plan, scale=scale, window=window, softcap=softcap)
        return out

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: varlen.Options) -> Tensor:
        keys, values = self.store.layers[layer]
        if varlen.supports(q, keys, values):
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            out = q.new_empty(*q.shape[:2], v.shape[-1])
            prefix = self.store.prefix[layer]
            varlen.decode(q, prefix, (keys, values), self._places, options, out=out, new=(k, v))
            return out
        return self._decode_twin(layer, q, k, v, options)

    def _decode_twin(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: varlen.Options) -> Tensor:
        table, lengths = self._places.table.to(self.device), self._places.lengths.to(self.device)
        rows, last = torch.arange(len(q), device=self.device), lengths - 1
        page, place = table[rows, last // self.store.size], last % self.store.size
        keys, values = self.store.layers[layer]
        keys[page, :, place], values[page, :, place] = k, v
        own = [part[table].transpose(1, 2).flatten(2, 3) for part in (keys, values)]  # (rows, heads, places, dim)
        store = DecodeStore(*self.store.prefix[layer], *own)
        return decode_attention(q, store, lengths, scale=options.scale, window=options.window, softcap=options.softcap)


def _shared(piece: Piece, size: int) -> tuple[int, tuple[int, ...]]:
    """The past of a piece, as what pieces of one call have in common."""
    return piece.past, tuple(piece.pages[: -(-piece.past // size)])
