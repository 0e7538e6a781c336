"""Every tensor of a checkpoint with the adapters merged in, in file order, several at work at once.

A worker reads a tensor, adds what the adapters change and hands its bytes on; a few rows at a time lie in fp32. For an
adapter that was trained on an NF4 base, W is what that base computed with, ``dequantize(quantize(W))``, unless the
original is asked for; the result is never quantized again. Tensors are handed out in order, and no more are begun than
fit into a budget of bytes that follows from the largest one, so memory does not grow with the checkpoint.

It writes nothing: ``merge`` writes shards, ``gguf`` a GGUF file.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunegate.errors import TunegateError
from tunegate.export.deltas import Dense, Matrix, Update, merged_rows, pieces
from tunegate.export.plan import Plan
from tunegate.kernels.formats import Recipe
from tunegate.kernels.linear import QuantizedWeight
from tunegate.kernels.nf4 import dequantize_rows, quantize
from tunegate.model.shards import DTYPES, fill, size_of
from tunegate.model.weights import TensorEntry

WORKERS = min(4, os.cpu_count() or 1)  # each holds some pieces of fp32, so no more than can run
_BUDGET = 1.25  # of the largest tensor; the rest of twice its size is for what is computed, and for the adapter
_ROOM = 64 << 20  # bytes always allowed, so that small tensors are not read one by one
_QUANTIZED_COST = 1.6  # in sizes of a 16-bit tensor: its codes beside it, and again where they are put together


def merged_tensors(
    plan: Plan, source: Path, dtypes: Mapping[str, torch.dtype] | None = None
) -> Iterator[tuple[TensorEntry, Tensor, bool]]:
    """(entry, its bytes (n,) uint8, whether any value changed) for every tensor of one file, in its order.

    ``dtypes`` names tensors whose values are stored in another dtype than their own, of the same width; all others
    keep theirs. The bytes are the consumer's until it asks for the next tensor, and memory until it lets go of them.
    :class:`TunegateError` for a value that is not finite where it was stored anew.
    """
    wanted = dtypes or {}
    entries = sorted(plan.files[source], key=lambda e: e.start)
    largest = max((size_of(e) for part in plan.files.values() for e in part), default=0)
    descriptor = os.open(source, os.O_RDONLY)
    threads = torch.get_num_threads()
    try:  # a worker that used every core for itself would only be in the way of the others
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def begin(entry: TensorEntry) -> Future[tuple[Tensor, bool]]:
                return pool.submit(_merged, plan, source, descriptor, entry, wanted.get(entry.name))

            yield from _in_order(plan, entries, begin, max(int(_BUDGET * largest), _ROOM))
    finally:
        torch.set_num_threads(threads)  # what threads that begin later start with
        os.close(descriptor)


def _in_order(
    plan: Plan, entries: Sequence[TensorEntry], begin: Callable[[TensorEntry], Future[tuple[Tensor, bool]]], budget: int
) -> Iterator[tuple[TensorEntry, Tensor, bool]]:
    ahead = deque(entries)
    waiting: deque[tuple[TensorEntry, Future[tuple[Tensor, bool]]]] = deque()
    held = 0
    while ahead or waiting:
        while ahead and (not waiting or held + _cost(plan, ahead[0]) <= budget):
            entry = ahead.popleft()
            held += _cost(plan, entry)
            waiting.append((entry, begin(entry)))
        entry, future = waiting.popleft()
        data, changed = future.result()
        del future  # it holds the bytes too
        yield entry, data, changed
        del data
        held -= _cost(plan, entry)


def _cost(plan: Plan, entry: TensorEntry) -> int:
    return int(size_of(entry) * (_QUANTIZED_COST if entry.name in plan.seen else 1))


@torch.no_grad()
def _merged(
    plan: Plan, source: Path, descriptor: int, entry: TensorEntry, dtype: torch.dtype | None
) -> tuple[Tensor, bool]:
    data = torch.empty(size_of(entry), dtype=torch.uint8)
    fill(descriptor, entry, data, source)
    path = plan.paths.get(entry.name)
    if path is None and entry.name not in plan.seen and dtype is None:
        return data, False
    weight = data.view(DTYPES[entry.dtype]).view(entry.shape)
    out = weight if dtype is None else weight.view(dtype)  # in place: each row is read before it is written
    if path in plan.transposed:
        weight, out = weight.t(), out.t()
    base: Matrix = Dense(weight)
    if entry.name in plan.seen:
        assert plan.recipe is not None
        base = Seen(quantize(weight, Recipe.from_json(plan.recipe)))
    if path is not None:
        return data, _add(plan, path, base, out)
    for part in pieces(base):
        out[part] = base.rows(part)
        _check_finite(out[part], entry.name)
    return data, False


@dataclass(frozen=True)
class Seen:
    """A weight as its codes give it back, decoded a few rows at a time."""

    codes: QuantizedWeight

    @property
    def shape(self) -> Sequence[int]:
        return self.codes.shape

    def rows(self, part: slice) -> Tensor:
        return dequantize_rows(self.codes, part.start, part.stop, torch.empty(part.stop - part.start, self.shape[1]))


def _add(plan: Plan, path: str, base: Matrix, out: Tensor) -> bool:
    """Write ``base`` with the adapters' change to ``out``, which may be ``base`` itself; whether any value is another
    one than without them."""
    changed = False
    for rows, values in merged_rows(base, plan.updates[path], plan.mix, path):
        changed = changed or not torch.equal(values.to(out.dtype), base.rows(rows).to(out.dtype))
        out[rows] = values
        _check_finite(out[rows], path)
    return changed


def _check_finite(values: Tensor, where: str) -> None:
    # a sum is one pass and finite only if all is; one of huge values may be infinite without that
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        kind = str(values.dtype).removeprefix("torch.")
        fix = "check the adapter's tensors; float16 ends at 65,504, where bfloat16 (--outtype bf16) does not"
        raise TunegateError(f"a weight is not finite in {kind}", where=where, fix=fix)


def _acts(update: Update) -> bool:
    return update.magnitude is not None or bool(update.b.any())


def check_changed(plan: Plan, changed: set[str], where: str) -> None:
    """:class:`TunegateError` unless the tensors that changed are those of the adapted modules."""
    expected = {
        name for name, path in plan.paths.items() if any(u is not None and _acts(u) for u in plan.updates[path])
    }
    still = sorted(expected - changed)
    if still:
        raise TunegateError(
            f"{len(still)} adapted tensors came out as they were in the base",
            where=where,
            got=", ".join(still[:5]),
            fix="the change is smaller than the base's dtype can store: merge a base in fp32, or serve unmerged",
        )
