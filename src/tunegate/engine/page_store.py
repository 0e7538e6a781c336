"""Memory for keys and values in pages.

Where all rows begin with the same tokens, these are computed once and their keys lie apart, densely: no row has pages
for them, and decoding reads them once for many rows. Which page is whose is not known here (see ``paging``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunegate.engine.runner import PackedPass, Runner, evaluating
from tunegate.kernels import Layout, Plan

Parts = tuple[Tensor, Tensor]  # of keys and of values


@torch.inference_mode()
def keys_of(runner: Runner, tokens: Sequence[int]) -> dict[int, Parts]:
    """Keys and values of ``tokens``, the beginning of a row, by layer: (tokens, kv heads, dim)."""
    kept = PackedPass(Plan(Layout((len(tokens),)), runner.device), keep=True)
    with evaluating(runner.model):
        runner.run(torch.tensor(tokens), torch.arange(len(tokens)), kept)
    assert kept.kept is not None
    return kept.kept


def token_bytes(runner: Runner) -> int:
    """What all layers keep of a token, found by a pass over one."""
    return sum(part.nbytes for parts in keys_of(runner, (0,)).values() for part in parts)


class PageStore:
    """The pages of every layer: key (pages, kv heads, size, dim) and value. Memory is touched as pages are used.

    ``prefix``: what every row begins with, computed here and kept once; a row's own tokens, which alone lie in pages,
    come after it.
    """

    def __init__(self, runner: Runner, pages: int, size: int, prefix: Sequence[int] = ()):
        self.size, self.prefix_tokens = size, len(prefix)
        kept = keys_of(runner, prefix or (0,))
        self.prefix = {n: (key[: len(prefix)], value[: len(prefix)]) for n, (key, value) in kept.items()}

        def paged(part: Tensor) -> Tensor:
            return part.new_empty(pages, part.shape[1], size, part.shape[2])

        self.layers = {n: (paged(key), paged(value)) for n, (key, value) in kept.items()}

    def copy(self, from_page: int, to_page: int, tokens: int) -> None:
        """The first ``tokens`` places of a page to another one, in every layer."""
        for parts in self.layers.values():
            for part in parts:
                part[to_page, :, :tokens] = part[from_page, :, :tokens]

    def gather(self, layer: int, pages: Tensor, tokens: int) -> Parts:
        """The prefix and the first ``tokens`` own keys and values of a row with these pages, (tokens, kv heads,
        dim)."""
        if not tokens:
            return self.prefix[layer]
        own = (part[pages].transpose(1, 2).flatten(0, 1)[:tokens] for part in self.layers[layer])
        return tuple(torch.cat(parts) for parts in zip(self.prefix[layer], own, strict=True))  # type: ignore[return-value]


def page_table(pages: Sequence[Sequence[int]]) -> Tensor:
    """(rows, most pages) int64: each row's pages, and its first one where it has fewer."""
    most = max(len(row) for row in pages)
    return torch.tensor([[*row, *([row[0]] * (most - len(row)))] for row in pages])
