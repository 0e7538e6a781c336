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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from tunegate.adapter.canonical import Bytes, Canonical, read_canonical
from tunegate.adapter.files import TENSORS, Fitting, Known, non_finite, opened_fitting, tensor_name, untrained
from tunegate.adapter.inject import put_module, servable
from tunegate.adapter.layers import Wrapper, features, row_norm, squared_norm
from tunegate.adapter.spares import LARGEST, Spares
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError, TunegateError
from tunegate.kernels.segments import Factors, FactorTable, Segments, Target, add_segments, lay_out


@dataclass(frozen=True, eq=False)
class Merged:
    """One adapter's copies of the layers that it adapts, its update in their weights, by column; all other layers are
    the base's own."""

    layers: Mapping[int, nn.Module]

    @property
    def nbytes(self) -> int:
        return sum(layer.weight.nbytes for layer in self.layers.values())  # type: ignore[misc]


@dataclass(frozen=True)
class Fetched:
    """An adapter's bytes, in ``memory`` that the next one's may take, and what its files' header and config say.
    ``seconds`` of each stage."""

    where: str
    fitting: Fitting
    canonical: Canonical
    memory: Bytes
    seconds: dict[str, float]


@dataclass(frozen=True)
class Identified:
    """An adapter in memory, from one reading of its files: its factors by column, ``largest``, the magnitude of its
    largest factor, and its content hash, which may be still under way. ``seconds`` of each stage."""

    spec: AdapterSpec
    factors: dict[int, Factors]
    largest: float
    canonical: Canonical
    hashing: Future[str]
    seconds: dict[str, float]

    @property
    def key(self) -> str:
        """The content hash; waits for it."""
        return self.hashing.result()

    def state(self) -> dict[str, Tensor]:
        """Its fp32 tensors by file name."""
        return self.canonical.state()


_Strided = tuple[tuple[int, int], tuple[int, int], int]  # size, stride, first element


@dataclass(frozen=True)
class _Layout:
    """Where the factors of adapters that are alike go: ``size`` elements in all, ``parts`` for :func:`lay_out`, counted
    from the first tensor's bytes, and of each module its column, scale, A and B."""

    size: int
    parts: np.ndarray[Any, np.dtype[np.int64]]
    modules: tuple[tuple[int, float, _Strided, _Strided], ...]


