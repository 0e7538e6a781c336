"""Many adapters on one model: each linear layer is wrapped once, and what rows of a pass get is told beside it.

:class:`Served` wraps every linear layer that can carry an adapter, keeps the adapters' factors in one
:class:`~tunegate.kernels.segments.FactorTable`, and holds the segments of the pass under way. A layer computes the
base's product for all rows at once and adds each row's own adapter. Adapters come and go between passes without
touching the model. A pass may also run on :class:`Merged` weights, for rows of one adapter: the wrapped layers give way
to its own.

LoRA, rsLoRA and DoRA with any ranks. DoRA's gain, m over the norm of W + s B A, is computed once, when an adapter is
read. No adapters on the head or on embeddings, no dropout, no gradients: this is for answering.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tunegate.adapter.files import Contents, Known, checked_contents, module_paths, tensor_name
from tunegate.adapter.inject import put_module, servable
from tunegate.adapter.layers import Wrapper, features, row_norm, squared_norm
from tunegate.errors import InputError, TunegateError
from tunegate.kernels.segments import Factors, FactorTable, Segments, Target, add_segments


@dataclass(frozen=True, eq=False)
class Merged:
    """One adapter's copies of the layers that it adapts, its update in their weights, by column; all other layers are
    the base's own."""

    layers: Mapping[int, nn.Module]

    @property
    def nbytes(self) -> int:
        return sum(layer.weight.nbytes for layer in self.layers.values())  # type: ignore[misc]


class SegmentedLinear(Wrapper):
    """``base`` with the adapters of the pass under way on top; shapes (..., in) -> (..., out)."""

    def __init__(self, base: nn.Module, column: int, served: Served):
        super().__init__()
        self.base = base
        self.column = column
        self.served = served
        sizes = features(base)
        assert sizes is not None  # servable() gives layers that can carry an adapter
        self.in_features, self.out_features = sizes

    @property
    def now(self) -> nn.Module:
        """The layer that the pass under way runs on."""
        merged = self.served.merged
        return self.base if merged is None else merged.layers.get(self.column, self.base)

    def forward(self, x: Tensor) -> Tensor:
        out = self.now(x)
        segments = self.served.segments
        if segments is not None and self.column in segments.columns:
            flat = x.reshape(-1, x.shape[-1])
            if len(flat) != self.served.rows:
                raise TunegateError(
                    "a layer that sees some rows of a pass only cannot serve adapters", got=str(x.shape)
                )
            add_segments(flat, segments, [Target(out.view(len(flat), -1), self.column, self.bias)])
        return out


class Served:
    """The adapters of ``model``, whose linear layers it wraps. ``skeleton``: the same architecture on the meta device,
    unwrapped, against which adapters are checked. ``dtype``: what factors are kept in."""

    def __init__(self, model: nn.Module, skeleton: nn.Module, dtype: torch.dtype = torch.float32):
        self.skeleton = skeleton
        self.layers: dict[str, SegmentedLinear] = {}
        self.segments: Segments | None = None
        self.merged: Merged | None = None
        self.rows = 0
        for column, (path, layer) in enumerate(servable(model).items()):
            self.layers[path] = SegmentedLinear(layer, column, self)
        for path, wrapper in self.layers.items():
            put_module(model, path, wrapper)
        self.table = FactorTable(len(self.layers), dtype)
        self._known: Known = {}
        self._norms: dict[int, Tensor] = {}  # squared norms of the base's rows, for DoRA
        self._identified: tuple[str, Contents] | None = None

    @contextlib.contextmanager
    def using(self, segments: Segments | None, rows: int, merged: Merged | None = None) -> Iterator[None]:
        """A pass over ``rows`` rows that have the adapters of ``segments``, or all run on ``merged``."""
        self.segments, self.rows, self.merged = segments, rows, merged
        try:
            yield
        finally:
            self.segments, self.rows, self.merged = None, 0, None

    def identify(self, folder: Path) -> str:
        """The content hash of the adapter in a PEFT folder. :class:`InputError` with everything that is wrong. What was
        read is kept for the :meth:`contents` that follows, which then reads no file."""
        self._identified = None
        contents = checked_contents(self.skeleton, folder, known=self._known)
        key = contents.hash()
        self._identified = key, contents
        return key

    def contents(self, folder: Path, key: str) -> Contents:
        """The adapter in a PEFT folder, whose content hash is ``key``. :class:`InputError` with everything that is
        wrong; what is returned is what was hashed."""
        if self._identified is None or self._identified[0] != key:
            self.identify(folder)
        assert self._identified is not None
        (found, contents), self._identified = self._identified, None
        if found != key:
            raise InputError(
                "the adapter's files are not those that were admitted", where=str(folder), expected=key, got=found
            )
        return contents

    def read(self, folder: Path, key: str) -> dict[int, Factors]:
        """:meth:`factors` of :meth:`contents`."""
        return self.factors(self.contents(folder, key))

    def factors(self, contents: Contents) -> dict[int, Factors]:
        """A checked adapter as factors by column, all in one piece of memory."""
        spec, state = contents.spec, contents.state
        paths = module_paths(state)
        names = [tensor_name(path, part) for path in paths for part in ("lora_A", "lora_B")]
        memory = torch.empty(sum(state[name].numel() for name in names), dtype=self.table.dtype)
        parts = iter(memory.split([state[name].numel() for name in names]))
        found = {}
        for path in paths:
            layer = self.layers[path]
            a, b = state[tensor_name(path, "lora_A")], state[tensor_name(path, "lora_B")]
            gain = None
            if spec.use_dora:
                norm = row_norm(layer.base, self._squared(layer), a, b, spec.scale_for(path))
                gain = (state[tensor_name(path, "lora_magnitude_vector")] / norm).contiguous()
            a, b = (next(parts).view(part.shape).copy_(part) for part in (a, b.t()))
            found[layer.column] = Factors(a, b, spec.scale_for(path), gain)
        return found

    def _squared(self, layer: SegmentedLinear) -> Tensor:
        if layer.column not in self._norms:
            self._norms[layer.column] = squared_norm(layer.base)
        return self._norms[layer.column]
