"""Passes whose tokens attend each for itself, steps of rows and short prompts, recorded layer by layer and replayed.

At a few tokens a layer's kernels take less time than the Python around them. Once so many were seen a few times, a
pass records each fused layer's calls; later ones fill in what has changed (hidden states, positions, pages, adapters),
all in memory that stays where it is, and replay. A recording is proven before it is used: its scratch memory is
overwritten, it is run once more, and the result has to be the same bytes. A layer that cannot be recorded keeps its
usual path. A pass records a few layers only, so that none takes much longer than others.

Only on the CPU, with the C++ kernels, for layers that are fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tunegate.adapter.segmented import Merged
from tunegate.engine import fused_layer
from tunegate.engine.fused_layer import Context
from tunegate.engine.fused_shape import Shape
from tunegate.engine.page_store import PageStore, page_table
from tunegate.engine.workspace import Workspace
from tunegate.kernels import varlen
from tunegate.kernels.recording import Recording, recording
from tunegate.kernels.segments import Segments

_AT_ONCE = 6  # layers that one pass records: each costs it what two or three layers cost
RECORD_AFTER = 3  # passes of the same kind: a recording costs about one pass, and each replay saves a part of one


@dataclass
class _Programs:
    """Recordings on one set of weights, by kind of pass and then by layer, and how often each kind was seen."""

    of: dict[Any, dict[int, Recording | None]] = field(default_factory=dict)
    passes: Counter[Any] = field(default_factory=Counter)


class RecordedSteps:
    """Recordings for 1 to ``most_rows`` rows of at most ``most_pages`` pages of ``store``. Those on merged weights end
    with these."""

    def __init__(self, store: PageStore, most_rows: int, most_pages: int):
        self.store = store
        self.table = torch.zeros(most_rows * most_pages, dtype=torch.long)
        self.most_pages = most_pages
        self.lengths = torch.zeros(most_rows, dtype=torch.long)
        self.most_rows = most_rows
        self._hidden: list[Tensor] = []
        self._angles: list[tuple[Tensor, Tensor]] = []
        self._keep, self._scratch = Workspace(), Workspace()
        self._own = _Programs()
        self._merged: WeakKeyDictionary[Merged, _Programs] = WeakKeyDictionary()
        self._seen: dict[int, int] = {}

    def begin(
        self, pages: Sequence[Sequence[int]], lengths: Sequence[int], segments: Segments | None, merged: Merged | None
    ) -> None:
        """The next pass: of every token the pages and length of its row up to it, and the adapters (with the memory of
        their numbers, which stays the same) or the merged weights."""
        self.rows = len(pages)
        table = self.table[: self.rows * self.most_pages].view(self.rows, self.most_pages)
        filled = page_table(pages)
        table[:, : filled.shape[1]] = filled
        self.lengths[: self.rows] = torch.tensor(lengths)
        self.places = varlen.Places(table, self.lengths[: self.rows], self.store.size)
        self.segments = segments
        adapters = None
        if segments is not None:
            table_at = segments.table.numbers.data_ptr()
            adapters = (bool(segments.gains), segments.most_rank, table_at, segments.numbers.data_ptr())
        programs = self._own if merged is None else self._merged.setdefault(merged, _Programs())
        kind = (self.rows, adapters)
        programs.passes[kind] += 1
        self._may_record = _AT_ONCE if programs.passes[kind] > RECORD_AFTER else 0
        self._layers = programs.of.setdefault(kind, {})
        self._seen.clear()

    def replay(self, number: int, hidden: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """The fused layer ``number`` on hidden (1, rows, H) as recorded; None if it was not."""
        program = self._layers.get(number)
        if program is None:
            return None
        _, out = self._memory(number, hidden)
        self._angles_of(angles)
        program.run()
        return out[None]

    def record(
        self, number: int, context: Context, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, index: int
    ) -> Tensor | None:
        """The same for its first time; None if it is not to be recorded. ``index``: the layer's in the pages."""
        if not self._may_record or number in self._layers:
            return None
        self._may_record -= 1
        x, out = self._memory(number, hidden)
        cos, sin = self._angles_of(angles) or (x, x)
        own = replace(context, cos=cos, sin=sin, attention=_Decoding(self, index), scratch=self._scratch)
        self._layers[number] = self._record(own, x, out)
        return out[None]

    def _memory(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's input, filled, and where its output goes: what one layer writes, the next one reads."""
        if not self._hidden:
            self._hidden = [hidden.new_empty(self.most_rows, hidden.shape[-1]) for _ in range(2)]
        x, out = (self._hidden[(number + side) % 2][: self.rows] for side in (0, 1))
        if hidden.data_ptr() != x.data_ptr():
            x.copy_(hidden[0])
        return x, out

    def _angles_of(self, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The pass's rotary tables, (1, rows, R) each, in memory that stays; a model has one or two kinds."""
        if angles is None:
            return None
        kind = self._seen.get(id(angles[0]))
        if kind is None:
            kind = self._seen[id(angles[0])] = len(self._seen)
            if kind == len(self._angles):
                cos, sin = (part.new_empty(self.most_rows, part.shape[-1]) for part in angles)
                self._angles.append((cos, sin))
            for to, part in zip(self._angles[kind], angles, strict=True):
                to[: self.rows] = part[0]
        cos, sin = self._angles[kind]
        return cos[: self.rows], sin[: self.rows]

    def _record(self, context: Context, x: Tensor, out: Tensor) -> Recording | None:
        """The recording, proven; None if a replay gives something else. ``out`` is right in any case."""
        memory = (self._keep, self._scratch)
        with self._keep.scope(), self._scratch.scope(), recording() as made:
            fused_layer.forward(context, x, out, self._keep, saving=False)
        wanted = out.clone()
        for space in memory:
            space.overwrite()
        out.fill_(float("nan"))
        made.run()
        if torch.equal(out, wanted):
            return made
        out.copy_(wanted)
        return None


class _Decoding:
    """Attention of the fused layer over the pages, written where the layer wants it."""

    def __init__(self, owner: RecordedSteps, layer: int):
        self.owner, self.layer = owner, layer

    def forward(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor, _lse: Tensor) -> None:
        options = varlen.Options(shape.scale, shape.window, shape.softcap)
        prefix, pages = self.owner.store.prefix[self.layer], self.owner.store.layers[self.layer]
        varlen.decode(q, prefix, pages, self.owner.places, options, out=out, new=(k, v))

    def backward(self, *args: Any) -> None:
        raise NotImplementedError("no gradients on this path")
