"""Keys and values in pages, and a forward pass of rows that are at different places.

One pass computes the next token of some rows and pieces of the prompts of others, together: every product of the model
sees all tokens at once, only attention tells them apart. A row that adds one token attends over its pages as they lie
(``varlen.decode``), and so does every token at the beginning of a row, each for itself: a pass of short prompts is one
call, which may be recorded. Longer pieces of prompts whose rows begin with the same pages share one call, in which
these pages are the prefix that all see.

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
from tunegate.engine.page_store import PageStore, page_table
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
    """Attention of ``pieces``, one after the other along the run. The first ``cuts`` tokens of each attend each for
    itself (see :func:`alone`); pieces with the same past have to be neighbours to share a call for the others.
    ``recorded``: the same pass as recordings, begun already, where all attend alone."""

    def __init__(
        self,
        store: PageStore,
        pieces: Sequence[Piece],
        cuts: Sequence[int],
        device: torch.device,
        recorded: RecordedSteps | None = None,
    ):
        self.store, self.device, self.recorded = store, device, recorded
        self.fused: PassState | None = None
        self._pieces, self._cuts = pieces, cuts
        if recorded is not None:
            self._places = recorded.places
        elif any(cuts):
            pages, lengths = lonely(pieces, cuts)
            self._places = varlen.Places(page_table(pages), torch.tensor(lengths), store.size)

    @cached_property
    def positions(self) -> Tensor:
        """Of every token of the run in its row."""
        ahead = self.store.prefix_tokens
        return torch.tensor([ahead + p.past + n for p in self._pieces for n in range(p.count)], dtype=torch.long)

    @cached_property
    def _rests(self) -> list[tuple[int, Piece]]:
        """What is left of the pieces without the tokens that attend alone, each with its first token of the run."""
        begins = accumulate((piece.count for piece in self._pieces), initial=0)
        parts = zip(begins, self._pieces, self._cuts, strict=False)
        return [(b + cut, Piece(p.pages, p.past + cut, p.count - cut)) for b, p, cut in parts if cut < p.count]

    @cached_property
    def _apart(self) -> tuple[Tensor | slice, Tensor | slice]:
        """Where along the run those that attend alone are, and the others."""
        flags = [n < cut for p, cut in zip(self._pieces, self._cuts, strict=True) for n in range(p.count)]
        ahead = sum(flags)
        if all(flags[:ahead]):
            return slice(0, ahead), slice(ahead, len(flags))
        flag = torch.tensor(flags, device=self.device)
        return flag.nonzero()[:, 0], (~flag).nonzero()[:, 0]

    @cached_property
    def _new(self) -> tuple[Tensor, Tensor]:
        """Page and place of every token of the rests."""
        size = self.store.size
        numbers = [(p.pages, p.past + n) for _, p in self._rests for n in range(p.count)]
        page = torch.tensor([pages[n // size] for pages, n in numbers], device=self.device)
        return page, torch.tensor([n % size for _, n in numbers], device=self.device)

    @cached_property
    def _groups(self) -> list[_Group]:
        groups: list[list[tuple[int, Piece]]] = []
        end, size = -1, self.store.size
        for begin, piece in self._rests:
            if begin == end and _shared(groups[-1][0][1], size) == _shared(piece, size):
                groups[-1].append((begin, piece))
            else:
                groups.append([(begin, piece)])
            end = begin + piece.count
        return [self._group(group[0][0], [piece for _, piece in group]) for group in groups]

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
        if not self._rests:
            return self._decode(layer, q, k, v, options)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        lone, rest = self._apart
        if any(self._cuts):
            out[lone] = self._decode(layer, q[lone], k[lone], v[lone], options)
        keys, values = self.store.layers[layer]
        page, place = self._new
        keys[page, :, place], values[page, :, place] = k[rest], v[rest]
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


def alone(piece: Piece, short: int) -> int:
    """How many of a piece's tokens, its first ones, attend each for itself, where the ``short`` first of a row do."""
    return 1 if piece.count == 1 else min(max(short - piece.past, 0), piece.count)


def lonely(pieces: Sequence[Piece], cuts: Sequence[int]) -> tuple[list[Sequence[int]], list[int]]:
    """Of each token that attends alone: its row's pages, and the row's tokens up to it."""
    tokens = [(piece.pages, piece.past + n + 1) for piece, cut in zip(pieces, cuts, strict=True) for n in range(cut)]
    return [pages for pages, _ in tokens], [length for _, length in tokens]


def _shared(piece: Piece, size: int) -> tuple[int, tuple[int, ...]]:
    """The past of a piece, as what pieces of one call have in common."""
    return piece.past, tuple(piece.pages[: -(-piece.past // size)])
