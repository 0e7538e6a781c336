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
from tunegate.engine.recorded import RecordedSteps
from tunegate.engine.runner import PackedPass, Runner, evaluating
from tunegate.kernels import DecodeStore, Layout, Plan, attention, decode_attention, varlen


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token."""

    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.kv_heads * (self.dim + self.value_dim) * self.dtype.itemsize


@torch.inference_mode()
def layer_shapes(runner: Runner) -> dict[int, LayerShape]:
    """What each layer of the model keeps, found by a pass over one token."""
    look = PackedPass(Plan(Layout((1,)), runner.device), keep=True)
    with evaluating(runner.model):
        runner.run(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), look)
    assert look.kept is not None
    return {n: LayerShape(k.shape[1], k.shape[2], v.shape[2], k.dtype) for n, (k, v) in look.kept.items()}


class PageStore:
    """The pages of every layer: key (pages, kv heads, size, dim) and value. Memory is touched as pages are used."""

    def __init__(self, shapes: dict[int, LayerShape], pages: int, size: int, device: torch.device):
        self.size = size
        self.layers = {
            number: (
                torch.empty(pages, shape.kv_heads, size, shape.dim, dtype=shape.dtype, device=device),
                torch.empty(pages, shape.kv_heads, size, shape.value_dim, dtype=shape.dtype, device=device),
            )
            for number, shape in shapes.items()
        }

    def gather(self, layer: int, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The first ``tokens`` keys and values of a row with these pages, (tokens, kv heads, dim)."""
        return tuple(  # type: ignore[return-value]
            part[pages].transpose(1, 2).reshape(-1, part.shape[1], part.shape[3])[:tokens]
            for part in self.layers[layer]
        )


@dataclass(frozen=True)
class Piece:
    """The next ``count`` tokens of a row whose first ``past`` ones lie in ``pages``; the new ones will, too."""

    pages: Sequence[int]
    past: int
    count: int


@dataclass(frozen=True)
class _Group:
    """Pieces with the same past: tokens ``begin`` to ``end`` of the pass."""

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
        all_pieces = [*self._steps, *self._pieces]
        return torch.tensor([p.past + n for p in all_pieces for n in range(p.count)], dtype=torch.long)

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
        layout = Layout((past, *counts), past) if past else Layout(counts)
        plan = Plan(layout, self.device, cached_prefix=past > 0)
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
            key, value = k[own], v[own]
            if group.past:
                before = self.store.gather(layer, group.pages, group.past)
                key, value = torch.cat([before[0], key]), torch.cat([before[1], value])
            out[own] = attention(q[own], key, value, group.plan, scale=scale, window=window, softcap=softcap)
        return out

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: varlen.Options) -> Tensor:
        keys, values = self.store.layers[layer]
        if varlen.supports(q, keys, values):
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            out = q.new_empty(*q.shape[:2], v.shape[-1])
            varlen.decode(q, (k[:0], v[:0]), (keys, values), self._places, options, out=out, new=(k, v))
            return out
        return self._decode_twin(layer, q, k, v, options)

    def _decode_twin(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: varlen.Options) -> Tensor:
        table, lengths = self._places.table.to(self.device), self._places.lengths.to(self.device)
        rows, last = torch.arange(len(q), device=self.device), lengths - 1
        page, place = table[rows, last // self.store.size], last % self.store.size
        keys, values = self.store.layers[layer]
        keys[page, :, place], values[page, :, place] = k, v
        own = [part[table].transpose(1, 2).flatten(2, 3) for part in (keys, values)]  # (rows, heads, places, dim)
        store = DecodeStore(k[:0], v[:0], *own)
        return decode_attention(q, store, lengths, scale=options.scale, window=options.window, softcap=options.softcap)


def _shared(piece: Piece, size: int) -> tuple[int, tuple[int, ...]]:
    """The past of a piece, as what pieces of one call have in common."""
    return piece.past, tuple(piece.pages[: -(-piece.past // size)])