class _Now(threading.local):
    """The pass that this thread makes."""

    segments: Segments | None = None
    merged: Merged | None = None
    rows = 0


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
        merged = self.served.now.merged
        return self.base if merged is None else merged.layers.get(self.column, self.base)

    def forward(self, x: Tensor) -> Tensor:
        out = self.now(x)
        segments = self.served.now.segments
        if segments is not None and self.column in segments.columns:
            flat = x.reshape(-1, x.shape[-1])
            if len(flat) != self.served.now.rows:
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
        self.now = _Now()
        for column, (path, layer) in enumerate(servable(model).items()):
            self.layers[path] = SegmentedLinear(layer, column, self)
        for path, wrapper in self.layers.items():
            put_module(model, path, wrapper)
        self.table = FactorTable(len(self.layers), dtype)
        self._known = Known()
        self._layouts: WeakKeyDictionary[Fitting, _Layout] = WeakKeyDictionary()
        self._norms: dict[int, Tensor] = {}  # squared norms of the base's rows, for DoRA
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashing: Future[str] | None = None  # of the bytes of the last adapter
        self._bytes: Bytes | None = None  # touched before
        self.spares = Spares(dtype)

    @contextlib.contextmanager
    def using(self, segments: Segments | None, rows: int, merged: Merged | None = None) -> Iterator[None]:
        """A pass of this thread over ``rows`` rows that have the adapters of ``segments``, or all run on ``merged``."""
        self.now.segments, self.now.rows, self.now.merged = segments, rows, merged
        try:
            yield
        finally:
            self.now.segments, self.now.rows, self.now.merged = None, 0, None

    def identify(self, folder: Path) -> Identified:
        """The adapter in a PEFT folder, read once: what is hashed is what the factors are made of.
        :class:`InputError` with everything that is wrong. From one thread at a time; the next call writes over the
        bytes of the last one's."""
        return self.laid_out(self.fetching(folder)())

    def fetching(self, folder: Path) -> Callable[[], Fetched]:
        """All of :meth:`identify` that touches a disk, for any thread: however long it takes, it does not disturb what
        is done here meanwhile."""
        if self._hashing is not None:
            wait([self._hashing])
        memory, self._bytes = self._bytes, None

        def fetch() -> Fetched:
            seconds: dict[str, float] = {}
            opened = opened_fitting(self.skeleton, folder, self._known)
            with _timed(seconds, "read"), opened as (handle, config, fitting):
                canonical = read_canonical(handle, fitting.header, config, memory)
            data = canonical.data
            kept = data if memory is None or memory.nbytes < data.nbytes <= LARGEST else memory
            return Fetched(str(folder / TENSORS), fitting, canonical, kept, seconds)

        return fetch

    def laid_out(self, fetched: Fetched) -> Identified:
        """The rest of :meth:`identify`."""
        fitting, canonical, seconds, where = fetched.fitting, fetched.canonical, fetched.seconds, fetched.where
        if (0 if self._bytes is None else self._bytes.nbytes) < fetched.memory.nbytes <= LARGEST:
            self._bytes = fetched.memory
        self._hashing = self._hasher.submit(_hash, canonical, seconds)
        with _timed(seconds, "layout"):
            factors, a, b = self._factors(fitting, canonical)
        problems = [] if np.isfinite(a + b) else non_finite(canonical.state(), where)
        if b == 0.0:
            problems += untrained(canonical.state(), where)
        if problems:
            raise InputError(problems)
        return Identified(fitting.spec, factors, max(a, b), canonical, self._hashing, seconds)

    def read(self, folder: Path, key: str) -> dict[int, Factors]:
        """The factors of the adapter in a PEFT folder, whose content hash is ``key``. :class:`InputError` with
        everything that is wrong."""
        found = self.identify(folder)
        require_key(found, key, folder)
        return found.factors

    def _factors(self, fitting: Fitting, canonical: Canonical) -> tuple[dict[int, Factors], float, float]:
        """A fitting adapter as factors by column, all in one piece of memory, and the largest magnitudes of all A and
        gains, and of all B, infinite if a value is not finite."""
        layout = self._layouts.get(fitting)
        if layout is None:
            layout = self._layouts[fitting] = self._layout(fitting)
        memory = self.spares.take(layout.size)
        found = {
            column: Factors(memory.as_strided(*a), memory.as_strided(*b), scale)
            for column, scale, a, b in layout.modules
        }
        largest_a, largest_b = lay_out(canonical.data[canonical.start :], memory, layout.parts)
        for path in fitting.paths if fitting.spec.use_dora else ():
            magnitude = canonical.tensor(tensor_name(path, "lora_magnitude_vector"))
            if not bool(magnitude.isfinite().all()):
                return found, np.inf, largest_b
            column = self.layers[path].column
            gain = self._gain(path, fitting.spec, canonical, magnitude)
            found[column], most = replace(found[column], gain=gain), float(gain.abs().max())
            largest_a = max(largest_a, most if np.isfinite(most) else np.inf)
        return found, largest_a, largest_b

    def _layout(self, fitting: Fitting) -> _Layout:
        parts, modules, at = [], [], 0
        for path in fitting.paths:
            a, b = (fitting.header.places[tensor_name(path, part)] for part in ("lora_A", "lora_B"))
            (rank, k), (n, _) = a.entry.shape, b.entry.shape
            to_b = at + rank * k
            parts += [(a.begin, at, rank, k, 0), (b.begin, to_b, n, rank, 1)]
            column, scale = self.layers[path].column, fitting.spec.scale_for(path)
            modules.append((column, scale, ((rank, k), (k, 1), at), ((rank, n), (n, 1), to_b)))
            at = to_b + rank * n
        return _Layout(at, np.array(parts, np.int64), tuple(modules))

    def _gain(self, path: str, spec: AdapterSpec, canonical: Canonical, magnitude: Tensor) -> Tensor:
        """DoRA's magnitude over its norm, of one layer."""
        layer = self.layers[path]
        a, b = (canonical.tensor(tensor_name(path, part)) for part in ("lora_A", "lora_B"))
        norm = row_norm(layer.base, self._squared(layer), a, b, spec.scale_for(path))
        return (magnitude / norm).contiguous()

    def _squared(self, layer: SegmentedLinear) -> Tensor:
        if layer.column not in self._norms:
            self._norms[layer.column] = squared_norm(layer.base)
        return self._norms[layer.column]


def _hash(canonical: Canonical, seconds: dict[str, float]) -> str:
    with _timed(seconds, "hash"):
        return canonical.hash()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - begun


def require_key(found: Identified, key: str, folder: Path) -> None:
    """:class:`InputError` unless ``key`` is the content hash of what was read from ``folder``."""
    if found.key != key:
        raise InputError(
            "the adapter's files are not those that were admitted", where=str(folder), expected=key, got=found.key
        )
